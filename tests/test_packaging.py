r"""What surrounds the code: the version, the commands in the README, a test for every script."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

import pyro_vaediff

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "Run": "pip install -e . && python experiments/run.py --prior diffusion",
    "Test": 'pip install -e ".[test]" && pytest',
}
SCRIPTS = [
    path.name
    for path in sorted((ROOT / "experiments").glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]


def shell_blocks(markdown: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)\n```$", markdown, flags=re.MULTILINE | re.DOTALL)


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_version_is_that_of_the_metadata():
    assert importlib.metadata.version("pyro_vaediff") == pyro_vaediff.__version__


def test_changelog_has_the_version():
    assert pyro_vaediff.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("heading", COMMANDS)
def test_readme_section_starts_with_its_command(heading: str):
    sections = re.split(r"^## ", readme(), flags=re.MULTILINE)
    (section,) = (s for s in sections if s.startswith(f"{heading}\n"))
    assert shell_blocks(section)[:1] == [COMMANDS[heading]]


def test_readme_has_no_other_set_up_command():
    assert [b for b in shell_blocks(readme()) if "install" in b] == list(COMMANDS.values())


def test_there_are_scripts():
    assert "run.py" in SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_has_a_smoke_test(script: str):
    tests = [path for path in (ROOT / "tests").glob("*.py") if path != Path(__file__)]
    assert any(re.search(rf"\b{script}\b", path.read_text(encoding="utf-8")) for path in tests), (
        f"experiments/{script} has a __main__, but no file in tests/ runs it"
    )
