r"""Files that are either whole or absent: checkpoints, tables and texts."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["load_checkpoint", "save_checkpoint", "write_atomically", "write_csv", "write_json"]

FORMAT = "pyro_vaediff checkpoint, version 1"


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    r"""Writes a file such that it is never seen half-written, whatever happens.

    Arguments:
        path: The path of the file. Missing folders are created.
        write: A function that writes the contents to an open binary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def write_csv(path: str | Path, records: list[dict[str, Any]]) -> None:
    r"""Writes records as a table.

    Arguments:
        path: The path of the file.
        records: The rows, at least one. What a row lacks, and others have, is left empty.
    """
    text = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    r"""Writes a record of numbers and texts, indented to be read.

    Arguments:
        path: The path of the file.
        record: The record.
    """
    text = json.dumps(record, indent=2)
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    r"""Saves a checkpoint: nested containers of tensors, numbers and strings.

    Arguments:
        path: The path of the file.
        state: The contents.
    """
    write_atomically(path, lambda file: torch.save({"format": FORMAT} | state, file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    r"""Loads a checkpoint onto the CPU, without executing any code that may be in it.

    Arguments:
        path: The path of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, or not a checkpoint of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or foreign file makes torch raise almost any exception, some without a message.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise ValueError(f"{path} is not a checkpoint, or is truncated ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this library ('{FORMAT}' is missing)")
    return state
