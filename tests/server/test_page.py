"""The page at /, in a browser: it streams, stops, shows what goes on, and works without a mouse."""

import asyncio
import json
import os
import re
import shutil
from threading import Thread

import httpx
import pytest
from observed_app import MODEL, OPTIONS, observed_app, served
from running_server import eventually

from autodeploy import AsyncLLM
from autodeploy.server.page import PAGE, content_policy

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
KEY = "sk-page"


@pytest.fixture(scope="module")
def llm():
    deployed = AsyncLLM(MODEL, **OPTIONS)
    yield deployed
    # In a thread: playwright's own event loop may still run in this one.
    ending = Thread(target=lambda: asyncio.run(deployed.shutdown()))
    ending.start()
    ending.join()


@pytest.fixture(scope="module")
def url(llm):
    with served(observed_app(llm)) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    """Chromium: this machine's, or the one that `playwright install chromium` fetched."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
            )
        except api.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A tab that fails its test for whatever the page says on the console, or asks elsewhere."""
    context = browser.new_context()
    tab = context.new_page()
    tab.set_default_timeout(15000)
    tab.complaints, tab.asked = [], []
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("console", lambda said: said.type == "error" and tab.complaints.append(str(said)))
    tab.on("request", lambda request: tab.asked.append(request.url))
    yield tab
    context.close()
    assert tab.complaints == []


def opened(page, url):
    page.goto(url)
    shows(page, "model", re.compile("^demo$"))
    return page


def shows(page, name, text):
    """Waits until the element of this id shows text that the pattern finds."""
    from playwright.sync_api import expect

    expect(page.locator(f"#{name}")).to_have_text(text, timeout=15000)


def finished(page):
    shows(page, "progress", re.compile("tokens"))
    return page.inner_text("#progress")


def test_a_completion_streams_into_the_page(page, url):
    opened(page, url)
    page.get_by_label("text to continue").check()
    page.get_by_label("Prompt", exact=True).fill("def fib(n):")
    page.get_by_label("Most tokens").fill("48")
    page.evaluate("""
      window.lengths = [];
      new MutationObserver(() => lengths.push(document.getElementById("output").textContent.length))
        .observe(document.getElementById("output"), {subtree: true, characterData: true});
    """)
    page.get_by_role("button", name="Generate").click()
    said = finished(page)
    assert re.match(r"Finished: \d+ tokens, [\d.,]+ a second", said)
    text = page.inner_text("#output")
    assert text.startswith("def fib(n):")
    assert len(text) > 20
    lengths = page.evaluate("lengths")
    assert len(lengths) > 5
    assert lengths == sorted(lengths)
    assert all(u.startswith(url) or u == "data:," for u in page.asked)


def test_a_conversation_goes_on_over_turns(page, url):
    opened(page, url)
    assert page.get_by_label("a chat message").is_checked()
    bodies = []
    page.on("request", lambda r: r.method == "POST" and bodies.append(r.post_data_json))
    for words in ("hello", "and then?"):
        page.get_by_label("Most tokens").fill("8")
        page.get_by_label("Prompt", exact=True).fill(words)
        page.get_by_label("Prompt", exact=True).press("Control+Enter")
        finished(page)
        assert page.input_value("#prompt") == ""
    roles = [[m["role"] for m in body["messages"]] for body in bodies]
    assert roles == [["user"], ["user", "assistant", "user"]]
    headings = page.locator("#output h3").all_inner_texts()
    assert headings == ["You", "Assistant", "You", "Assistant"]
    page.get_by_role("button", name="Clear").click()
    assert page.inner_text("#output") == ""


def test_escape_stops_and_the_engine_hears_of_it(page, url, llm):
    opened(page, url)
    lengthen(page)
    page.get_by_label("text to continue").check()
    page.get_by_label("Prompt", exact=True).fill("x = 1\n")
    page.get_by_label("Most tokens").fill("480")
    page.get_by_role("button", name="Generate").click()
    shows(page, "output", re.compile(".{10}", re.DOTALL))
    # The focus went from the button that cannot be pressed now to the one that can.
    assert page.evaluate("document.activeElement.id") == "stop"
    page.keyboard.press("Escape")
    shows(page, "progress", re.compile("^Stopped"))
    assert page.evaluate("document.activeElement.id") == "generate"
    assert page.get_attribute("#output", "aria-busy") == "false"
    shows(page, "running", re.compile("^0$"))
    # What the page shows may be from before it began.
    eventually(lambda: llm.open_requests == 0)


def lengthen(page):
    """Has every answer go on to its limit of tokens, so that there is time to stop it."""
    page.evaluate("""() => {
      const real = window.fetch;
      window.fetch = (path, options = {}) => {
        if (options.method === "POST") {
          options.body = JSON.stringify({...JSON.parse(options.body), ignore_eos: true});
        }
        return real(path, options);
      };
    }""")


