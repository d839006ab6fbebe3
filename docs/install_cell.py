r"""The first cell of the notebooks, which installs the library where it is missing."""

from __future__ import annotations

import re
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PAGES = re.compile(r"tutorials/\d-|teaching/assignment-")
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
    os.chdir("source/docs/{folder}")
```

"""


def repository(pyproject: Path) -> str | None:
    r"""Returns the public address of the repository, if ``pyproject.toml`` has one."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository")


def with_install_cell(text: str, page: str, address: str | None) -> str:
    r"""Returns the text of a page with the cell before its first one.

    The cell is in the notebook and not on the page.

    Arguments:
        text: The text of the page.
        page: The name of the page, such as ``"tutorials/1-elbo"``; others than tutorials and
            assignments stay as they are.
        address: The public address of the repository. Without one, the source comes from an
            archive that is uploaded with the notebook.
    """
    if not PAGES.match(page):
        return text
    if address is None:
        how = "Upload the source with it:\n# git archive --output pyro_vaediff.zip HEAD"
        get = '    shutil.unpack_archive("pyro_vaediff.zip", "source")'
    else:
        how = "The source comes from its repository."
        get = f'    subprocess.run(["git", "clone", "-q", "{address}", "source"], check=True)'
    cell = CELL.format(how=how, get=get, folder=page.partition("/")[0])
    return text.replace("```{code-cell} python\n", f"{cell}```{{code-cell}} python\n", 1)
