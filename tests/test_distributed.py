r"""Several processes on CPU: the gradient of one process with the joint batch, and one run.

Each test of several processes takes a few seconds, of which most are imports.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pyro
import pytest
import torch
from errors import one_line_value_error
from processes import TIMEOUT, free_port, together
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor

from pyro_vaediff import Timestep_ELBO, TraceKL_ELBO, files
from pyro_vaediff.data import ImageData
from pyro_vaediff.diffusion import base_normal
from pyro_vaediff.evaluate import evaluate, value_elbo
from pyro_vaediff.infer import Timesteps
from pyro_vaediff.train import distributed, load_checkpoint, loop
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig, TrainConfig
from pyro_vaediff.train.loop import NonFiniteError, Trainer
from pyro_vaediff.train.optim import TorchOptim, make_svi, per_datum

RUN = Path(__file__).parents[1] / "experiments" / "run.py"

# --- One process ----------------------------------------------------------------------------------


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    x = torch.randn(5, 2)
    before = x.clone()
    with distributed.process_group("cpu") as device, distributed.in_turns():
        assert device == torch.device("cpu")
        assert (distributed.rank(), distributed.size(), distributed.is_main()) == (0, 1, True)
        distributed.sum_([x])
        distributed.broadcast_([x])
        assert torch.equal(distributed.share(x), before)
        assert distributed.from_main(lambda: "anything") == "anything"
    assert not torch.distributed.is_initialized()


def test_folded_seeds_are_different():
    numbers = itertools.product(range(20), repeat=3)
    seeds = {distributed.fold_seed(*n) for n in numbers} | {distributed.fold_seed(0, 1)}
    assert len(seeds) == 20**3 + 1
    # torch's generator on the CPU looks at half of their bits.
    assert len({seed % 2**32 for seed in seeds}) > 20**3 - 5
    torch.manual_seed(max(seeds))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with one_line_value_error("process 1 of this machine has no GPU, there are 0"):
        distributed.process_group("cuda").__enter__()


def test_the_loop_in_the_documentation(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    page = (RUN.parents[1] / "docs" / "howto" / "distributed.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"^```python\n(import torch\n.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(compile(loop, "distributed.md", "exec"), {})
    losses = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[2] < losses[0] - 5


# --- What the processes exchange ------------------------------------------------------------------


def exchange() -> dict:
    rank = distributed.rank()
    a, b = torch.arange(6.0).reshape(2, 3).T + rank, torch.tensor([rank + 1])
    c = torch.full((), 10.0 * rank, dtype=torch.float64)
    distributed.sum_([a, b, c])
    d = torch.full((2, 2), float(rank))
    distributed.broadcast_([d])
    order = torch.zeros(3)
    with distributed.in_turns():
        order[rank] = 1
    return {
        "a": a.tolist(), "b": b.tolist(), "c": c.tolist(), "d": d.tolist(),
        "share": distributed.share(torch.arange(7)).tolist(),
        "from main": distributed.from_main(lambda: {"rank": rank, "x": torch.ones(2)})["rank"],
    }  # fmt: skip


def test_sums_broadcasts_and_shares():
    results = together(exchange, 3)
    for result in results:
        assert result["a"] == (3 * torch.arange(6.0).reshape(2, 3).T + 3).tolist()
        assert (result["b"], result["c"]) == ([6], 30.0)
        assert result["d"] == [[0.0, 0.0], [0.0, 0.0]]
        assert result["from main"] == 0
    shares = [result["share"] for result in results]
    assert [number for share in shares for number in share] == list(range(7))
    assert sorted(map(len, shares)) == [2, 2, 3]


# --- The gradient ---------------------------------------------------------------------------------

BATCH = 7  # which two processes cannot share evenly
ESTIMATORS = {
    "all timesteps": lambda: Timestep_ELBO("all"),
    "all timesteps, given x": lambda: Timestep_ELBO("all", conditioning="x", chunk_size=2),
    "two timesteps": lambda: Timestep_ELBO(k=2),
    "two particles": lambda: Timestep_ELBO(k=1, num_particles=2),
    "chain": TraceKL_ELBO,
    "Pyro's": Trace_ELBO,
}


class FixedNoise(Messenger):
    r"""Gives each datum of a batch noise that depends on the site and on the datum only."""

    def _pyro_sample(self, msg: dict) -> None:
        fn = msg["fn"]
        if msg["done"] or msg["value"] is not None or site_is_subsample(msg):
            return
        mine = distributed.share(torch.arange(BATCH))
        whole = Size([*fn.batch_shape[:-1], BATCH])
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(msg["name"].encode()))
            if isinstance(fn, Timesteps):
                msg["value"] = fn.expand(whole).sample()[..., mine]
                return
            noise = torch.randn(*whole, *fn.event_shape, dtype=torch.float64)[..., mine, :]
        normal = base_normal(fn)
        msg["value"] = normal.loc + normal.scale * noise


def steps() -> dict[str, dict[str, Tensor]]:
    r"""Takes three steps of each estimator with the same batch and noise, however it is shared."""
    results = {}
    for prior, (name, estimator) in itertools.product(("diffusion", "flow"), ESTIMATORS.items()):
        torch.manual_seed(0)
        config = ModelConfig(prior=prior, latent_dim=2, width=4, num_timesteps=5, prior_width=16)
        vae = make_vae(config).double()
        x = torch.rand(BATCH, 1, 8, 8, dtype=torch.float64)
        optim = TorchOptim(torch.optim.Adam(vae.parameters(), lr=1e-2), clip_norm=1.0)
        programs = (per_datum(vae.model, BATCH), per_datum(FixedNoise()(vae.guide), BATCH))
        svi, gradients, norms = make_svi(*programs, optim, estimator()), [], []

        def look(*args, vae=vae, optim=optim, gradients=gradients, norms=norms):
            grads = [p.grad.flatten() for p in vae.parameters() if p.grad is not None]
            gradients.append(torch.cat(grads))
            norms.append(optim.grad_norm)

        optim.optimizer.register_step_pre_hook(look)
        terms = []
        for _ in range(3):
            svi.step(distributed.share(x))
            terms.append(torch.stack([*svi.loss.terms.values()]))
        results[f"{prior}, {name}"] = {
            "terms": torch.stack(terms),
            "gradients": torch.stack(gradients),  # after clipping
            "norms": torch.stack(norms),
            "weights": torch.cat([p.detach().flatten() for p in vae.parameters()]),
        }
    return {key: {n: t.tolist() for n, t in values.items()} for key, values in results.items()}


def test_two_processes_have_the_gradient_of_one_with_the_joint_batch():
    pyro.enable_validation(False)
    alone = steps()
    first, second = together(steps, 2)
    assert first == second  # bit for bit, or their models would drift apart
    for key, expected in alone.items():
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.tensor(first[key][name], dtype=torch.float64),
                torch.tensor(value, dtype=torch.float64),
                atol=1e-6,
                rtol=1e-6,
                msg=lambda text, where=(key, name): f"{where}: {text}",
            )
        assert min(expected["norms"]) > 1, key  # all are clipped


# --- A run ----------------------------------------------------------------------------------------


def images(count: int, seed: int) -> Tensor:
    r"""Images whose first row holds their number and whose second row tells left from right."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    found[:, 0, 0] = torch.arange(count)[:, None]
    found[:, 0, 1] = torch.tensor([0, *[9] * 7])
    return found