def test_what_goes_on_is_shown(page, url, llm):
    opened(page, url)
    shows(page, "rate", re.compile(r"\d"))
    assert page.inner_text("#kv-text") == "0.0 %"
    assert page.inner_text("#device") == "cpu"
    assert page.inner_text("#recipe") == "default.yaml"
    rows = page.locator("#transforms tbody tr").all_inner_texts()
    counts = dict(row.split("\t") for row in rows)
    assert next(iter(counts)) == "canonicalize"
    assert int(counts["cache"]) > 0
    assert page.inner_text("#generated") == f"{llm.stats.generated_tokens:,}"


def test_a_key_is_asked_for_and_used(page, llm):
    with served(observed_app(llm, key=KEY)) as url:
        page.goto(url)
        shows(page, "lost", "Waiting for the API key.")
        key = page.get_by_label("API key", exact=True)
        key.fill("wrong")
        page.get_by_label("Prompt", exact=True).fill("hello")
        page.get_by_role("button", name="Generate").click()
        alert = page.get_by_role("alert")
        alert.filter(has_text="the API key is wrong").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        key.fill(KEY)
        page.get_by_role("button", name="Generate").click()
        finished(page)
        assert alert.inner_text() == ""
        page.goto("about:blank")
    # The browser notes the refusal; nothing else may be there.
    assert all("401" in said for said in page.complaints)
    page.complaints.clear()


def test_markup_is_shown_as_text_and_an_error_event_as_an_alert(page, url):
    markup = "<img src=x onerror=alert(1)>"
    said = [{"choices": [{"text": markup}]}, {"error": {"message": "the engine died"}}]
    body = "".join(f"data: {json.dumps(event)}\r\n\r\n" for event in said)
    answer = {"body": body, "content_type": "text/event-stream"}
    page.route("**/v1/completions", lambda route: route.fulfill(**answer))
    opened(page, url)
    page.get_by_label("text to continue").check()
    page.get_by_label("Prompt", exact=True).fill("x")
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("alert").filter(has_text="the engine died").wait_for()
    assert markup in page.inner_text("#output")
    assert page.get_by_role("button", name="Generate").is_enabled()


def test_everything_is_reached_by_tab_and_has_a_name(page, url):
    opened(page, url)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    wanted = ["mode", "max-tokens", "temperature", "prompt", "generate", "clear", "output"]
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted
    unnamed = page.evaluate("""
      [...document.querySelectorAll("input, textarea, button, progress, [role=region]")]
        .filter(e => !(e.labels && e.labels.length) && !e.textContent.trim()
                     && !e.getAttribute("aria-label"))
        .map(e => e.outerHTML)
    """)
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(page, url, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    opened(page, url)
    pairs = page.evaluate("""
      [...document.querySelectorAll("h1, h2, p.note, dt, dd, label, button, th, .error")]
        .map(e => {
          let ground = e;
          while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)")
            ground = ground.parentElement;
          const style = getComputedStyle(e);
          return [style.color, getComputedStyle(ground).backgroundColor, +style.opacity];
        }).filter(([, , opacity]) => opacity === 1)
    """)
    assert len(pairs) > 30
    # 4.5 is WCAG's level AA for text.
    assert min(contrast(ink, ground) for ink, ground, _ in pairs) >= 4.5


def contrast(*colours):
    """Ratio of two CSS colours by WCAG 2.2: 1 (none) to 21."""
    lights = sorted(luminance(c) for c in colours)
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour):
    parts = [int(p) / 255 for p in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_it_fits_a_telephone(page, url):
    page.set_viewport_size({"width": 360, "height": 700})
    opened(page, url)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_server_that_goes_away_is_reported(page, llm):
    with served(observed_app(llm)) as url:
        opened(page, url)
    page.get_by_text("The server does not answer.").wait_for()
    page.complaints.clear()


def test_the_page_allows_itself_nothing_else(url):
    response = httpx.get(url)
    policy = response.headers["content-security-policy"]
    assert policy == content_policy(PAGE.read_text())
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    outside = re.findall(r"https?://|//\w|@import|url\(", response.text.replace("</", ""))
    assert [x for x in outside if not x.startswith("// ")] == []


def test_status_tells_what_is_deployed(url):
    status = httpx.get(url + "/api/status").json()
    assert (status["model"], status["recipe"], status["device"]) == ("demo", "default.yaml", "cpu")
    assert status["has_chat_template"] is True
    assert status["needs_api_key"] is False
    assert {"step": "cache", "matches": 8} in status["transforms"]
    assert status["stats"]["pages_total"] == 255
