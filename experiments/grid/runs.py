r"""The runs of a grid: each one a process, at most once; see the docstring of ``table.py``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from study import check_settings
from tqdm import tqdm

from pyro_vaediff.files import write_json
from pyro_vaediff.train.runs import CHECKPOINT, METRICS

from .cells import Cell

__all__ = ["Runner", "check_cell", "command"]

RUN = Path(__file__).parents[1] / "run.py"
SETTINGS, LOG, LOCK = "cell.json", "log.txt", "lock"


def command(cell: Cell, out: Path, device: str) -> list[str]:
    r"""Returns the command that starts or continues a run."""
    path = cell.folder(out)
    words = [*cell.words, "--device", device, "--out", str(path), "--quiet"]
    if cell.init is not None:
        words += ["--init", str(cell.init.folder(out))]
    resume = ["--resume"] if (path / CHECKPOINT).exists() else []
    return [sys.executable, str(RUN), *words, *resume]


def check_cell(cell: Cell, out: Path) -> None:
    r"""Raises a ``ValueError`` if the folder of a cell holds a run with other settings."""
    path = cell.folder(out)
    if cell.is_finished(out) or (path / CHECKPOINT).exists():
        if not (path / SETTINGS).exists():
            raise ValueError(f"{path} holds a run that is not of a table: choose another --out")
        check_settings(path / SETTINGS, cell.settings)


def start(cell: Cell, out: Path, device: str, threads: int) -> subprocess.Popen | None:
    r"""Starts or continues a run, or returns ``None`` if another process has it."""
    path = cell.folder(out)
    path.mkdir(parents=True, exist_ok=True)
    # The run inherits the lock and holds it until it ends, whatever happens to this process.
    with open(path / LOCK, "a") as lock, open(path / LOG, "a") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        for leftover in path.glob(".*"):  # of a run that was killed while it wrote
            leftover.unlink()
        check_cell(cell, out)
        write_json(path / SETTINGS, cell.settings)
        words = command(cell, out, device)
        print(f"$ {shlex.join(words)}", file=log, flush=True)
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C is for this process, which ends its runs itself
        )
        lock.truncate(0)
        print(process.pid, file=lock)
        return process


def num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def epochs_done(cell: Cell, out: Path) -> int:
    r"""Returns for how many epochs a run has been trained."""
    if cell.is_finished(out):
        return cell.epochs
    try:
        lines = (cell.folder(out) / METRICS).read_text().count("\n")
    except FileNotFoundError:
        return 0
    return min(lines - 1, cell.epochs)  # the first one is the header


def describe(cell: Cell, out: Path) -> str:
    r"""Returns the result of a run on one line."""
    results = cell.results(out)
    line = f"test -ELBO {results['test_negative_elbo']:.2f} nats"
    if frechet := results.get("frechet"):
        line += f", {frechet['label']} {frechet['samples']:.2f}"
    return line


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Runner:
    r"""Runs cells, some at once.

    Arguments:
        cells: The cells, in their order.
        out: The folder of the grid.
        device: The device.
        jobs: The number of runs at once.
        progress: Whether to show a progress bar.
        on_finish: What to do whenever a run finishes.
    """

    def __init__(
        self,
        cells: list[Cell],
        out: Path,
        device: str = "auto",
        jobs: int = 1,
        progress: bool = True,
        on_finish: Callable[[], object] = lambda: None,
    ):
        self.cells, self.out, self.device, self.jobs = cells, out, device, jobs
        self.on_finish = on_finish
        self.waiting = [cell for cell in cells if not cell.is_finished(out)]
        self.running: dict[Cell, tuple[subprocess.Popen, float]] = {}
        self.elsewhere: set[Cell] = set()
        self.failed: dict[str, str] = {}
        self.shown: object = None
        self.bar = tqdm(
            total=sum(cell.epochs for cell in cells),
            initial=sum(epochs_done(cell, out) for cell in cells),
            unit="epoch",
            disable=not progress,
            dynamic_ncols=True,
        )

    def run(self) -> dict[str, str]:
        r"""Runs what is not finished, and returns the errors of the runs that failed."""
        try:
            while self.waiting or self.running:
                self.start_runs()
                self.end_runs()
                self.show_progress()
                time.sleep(0.2)
        finally:
            self.bar.close()
            for process, _ in self.running.values():
                process.terminate()
            for process, _ in self.running.values():
                process.wait()
        return self.failed

    def start_runs(self) -> None:
        threads = max(1, num_cores() // self.jobs)
        for cell in list(self.waiting):
            if len(self.running) == self.jobs:
                return
            if cell.is_finished(self.out):
                self.waiting.remove(cell)
                self.say(cell, f"finished elsewhere, {describe(cell, self.out)}")
                self.on_finish()
            elif cell.init is not None and not cell.init.is_finished(self.out):
                if not self.is_coming(cell.init):
                    self.waiting.remove(cell)
                    self.failed[cell.name] = (
                        f"it starts from {cell.init.name}, which is needed first"
                    )
                    self.say(cell, f"failed, {self.failed[cell.name]}")
            elif process := start(cell, self.out, self.device, threads):
                self.waiting.remove(cell)
                self.running[cell] = (process, time.monotonic())
            elif cell not in self.elsewhere:
                self.elsewhere.add(cell)
                owner = (cell.folder(self.out) / LOCK).read_text().strip()
                self.say(cell, f"process {owner} runs it, which is waited for")

    def is_coming(self, cell: Cell) -> bool:
        r"""Whether a run will finish, here or elsewhere."""
        if cell in self.waiting or cell in self.running:
            return True
        with contextlib.suppress(FileNotFoundError), open(cell.folder(self.out) / LOCK) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return cell.is_finished(self.out)

    def end_runs(self) -> None:
        for cell, (process, since) in list(self.running.items()):
            if (status := process.poll()) is None:
                continue
            del self.running[cell]
            if status == 0 and cell.is_finished(self.out):
                seconds = time.monotonic() - since
                self.say(cell, f"{seconds:.0f} s, {describe(cell, self.out)}")
                self.on_finish()
            else:
                log = cell.folder(self.out) / LOG
                self.failed[cell.name] = f"{last_line(log)} (status {status}, see {log})"
                self.say(cell, f"failed, {self.failed[cell.name]}")

    def say(self, cell: Cell, text: str) -> None:
        self.bar.write(f"[{self.done()}] {cell.name}: {text}")
        sys.stdout.flush()

    def done(self) -> str:
        done = len(self.cells) - len(self.waiting) - len(self.running) - len(self.failed)
        return f"{done}/{len(self.cells)}"

    def show_progress(self) -> None:
        epochs = {cell: epochs_done(cell, self.out) for cell in self.cells}
        now = [f"{cell.name} {epochs[cell]}/{cell.epochs}" for cell in self.running]
        state = (f"runs {self.done()}", ", ".join(now), sum(epochs.values()))
        # A clock is for a terminal. A file would be filled with it.
        if state != self.shown or sys.stderr.isatty():
            self.bar.set_description_str(state[0], refresh=False)
            self.bar.set_postfix_str(state[1], refresh=False)
            self.bar.n = state[2]
            self.bar.refresh()
        self.shown = state
