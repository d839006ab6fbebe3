r"""What evaluation and sampling take, and the matrix products that they cannot do without.

``benchmark.py`` compares them. Everything is timed in turns in one process; the time of a large
product says what the machine is capable of.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vaediff.bench.cost import milliseconds
from pyro_vaediff.infer import Timestep_ELBO
from pyro_vaediff.nn import ResidualMLP
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.sampling import ancestral

__all__ = ["command", "exhaustive", "matrix_products", "sampler"]

Times = list[float]


def make_prior(
    device: torch.device, latent_dim: int, num_timesteps: int
) -> tuple[DiffusionPrior, ResidualMLP]:
    r"""Returns a diffusion prior and its network, which is not zero."""
    torch.manual_seed(0)
    net = ResidualMLP(latent_dim)
    prior = DiffusionPrior(latent_dim, num_timesteps, backbone=net).to(device).eval()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.03)
    return prior, net


def linear_layers(net: ResidualMLP) -> list[nn.Linear]:
    r"""Returns the layers that see every latent, in their order."""
    blocks = [layer for block in net.blocks for layer in (block.first, block.second)]
    return cast("list[nn.Linear]", [net.inputs, *blocks, net.outputs])


def matrix_products(net: ResidualMLP, z: Tensor) -> Tensor:
    r"""Returns what the matrix products of a network make of latents, one after the other."""
    for rows in z.split(net.rows):
        for layer in linear_layers(net):
            rows = rows @ layer.weight.T
    return rows


def flops(net: ResidualMLP, num_rows: int) -> int:
    r"""Returns the operations of these products: two per weight and row."""
    return 2 * num_rows * sum(layer.weight.numel() for layer in linear_layers(net))


def in_turns(device: torch.device, repeats: int, *steps: Callable[[], object]) -> list[Times]:
    r"""Returns the times of each of some steps in milliseconds, measured in turns."""
    times: list[Times] = [[] for _ in steps]
    for _ in range(repeats):
        for column, step in zip(times, steps, strict=True):
            column.append(milliseconds(step, device))
    return times


@torch.no_grad()
def exhaustive(device: torch.device, repeats: int, quick: bool) -> tuple[Times, Times, Times]:
    r"""Returns the times of a bound of all timesteps, of its products, and of these at the peak."""
    T, size, side = (10, 8, 64) if quick else (1000, 100, 2048)
    prior, net = make_prior(device, 100, T)
    elbo = Timestep_ELBO("all", entropy="exact")
    loc = torch.randn(size, 100, device=device)

    def guide() -> None:
        with pyro.plate("data", size, dim=-1):
            prior.guide(dist.Normal(loc, torch.full_like(loc, 0.3)).to_event(1))

    def model() -> None:
        with pyro.plate("data", size, dim=-1):
            prior.model()

    z, square = loc.repeat(T, 1), torch.randn(side, side, device=device)
    steps = (
        lambda: elbo.loss(model, guide),
        lambda: matrix_products(net, z),
        lambda: square @ square,
    )
    in_turns(device, 1, *steps)  # the first turn warms up
    bound, products, large = in_turns(device, repeats, *steps)
    share = flops(net, len(z)) / (2 * side**3)
    return bound, products, [share * elapsed for elapsed in large]


@torch.no_grad()
def sampler(device: torch.device, repeats: int, quick: bool) -> tuple[Times, Times]:
    r"""Returns the times of ancestral latents, and of the products of their denoiser."""
    T, count = (10, 20) if quick else (1000, 10_000)
    prior, net = make_prior(device, 100, T)
    z = torch.randn(count, 100, device=device)

    def products() -> None:
        for _ in range(T):
            matrix_products(net, z)

    samples, floor = in_turns(device, repeats, lambda: ancestral(prior, count), products)
    return samples, floor


def command(quick: bool) -> float:
    r"""Returns the time of the default run in milliseconds, with its start and its pictures."""
    with tempfile.TemporaryDirectory() as out:
        options = ["--quiet", "--out", str(Path(out) / "run")]
        options += ["--epochs", "1", "--limit", "40", "--features", "none"] if quick else []
        start = time.perf_counter()
        argv = [sys.executable, "-m", "pyro_vaediff", *options]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        return 1e3 * (time.perf_counter() - start)
