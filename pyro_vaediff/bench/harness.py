r"""The bench: bias, variance and cost of every estimator, through one function.

The figure of merit of an estimator is its gradient variance times the time of a whole training
step: the variance that is left if a fixed time is spent on independent evaluations. It is compared
with that of the paper's choice, one uniform timestep per datum given :math:`z_0`.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ..infer import Timestep_ELBO, differentiable_terms, particle_options
from ..sampling.solvers import check_diffusion
from ..testing.oracle import Oracle
from ..vae import VAE
from .cost import count_evaluations, peak_memory, step_times, whole_step
from .entry import Entry
from .gradients import Draws, draw, noise_of

__all__ = [
    "Reference",
    "add_merits",
    "draw_values",
    "exact_reference",
    "exhaustive_reference",
    "measure",
    "measure_costs",
    "minibatch_noise",
    "rms_error",
    "training_step",
]

ANTITHETIC_PAIRS = particle_options(2) | {"antithetic": True}
MODULES = ("encoder", "decoder", "prior")
Record = dict[str, Any]


@contextmanager
def guide_order(vae: VAE, order: str) -> Iterator[None]:
    r"""A context inside of which the guide of a VAE's diffusion prior has an order."""
    prior = check_diffusion(vae.prior)
    before, prior.order = prior.order, order
    try:
        yield
    finally:
        prior.order = before


def training_step(entry: Entry, vae: VAE, x: Tensor) -> Callable[[], object]:
    r"""Returns a whole training step with an estimator, which leaves the VAE as it is.

    Arguments:
        entry: The estimator.
        vae: The VAE.
        x: The data, with shape :math:`(B, *)`.
    """
    step = whole_step(entry.make(), vae, x)

    def ordered() -> object:
        with guide_order(vae, entry.order):
            return step()

    return ordered


@dataclass(frozen=True)
class Reference:
    r"""The value that an estimator of the bound should have on average.

    Arguments:
        value: The negative ELBO, in nats per datum.
        value_se: Its standard error, zero if it is exact.
        gradients: Its gradient with respect to the parameters of each module.
        again: An independent estimate of the gradients, or the same ones if they are exact.
        evidence: :math:`\log p(x)`, in nats per datum, if it is known.
    """

    value: float
    value_se: float
    gradients: dict[str, Tensor]
    again: dict[str, Tensor]
    evidence: float | None = None


def exact_reference(vae: VAE, x: Tensor) -> Reference:
    r"""Returns the closed forms of a linear-Gaussian VAE."""
    oracle = Oracle(vae, x)
    loss = oracle.negative_elbo.mean()
    gradients = {}
    for name, module in vae.named_children():
        grads = torch.autograd.grad(
            loss, list(module.parameters()), retain_graph=True, materialize_grads=True
        )
        gradients[name] = torch.cat([grad.flatten() for grad in grads])
    return Reference(loss.item(), 0.0, gradients, gradients, oracle.log_evidence.mean().item())


def exhaustive_reference(vae: VAE, x: Tensor, draws: int = 8) -> Reference:
    r"""Returns the mean over draws of all timesteps, with antithetic pairs of particles."""
    elbo = Timestep_ELBO("all", **ANTITHETIC_PAIRS)
    reference = draw(elbo, vae, itertools.repeat(x, draws))
    return Reference(
        reference.values.mean().item(),
        reference.values.std().item() / draws**0.5,
        {name: rows[::2].mean(0) for name, rows in reference.gradients.items()},
        {name: rows[1::2].mean(0) for name, rows in reference.gradients.items()},
    )


def measure(
    entry: Entry,
    vae: VAE,
    x: Tensor,
    reference: Reference,
    draws: int = 40,
    seconds: float = math.inf,
    min_draws: int = 4,
) -> tuple[Record, Draws]:
    r"""Measures the bias and the noise of an estimator.

    Arguments:
        entry: The estimator.
        vae: The VAE.
        x: The data, with shape :math:`(B, *)`.
        reference: What the estimator should give.
        draws: The number of independent evaluations.
        seconds: Fewer evaluations are made if they would take longer, but ``min_draws`` at least.
        min_draws: The number of evaluations that are always made.

    Returns:
        A record for the table, and the draws.
    """
    elbo = entry.make()
    with guide_order(vae, entry.order):
        with pyro.get_param_store().scope():
            for _ in range(entry.warmup):
                differentiable_terms(elbo, vae.model, vae.guide, x)
        start = time.perf_counter()
        sample = draw(elbo, vae, [x])
        elapsed = time.perf_counter() - start
        count = int(max(min_draws, min(draws, seconds / elapsed)))
        rest = draw(elbo, vae, itertools.repeat(x, count - 1))
    sample = Draws(
        torch.cat([sample.values, rest.values]),
        {name: torch.cat([g, rest.gradients[name]]) for name, g in sample.gradients.items()},
    )
    values = sample.values.double()
    record: Record = {
        "estimator": entry.name,
        "group": entry.group,
        "counterexample": entry.counterexample,
        "draws": count,
        "bias": values.mean().item() - reference.value,
        "bias_se": math.hypot(values.std().item() / count**0.5, reference.value_se),
        "predicted_bias": 0.0,
        "predicted_bias_se": 0.0,
        "sd": values.std().item(),
    }
    if entry.predict is not None:
        predicted = entry.predict(elbo, vae, x, count)
        record["predicted_bias"] = statistics.mean(predicted)
        record["predicted_bias_se"] = statistics.stdev(predicted) / len(predicted) ** 0.5
    for module in MODULES:
        noise = noise_of(
            sample.gradients[module], reference.gradients[module], reference.again[module]
        )
        record |= {
            f"{module}_variance": noise.variance,
            f"{module}_variance_se": noise.variance_se,
            f"{module}_snr": noise.snr,
            f"{module}_bias": noise.bias,
            f"{module}_bias_se": noise.bias_se,
        }
    return record, sample


