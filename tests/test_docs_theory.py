r"""The form of the theory pages. Their checks run when the documentation is built."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in (DOCS / "theory").glob("*.md") if page.name != "index.md")
CELL = re.compile(r"^```\{code-cell\} python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\{(?:class|func|meth|mod)\}`(?:[^`<]*<|~)?(pyro_vaediff[\w.]*)>?`")
CHECK = re.compile(r"^ *(?:same\(|near\(|below\(|assert )", flags=re.MULTILINE)


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


@pytest.mark.parametrize("page", [*PAGES, DOCS / "conventions.md"], ids=lambda page: page.stem)
def test_linked_objects_exist(page: Path):
    names = LINK.findall(page.read_text(encoding="utf-8"))
    assert names
    assert [name for name in names if not exists(name)] == []


def test_errata_are_complete():
    found = sections(DOCS / "theory" / "errata.md")
    assert len(found) >= 10
    for erratum in found:
        for field in ("Where", "As printed", "Corrected", "Why", "Check"):
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