DATA = ImageData("numbered", images(35, 0), images(11, 1), images(5, 2), horizontal_flip=True)


def make_trainer(out: Path | None, epochs: int, **options) -> Trainer:
    elbo = Timestep_ELBO(options.pop("timesteps", "importance"), k=2)
    model = ModelConfig(latent_dim=2, width=4, num_timesteps=5, prior_width=16)
    config = TrainConfig(epochs, **{"batch_size": 11, "lr": 2e-3, "ema": 0.5} | options)
    return Trainer.from_config(model, config, elbo, DATA, out=out)


def train(out: Path | None, epochs: int, resume: bool = False, **options) -> dict:
    r"""Trains, and returns what happened in this process."""
    trainer = make_trainer(out, epochs, **options)
    seen, seeds, written = [], [], []

    def preprocess(vae, batch):
        seen.append([(int(x[0, 0, 0]), int(x[0, 1, 0])) for x in batch])  # the number, and the side
        seeds.append(torch.initial_seed())
        return real_preprocess(vae, batch)

    def replace(path, write):
        written.append(path.name)
        real_replace(path, write)

    real_preprocess, real_replace = loop.preprocess, files.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "preprocess", preprocess)
        patch.setattr(files, "replace", replace)
        if resume:
            trainer.resume()
        done = len(trainer.history)
        trainer.fit(progress=False)
    state = trainer.state_dict()
    model = {
        f"{part} {name}": x
        for part in ("vae", "average", "elbo")
        for name, x in state[part].items()
    }
    return {
        "done": done, "history": trainer.history, "seen": seen, "seeds": seeds, "written": written,
        "model": {name: x.tolist() for name, x in model.items()},
    }  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, list[dict]]:
    r"""A run of four epochs in two processes: its folder, and what happened in each."""
    out = tmp_path_factory.mktemp("straight") / "run"
    return out, together(train, 2, out, 4)


