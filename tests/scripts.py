r"""How the tests run the scripts in ``experiments/``."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from errors import exit_message

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def call(script: str, *args: object) -> str:
    r"""Runs a script in a process of its own, and returns what it printed."""
    command = [sys.executable, str(EXPERIMENTS / script), *map(str, args), "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def script_errors(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    r"""Returns a function that runs a script with arguments and returns the error that ends it."""

    def call(*args: object) -> str:
        monkeypatch.syspath_prepend(str(script.parent))
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        with pytest.raises(SystemExit) as info:
            runpy.run_path(str(script), run_name="__main__")
        return exit_message(info.value, capsys.readouterr().err)

    return call
