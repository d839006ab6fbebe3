r"""Each class of likelihoods with nats, where :math:`\log p` is known.

The data are :math:`z_0 \sim \mathcal{N}(0, s^2 I)` with :math:`D = 49` and :math:`s^2 = 0.1`, and
the denoiser is the exact :math:`E[z_0 | z_t]` of them, so that everything is linear and Gaussian:
the chain of :math:`T = 25` steps with this denoiser, its probability flow, and the data themselves,
which are what the diffusion makes in continuous time. The log-SNR falls from 8 to −4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

from ..arguments import check_choice, check_seed, check_whole
from ..diffusion import q_marginal
from ..infer import Reweighted, Timestep_ELBO, TraceKL_ELBO
from ..priors import DiffusionPrior
from ..sampling.probability_flow import ProbabilityFlow
from ..schedules import LogSNRSchedule
from .audit import BOUNDS, NO_BOUNDS, Audit, audit
from .likelihood import by_samples, importance_weighted_bound
from .surgery import chain_log_prob, chain_programs, estimates

__all__ = ["Demonstration", "demonstrate"]

D, T, SCALE, HIGH, LOW = 49, 25, 0.1**0.5, 8.0, -4.0


@dataclass(frozen=True)
class Demonstration:
    r"""A number beside the exact :math:`-\log p(z_0)` of the same model, in nats per datum."""

    #: How the number was estimated.
    how: str
    #: Its class.
    audit: Audit
    #: The number.
    estimate: float
    #: What it stands for.
    exact: float
    #: The standard error of the difference of the two, over data.
    se: float

    @property
    def difference(self) -> float:
        r"""The number less what it stands for."""
        return self.estimate - self.exact

    @property
    def verdict(self) -> str:
        r"""Says whether the number is below :math:`-\log p`, by more than five standard errors."""
        if abs(self.difference) < 1e-6:
            return "equal to -log p"
        return "below -log p" if self.difference < -5 * self.se else "at least -log p"

    def __str__(self) -> str:
        return (
            f"{self.how:39} {self.estimate:7.2f} {self.exact:7.2f} "
            f"{self.difference:7.2f} ± {self.se:.2f}  {self.verdict}"
        )


@torch.no_grad()
def demonstrate(
    *kinds: str, num_data: int = 200, num_samples: int = 32, seed: int = 0
) -> list[Demonstration]:
    r"""Returns numbers of each class where :math:`-\log p` is known.

    Arguments:
        kinds: The classes, see :func:`~pyro_vaediff.evaluate.audit.audit`. By default, all of them.
        num_data: The number of data.
        num_samples: The number of samples of each log-mean-exp.
        seed: The seed of data and numbers. The global generators are restored.

    Raises:
        ValueError: If a class is unknown or a number is out of range.

    Example:
        >>> (row,) = demonstrate("quadrature")
        >>> row.exact - row.estimate > 4, row.verdict
        (True, 'below -log p')
    """
    for kind in kinds:
        check_choice("kind", kind, (*BOUNDS, *NO_BOUNDS))
    check_whole("num_data", num_data, least=2, why=" for standard errors")
    check_whole("num_samples", num_samples)
    check_seed(seed)
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        z_0 = SCALE * torch.randn(num_data, D, dtype=torch.float64)
        after = torch.get_rng_state()  # so that no number depends on which others are wanted
        for how, classified, estimate, scale in cases(z_0, num_samples):
            if kinds and classified.kind not in kinds:
                continue
            torch.set_rng_state(after)
            values, exact = -estimate(), -dist.Normal(0, scale).to_event(1).log_prob(z_0)
            se = (values - exact).std().item() / math.sqrt(num_data)
            means = values.mean().item(), exact.mean().item()
            found.append(Demonstration(how, classified, *means, se))
    return found


def cases(z_0: Tensor, K: int) -> list[tuple[str, Audit, Callable[[], Tensor], Tensor]]:
    r"""Returns estimators of :math:`\log p(z_0)`, with their class and the scale of the model."""
    prior = exact_prior()
    flow, programs = ProbabilityFlow(prior, num_steps=T), chain_programs(prior, z_0)
    data, chain, ode = SCALE * torch.ones_like(z_0[0]), chain_scale(prior), flow_scale(flow)
    weights, noisy, closed = Trace_ELBO(num_particles=K), Timestep_ELBO(k=8), TraceKL_ELBO()
    halved = Reweighted(noisy, {"steps": 0.5})

    def log_weight() -> Tensor:
        return importance_weighted_bound(*programs, elbo=Trace_ELBO())

    return [
        (
            "Timestep_ELBO(k=8)",
            audit(noisy, prior),
            lambda: chain_log_prob(prior, z_0, noisy),
            chain,
        ),
        (
            f"a random time in each of {T} cells",
            audit("continuous-time bound", prior),
            lambda: -continuous_loss(prior, z_0, torch.rand(T, len(z_0), dtype=z_0.dtype)),
            data,
        ),
        (
            f"ProbabilityFlow(prior, num_steps={T})",
            audit(flow),
            lambda: flow.log_prob(z_0),
            ode,
        ),
        (
            f"importance_weighted_bound, {K} samples",
            audit(importance_weighted_bound, prior, elbo=weights),
            lambda: importance_weighted_bound(*programs, elbo=weights),
            chain,
        ),
        (
            f"the end of each of these {T} cells",
            audit("quadrature", prior),
            lambda: -continuous_loss(prior, z_0, torch.ones(T, 1, dtype=z_0.dtype)),
            data,
        ),
        (
            f"log-mean-exp of {K} Timestep_ELBO(k=8)",
            audit(importance_weighted_bound, prior, elbo=noisy),
            lambda: log_mean_exp(lambda: chain_log_prob(prior, z_0, noisy), K),
            chain,
        ),
        (
            f"log-mean-exp of {K} TraceKL_ELBO()",
            audit(importance_weighted_bound, prior, elbo=closed),
            lambda: log_mean_exp(lambda: chain_log_prob(prior, z_0, closed), K),
            chain,
        ),
        (
            f"log-mean-exp of {K} single probes",
            audit("stochastic trace", prior),
            lambda: log_mean_exp(lambda: one_probe_log_prob(flow, z_0), K),
            ode,
        ),
        (
            f"log-mean-exp of {K} samples, scale 10",
            audit("scaled weights", prior),
            lambda: log_mean_exp(lambda: 10 * log_weight(), K) / 10,
            chain,
        ),
        (
            "Reweighted(..., {'steps': 0.5})",
            audit(halved, prior),
            lambda: estimates(halved, *programs),  # which chain_log_prob would not take
            chain,
        ),
    ]


def log_mean_exp(log_weight: Callable[[], Tensor], num_samples: int) -> Tensor:
    r"""Returns the logarithm of the mean of random weights, drawn one after the other."""
    return by_samples(torch.stack([log_weight() for _ in range(num_samples)]))[num_samples]


class Zero(nn.Module):
    r"""A network that leaves all to the preconditioning of the denoiser."""

    any_batch = True

    def forward(self, z: Tensor, log_snr: Tensor) -> Tensor:
        return torch.zeros_like(z)


def exact_prior() -> DiffusionPrior:
    r"""Returns a prior whose denoiser is the exact one of :math:`\mathcal{N}(0, s^2 I)`."""
    schedule = LogSNRSchedule(lambda t: HIGH + (LOW - HIGH) * t, T)
    prior = DiffusionPrior(D, T, schedule, Zero(), preconditioning=True, order="posterior").double()
    known = prior.denoiser.preconditioning
    assert known is not None
    known.log_scale.data.fill_(math.log(SCALE) / known.gain)
    return prior.requires_grad_(False)


def chain_scale(prior: DiffusionPrior) -> Tensor:
    r"""Returns the scale of :math:`z_0` of a chain whose steps have the means :math:`R_t z_t`."""
    one = torch.ones_like(prior.origin)
    variance = one
    for t in range(T, 0, -1):
        step = prior.reverse(one, t)
        variance = step.mean.square() * variance + step.variance
    return variance.sqrt()


def flow_scale(flow: ProbabilityFlow) -> Tensor:
    r"""Returns the scale of :math:`z_0` of a linear flow."""
    return flow.decode(torch.ones_like(flow.prior.origin)).abs()


def continuous_loss(prior: DiffusionPrior, z_0: Tensor, u: Tensor) -> Tensor:
    r"""Returns estimates of a bound on :math:`-\log p(z_0)` from a time in each of :math:`T` cells.

    .. math:: E[-\log p(z_0 | z_{\lambda_{\max}})] + \mathrm{KL}(q(z_{\lambda_{\min}} | z_0) \,\|\,
        \mathcal{N}(0, I)) + \frac{\lambda_{\max} - \lambda_{\min}}{2} \, E_t \| \epsilon -
        \hat\epsilon(z_t, t) \|^2

    Arguments:
        prior: The prior.
        z_0: The data, with shape :math:`(N, D)`.
        u: Where in its cell each time is, with shape :math:`(T, N)`: uniform in :math:`[0, 1]`, or
            the estimates are none of the bound.
    """
    t = (torch.arange(T).unsqueeze(-1) + u) / T
    z_t = q_marginal(prior.schedule, z_0, t).sample((8,))  # of each time
    errors = prior.schedule.log_snr_at(t).exp() * (z_0 - prior.denoise(z_t, t)).square().sum(-1)
    first = D / 2 * (1 + math.log(2 * math.pi) - HIGH)
    last = kl_divergence(q_marginal(prior.schedule, z_0, T), prior.standard_normal())
    return first + last + (HIGH - LOW) / 2 * errors.mean((0, 1))


def one_probe_log_prob(flow: ProbabilityFlow, z_0: Tensor) -> Tensor:
    r"""Returns estimates of a linear flow's log-density, with one probe for the whole path: the
    trace of :math:`\nabla v` is :math:`\eta^T \nabla v \, \eta` with :math:`\eta \sim
    \mathcal{N}(0, I)`."""
    probe, z_T = torch.randn_like(z_0), z_0 / flow_scale(flow)
    traces = torch.stack([(probe * flow.velocity(probe, t)).sum(-1) for t in flow.times])
    s = torch.exp(-flow.prior.schedule.log_snr / 2).asinh()[flow.times]
    return flow.prior.standard_normal().log_prob(z_T) + torch.trapezoid(traces, s, dim=0)
