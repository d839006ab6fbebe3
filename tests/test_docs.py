r"""The form of the pages. What is on them runs when the documentation is built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if not {"_build", "generated"} & set(p.parts))
TUTORIALS = sorted((DOCS / "tutorials").glob("[0-9]*.md"))
EXERCISE = re.compile(r":::\{admonition\} Exercise (\d+)\.(\d+): .+\n:class: exercise\n")


@dataclass
class Cell:
    start: int
    options: dict
    code: str

    @property
    def is_solution(self) -> bool:
        prompts = self.options.get("mystnb", {})
        return (
            self.options.get("tags") == ["hide-input"]
            and prompts.get("code_prompt_show") == "Show a solution"
            and prompts.get("code_prompt_hide") == "Hide the solution"
        )


def cells(page: Path) -> list[Cell]:
    r"""Returns the code cells of a page, in the order in which they run."""
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(
        r"^```\{code-cell\} python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL
    ):
        body = match[1]
        options: dict = {}
        if block := re.match(r"---\n(.*?)^---\n", body, flags=re.MULTILINE | re.DOTALL):
            options, body = yaml.safe_load(block[1]), body[block.end() :]
        elif block := re.match(r"(?::.*\n)+", body):
            options = yaml.safe_load(re.sub(r"^:(\w+):", r"\1:", block[0], flags=re.MULTILINE))
            body = body[block.end() :]
        found.append(Cell(match.start(), options, body))
    return found


def test_there_are_nine_tutorials():
    assert [int(page.name[0]) for page in TUTORIALS] == list(range(1, 10))
    index = (DOCS / "tutorials" / "index.md").read_text(encoding="utf-8")
    assert re.findall(r"^(\d-[\w-]+)$", index, flags=re.MULTILINE) == [p.stem for p in TUTORIALS]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial_can_be_downloaded(page: Path):
    assert f"{{nb-download}}`{page.stem}.ipynb`" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_exercises_have_a_stub_a_hidden_solution_and_a_grade(page: Path):
    text = page.read_text(encoding="utf-8")
    exercises = list(EXERCISE.finditer(text))
    numbers = [(int(match[1]), int(match[2])) for match in exercises]
    assert len(numbers) >= 2
    assert numbers == [(int(page.name[0]), i) for i in range(1, len(numbers) + 1)]
    assert text.index("\n## Exercises\n") < exercises[0].start()
    ends = [*(match.start() for match in exercises[1:]), len(text)]
    for match, end in zip(exercises, ends, strict=True):
        inside = [cell for cell in cells(page) if match.start() < cell.start < end]
        kinds = [cell.is_solution for cell in inside]
        assert kinds.count(True) == 1 and not kinds[0] and not kinds[-1], match[0]
        assert "yours" in inside[0].code, f"{match[0]} has no stub"
        assert "assert" in inside[-1].code, f"{match[0]} has no grading"


@pytest.mark.parametrize(
    "page", [*PAGES, DOCS.parent / "README.md"], ids=lambda page: str(page.relative_to(DOCS.parent))
)
def test_pictures_have_a_text(page: Path):
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```\{(?:image|figure)\}.*?^```$", text, flags=re.M | re.S):
        assert ":alt: " in block, block
    assert not re.findall(r"!\[\]\(", text)
    assert all(re.search(r' alt="[^"]+"', tag) for tag in re.findall(r"<img [^>]*>", text))
    for cell in cells(page):
        if re.search(r"\bplt\.(subplots|figure)\(|^animate\(", cell.code, flags=re.MULTILINE):
            image = cell.options.get("mystnb", {}).get("image", {})
            assert image.get("alt"), cell.code


def test_a_name_is_in_the_api_reference_once(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    from api_pages import PACKAGE, page, submodules

    for module in submodules(PACKAGE):
        names = re.findall(r"^\.\. auto(?:class|function|data):: ([\w.]+)$", page(module), re.M)
        found = [name.rpartition(".")[2] for name in names]
        assert len(set(found)) == len(found), module.__name__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_code_on_a_page_is_python(page: Path):
    for cell in cells(page):
        compile(cell.code, str(page), "exec")
        assert max(map(len, cell.code.splitlines()), default=0) <= 100, cell.code
