r"""Files that are either whole or absent: tables, texts and whatever else is written."""

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

__all__ = [
    "check_folder",
    "read_json",
    "remove_unfinished",
    "write_atomically",
    "write_csv",
    "write_json",
]

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
        records: The rows, at least one. Where a row has no value for a column, its cell is empty.
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


def describe_error(error: Exception) -> str:
    r"""Returns the reason why a file cannot be used, on one line."""
    # With torch, it comes after the advice to load the file without precautions.
    _, unsafe, reason = str(error).rpartition("WeightsUnpickler error: ")
    reason = (reason.strip() or type(error).__name__).splitlines()[0].strip()
    return reason.partition(". ")[0] if unsafe or "Weights only load failed" in reason else reason
