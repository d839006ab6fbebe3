r"""Measures what a step of SVI costs, against the same loss written by hand.

    python experiments/benchmark.py

times whole training steps (loss, gradient, clipping, Adam) and prints the ratios of their medians:

    overhead   a step of SVI with Timestep_ELBO, over a step of a loop in plain PyTorch. Both have
               the same networks, the same timesteps per datum from the same proposal with the same
               weights, and the same constants; the loop has no distribution and no effect handler.
    timesteps  a step with T = 4000, over a step with T = 10.

each with the configurations

    cifar10    3 x 32 x 32, batch 100, 100 latents, width 64: the convolutions take the time
    digits     1 x  8 x  8, batch 100,   8 latents, width 32: the smallest networks

Before anything is timed, both losses and all their gradients are compared in float64, for the same
noise: the script stops if they are not equal to ten digits.

The two steps of a ratio take turns in one process (A B, B A, A B, ...), such that other work on the
machine slows down both. A ratio is that of the medians; the quartiles are those of the ratios of
the pairs. Absolute times mean little on a busy machine. Nothing is asserted about time.

The table is printed, and written to ``--out`` as ``benchmark.md`` and ``benchmark.csv``. A whole
run takes a few minutes on two CPU cores, and ``--quick`` a few seconds, with small networks whose
ratios have no meaning.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from by_hand import ByHand, check_equal
from common import exit_on_error, parse_device, provenance
from study import table
from torch import Tensor, nn

from pyro_vaediff.arguments import folder
from pyro_vaediff.bench.cost import milliseconds
from pyro_vaediff.files import check_folder, write_atomically, write_csv
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig
from pyro_vaediff.train.optim import TorchOptim, per_datum
from pyro_vaediff.vae import VAE

CONFIGS = {
    "cifar10": ModelConfig(latent_dim=100, image_shape=(3, 32, 32), width=64),
    "digits": ModelConfig(latent_dim=8, image_shape=(1, 8, 8), width=32),
}
# The ratios that the library aims at: (measurement, configuration) -> at most.
TARGETS = {
    ("overhead", "cifar10"): 1.05,
    ("overhead", "digits"): 1.5,
    ("timesteps", "cifar10"): 1.1,
    ("timesteps", "digits"): 1.1,
}
BATCH_SIZE, K, LR, CLIP_NORM = 100, 8, 5e-4, 100.0


# Steps --------------------------------------------------------------------------------------------


def svi_step(vae: VAE) -> Callable[[Tensor], object]:
    optim = TorchOptim(torch.optim.Adam(vae.parameters(), lr=LR), CLIP_NORM)
    programs = per_datum(vae.model), per_datum(vae.guide)
    return pyro.infer.SVI(*programs, optim, loss=Timestep_ELBO(k=K)).step


def step_by_hand(vae: VAE) -> Callable[[Tensor], object]:
    by_hand, parameters = ByHand(vae, K), list(vae.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LR)

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


def measure(
    name: str, config: ModelConfig, batch_size: int, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    r"""Returns a record for each measurement with a configuration."""

    def make(num_timesteps: int) -> VAE:
        torch.manual_seed(0)
        return make_vae(replace(config, num_timesteps=num_timesteps)).to(device)

    vae = make(1000)
    x = torch.rand(batch_size, *config.image_shape, device=device) * 2 - 1
    check_equal(vae, x[:4], K)
    print(f"{name}: the losses and their gradients are equal", flush=True)

    measurements = {
        "overhead": (svi_step(copy.deepcopy(vae)), step_by_hand(vae)),
        "timesteps": (svi_step(make(4000)), svi_step(make(10))),
    }
    records = []
    for what, steps in measurements.items():
        times = interleave(steps, x, repeats, warmup=max(2, repeats // 6))
        medians = [statistics.median(column) for column in times]
        ratios = [a / b for a, b in zip(*times, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        records.append(
            {
                "measurement": what,
                "configuration": name,
                "median_ms": round(medians[0], 3),
                "reference_ms": round(medians[1], 3),
                "ratio": round(medians[0] / medians[1], 3),
                "lower_quartile": round(low, 3),
                "upper_quartile": round(high, 3),
                "target": TARGETS[what, name],
            }
        )
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
        records += measure(name, config, batch_size, args.device, repeats)

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
