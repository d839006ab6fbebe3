r"""Kills runs at random moments and resumes them: what they leave must not tell.

    OMP_NUM_THREADS=1 python tests/stress_resume.py --kills 100

runs the main job once without a disturbance and then again and again. A second thread
kills the process (SIGKILL, there is nothing that it could still do), half of the time at a random
moment of its CPU time, and else during a training step, a validation or the writing of a file. The
same command with ``--resume`` follows, and may be killed again. Each run that has come to its end
must have left the same files as the first one: the same weights, optimizer, metrics, results and
pictures, bit for bit.

Each process is a fork of this one, which has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import resource
import shlex
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which the first step of an optimizer imports

from pyro_vaediff import files
from pyro_vaediff.data import load
from pyro_vaediff.train import load_checkpoint, loop, optim
from pyro_vaediff.train import main as main_job
from pyro_vaediff.train.runs import BEST, CHECKPOINT

load("digits")  # imports scikit-learn
# Two phases, a moving average, a proposal that learns, snapshots: much to be resumed.
OPTIONS = shlex.split("""
    --quiet --device cpu --features none --limit 60 --batch-size 20 --epochs 5 --prior-epochs 2
    --latent-dim 2 --width 4 --num-timesteps 10 --k 2 --prior-width 32 --timesteps loss-aware
    --ema 0.9 --warmup 3 --snapshots 2 4
""")
PHASES = ("start", "step", "validation", "write", "report")


class Phases:
    r"""What a process is doing, in memory that outlives it, and when it is to be killed."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 1)
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.victim: tuple[str, int, float] | None = None

    @property
    def current(self) -> str:
        return PHASES[self.memory[0]]

    def enter(self, name: str) -> None:
        self.memory[0] = PHASES.index(name)

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        before, start = self.current, time.perf_counter()
        self.enter(name)
        self.counts[name] += 1
        if self.victim is not None and self.victim[:2] == (name, self.counts[name]):
            kill_after(time.perf_counter, self.victim[2])
        try:
            yield
        finally:
            self.enter(before)
            self.seconds[name] += time.perf_counter() - start

    def watch(self, module: Any, function: str, name: str) -> None:
        original = getattr(module, function)

        def watched(*args, **kwargs):
            with self.during(name):
                return original(*args, **kwargs)

        setattr(module, function, watched)


def kill_after(clock: Callable[[], float], seconds: float) -> None:
    r"""Kills this process once a clock has advanced, whatever it is doing then."""
    end = clock() + seconds

    def wait() -> None:
        while (left := end - clock()) > 0:
            time.sleep(min(left, 0.002))
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


class Run:
    r"""A run that is started again after each kill, until it has come to its end.

    Arguments:
        out: The run directory.
    """

    def __init__(self, out: Path):
        self.out = out
        self.log = out.with_suffix(".log")

    def go_on(
        self,
        phases: Phases,
        at: float | None = None,
        summary: Path | None = None,
    ) -> bool:
        r"""Starts or resumes the run in a process of its own.

        Arguments:
            phases: Tells what the process is doing.
            at: The seconds of CPU time after which it is killed, if it is not in a phase.
            summary: A file for how often and for how long the process was in which phase.

        Returns:
            Whether it came to its end, and was not killed.
        """
        phases.enter("start")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with (
                    open(self.log, "a") as log,
                    contextlib.redirect_stdout(log),
                    contextlib.redirect_stderr(log),
                ):
                    self.run(phases, at, summary)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            return False
        assert os.WEXITSTATUS(status) == 0, self.log.read_text()
        return True

    def run(self, phases: Phases, at: float | None, summary: Path | None) -> None:
        phases.watch(optim.TermsLoss, "__call__", "step")
        phases.watch(loop.Trainer, "validate", "validation")
        phases.watch(files, "replace", "write")
        phases.watch(main_job, "report", "report")
        if at is not None:
            kill_after(time.process_time, at)
        start = time.process_time()
        resume = ["--resume"] if (self.out / CHECKPOINT).exists() else []
        try:
            main_job.main([*OPTIONS, "--out", str(self.out), *resume])
        except BaseException:
            traceback.print_exc()
            raise
        if summary is not None:
            seconds = phases.seconds | {"all": time.process_time() - start}
            summary.write_text(json.dumps({"counts": phases.counts, "seconds": seconds}))


def stress(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    r"""Kills runs, and checks what they leave.

    Arguments:
        kills: The number of kills.
        seed: The seed of their moments.
        folder: Where the runs go.

    Returns:
        How many kills there were in which phase, and how many runs were compared.
    """
    generator, phases = random.Random(seed), Phases()
    straight = Run(folder / "straight" / "run")
    straight.out.parent.mkdir()
    summary = folder / "summary.json"
    assert straight.go_on(phases, summary=summary)
    usual = json.loads(summary.read_text())

    where: Counter[str] = Counter()
    runs = 0
    while sum(where.values()) < kills:
        runs += 1
        run = Run(folder / f"killed-{runs}" / "run")
        run.out.parent.mkdir()
        finished = False
        while not finished:
            at = None
            phases.victim = None
            if sum(where.values()) < kills:
                if generator.random() < 0.5:
                    at = generator.uniform(0, usual["seconds"]["all"])
                else:
                    name = generator.choice(("step", "validation", "write"))
                    mean = usual["seconds"][name] / usual["counts"][name]
                    number = generator.randint(1, usual["counts"][name])
                    phases.victim = name, number, generator.uniform(0, mean)
            finished = run.go_on(phases, at)
            if not finished:
                where[phases.current] += 1
                found = {path.name for path in run.out.glob("*")} if run.out.exists() else set()
                for name in found & {CHECKPOINT, BEST}:
                    load_checkpoint(run.out / name)  # it is whole
        compare(run.out, straight.out)
        shutil.rmtree(run.out.parent)
    return {"kills": dict(where), "runs": runs, "CPU seconds of a run": usual["seconds"]["all"]}


def compare(out: Path, expected: Path) -> None:
    r"""Asserts that two run directories hold the same files, apart from the time they took."""
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        mine, theirs = out / name, expected / name
        if mine.suffix == ".pt":
            assert_same(load_checkpoint(mine), load_checkpoint(theirs), name)
        elif name == "results.json":
            found, wanted = (json.loads(path.read_text()) for path in (mine, theirs))
            assert found | {"training_seconds": 0} == wanted | {"training_seconds": 0}
        else:
            assert mine.read_bytes() == theirs.read_bytes(), name


def assert_same(a: Any, b: Any, where: str) -> None:
    r"""Asserts that two nested containers of tensors are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}, {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}, {i}")
    else:
        assert a == b, where


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork of a process with threads may hang
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = stress(args.kills, args.seed, Path(folder))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    result["CPU seconds"] = round(usage.ru_utime + usage.ru_stime)
    result["seconds"] = round(time.perf_counter() - start)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
