r"""Grades a student's notebook: ``python docs/teaching/grade.py 1 notebook.ipynb``.

The notebook is run in a kernel of its own, from its first cell to its last. A cell that fails is
passed over. Then each function that the assignment asks for is checked, and the points are printed.
The code of a student runs with the rights of whoever grades it: do so in a container.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from checks import TASKS  # noqa: E402


class Result(NamedTuple):
    r"""What a task earned."""

    name: str
    points: int
    possible: int
    comment: str


def grade(assignment: int, notebook: str | Path, timeout: int = 300) -> list[Result]:
    r"""Returns the result of each task.

    Arguments:
        assignment: The number of the assignment.
        notebook: The path of the notebook, ``.ipynb``.
        timeout: The time limit of a cell, in seconds.

    Raises:
        ValueError: If there is no such assignment, or the file is no notebook.
        FileNotFoundError: If there is no such file.
    """
    if assignment not in TASKS:
        raise ValueError(f"assignment must be one of {list(TASKS)}, got {assignment}")
    path = Path(notebook)
    if path.suffix != ".ipynb":
        raise ValueError(f"notebook must end in .ipynb, got {str(path)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"notebook {str(path)!r} does not exist: check the path")
    try:
        document = nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"notebook {str(path)!r} is no Jupyter notebook: {reason}") from error

    checks = [
        nbformat.v4.new_code_cell(
            f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport checks\n"
            f"print(checks.verdict({assignment}, {task.name!r}, globals().get({task.name!r})))"
        )
        for task in TASKS[assignment]
    ]
    document.cells += checks
    folder = {"metadata": {"path": str(path.resolve().parent)}}
    client = NotebookClient(
        document, timeout=timeout, kernel_name="python3", allow_errors=True, resources=folder
    )
    reason = "the check did not run"
    try:
        client.execute()
    except CellTimeoutError:
        reason = f"not checked: a cell ran for more than {timeout} s"
    except DeadKernelError:
        reason = "not checked: the kernel died"
    return [
        Result(task.name, *read(cell, task.points, reason))
        for task, cell in zip(TASKS[assignment], checks, strict=True)
    ]


def read(cell: nbformat.NotebookNode, possible: int, reason: str) -> tuple[int, int, str]:
    r"""Returns the points, the possible ones and the comment that a check printed last."""
    printed = "".join(o.text for o in cell.outputs if o.get("name") == "stdout").strip()
    try:
        found = json.loads(printed.splitlines()[-1])
        return found["points"], possible, found["comment"]
    except (IndexError, KeyError, TypeError, json.JSONDecodeError):
        return 0, possible, reason


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Grades a student's notebook.")
    parser.add_argument("assignment", type=int, help="the number of the assignment")
    parser.add_argument("notebook", help="the path of the notebook, .ipynb")
    parser.add_argument("--timeout", type=int, default=300, help="seconds that a cell may run")
    options = parser.parse_args(args)
    try:
        results = grade(options.assignment, options.notebook, options.timeout)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for result in results:
        print(f"{result.points} / {result.possible}  {result.name}: {result.comment}")
    total, possible = (sum(r[i] for r in results) for i in (1, 2))
    print(f"{total} / {possible}  in all")


if __name__ == "__main__":
    main()
