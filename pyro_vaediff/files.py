r"""Files that are either whole or absent: checkpoints, tables and texts."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

__all__ = [
    "check_folder",
    "load_checkpoint",
    "read_json",
    "remove_unfinished",
    "save_checkpoint",
    "write_atomically",
    "write_csv",
    "write_json",
]

FORMAT = "pyro_vaediff checkpoint, version 1"
UNFINISHED = ".unfinished"  # the suffix of a file that is being written


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    r"""Writes a file such that it is never seen half-written, whatever happens.

    Arguments:
        path: The path of the file. Missing folders are created.
        write: A function that writes the contents to an open binary file.

    Raises:
        OSError: If the file cannot be written, such as on a full disk. A file that was there before
            stays as it is.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, write)
    except OSError as error:
        reason = f"{error.strerror or error} (a file that was there before is unchanged)"
        raise OSError(error.errno, reason, str(path)) from error
    # The name is a part of the folder. Not every file system can make folders outlast a crash.
    with suppress(OSError):
        sync_folder(path.parent)


def replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    descriptor, name = tempfile.mkstemp(UNFINISHED, f".{path.name}.", path.parent)
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(descriptor)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: str | Path) -> None:
    r"""Removes what a process that was killed in :func:`write_atomically` has left in a folder.

    Arguments:
        folder: The folder, into which nobody else writes.
    """
    for path in Path(folder).glob(f".*{UNFINISHED}"):
        path.unlink()


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


def read_json(path: str | Path) -> dict[str, Any]:
    r"""Reads what :func:`write_json` wrote.

    Arguments:
        path: The path of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file does not hold a record.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, mend or remove it: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged, mend or remove it: it holds no record")
    return record


def check_folder(argument: str, path: str | Path) -> None:
    r"""Raises a ``ValueError`` if there cannot be a folder at a path, as there is a file.

    Arguments:
        argument: The name of the argument, for the message.
        path: The path, which need not exist yet.
    """
    for folder in (Path(path), *Path(path).parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{argument} {path}: {folder} is a file: choose a folder")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    r"""Saves a checkpoint: nested containers of tensors, numbers and strings.

    Arguments:
        path: The path of the file.
        state: The contents.
    """
    # torch's writer makes other errors of a full disk.
    content = io.BytesIO()
    torch.save({"format": FORMAT} | state, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def describe_error(error: Exception) -> str:
    r"""Returns what is wrong in a file, on one line."""
    # With torch, it comes after the advice to load the file without precautions.
    _, unsafe, reason = str(error).rpartition("WeightsUnpickler error: ")
    reason = (reason.strip() or type(error).__name__).splitlines()[0].strip()
    return reason.partition(". ")[0] if unsafe or "Weights only load failed" in reason else reason


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
        reason = describe_error(error)[:80]
        raise ValueError(f"{path} is not a checkpoint, or is truncated ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this library ('{FORMAT}' is missing)")
    return state
