r"""The bench: bias, variance and cost of every estimator, through one function.

The figure of merit of an estimator is its gradient variance times the time of a whole training
step: the variance that is left if a fixed time is spent on independent evaluations. As a multiple
of that of a baseline, it is called *effective compute multiplier*.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..infer import Timestep_ELBO
from ..vae import VAE
from .cost import count_evaluations, median_se, peak_memory, timings, whole_step
from .entry import Entry
from .gradients import Draws, draw, noise_of
from .paired import random_seeds, reseeded
from .programs import (
    Data,
    Programs,
    arguments,
    diffusion_priors,
    num_data,
    own_store,
    programs_of,
)
from .reference import ANTITHETIC_PAIRS, Reference

__all__ = [
    "add_merits",
    "draw_values",
    "measure",
    "measure_costs",
    "minibatch_noise",
    "rms_error",
    "training_step",
]

Record = dict[str, Any]


@contextmanager
def guide_order(vae: VAE | Programs, order: str | None) -> Iterator[None]:
    r"""A context inside of which the guides of a VAE's diffusion priors have an order."""
    if order is None:
        yield
        return
    if isinstance(vae, Programs):
        raise ValueError(f"order {order!r} is one of a VAE's guide: pass the VAE, not its programs")
    before = {prior: prior.order for prior in diffusion_priors(vae)}
    for prior in before:
        prior.order = order
    try:
        yield
    finally:
        for prior, old in before.items():
            prior.order = old


def training_step(entry: Entry, vae: VAE | Programs, x: Data) -> Callable[[], object]:
    r"""Returns a whole training step with an estimator, which leaves the VAE as it is.

    Arguments:
        entry: The estimator.
        vae: The VAE, or any programs.
        x: The data, with shape :math:`(B, *)`, or the arguments of the programs.
    """
    step = whole_step(entry.make(), vae, x)

    def ordered() -> object:
        with guide_order(vae, entry.order):
            return step()

    return ordered


def measure(
    entry: Entry,
    vae: VAE | Programs,
    x: Data,
    reference: Reference,
    draws: int = 100,
    seconds: float = math.inf,
    min_draws: int = 4,
    seed: int = 0,
) -> tuple[Record, Draws]:
    r"""Measures the bias and the noise of an estimator.

    The draws of all estimators that are measured with one seed have common random numbers, see
    :mod:`~pyro_vaediff.bench.paired`.

    Arguments:
        entry: The estimator.
        vae: The VAE, or any programs.
        x: The data, with shape :math:`(B, *)`, or the arguments of the programs.
        reference: What the estimator should give.
        draws: The number of independent evaluations.
        seconds: Fewer evaluations are made if they would take longer, but ``min_draws`` at least.
        min_draws: The number of evaluations that are always made.
        seed: The seed.

    Returns:
        A record for the table, and the draws.
    """
    elbo, programs = entry.make(), programs_of(vae)
    seeds = random_seeds(seed, max(draws, min_draws))
    with guide_order(vae, entry.order):
        if entry.warmup:
            draw(elbo, programs, itertools.repeat(x, entry.warmup))
        start = time.perf_counter()
        sample = draw(elbo, programs, reseeded(x, seeds[:1]))
        elapsed = time.perf_counter() - start
        count = int(max(min_draws, min(draws, seconds / elapsed)))
        rest = draw(elbo, programs, reseeded(x, seeds[1:count]))
    sample = Draws(
        torch.cat([sample.values, rest.values]),
        {name: torch.cat([g, rest.gradients[name]]) for name, g in sample.gradients.items()},
    )
    values = sample.values
    loss = noise_of(values[:, None], values.new_tensor([reference.value]))
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
        "variance": loss.variance,
        "variance_se": loss.variance_se,
    }
    if entry.predict is not None:
        predicted = entry.predict(elbo, vae, x, count)
        record["predicted_bias"] = statistics.mean(predicted)
        record["predicted_bias_se"] = statistics.stdev(predicted) / len(predicted) ** 0.5
    for name, gradients in sample.gradients.items():
        noise = noise_of(gradients, reference.gradients[name], reference.again[name])
        record |= {
            f"{name}_variance": noise.variance,
            f"{name}_variance_se": noise.variance_se,
            f"{name}_snr": noise.snr,
            f"{name}_bias": noise.bias,
            f"{name}_bias_se": math.hypot(noise.bias_se, reference.relative_se.get(name, 0.0)),
        }
    return record, sample


