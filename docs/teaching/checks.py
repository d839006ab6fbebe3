r"""What the assignments ask for, as functions that check a student's answer.

A check takes the student's function and raises an ``AssertionError`` that says what is wrong. It
computes what is right in another way than a solution would, so that it gives none away.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_vaediff import DiffusionPrior
from pyro_vaediff.diffusion import q_marginal, q_reverse
from pyro_vaediff.schedules import Schedule

__all__ = ["TASKS", "Task", "verdict"]

BETAS = torch.tensor([0.05, 0.1, 0.2, 0.4], dtype=torch.float64)


class Task(NamedTuple):
    r"""A function that a student has to write."""

    name: str
    points: int
    check: Callable[[Any], None]


def close(answer: Any, expected: Any, hint: str, tolerance: float = 1e-5) -> None:
    answer, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (answer, expected))
    assert answer.shape == expected.shape, (
        f"the shape should be {tuple(expected.shape)}, not {tuple(answer.shape)}"
    )
    error = (answer - expected).abs().max().item()
    assert error <= tolerance, f"off by up to {error:.3g}: {hint}"


# --- Assignment 1: a bound ---


def check_gaussian_kl(gaussian_kl: Callable) -> None:
    torch.manual_seed(0)
    m, s = torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.2
    z = torch.linspace(-12, 12, 4001).double().reshape(-1, 1, 1)
    log_q, log_p = dist.Normal(m, s).log_prob(z), dist.Normal(0.0, 1.0).log_prob(z)
    expected = (log_q.exp() * (log_q - log_p)).sum(0).sum(-1) * 24 / 4000
    close(gaussian_kl(m, s), expected, "KL(q || p), from q = N(m, s^2), summed over dimensions")


def check_programs(programs: Callable) -> None:
    model, guide = programs(w=1.5, sigma=0.7)
    x = torch.tensor([0.3, -1.2, 2.0])
    precision = 1 + 1.5**2 / 0.7**2
    m, s = 1.5 * x / 0.7**2 / precision, torch.tensor(precision).rsqrt()
    evidence = dist.Normal(0.0, (1.5**2 + 0.7**2) ** 0.5).log_prob(x).sum()
    trace = poutine.trace(model).get_trace(x, m, s)
    assert trace.nodes["x"]["is_observed"], "the site 'x' is the datum: it is observed"
    for _ in range(3):  # with the posterior as the guide there is no noise
        loss = Trace_ELBO().loss(model, guide, x, m, s)
        close(loss, -evidence, "with the exact posterior, the loss is -log p(x), each time", 1e-3)
    losses = torch.tensor([Trace_ELBO().loss(model, guide, x, m + 0.5, s) for _ in range(400)])
    gap, se = 3 * 0.5**2 / (2 * s**2), losses.std() / 20
    assert (losses.mean() + evidence - gap).abs() < 5 * se, (
        "with a guide whose mean is off by 0.5, the gap is not KL(q || posterior): are there a "
        "plate and one latent for each datum?"
    )


def check_surgery(surgery: Callable) -> None:
    m, s = torch.tensor([-1.0, 0.5, 2.0]).double(), torch.tensor([0.4, 0.7, 0.3]).double()
    z = torch.linspace(-9, 9, 9001).double()
    each = dist.Normal(m, s).log_prob(z.unsqueeze(-1))
    log_q, log_p = each.logsumexp(-1) - math.log(3), dist.Normal(0.0, 1.0).log_prob(z)
    marginal = ((log_q - log_p) * log_q.exp()).sum() * 18 / 9000
    total = ((each - log_p.unsqueeze(-1)) * each.exp()).sum() / 3 * 18 / 9000
    torch.manual_seed(0)
    answer = surgery(m, s, 20_000)
    assert len(answer) == 2, "return two numbers: the mutual information and the marginal KL"
    close(answer[0], total - marginal, "mutual information: log q(z|x_n) - log q(z)", 0.03)
    close(answer[1], marginal, "marginal KL: log q(z) - log p(z), z from a random datum", 0.03)


# --- Assignment 2: a chain ---


def check_diffuse(diffuse: Callable) -> None:
    torch.manual_seed(0)
    z_0, eps = torch.randn(2, 6, 3).double()
    for t in (1, 2, 4):
        q = q_marginal(Schedule(BETAS).double(), z_0, t)
        expected = q.mean + q.stddev * eps
        close(diffuse(z_0, t, BETAS, eps), expected, f"t = {t}: is beta_t = betas[t - 1]?")


def check_way_back(way_back: Callable) -> None:
    torch.manual_seed(0)
    z_0, z_t = torch.randn(2, 6, 3).double()
    for t in (2, 3, 4):
        q = q_reverse(Schedule(BETAS).double(), z_0, z_t, t)
        mean, variance = way_back(z_0, z_t, t, BETAS)
        close(mean, q.mean, f"the mean at t = {t}: precisions add, means are weighted by them")
        close(torch.as_tensor(variance).expand(6, 3), q.variance, f"the variance at t = {t}")


def check_chain(chain: Callable) -> None:
    betas = BETAS.float()
    prior = DiffusionPrior(2, 4, Schedule(betas))  # its network starts at zero
    mine, guide = chain(betas)
    x = torch.randn(7, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            prior.model()

    def right_guide(x):
        with pyro.plate("data", len(x)):
            prior.guide(dist.Normal(x, 0.1).to_event(1))

    trace = poutine.trace(guide).get_trace(x)
    names = {f"z_{t}" for t in range(5)}
    for program, found in (("guide", trace), ("model", poutine.trace(mine).get_trace(x))):
        latents = {name for name in found.stochastic_nodes if name != "data"}
        assert latents == names, f"the {program} has the sites {sorted(latents)}"
    for program, right, found in (
        ("model", model, poutine.trace(poutine.replay(mine, trace=trace)).get_trace(x)),
        ("guide", right_guide, trace),
    ):
        expected = poutine.trace(poutine.replay(right, trace=trace)).get_trace(x)
        for each in (found, expected):
            each.compute_log_prob()
        for t in range(5):
            site, other = found.nodes[f"z_{t}"]["log_prob"], expected.nodes[f"z_{t}"]["log_prob"]
            close(site, other, f"log-density of z_{t} in the {program}: is it N(mean, sd)?", 1e-3)


# --- Assignment 3: an estimator ---

TERMS = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.25, 0.25], dtype=torch.float64)
PROPOSAL = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.05, 0.05], dtype=torch.float64)


def check_estimate(estimate: Callable) -> None:
    torch.manual_seed(0)
    for r in (torch.ones(6).double() / 6, PROPOSAL):
        for k in (1, 3):
            draws = torch.stack([torch.as_tensor(estimate(TERMS, r, k)) for _ in range(4000)])
            error, se = draws.mean() - TERMS.sum(), draws.std() / 4000**0.5
            assert error.abs() < 5 * se, f"k = {k}: biased by {error:.2f}: what is the weight?"
            variance = ((TERMS**2 / r).sum() - TERMS.sum() ** 2) / k
            assert (draws.var() / variance - 1).abs() < 0.2, (
                f"k = {k}: the variance is {draws.var():.2f}, not {variance:.2f}: are there k "
                "independent timesteps?"
            )


def check_variance(variance: Callable) -> None:
    torch.manual_seed(0)
    sd = torch.tensor([1.0, 2.0, 0.5, 0.5, 0.1, 0.0]).double()  # each term is noisy, given t
    for r in (torch.ones(6).double() / 6, PROPOSAL):
        t = torch.multinomial(r, 400_000, replacement=True)
        draws = (TERMS + sd * torch.randn(len(t), 6).double())[torch.arange(len(t)), t] / r[t]
        answer = torch.as_tensor(variance(TERMS, TERMS**2 + sd**2, r))
        assert (answer / draws.var() - 1).abs() < 0.03, (
            f"it is {draws.var():.2f}, not {answer:.2f}: E[(L/r)^2] - E[L/r]^2, over t and noise"
        )


def check_best_proposal(best_proposal: Callable) -> None:
    squares = TERMS**2 + torch.tensor([1.0, 4.0, 0.25, 0.25, 0.01, 0.0]).double()
    answer = torch.as_tensor(best_proposal(squares))
    close(answer.sum(), 1.0, "probabilities sum to 1")
    least = (squares / answer).sum()
    torch.manual_seed(0)
    for _ in range(200):
        other = answer * (1 + 0.05 * torch.randn(6).double())
        assert (squares / (other / other.sum())).sum() >= least - 1e-9, (
            "another proposal has less variance: minimize sum_t E[L_t^2] / r(t)"
        )


TASKS: dict[int, list[Task]] = {
    1: [
        Task("gaussian_kl", 2, check_gaussian_kl),
        Task("programs", 5, check_programs),
        Task("surgery", 3, check_surgery),
    ],
    2: [
        Task("diffuse", 2, check_diffuse),
        Task("way_back", 3, check_way_back),
        Task("chain", 5, check_chain),
    ],
    3: [
        Task("estimate", 4, check_estimate),
        Task("variance", 3, check_variance),
        Task("best_proposal", 3, check_best_proposal),
    ],
}


def verdict(assignment: int, name: str, answer: Any) -> str:
    r"""Returns the points and a comment on a student's function, as JSON.

    Arguments:
        assignment: The number of the assignment.
        name: The name of the task.
        answer: The student's function; ``None`` if there is none.
    """
    (task,) = (task for task in TASKS[assignment] if task.name == name)
    points, comment = 0, ""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    try:
        assert callable(answer), f"there is no function {name}"
        task.check(answer)
        points, comment = task.points, "right"
    except AssertionError as error:
        comment = str(error)
    except Exception as error:  # of the student's code
        comment = f"{type(error).__name__}: {error}"
    return json.dumps({"points": points, "comment": comment.strip().partition("\n")[0]})
