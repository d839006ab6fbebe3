r"""What an error for user input looks like."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def one_line_value_error(match: str) -> Iterator[None]:
    r"""Expects a ``ValueError`` whose message is one line that matches a regular expression.

    Pyro appends a table of the shapes of the trace to an error that is raised inside a program.
    """
    with pytest.raises(ValueError) as info:
        yield
    message = re.split(r"\n *Trace Shapes:", str(info.value))[0]
    assert re.search(match, message), message
    assert "\n" not in message, message


def exit_message(exit: SystemExit, stderr: str) -> str:
    r"""Returns the error of a script that was ended by one, which must be one line.

    Arguments:
        exit: The exception that ended the script: with a message of its own, or with the code 2 of
            argparse, which has written its message.
        stderr: What the script wrote to its standard error.
    """
    if exit.code != 2:
        assert isinstance(exit.code, str)  # goes to stderr, with exit status 1
        stderr += exit.code
    # argparse puts a usage above the error.
    assert stderr.count("error:") == 1 and "Traceback" not in stderr
    message = stderr[stderr.index("error:") :].strip()
    assert "\n" not in message
    return message


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