@torch.no_grad()
def draw_values(
    entry: Entry, vae: VAE, x: Tensor, draws: int, seconds: float = math.inf, min_draws: int = 4
) -> Tensor:
    r"""Draws the loss alone, without its gradient.

    Arguments:
        entry: The estimator.
        vae: The VAE.
        x: The data, with shape :math:`(B, *)`.
        draws: The number of independent evaluations.
        seconds: The time after which no new one begins, if there are ``min_draws``.
        min_draws: The number of evaluations that are always made.

    Returns:
        The losses in nats per datum, with shape :math:`(N,)`.
    """
    elbo = entry.make()
    values: list[float] = []
    start = time.perf_counter()
    with guide_order(vae, entry.order), pyro.get_param_store().scope():
        while len(values) < draws:
            values.append(elbo.loss(vae.model, vae.guide, x) / len(x))
            if len(values) >= min_draws and time.perf_counter() - start > seconds:
                break
    return torch.tensor(values, dtype=torch.float64)


def measure_costs(
    entries: Sequence[Entry], vae: VAE, x: Tensor, repeats: int = 7
) -> dict[str, Record]:
    r"""Measures network evaluations, time and memory of a whole training step, by estimator.

    Steps are timed in turns, the slow ones apart from the others.

    Arguments:
        entries: The estimators.
        vae: The VAE, which stays as it is.
        x: The data, with shape :math:`(B, *)`.
        repeats: How many times each step is timed; once if it takes more than a second.
    """
    steps: dict[bool, dict[str, Callable[[], object]]] = {False: {}, True: {}}
    costs: dict[str, Record] = {}
    for entry in entries:
        step = training_step(entry, vae, x)
        (first,) = step_times([step], 1, x.device)
        with count_evaluations(vae) as counts:
            peak = peak_memory(step, x.device)
        costs[entry.name] = {
            **{f"{name}_evaluations": count / len(x) for name, count in counts.items()},
            "megabytes": peak / 1e6,
        }
        steps[first > 1e3][entry.name] = step
    for slow, group in steps.items():
        times = step_times(list(group.values()), 1 if slow else repeats, x.device)
        for name, milliseconds in zip(group, times, strict=True):
            costs[name]["ms"] = milliseconds
    return costs


def minibatch_noise(vae: VAE, batches: Sequence[Tensor]) -> dict[str, float]:
    r"""Returns the gradient variance that is due to which data are in a minibatch, by module.

    Below that, an estimator with less noise buys nothing. It is the covariance of two gradients of
    the same minibatches, whose own noise is independent.

    Arguments:
        vae: The VAE.
        batches: Several minibatches of different data.
    """
    elbo = Timestep_ELBO(**ANTITHETIC_PAIRS)
    one, other = (draw(elbo, vae, batches).gradients for _ in range(2))
    products = {n: (g - g.mean(0)) * (other[n] - other[n].mean(0)) for n, g in one.items()}
    return {n: max(0.0, p.sum().item() / (len(batches) - 1)) for n, p in products.items()}


def add_merits(records: Sequence[Record], baseline: str) -> None:
    r"""Adds to each record how many times better its variance × time is than the baseline's.

    Arguments:
        records: The records, with costs.
        baseline: The name of the estimator that the others are compared with.
    """
    reference = next((r for r in records if r["estimator"] == baseline), None)
    if reference is None:
        raise ValueError(f"records must hold the baseline {baseline!r}, to compare the others with")
    for record in records:
        for module in MODULES:
            products = [r[f"{module}_variance"] * r["ms"] for r in (reference, record)]
            record[f"{module}_merit"] = products[0] / products[1] if products[1] else math.inf


def rms_error(values: Tensor, reference: float) -> tuple[Tensor, Tensor]:
    r"""Returns the root mean square error of means over samples.

    Arguments:
        values: Independent samples, with shape :math:`(N,)`.
        reference: The true mean.

    Returns:
        The numbers of samples :math:`1, 2, 4, \dots \leq N / 4`, and the errors, both with shape
        :math:`(n,)`.
    """
    samples = [2**i for i in range(max(1, int(math.log2(len(values))) - 1))]
    errors = []
    for n in samples:
        means = values[: len(values) // n * n].reshape(-1, n).mean(1)
        errors.append((means - reference).square().mean().sqrt())
    return torch.tensor(samples), torch.stack(errors)
