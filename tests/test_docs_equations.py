r"""The paper's equations: every one has its own number, the code that implements it, and a check.

The table in ``docs/conventions.md`` says on which page an equation is, and which check it has.
The checks run when the documentation is built.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in (DOCS / "theory").glob("*.md") if page.name != "index.md")
NUMBERS = range(1, 21)  # what is tagged in the paper
ROW = re.compile(r"^\| \((\d+)\) \| .+ \| (.+) \| \[\]\(theory/(.+)\) \| `(.+)` \|$", flags=re.M)
LINK = re.compile(r"\{(?:class|func|meth|mod)\}`")
LABEL = re.compile(r"^ *(?:same|near|below)\(f?\"(.+?)\",", flags=re.M)


class Equation(NamedTuple):
    code: str
    page: str
    check: str


def equations() -> dict[int, Equation]:
    r"""Returns the table in the conventions, by number."""
    text = (DOCS / "conventions.md").read_text(encoding="utf-8")
    rows = {int(number): Equation(*row) for number, *row in ROW.findall(text)}
    assert list(rows) == list(NUMBERS)
    return rows


def sections(page: Path) -> list[str]:
    r"""Returns the parts of a page that begin with a heading of the second level."""
    return re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M)


def tags(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\\tag\{(\d+)\}", text)]


def named(heading: str) -> list[int]:
    r"""Returns the numbers that a heading ends in: 4 for "(4)", and 2, 3, 4 for "(2)–(4)"."""
    end = re.search(r": \((\d+)\)(?:–\((\d+)\))?$", heading)
    return list(range(int(end[1]), int(end[2] or end[1]) + 1)) if end else []


@pytest.mark.parametrize("number", NUMBERS)
def test_equation_has_its_number_the_code_and_the_check(number: int):
    code, page, check = equations()[number]
    check = check.replace(r"\|", "|")  # as a table has to write it
    found = [part for part in sections(DOCS / "theory" / page) if number in tags(part)]
    assert len(found) == 1, f"({number}) is {len(found)} times on {page}"
    assert "`" in code and LINK.search(found[0]), f"({number}) has no link to its code"
    assert check.startswith(f"({number}): ")
    after = found[0][found[0].index(rf"\tag{{{number}}}") :]
    assert check in LABEL.findall(after), f"({number}) has no check {check!r} after it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_other_page_claims_a_number(page: Path):
    table = equations()
    here = [number for number in NUMBERS if table[number].page == page.name]
    assert tags(page.read_text(encoding="utf-8")) == here
    title, *parts = sections(page)
    if page.stem != "errata":  # its headings name the equations that err
        assert named(re.search(r"^# (.+)$", title, flags=re.M)[1]) == here
        for part in parts:
            assert named(part.splitlines()[0]) == tags(part), part.splitlines()[0]
    for label in LABEL.findall(page.read_text(encoding="utf-8")):
        if number := re.match(r"\((\d+)\): ", label):
            assert int(number[1]) in here, label


def test_letters_are_in_order_and_explained():
    order = ["vae", "diffusion", "squared-error", "diffusion-prior", "timesteps"]
    pages = sorted(PAGES, key=lambda page: order.index(page.stem) if page.stem in order else 9)
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    letters = re.findall(r"\\tag\{([A-Z])\}", text)
    assert letters == list("ABCDEFG")
    conventions = (DOCS / "conventions.md").read_text(encoding="utf-8")
    assert re.findall(r"\(([A-Z])\) ", conventions.partition("The letters are")[2]) == letters
