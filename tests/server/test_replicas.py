"""`autodeploy serve --data-parallel-size 2`: where requests go, and what a death does to them."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from running_server import eventually
from served_process import Served

SHARED = "def add(a, b):\n    return a + b\n\n" * 16


@pytest.fixture(scope="module")
def served():
    one = Served(
        "--data-parallel-size", "2", "--max-num-seqs", "8", "--on-engine-death", "restart",
        "--max-num-batched-tokens", "256",
    )  # fmt: skip
    yield one
    one.process.send_signal(signal.SIGTERM)
    assert one.end()[0] == 0


def complete(served, prompt, tokens=2, **fields):
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **fields}
    answer = served.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def of_each(served, name, **labels):
    """A metric of both replicas."""
    families = text_string_to_metric_families(served.client.get("/metrics").text)
    samples = [s for family in families for s in family.samples if s.name == name]
    found = {
        s.labels["engine"]: s.value for s in samples if labels.items() <= s.labels.items()
    }  # fmt: skip
    return [found["0"], found["1"]]


def finished(served):
    return of_each(served, "vllm:request_success_total", finished_reason="length")


def grown(before, after):
    return sorted(b - a for a, b in zip(before, after, strict=True))


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_prompts_that_start_alike_go_to_one_replica(served):
    before = finished(served), of_each(served, "vllm:prefix_cache_hits_total")
    answers = [complete(served, SHARED + f"# {number}") for number in range(5)]
    assert [cached(answer) > 200 for answer in answers] == [False, True, True, True, True]
    assert grown(before[0], finished(served)) == [0, 5]
    hits = grown(before[1], of_each(served, "vllm:prefix_cache_hits_total"))
    assert hits[0] == 0
    assert hits[1] > 800


def test_a_response_that_goes_on_goes_to_the_replica_that_has_the_conversation(served):
    def respond(**fields):
        body = {"max_output_tokens": 2, "ignore_eos": True, **fields}
        return served.client.post("/v1/responses", json=body).json()

    before = finished(served)
    answer = respond(input="class Conversation:\n" * 16)
    for number in range(4):
        answer = respond(input=f"And {number}?", previous_response_id=answer["id"])
        assert answer["usage"]["input_tokens_details"]["cached_tokens"] >= 64
    assert grown(before, finished(served)) == [0, 5]


def test_tenants_do_not_share_a_replicas_cache(served):
    prompt = "class Tenant:\n" * 20
    first = complete(served, prompt, cache_salt="a")
    other = complete(served, prompt, cache_salt="b")
    again = complete(served, prompt, cache_salt="a")
    assert [cached(answer) > 0 for answer in (first, other, again)] == [False, False, True]


def test_prompts_that_share_nothing_are_divided(served):
    before = finished(served)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: complete(served, f"{n} is a number " * 4, 40), range(16)))
    assert grown(before, finished(served))[0] >= 5


def test_prompts_of_one_request_are_divided(served):
    before = finished(served)
    complete(served, [f"{n} apples and pears" for n in range(8)])
    assert grown(before, finished(served)) == [4, 4]


def test_many_with_one_prefix_do_not_all_wait_for_one_replica(served):
    before = finished(served)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda n: complete(served, f"{SHARED}# {n}", 60), range(12)))
    assert grown(before, finished(served))[0] >= 2


def test_one_dies_and_the_other_goes_on_until_it_is_back(served):
    streams = [served.stream(prompt=text, max_tokens=700) for text in ("a", "b")]
    with streams[0] as first, streams[1] as second:
        lines = [first.iter_lines(), second.iter_lines()]
        for each in lines:
            next(each)
        served.engines()[0].kill()
        eventually(lambda: status(served)["state"] == "degraded")
        for path in ("/health", "/ready"):
            assert served.client.get(path).status_code == 200
        ends = sorted(tuple([line for line in each if line][-2:]) for each in lines)
    events = [json.loads(event.removeprefix("data: ")) for event, _ in ends]
    assert [last for _, last in ends] == ["data: [DONE]"] * 2
    (error,) = [event["error"] for event in events if "error" in event]
    (choice,) = [event["choices"][0] for event in events if "choices" in event]
    assert (error["code"], choice["finish_reason"]) == ("engine_dead", "length")
    dead = [replica for replica in status(served)["replicas"] if replica["state"] != "serving"]
    assert all("SIGKILL" in replica["reason"] for replica in dead)
    complete(served, "while it is away")
    eventually(lambda: status(served)["state"] == "ok", 30)
    assert sorted(replica["restarts"] for replica in status(served)["replicas"]) == [0, 1]
    before = finished(served)
    complete(served, [f"{n} again" for n in range(8)])
    assert grown(before, finished(served))[0] > 0


def test_nothing_is_left_open(served):
    eventually(lambda: not any(r["open_tokens"] for r in status(served)["replicas"]))
    each = [replica["stats"] for replica in status(served)["replicas"]]
    whole = status(served)["stats"]
    assert whole["generated_tokens"] == sum(stats["generated_tokens"] for stats in each)


def status(served):
    return served.client.get("/api/status").json()
