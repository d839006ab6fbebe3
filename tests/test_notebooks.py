r"""Notebooks that run elsewhere: their first cell, their badges, and what these lead to."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_docs import DOCS, PAGES, cells
from test_teaching import load

OFFERED = [page for page in PAGES if "{nb-download}`" in page.read_text(encoding="utf-8")]
ADDRESS = "https://github.com/a-b/c.d"
PAGE = (
    "# A page\n\n{nb-download}`1.ipynb` is this page.\n\n"
    "```{code-cell} python\n# a comment\nimport torch\n```\n\n```{code-cell} python\n1\n```\n"
)
notebooks = load("notebooks", DOCS / "notebooks.py")


def test_tutorials_and_assignments_are_offered_as_notebooks():
    names = {str(page.relative_to(DOCS)) for page in OFFERED}
    folders = ("tutorials/[0-9]*.md", "teaching/assignment-*.md")
    expected = {str(p.relative_to(DOCS)) for folder in folders for p in DOCS.glob(folder)}
    assert len(expected) == 12 and expected <= names


def first_cell(page: str, address: str | None, tmp_path: Path) -> str:
    path = tmp_path / "page.md"
    path.write_text(notebooks.with_install_cell(PAGE, page, address), encoding="utf-8")
    found = cells(path)
    assert [cell.code for cell in found[1:]] == ["# a comment\nimport torch\n", "1\n"]
    assert found[0].options == {"tags": ["remove-cell"]}
    return found[0].code


@pytest.mark.parametrize("page", ["tutorials/1-elbo", "teaching/assignment-1", "theory/vae"])
@pytest.mark.parametrize("address", [None, "https://example.org/a/b"])
def test_notebooks_install_the_library_where_it_is_missing(tmp_path, monkeypatch, page, address):
    code, calls = first_cell(page, address, tmp_path), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    monkeypatch.setattr(shutil, "unpack_archive", lambda *args: calls.append([*args]))
    exec(code, {})  # it is installed here
    assert not calls and Path.cwd() == tmp_path

    source = tmp_path / "source" / "docs" / page.partition("/")[0]
    source.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        exec(code, {})
    expected = ["pyro_vaediff.zip"] if address is None else ["git", "clone", "-q", address]
    assert calls[0] == [*expected, "source"]
    assert calls[1:] == [[sys.executable, "-m", "pip", "install", "-q", "./source"]]
    assert Path.cwd() == source

    os.chdir(tmp_path)  # the kernel was restarted, and the library is there
    exec(code, {})
    assert len(calls) == 2 and Path.cwd() == source


def test_other_pages_have_neither_cell_nor_badge():
    page = PAGE.replace("nb-download", "download")
    assert notebooks.with_install_cell(page, "theory/vae", None) == page
    assert notebooks.with_badges(page, "theory/vae", ADDRESS) == page


@pytest.mark.parametrize("address", [None, "https://gitlab.com/a/b", "https://github.com/a"])
def test_without_an_address_on_github_there_are_no_badges(address):
    assert notebooks.with_badges(PAGE, "tutorials/1-elbo", address) == PAGE


@pytest.mark.parametrize("ending", ["", "/", ".git"])
def test_badges_are_below_the_title_and_have_a_text(ending):
    text = notebooks.with_badges(PAGE, "tutorials/1-elbo", ADDRESS + ending)
    badge = r"\[!\[Open in (\w+)\]\(https://\S+\.svg\)\]\((\S+)\)\n"
    assert re.match(rf"# A page\n\n(?:{badge}){{2}}\n\{{nb-download}}", text)
    found = {name: unquote(link) for name, link in re.findall(badge, text)}
    path = "notebooks/tutorials/1-elbo.ipynb"
    assert found == {
        "Colab": f"https://colab.research.google.com/github/a-b/c.d/blob/gh-pages/{path}",
        "Binder": f"https://mybinder.org/v2/gh/a-b/c.d/gh-pages?labpath={path}",
    }


def test_the_address_is_that_of_the_metadata(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text('[project]\nname = "a"\n[project.urls]\nRepository = "https://example.org"\n')
    assert notebooks.repository(path) == "https://example.org"
    path.write_text('[project]\nname = "a"\n')
    assert notebooks.repository(path) is None


def build(tmp_path: Path, *options: str) -> Path:
    r"""Builds the pages that are offered as notebooks, without running them."""
    source = tmp_path / "docs"
    for page in OFFERED:
        copy = source / page.relative_to(DOCS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, copy)
    (source / "index.md").write_text("# All\n\n```{toctree}\n:glob:\n\n*/*\n```\n")
    (source / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(DOCS)!r})\n"
        'extensions = ["myst_nb", "notebooks"]\nnb_execution_mode = "off"\n'
        'myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]\n'
    )
    html = tmp_path / "html"
    command = [sys.executable, "-m", "sphinx", "-Q", "-b", "html", *options, source, html]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    return html


def test_badges_of_each_page_lead_to_a_notebook_that_the_build_makes(tmp_path):
    pytest.importorskip("myst_nb")
    html = build(tmp_path, "-D", f"repository={ADDRESS}")
    for page in OFFERED:
        name = page.relative_to(DOCS).with_suffix("")
        text = (html / name).with_suffix(".html").read_text(encoding="utf-8")
        colab = re.findall(r'href="https://colab[^"]+/c\.d/blob/gh-pages/([^"]+)"', text)
        binder = re.findall(r'href="https://mybinder[^"]+/c\.d/gh-pages\?labpath=([^"]+)"', text)
        assert len(colab) == len(binder) == 1, name
        assert colab[0] == unquote(binder[0]) == f"notebooks/{name}.ipynb"
        document = json.loads((html / colab[0]).read_text(encoding="utf-8"))
        code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
        assert f'"clone", "-q", "{ADDRESS}"' in "".join(code[0]["source"]), name
        assert "Installs the library" not in text
    requirements = (html / "binder" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert requirements[1:] == notebooks.metadata()["dependencies"]


def test_a_build_without_an_address_has_neither_badges_nor_their_files(tmp_path):
    pytest.importorskip("myst_nb")
    html = build(tmp_path, "-D", "repository=")
    assert not (html / "notebooks").exists() and not (html / "binder").exists()
    for page in OFFERED:
        text = (html / page.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8")
        assert "colab" not in text and "mybinder" not in text
