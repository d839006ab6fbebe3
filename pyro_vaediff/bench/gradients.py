r"""Values and gradients of an estimator, drawn many times, and what their noise is.

A gradient estimate :math:`g` of the parameters of one module has the total variance
:math:`\mathrm{tr} \, \mathrm{Cov}(g)` and the signal-to-noise ratio :math:`\|E[g]\| /
\sqrt{\mathrm{tr} \, \mathrm{Cov}(g)}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..infer import Estimator, Proposal, Timestep_ELBO
from ..priors import DiffusionPrior
from ..vae import VAE
from .programs import Data, Programs, arguments, num_data, own_store, programs_of

__all__ = ["Draws", "Noise", "draw", "gradient_noise_by_timestep", "noise_of", "optimal_proposal"]


@dataclass(frozen=True)
class Draws:
    r"""Draws of a loss and of its gradient.

    Arguments:
        values: The losses in nats per datum, with shape :math:`(N,)`.
        gradients: The gradients of each group of parameters, with shapes :math:`(N, P)`.
    """

    values: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Noise:
    r"""The noise of a gradient estimate.

    Arguments:
        variance: The total variance :math:`\mathrm{tr} \, \mathrm{Cov}(g)`.
        variance_se: Its standard error.
        snr: The signal-to-noise ratio, zero if the signal is not distinguishable from noise.
        bias: The relative bias along the reference gradient, :math:`\langle E[g], g^* \rangle /
            \|g^*\|^2 - 1`.
        bias_se: Its standard error, without that of the reference.
    """

    variance: float
    variance_se: float
    snr: float
    bias: float
    bias_se: float


def draw(elbo: Estimator, vae: VAE | Programs, batches: Iterable[Data]) -> Draws:
    r"""Draws the loss and the gradient of a VAE, or of any programs, once for each batch.

    Arguments:
        elbo: The estimator.
        vae: The VAE, or the programs.
        batches: The data of each draw, with shapes :math:`(B, *)`, or the arguments of the
            programs: the same ones again and again for the noise of the estimator, new ones for
            that of the minibatch.
    """
    programs = programs_of(vae)
    values: list[float] = []
    gradients: dict[str, list[Tensor]] = {name: [] for name in programs.groups}
    # The denoiser would otherwise fill the parameter store of whoever calls this.
    with own_store():
        for x in batches:
            for parameter in programs.parameters:
                parameter.grad = torch.zeros_like(parameter)
            loss = elbo.loss_and_grads(programs.model, programs.guide, *arguments(x))
            values.append(loss / num_data(x))
            for name, group in programs.groups.items():
                grads = [p.grad.flatten() for p in group if p.grad is not None]
                gradients[name].append(torch.cat(grads) / num_data(x))
    for parameter in programs.parameters:
        parameter.grad = None
    return Draws(
        torch.tensor(values, dtype=torch.float64),
        {name: torch.stack(rows) for name, rows in gradients.items()},
    )


def noise_of(gradients: Tensor, reference: Tensor, again: Tensor | None = None) -> Noise:
    r"""Returns the noise of gradients.

    Arguments:
        gradients: Independent draws, with shape :math:`(N, P)`, :math:`N \geq 2`.
        reference: The true gradient, with shape :math:`(P,)`.
        again: An independent estimate of it, if the reference is an estimate: the square of one
            would count its noise as signal.
    """
    again = reference if again is None else again
    n, mean = len(gradients), gradients.mean(0)
    squares = (gradients - mean).square().sum(-1) * (n / (n - 1))
    variance = squares.mean()
    signal = (mean.square().sum() - variance / n).clamp(min=0)
    along = gradients @ reference / (reference * again).sum()
    return Noise(
        variance.item(),
        (squares.std() / n**0.5).item(),
        (signal / variance).sqrt().item(),
        along.mean().item() - 1,
        (along.std() / n**0.5).item(),
    )


class _One(Proposal):
    r"""A single timestep with probability one."""

    def __init__(self, t: int):
        super().__init__()
        self.t = t

    def forward(self, prior: DiffusionPrior, conditioning: str) -> Tensor:
        probs = prior.schedule.betas.new_zeros(prior.num_timesteps - 1)
        probs[self.t - 2] = 1.0
        return probs


def gradient_noise_by_timestep(
    vae: VAE,
    x: Tensor,
    timesteps: Sequence[int],
    conditioning: str = "z_0",
    draws: int = 1,
) -> dict[str, Tensor]:
    r"""Returns the root mean square gradient of the KL term of each timestep, for a single datum.

    The proposal :math:`r(t)` that minimizes the variance of a module's gradient is proportional to
    it.

    Arguments:
        vae: A VAE with a diffusion prior.
        x: The data, with shape :math:`(B, *)`.
        timesteps: The timesteps :math:`t \geq 2`, :math:`n` in number.
        conditioning: What the KLs are given, ``"z_0"`` or ``"x"``.
        draws: The number of draws per datum.

    Returns:
        The root mean squares for the encoder and the prior, with shape :math:`(n,)` each.
    """
    modules = {"encoder": vae.encoder, "prior": vae.prior}
    squares: dict[str, list[Tensor]] = {name: [] for name in modules}
    with own_store():
        for t in timesteps:
            elbo = Timestep_ELBO(_One(int(t)), k=1, conditioning=conditioning)
            total = {name: x.new_zeros(()) for name in modules}
            for datum in x.repeat(draws, *(1 for _ in x.shape[1:])).split(1):
                term = elbo.terms(vae.model, vae.guide, datum)["z_s"]
                parameters = [list(module.parameters()) for module in modules.values()]
                every = [p for group in parameters for p in group]
                grads = iter(torch.autograd.grad(term, every, materialize_grads=True))
                for name, group in zip(modules, parameters, strict=True):
                    total[name] += sum(next(grads).square().sum() for _ in group)
            for name in modules:
                squares[name].append(total[name] / (draws * len(x)))
    return {name: torch.stack(values).sqrt() for name, values in squares.items()}


def optimal_proposal(timesteps: Tensor, rms: Tensor, num_timesteps: int) -> Tensor:
    r"""Returns the proposal over :math:`t = 2, \dots, T` in proportion to a gradient's noise.

    Arguments:
        timesteps: The timesteps at which the noise was measured, increasing from 2 to :math:`T`,
            with shape :math:`(n,)`. In between, its logarithm is interpolated in that of :math:`t`.
        rms: The root mean squares, positive and with shape :math:`(n,)`.
        num_timesteps: The number of timesteps :math:`T`.

    Returns:
        The probabilities of the given timesteps, in float64 and with shape :math:`(n,)`.

    Example:
        >>> optimal_proposal(torch.tensor([2, 4]), torch.tensor([1.0, 0.5]), 4)
        tensor([0.4615, 0.2308], dtype=torch.float64)
    """
    every, rms = torch.arange(2, num_timesteps + 1), rms.double().log()
    position = torch.searchsorted(timesteps, every).clamp(1, len(timesteps) - 1)
    left, right = timesteps[position - 1].double().log(), timesteps[position].double().log()
    share = (every.double().log() - left) / (right - left)
    optimal = torch.lerp(rms[position - 1], rms[position], share).exp()
    return (optimal / optimal.sum())[timesteps - 2]
