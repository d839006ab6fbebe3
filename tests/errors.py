r"""What an error for user input looks like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

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