@torch.no_grad()
def draw_values(
    entry: Entry,
    vae: VAE | Programs,
    x: Data,
    draws: int,
    seconds: float = math.inf,
    min_draws: int = 4,
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
    elbo, programs = entry.make(), programs_of(vae)
    values: list[float] = []
    start = time.perf_counter()
    with guide_order(vae, entry.order), own_store():
        while len(values) < draws:
            loss = elbo.loss(programs.model, programs.guide, *arguments(x))
            values.append(loss / num_data(x))
            if len(values) >= min_draws and time.perf_counter() - start > seconds:
                break
    return torch.tensor(values, dtype=torch.float64)


def measure_costs(
    entries: Sequence[Entry], vae: VAE | Programs, x: Data, repeats: int = 7
) -> dict[str, Record]:
    r"""Measures time and memory of a whole training step, by estimator.

    Of a VAE with a diffusion prior, the evaluations of its networks are counted as well. Steps are
    timed in turns, the slow ones apart from the others.

    Arguments:
        entries: The estimators.
        vae: The VAE, which stays as it is, or any programs.
        x: The data, with shape :math:`(B, *)`, or the arguments of the programs.
        repeats: How many times each step is timed; once if it takes more than a second, and then
            without a standard error. With 0, there are no times: on a busy machine, they say
            nothing.
    """
    steps: dict[bool, dict[str, Callable[[], object]]] = {False: {}, True: {}}
    costs: dict[str, Record] = {}
    device = programs_of(vae).parameters[0].device
    for entry in entries:
        step = training_step(entry, vae, x)
        ((first,),) = timings([step], 1, device)
        costs[entry.name] = {}
        if isinstance(vae, VAE):
            with count_evaluations(vae) as counts:
                step()
            costs[entry.name] = {f"{n}_evaluations": c / len(x) for n, c in counts.items()}
        costs[entry.name]["megabytes"] = peak_memory(step, device) / 1e6
        steps[first > 1e3][entry.name] = step
    for slow, group in steps.items() if repeats else ():
        columns = timings(list(group.values()), 1 if slow else repeats, device)
        for name, times in zip(group, columns, strict=True):
            costs[name]["ms"] = statistics.median(times)
            if len(times) > 1:
                costs[name]["ms_se"] = median_se(times)
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
    r"""Adds to each record its effective compute multipliers, and their standard errors.

    .. math:: \frac{V_0 \, \tau_0}{V \, \tau}

    with the variance :math:`V` of the gradient of a group and the time :math:`\tau` of a step: how
    many times the baseline's compute would be needed for the same noise. The standard errors are
    those of independent variances and times; common random numbers make them smaller.

    Arguments:
        records: The records, with costs.
        baseline: The name of the estimator that the others are compared with.
    """
    reference = next((r for r in records if r["estimator"] == baseline), None)
    if reference is None:
        raise ValueError(f"records must hold the baseline {baseline!r}, to compare the others with")
    groups = [key.removesuffix("_variance") for key in reference if key.endswith("_variance")]
    for record, group in itertools.product(records, groups):
        products = [r[f"{group}_variance"] * r["ms"] for r in (reference, record)]
        merit = products[0] / products[1] if products[1] else math.inf
        relative = [
            r.get(f"{key}_se", 0.0) / r[key] if r[key] else 0.0
            for r in (reference, record)
            for key in (f"{group}_variance", "ms")
        ]
        record[f"{group}_merit"] = merit
        known = record is reference or merit == math.inf
        record[f"{group}_merit_se"] = 0.0 if known else merit * math.hypot(*relative)


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
