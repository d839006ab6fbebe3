r"""Measures what a step of SVI costs, against the same loss written by hand.

    python experiments/benchmark.py

times training steps (loss, gradient, clipping, AdamW), evaluation and sampling, and prints the
ratios of their medians:

    overhead    a step of SVI with Timestep_ELBO as the trainer takes it, over a step of a loop in
                plain PyTorch. Both have the same networks and optimizer, the same timesteps per
                datum from the same proposal with the same weights, and the same constants; the loop
                has no distribution and no effect handler.
    plain-svi   the same with pyro.infer.SVI, which registers all parameters in every step.
    timesteps   a step with T = 4000, over a step with T = 10.
    bf16        a training step with bfloat16 and channels last, over one with float32
                (convolutions: cifar10 only). Their losses are compared first.
    exhaustive  the bound of 100 data over all T = 1000 timesteps, over the matrix products of its
                denoiser alone, and over the time that they would take at the rate of one large
                product (sgemm): the inverse of the share of the peak.
    sampler     10,000 ancestral latents with T = 1000, over the matrix products of the denoiser.
    command     ``python -m pyro_vaediff``, training, evaluation and pictures, over 15 seconds.

``--only`` selects some of them. Steps have the configurations

    cifar10    3 x 32 x 32, batch 100, 100 latents, width 64: the convolutions take the time
    digits     1 x  8 x  8, batch 100,   8 latents, width 32: the smallest networks

Before anything is timed, the losses of SVI and of the loop and all their gradients are compared in
float64, for the same noise: the script stops if they are not equal to ten digits.

The two steps of a ratio take turns in one process (A B, B A, A B, ...), such that other work on the
machine slows down both. A ratio is that of the medians; the quartiles are those of the ratios of
the pairs. Absolute times mean little on a busy machine. Nothing is asserted about time.

The table is printed, and written to ``--out`` as ``benchmark.md`` and ``benchmark.csv``. A whole
run takes some ten minutes on two CPU cores, most of them for ``sampler``, and ``--quick`` a few
seconds and the command, with small networks whose ratios have no meaning.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from by_hand import ByHand, check_equal
from common import exit_on_error, parse_device, provenance
from floors import command, exhaustive, sampler
from study import table
from torch import Tensor, nn

from pyro_vaediff.arguments import folder
from pyro_vaediff.bench.cost import milliseconds
from pyro_vaediff.evaluate import evaluating
from pyro_vaediff.files import check_folder, write_atomically, write_csv
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.nn.modes import use_channels_last
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig
from pyro_vaediff.train.optim import TorchOptim, make_svi, per_datum
from pyro_vaediff.vae import VAE

CONFIGS = {
    "cifar10": ModelConfig(latent_dim=100, image_shape=(3, 32, 32), width=64),
    "digits": ModelConfig(latent_dim=8, image_shape=(1, 8, 8), width=32),
}
# The ratios that the library aims at: (measurement, configuration) -> at most.
TARGETS = {
    ("overhead", "cifar10"): 1.02,
    ("overhead", "digits"): 1.08,
    ("plain-svi", "cifar10"): 1.05,
    ("plain-svi", "digits"): 1.5,
    ("timesteps", "cifar10"): 1.1,
    ("timesteps", "digits"): 1.1,
    ("bf16", "cifar10"): 0.55,
    ("exhaustive", "matrix products"): 1.25,
    ("exhaustive", "sgemm peak"): 1.54,  # a share of 0.65
    ("sampler", "matrix products"): 1.2,
    ("command", "digits"): 1.0,
}
MEASUREMENTS = tuple(dict.fromkeys(name for name, _ in TARGETS))
BATCH_SIZE, K, LR, CLIP_NORM = 100, 8, 5e-4, 100.0


# Steps --------------------------------------------------------------------------------------------


def optimizer_of(vae: VAE) -> torch.optim.Optimizer:
    return torch.optim.AdamW(vae.parameters(), lr=LR, weight_decay=0.0, fused=True)


def trainer_step(vae: VAE) -> Callable[[Tensor], object]:
    optim, model, guide = TorchOptim(optimizer_of(vae), CLIP_NORM), vae.model, vae.guide
    return make_svi(per_datum(model), per_datum(guide), optim, Timestep_ELBO(k=K)).step


def svi_step(vae: VAE) -> Callable[[Tensor], object]:
    optim, model, guide = TorchOptim(optimizer_of(vae), CLIP_NORM), vae.model, vae.guide
    return pyro.infer.SVI(per_datum(model), per_datum(guide), optim, Timestep_ELBO(k=K)).step


def bf16_step(vae: VAE) -> Callable[[Tensor], object]:
    use_channels_last(vae)
    step, device = trainer_step(vae), next(vae.parameters()).device.type

    def autocast(x: Tensor) -> object:
        with torch.autocast(device, torch.bfloat16):
            return step(x)

    return autocast


def check_bf16(vae: VAE, x: Tensor) -> None:
    r"""Raises unless the losses in both precisions are the same to 1e-2, for the same noise."""
    losses, elbo = [], Timestep_ELBO(k=K)
    half = copy.deepcopy(vae)
    use_channels_last(half)
    for net, enabled in ((vae, False), (half, True)):
        torch.manual_seed(0)
        with evaluating(net, 0), torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            losses.append(elbo.loss(per_datum(net.model), per_datum(net.guide), x))
    if not abs(losses[1] / losses[0] - 1) < 1e-2:
        raise RuntimeError(f"bf16 and float32 differ in the loss: {losses[1]} and {losses[0]}")


def step_by_hand(vae: VAE) -> Callable[[Tensor], object]:
    by_hand, parameters = ByHand(vae, K), list(vae.parameters())
    optimizer = optimizer_of(vae)

    def step(x: Tensor) -> Tensor:
        loss = by_hand.loss(x, *by_hand.draw(x))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def interleave(
    steps: tuple[Callable[[Tensor], object], ...], x: Tensor, repeats: int, warmup: int
) -> list[list[float]]:
    r"""Returns the times of each of the steps in milliseconds, measured in turns."""
    times: list[list[float]] = [[], []]
    for i in range(warmup + repeats):
        for j in (0, 1) if i % 2 == 0 else (1, 0):
            elapsed = milliseconds(partial(steps[j], x), x.device)
            if i >= warmup:
                times[j].append(elapsed)
    return times


def record(what: str, name: str, times: list[list[float]]) -> dict[str, Any]:
    r"""Returns a row of the table, from the times of a measurement and of its reference."""
    medians = [statistics.median(column) for column in times]
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4)
    return {
        "measurement": what,
        "configuration": name,
        "median_ms": round(medians[0], 3),
        "reference_ms": round(medians[1], 3),
        "ratio": round(medians[0] / medians[1], 3),
        "lower_quartile": round(low, 3),
        "upper_quartile": round(high, 3),
        "target": TARGETS[what, name],
    }


def measure(
    name: str,
    config: ModelConfig,
    batch_size: int,
    device: torch.device,
    repeats: int,
    only: Sequence[str],
) -> list[dict[str, Any]]:
    r"""Returns a record for each measurement of steps with a configuration."""

    def make(num_timesteps: int) -> VAE:
        torch.manual_seed(0)
        return make_vae(replace(config, num_timesteps=num_timesteps)).to(device)

    vae = make(1000)
    x = torch.rand(batch_size, *config.image_shape, device=device) * 2 - 1
    check_equal(vae, x[:4], K)
    print(f"{name}: the losses and their gradients are equal", flush=True)

    measurements = {
        "overhead": lambda: (trainer_step(copy.deepcopy(vae)), step_by_hand(vae)),
        "plain-svi": lambda: (svi_step(copy.deepcopy(vae)), step_by_hand(vae)),
        "timesteps": lambda: (trainer_step(make(4000)), trainer_step(make(10))),
        "bf16": lambda: (bf16_step(copy.deepcopy(vae)), trainer_step(vae)),
    }
    records = []
    for what in only:
        if what not in measurements or (what, name) not in TARGETS:
            continue
        if what == "bf16":
            check_bf16(vae, x)
            print(f"{name}: the losses in bf16 and float32 are equal to 1e-2", flush=True)
        times = interleave(measurements[what](), x, repeats, warmup=max(2, repeats // 6))
        records.append(record(what, name, times))
    return records


def measure_floors(
    device: torch.device, repeats: int, only: Sequence[str], quick: bool
) -> list[dict[str, Any]]:
    r"""Returns a record for each measurement that is compared with matrix products, or a goal."""
    records = []
    if "exhaustive" in only:
        bound, products, peak = exhaustive(device, repeats, quick)
        records.append(record("exhaustive", "matrix products", [bound, products]))
        records.append(record("exhaustive", "sgemm peak", [bound, peak]))
    if "sampler" in only:
        times = list(sampler(device, max(1, repeats // 3), quick))
        records.append(record("sampler", "matrix products", times))
    if "command" in only:
        records.append(record("command", "digits", [[command(quick)], [15e3]]))
    return records


# The table ----------------------------------------------------------------------------------------


def markdown(records: list[dict[str, Any]], caption: str) -> str:
    header = ("measurement", "configuration", "step (ms)", "reference (ms)", "ratio", "quartiles")
    rows = [
        [
            r["measurement"],
            r["configuration"],
            f"{r['median_ms']:.2f}",
            f"{r['reference_ms']:.2f}",
            f"{r['ratio']:.3f}",
            f"{r['lower_quartile']:.2f} to {r['upper_quartile']:.2f}",
            f"≤ {r['target']}",
        ]
        for r in records
    ]
    return "\n".join([caption, "", *table([*header, "target"], rows)]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", type=parse_device, default="cpu", help="cpu, cuda, ... (%(default)s)"
    )
    parser.add_argument(
        "--configurations", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="(all)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="(all)"
    )
    parser.add_argument("--repeats", type=int, default=60, help="steps per median (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small networks, few repeats")
    parser.add_argument("--out", type=folder, default=Path("runs/benchmark"), help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    check_folder("--out", args.out)

    # Checks of arguments are for tests and for learning, not for long runs.
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)

    batch_size, repeats = (8, 3) if args.quick else (BATCH_SIZE, args.repeats)
    records = []
    for name in args.configurations:
        config = CONFIGS[name]
        if args.quick:
            config = replace(config, width=4, latent_dim=3)
        records += measure(name, config, batch_size, args.device, repeats, args.only)
    records += measure_floors(args.device, max(1, repeats // 12), args.only, args.quick)

    caption = (
        f"Medians of {repeats} steps, batch {batch_size}, k = {K}, on {provenance(args.device)}"
        f"{' (--quick: small networks, ratios without meaning)' if args.quick else ''}."
    )
    text = markdown(records, caption)
    print(f"\n{text}")
    write_csv(args.out / "benchmark.csv", records)
    write_atomically(args.out / "benchmark.md", lambda file: file.write(text.encode()))
    print(f"written to {args.out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
