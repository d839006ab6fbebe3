r"""Compares estimators of the ELBO on one model: bias, variance and cost.

    python experiments/compare_estimators.py --checkpoint runs/digits-diffusion-s0
    python experiments/compare_estimators.py --oracle

The model is that of a run of ``run.py`` with a diffusion prior, also on latents that are images or
in a hierarchy, at every epoch that ``--snapshots`` of ``run.py`` has kept and at its best one; or
with ``--oracle`` a linear-Gaussian VAE, whose ELBO and gradient have a closed form, before, while
and after it is fitted to data. All estimators see the same minibatches. Those that unroll the whole
chain, which takes seconds at T = 1000, are on the bench at the last moment only. Those that are not
legal for the model are left out, and the page says why. Measured are

    bias        against the closed form, or the mean over all timesteps and many particles, with a
                95 % confidence interval; for the counter-examples, beside the predicted one
    sd          of the value, in nats per datum
    variance    of the gradient of the encoder, the decoder and the prior (the trace of its
                covariance), and the signal-to-noise ratio
    cost        evaluations of the networks, milliseconds of a whole training step (its median,
                measured in turns with the others), peak memory of the tensors that the step makes
    merit       the effective compute multiplier: variance x time of one uniform timestep per datum,
                given z_0, which is the paper's choice, as a multiple of the estimator's. Larger is
                better.

Numbers are means over ``--minibatches``, with ``--draws`` on each. An error is that of the spread
over minibatches, or that of the draws if it is larger.

Variances may be measured on a busy machine, times only on an idle one. With ``--no-time`` no step
is timed; with ``--only-time`` nothing else is done. Either may come first, with one ``--out``:
the page then has the times, and says on what they were measured.

For a model of your own, and in a few lines, see ``pyro_vaediff.bench.compare``.

The folder ``--out`` then holds

    estimators.csv              everything, a row per estimator and moment of training
    measured.json               what is behind the page beside times
    times.csv                   the times of a step
    settings.json               what was measured, which is the same for all of these files
    estimators.md               the page to read, with the command, the seed and the machine
    pareto-MODULE.png           variance against cost, at the last moment
    convergence.png, .csv       error of the value against the number of samples
    gradient_noise.png, .csv    gradient noise by timestep, and what the proposals make of it

To put another estimator on the bench, add an entry to ``experiments/estimators/entries.py``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import shlex
import sys
import warnings
from pathlib import Path

import pyro
import torch
from common import exit_on_error, parse_device, provenance
from estimators import write_report
from estimators.measure import choose, measure_all, split_refused
from study import check_settings
from torch import Tensor

from pyro_vaediff.arguments import check_seed, folder
from pyro_vaediff.bench import diffusion_priors, measure_costs
from pyro_vaediff.evaluate import preprocess
from pyro_vaediff.files import check_folder, read_json, write_csv, write_json
from pyro_vaediff.testing import Oracle, linear_gaussian_vae
from pyro_vaediff.train.runs import BEST, load_checkpoint, load_data, load_vae
from pyro_vaediff.vae import VAE


def moments_of(run: Path, device: torch.device) -> dict[str, VAE]:
    r"""Returns the models that a run has kept, by the moment of training."""
    best = run / BEST if run.is_dir() else run
    paths = [p for p in best.parent.glob("epoch-*.pt") if p.stem[6:].isdecimal()]
    paths = sorted(paths, key=lambda path: int(path.stem[6:]))
    moments = {f"epoch {path.stem[6:]}": path for path in paths} if run.is_dir() else {}
    epoch = load_checkpoint(best).get("best_epoch")
    moments.pop(f"epoch {epoch}", None)
    moments[f"epoch {epoch} (best)" if epoch else best.stem] = best
    if "epoch 0" in moments:
        moments = {"initial": moments.pop("epoch 0")} | moments
    return {name: load_vae(path, device)[0] for name, path in moments.items()}


def load_run(args: argparse.Namespace) -> tuple[dict[str, VAE], Tensor]:
    r"""Returns the models of a run, and minibatches of its data, one per row."""
    moments = moments_of(args.checkpoint, args.device)
    vae = list(moments.values())[-1]
    try:
        diffusion_priors(vae)
    except ValueError as error:
        raise ValueError(f"--checkpoint {args.checkpoint}: {error}") from error
    data = load_data(args.checkpoint, args.root, not args.no_download, args.groups)
    count = args.batch_size * args.num_batches
    if len(data.train) < count:
        raise ValueError(
            f"--batch-size {args.batch_size} times {args.num_batches} must be at most the "
            f"{len(data.train)} training images: --minibatches or --noise-minibatches is that many"
        )
    chosen = torch.randperm(len(data.train))[:count]
    x = preprocess(vae, data.train[chosen])
    return moments, x.unflatten(0, (args.num_batches, args.batch_size))


def load_oracle(args: argparse.Namespace) -> tuple[dict[str, VAE], Tensor]:
    r"""Returns the linear-Gaussian VAE while it is fitted, and minibatches of its first data."""
    vae = linear_gaussian_vae(args.num_timesteps, seed=args.seed).to(args.device)
    with torch.no_grad():
        x = vae.model(num_samples=args.batch_size * args.num_batches)
    adam, moments = torch.optim.Adam(vae.parameters(), lr=0.02), {}
    for step in range(401):
        if step in (0, 40, 400):
            moments["initial" if step == 0 else f"{step} steps"] = copy.deepcopy(vae)
        adam.zero_grad()
        Oracle(vae, x).negative_elbo.mean().backward()
        adam.step()
    vae.zero_grad()
    return moments, x.unflatten(0, (args.num_batches, args.batch_size))


# The script ---------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, metavar="RUN", help="a run directory of run.py")
    what.add_argument("--oracle", action="store_true", help="the linear-Gaussian VAE")
    parser.add_argument("--root", default="data", help="where the run's data are (%(default)s)")
    parser.add_argument("--groups", type=Path, metavar="FILE", help="the run's list of groups")
    parser.add_argument("--no-download", action="store_true", help="never download data")
    parser.add_argument(
        "--only", nargs="*", default=(), metavar="TEXT", help="estimators with this in their name"
    )
    parser.add_argument(
        "--draws", type=int, help="evaluations per estimator and minibatch (100; oracle 150)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="fewer draws of an estimator of all timesteps if they take longer, 4 at least (60)",
    )
    parser.add_argument("--batch-size", type=int, help="(100; oracle 20)")
    parser.add_argument("--minibatches", type=int, help="to be averaged over (3; oracle 3)")
    parser.add_argument("--noise-minibatches", type=int, help="for the minibatch's own noise (12)")
    parser.add_argument(
        "--num-timesteps", type=int, default=8, help="T of the oracle (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed steps (%(default)s)")
    timing = parser.add_mutually_exclusive_group()
    timing.add_argument("--no-time", action="store_true", help="time no steps, on a busy machine")
    timing.add_argument("--only-time", action="store_true", help="do nothing but to time steps")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", type=parse_device, default="cpu", help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few draws of small batches")
    parser.add_argument("--title", help="of the page (oracle, or the name of the run)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--out", type=folder, help="(runs/estimators-NAME)")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv

    quick, oracle = args.quick, args.oracle
    defaults = {
        "draws": 8 if quick else 150 if oracle else 100,
        "seconds": 0.2 if quick else 60.0,
        "batch_size": 4 if quick else 20 if oracle else 100,
        "minibatches": 2 if quick else 3,
        "noise_minibatches": 3 if quick else 12,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.values = 16 if quick else 2048 if oracle else 512
    args.min_draws = 2 if quick else 4
    args.points, args.noise_draws, args.noise_data = (4, 1, 2) if quick else (20, 2, 20)
    args.repeats = 1 if quick else args.repeats
    least = {"draws": 4, "batch_size": 1, "minibatches": 1, "noise_minibatches": 2, "repeats": 1}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least {bound}, got {getattr(args, name)}")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds must be positive and finite, got {args.seconds}")
    args.num_batches = max(args.minibatches, args.noise_minibatches)
    name = "oracle" if oracle else args.checkpoint.resolve().name
    args.out = args.out or Path("runs") / f"estimators-{name}"
    args.title = args.title or name
    return args


def read_times(path: Path) -> tuple[dict[str, dict[str, float]], str]:
    r"""Returns the times by estimator, and the machine; nothing if they were not measured."""
    if not path.exists():
        return {}, ""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    times = {
        row["estimator"]: {key: float(row[key]) for key in ("ms", "ms_se") if row.get(key)}
        for row in rows
    }
    return times, rows[0]["machine"]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--out", args.out)
    check_seed(args.seed, "--seed")
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)
    warnings.filterwarnings("ignore", "Failed to verify mean field restriction")
    torch.manual_seed(args.seed)
    entries, machine = choose(args.only), provenance(args.device)
    moments, x = (load_oracle if args.oracle else load_run)(args)
    settings = {
        "model": "oracle" if args.oracle else str(args.checkpoint),
        "batch_size": args.batch_size,
        "num_timesteps": args.num_timesteps if args.oracle else None,
        "device": args.device.type,
    }
    check_settings(args.out / "settings.json", settings)

    measured = args.out / "measured.json"
    if not args.only_time:
        cut = f"; where all timesteps are evaluated, as many as take {args.seconds:g} s"
        caption = (
            f"`{shlex.join(['python', 'experiments/compare_estimators.py', *args.argv])}`: "
            f"{args.minibatches} minibatches of {args.batch_size}, {args.draws} draws each{cut}; "
            f"seed {args.seed}, on {machine}."
        )
        found = measure_all(entries, moments, x, args)
        write_json(measured, {"title": args.title, "caption": caption} | found)
    if not args.no_time:
        vae = list(moments.values())[-1]
        kept, _ = split_refused(entries, vae, x[0, :2])
        costs = measure_costs(kept, vae, x[0], args.repeats)
        keys = ("ms", "ms_se")
        rows = [
            {"estimator": name, **{k: c[k] for k in keys if k in c}, "machine": machine}
            for name, c in costs.items()
        ]
        write_csv(args.out / "times.csv", rows)
    if measured.exists():
        text = write_report(args.out, read_json(measured), *read_times(args.out / "times.csv"))
        print(f"\n{text}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
