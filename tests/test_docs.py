"""Every Python block of docs/ and README.md runs, in order, from the repository's root."""

import dataclasses
import re
from pathlib import Path

import pytest

from autodeploy.transforms import library
from autodeploy.transforms.transform import TRANSFORMS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "examples" / "day0" / "README.md",
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_examples_of_a_page_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    names = {"__name__": f"docs_{page.stem}"}
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 2
        # Line numbers of a failure are those of the page.
        code = compile("\n" * (line - 1) + match.group(1), str(page), "exec")
        exec(code, names)


def test_every_link_between_pages_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_table_of_transforms_has_all_that_ship_with_their_options():
    shipped = {
        name: [field.name for field in dataclasses.fields(kind)]
        for name, kind in TRANSFORMS.items()
        if kind.__module__.startswith(library.__name__)
    }
    told = {}
    for line in (ROOT / "docs" / "recipes.md").read_text().splitlines():
        if line.startswith("| `"):
            _, name, _, options, _ = line.split("|")
            told[name.strip(" `")] = re.findall(r"`(\w+)`", options)
    assert told == shipped
