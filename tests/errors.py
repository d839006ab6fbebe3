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
