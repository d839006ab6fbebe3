r"""Notebooks that run as they are, on the reader's machine, in Colab and in Binder.

An extension of Sphinx. Each page that is offered as a notebook, by ``{nb-download}``, gets a first
cell that installs the library where it is missing. If the project has a public address, as
``Repository`` in ``[project.urls]`` of ``pyproject.toml`` or by ``-D repository=ADDRESS``, that
cell clones it. If the address is on GitHub, each of these pages also has badges that open its
notebook in Colab and in Binder. They lead to the branch `BRANCH` of the repository, where the build
of the documentation is published: it has the notebooks in ``notebooks/``, and for Binder the
library's dependencies in ``binder/requirements.txt``.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
BRANCH = "gh-pages"
GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")
DOWNLOAD = "{nb-download}`"
CELL = """```{{code-cell}} python
:tags: [remove-cell]

# Installs the library where it is missing, as in Colab. {how}
import importlib.util
import os
import shutil
import subprocess
import sys

if importlib.util.find_spec("pyro_vaediff") is None:
{get}
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "./source"], check=True)
    importlib.invalidate_caches()
if os.path.isdir("source/docs/{folder}"):  # where the page is, after a restart as well
    os.chdir("source/docs/{folder}")
```

"""


def metadata(pyproject: Path = PYPROJECT) -> dict[str, Any]:
    r"""Returns the table ``[project]``."""
    return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]


def repository(pyproject: Path = PYPROJECT) -> str | None:
    r"""Returns the public address of the repository, if ``pyproject.toml`` has one."""
    return metadata(pyproject).get("urls", {}).get("Repository")


def with_install_cell(text: str, page: str, address: str | None) -> str:
    r"""Returns the text of a page with the cell before its first one.

    The cell is in the notebook and not on the page.

    Arguments:
        text: The text of the page. One that is not offered as a notebook stays as it is.
        page: The name of the page, such as ``"tutorials/1-elbo"``.
        address: The public address of the repository. Without one, the source comes from an
            archive that is uploaded with the notebook.
    """
    if DOWNLOAD not in text:
        return text
    if not address:
        how = "Upload the source with it:\n# git archive --output pyro_vaediff.zip HEAD"
        get = '    shutil.unpack_archive("pyro_vaediff.zip", "source")'
    else:
        how = "The source comes from its repository."
        get = f'    subprocess.run(["git", "clone", "-q", "{address}", "source"], check=True)'
    cell = CELL.format(how=how, get=get, folder=page.partition("/")[0])
    return text.replace("```{code-cell} python\n", f"{cell}```{{code-cell}} python\n", 1)


def links(page: str, address: str | None) -> dict[str, str]:
    r"""Returns the addresses that open a page's notebook, by service: none if not on GitHub."""
    match = GITHUB.fullmatch(address or "")
    if match is None:
        return {}
    path = f"notebooks/{page}.ipynb"
    return {
        "Colab": f"https://colab.research.google.com/github/{match[1]}/blob/{BRANCH}/{path}",
        "Binder": f"https://mybinder.org/v2/gh/{match[1]}/{BRANCH}?labpath={quote(path, safe='')}",
    }


def with_badges(text: str, page: str, address: str | None) -> str:
    r"""Returns the text of a page with the badges of `links` below its title."""
    if DOWNLOAD not in text:
        return text
    pictures = {
        "Colab": "https://colab.research.google.com/assets/colab-badge.svg",
        "Binder": "https://mybinder.org/badge_logo.svg",
    }
    found = links(page, address).items()
    badges = "\n".join(f"[![Open in {name}]({pictures[name]})]({link})" for name, link in found)
    if not badges:
        return text
    return re.sub(r"^# .+\n", lambda title: f"{title[0]}\n{badges}\n", text, count=1, flags=re.M)


def publish(pages: list[str], built: Path, html: Path) -> None:
    r"""Puts the notebooks where their badges lead to, and beside them what Binder installs.

    Arguments:
        pages: The names of the pages.
        built: The folder where MyST-NB has written the notebooks.
        html: The folder of the built documentation.
    """
    for page in pages:
        path = html / "notebooks" / f"{page}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built / f"{page}.ipynb", path)
    # The library itself comes with the first cell, together with the files that pages read.
    wheels = "--extra-index-url https://download.pytorch.org/whl/cpu"
    lines = [wheels, *metadata()["dependencies"]]
    (html / "binder").mkdir(exist_ok=True)
    (html / "binder" / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare(app: Any, page: str, source: list[str]) -> None:
    address = app.config.repository
    source[0] = with_badges(with_install_cell(source[0], page, address), page, address)


def finish(app: Any, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    if links("", app.config.repository):
        paths = {page: Path(app.env.doc2path(page)) for page in sorted(app.env.found_docs)}
        pages = [p for p, path in paths.items() if DOWNLOAD in path.read_text(encoding="utf-8")]
        publish(pages, Path(app.env.mystnb_config.output_folder), Path(app.outdir))


def setup(app: Any) -> dict[str, bool]:
    app.add_config_value("repository", repository(), "env")
    app.connect("source-read", prepare)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
