r"""The form of the theory pages. Their checks run when the documentation is built."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in (DOCS / "theory").glob("*.md") if page.name != "index.md")
NUMBERS = range(1, 21)
CELL = re.compile(r"^```\{code-cell\} python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\{(?:class|func|meth|mod)\}`(?:[^`<]*<|~)?(pyro_vaediff[\w.]*)>?`")
CHECK = re.compile(r"^ *(?:same\(|near\(|assert )", flags=re.MULTILINE)


def sections(page: Path) -> list[str]:
    r"""Returns the parts of a page that begin with a heading of the second level."""
    text = page.read_text(encoding="utf-8")
    return re.split(r"^## ", text, flags=re.MULTILINE)[1:]


def exists(name: str) -> bool:
    r"""Whether a name is a module, or an attribute of one, or an attribute of that."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_equation_of_the_paper_has_one_place():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert sorted(map(int, re.findall(r"\\tag\{(\d+)\}", text))) == list(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_equation_has_code_and_a_check_beside_it(number: int):
    tag = rf"\tag{{{number}}}"
    (section,) = (section for page in PAGES for section in sections(page) if tag in section)
    assert LINK.search(section), f"({number}) has no link to the object that implements it"
    after = section[section.index(tag) :]
    assert any(CHECK.search(cell) for cell in CELL.findall(after)), f"({number}) is not checked"


@pytest.mark.parametrize("page", [*PAGES, DOCS / "conventions.md"], ids=lambda page: page.stem)
def test_linked_objects_exist(page: Path):
    names = LINK.findall(page.read_text(encoding="utf-8"))
    assert names
    assert [name for name in names if not exists(name)] == []


def test_conventions_say_where_each_equation_is():
    text = (DOCS / "conventions.md").read_text(encoding="utf-8")
    table = text[text.index("## The paper's equations") : text.index("## Other notations")]
    rows = re.findall(r"^\| (\(.+?) \| .* \| (.*) \| \[\]\(theory/.*\) \|$", table, flags=re.M)
    assert [int(n) for first, _ in rows for n in re.findall(r"\d+", first)] == list(NUMBERS)
    assert all("`" in where for _, where in rows)


def test_errata_are_complete():
    found = sections(DOCS / "theory" / "errata.md")
    assert len(found) >= 7
    for erratum in found:
        for field in ("As printed", "Corrected", "Why", "Check"):
            assert f"\n**{field}**\n: " in erratum, (erratum.splitlines()[0], field)
        assert any(CHECK.search(cell) for cell in CELL.findall(erratum)), erratum.splitlines()[0]


def test_index_has_every_page():
    index = (DOCS / "theory" / "index.md").read_text(encoding="utf-8")
    toctree = index[index.index("```{toctree}") :]
    names = re.findall(r"^([\w-]+)$", toctree, flags=re.M)
    assert sorted(names) == sorted(page.stem for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_can_be_downloaded(page: Path):
    assert f"{{nb-download}}`{page.stem}.ipynb`" in page.read_text(encoding="utf-8")