def test_each_process_has_its_share_of_the_data_and_its_own_randomness(straight):
    first, second = straight[1]
    epochs, seeds = [], set()
    for epoch in range(4):
        steps = slice(3 * epoch, 3 * epoch + 3)  # of 11 images; 2 of 35 are left out
        batches = list(zip(first["seen"][steps], second["seen"][steps], strict=True))
        assert {(len(a), len(b)) for a, b in batches} == {(5, 6)}
        epochs.append([image for a, b in batches for image in (*a, *b)])
        numbers = [number for number, _ in epochs[-1]]
        assert len(set(numbers)) == 33
        sides = {side for _, side in epochs[-1]}
        assert sides == {0, 9}  # some are flipped, and some are not
        for result in (first, second):
            (seed,) = set(result["seeds"][steps])
            seeds.add(seed)
    assert len(seeds) == 8
    assert len({str(images) for images in epochs}) == 4


def test_all_processes_agree_and_one_writes(straight):
    out, (first, second) = straight
    assert first["history"] == second["history"]
    assert first["model"] == second["model"]
    assert second["written"] == []
    assert set(first["written"]) == {"metrics.csv", "best.pt", "checkpoint.pt"}
    assert {path.name for path in out.iterdir()} == set(first["written"])
    saved = load_checkpoint(out / "checkpoint.pt")
    assert {f"vae {k}": v.tolist() for k, v in saved["vae"].items()}.items() <= first[
        "model"
    ].items()
    losses = [record["validation"] for record in first["history"]]
    assert losses[-1] < losses[0]


def test_the_validation_loss_is_the_mean_over_all_images(straight):
    out, (first, _) = straight
    trainer = make_trainer(None, 4)
    trainer.average.load_state_dict(load_checkpoint(out / "checkpoint.pt")["average"])
    loss = 0.0
    for rank, part in enumerate(DATA.validation.tensor_split(2)):  # of 6 and 5 images
        seed = distributed.fold_seed(0, rank)
        elbo = value_elbo(trainer.config.validate_k)
        terms = evaluate(trainer.current(), part, elbo, seed=seed)
        loss += len(part) * sum(terms.values()) / 11
    assert first["history"][-1]["validation"] == pytest.approx(loss, rel=1e-6)


def test_what_only_one_process_sees_reaches_all_models():
    first, second = together(train, 2, None, 1, timesteps="loss-aware")
    assert first["model"] == second["model"]
    assert len(first["model"]["elbo 0.squares"]) == 6


def test_a_resumed_run_of_two_processes_is_the_run_that_never_stopped(straight, tmp_path):
    together(train, 2, tmp_path / "run", 2)
    resumed = together(train, 2, tmp_path / "run", 4, True)
    assert [result["done"] for result in resumed] == [2, 2]
    for mine, theirs in zip(resumed, straight[1], strict=True):
        assert mine["history"] == theirs["history"]
        assert mine["model"] == theirs["model"]
        assert mine["seen"] == theirs["seen"][6:]
    metrics = [(out / "metrics.csv").read_bytes() for out in (tmp_path / "run", straight[0])]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_continues_the_run(straight, tmp_path, before, after):
    out = tmp_path / "run"
    first = together(train, before, out, 2)[0]
    results = together(train, after, out, 4, True)
    for result in results:
        assert result["done"] == 2
        assert result["history"] == results[0]["history"]
        assert result["model"] == results[0]["model"]
        assert result["history"][:2] == first["history"]
        assert result["history"][2:] != straight[1][0]["history"][2:]
    losses = [record["validation"] for record in results[0]["history"]]
    assert max(losses[2:]) < losses[0]
    assert len(load_checkpoint(out / "checkpoint.pt")["history"]) == 4
    assert min(losses) == load_checkpoint(out / "best.pt")["history"][-1]["validation"]


# --- What goes wrong ------------------------------------------------------------------------------


def diverge() -> None:
    trainer = make_trainer(None, 3)
    if distributed.rank() == 1:
        step = itertools.count(1)
        trainer.vae.decoder.maps.register_forward_hook(
            lambda module, args, output: output * float("nan") if next(step) == 2 else None
        )
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)
    trainer.fit(progress=False)


def test_a_nan_in_one_process_ends_all_at_the_same_step():
    first, second = together(diverge, 2)
    assert isinstance(first, NonFiniteError) and str(first) == str(second)
    assert str(first).startswith("step 2 (epoch 1) is not finite: x = nan")


def missing_checkpoint(out: Path) -> None:
    make_trainer(out if distributed.is_main() else Path("elsewhere"), 1).resume()


def too_small() -> None:
    make_trainer(None, 1, batch_size=1)


def test_errors(tmp_path):
    first, second = together(missing_checkpoint, 2, tmp_path)
    assert isinstance(first, FileNotFoundError) and "no checkpoint at" in str(first)
    assert isinstance(second, ConnectionError) and "another process of this run" in str(second)
    for error in together(too_small, 2):
        assert isinstance(error, ValueError)
        assert str(error).startswith(
            "batch_size must be at least the number of processes, 2, got 1"
        )


# --- From the command line ------------------------------------------------------------------------


def command(out: Path, epochs: int, *flags: str) -> list[str]:
    options = {"prior": "gaussian", "limit": 40, "width": 4, "latent-dim": 2, "batch-size": 20}
    options |= {"lr-schedule": "constant", "features": "none", "device": "cpu"}
    options |= {"epochs": epochs, "out": out}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [str(RUN), "--quiet", *flags, *words]


def workers(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for workers in /proc")
def test_a_killed_worker_ends_the_job_and_the_run_can_be_resumed(tmp_path):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(free_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [*torchrun, *command(out, 100_000)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        wait_until((out / "checkpoint.pt").exists, job)
        pids = workers(job.pid)
        assert len(pids) == 2
        os.kill(pids[1], signal.SIGKILL)
        output, errors = job.communicate(timeout=TIMEOUT)
    finally:
        job.kill()
    assert job.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert output.count("prior gaussian") == 1  # only one process prints
    assert "SIGKILL" in errors  # torchrun says what happened
    done = len(load_checkpoint(out / "checkpoint.pt")["history"])
    assert done >= 1

    # One process goes on, without torchrun.
    resumed = subprocess.run(
        [sys.executable, *command(out, done + 2, "--resume")],
        capture_output=True, text=True, timeout=TIMEOUT, env=environment,
    )  # fmt: skip
    assert (resumed.returncode, resumed.stderr) == (0, "")
    with open(out / "metrics.csv", newline="") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(1, done + 3))
    assert (out / "results.json").exists()
    assert not list(out.glob(".*"))
