r"""Few-step programs: the best reverse variances for a trained mean, and the best grid of times.

The bound of a chain depends on its reverse variances through :math:`-\log p(z_s | z_t)` alone. With
the best ones, which :func:`fit_variances` measures, that is the entropy of a Gaussian: a step from
any time to any other has a cost in closed form, and the grid of :math:`n` steps whose costs sum to
the least is a shortest path.

References:
    | Estimating the Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models
      (Bao et al., 2022)
    | https://arxiv.org/abs/2206.07309

    | Learning to Efficiently Sample from Diffusion Probabilistic Models (Watson et al., 2021)
    | https://arxiv.org/abs/2106.03802
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import check_whole
from ..denoise import Analytic, Diagonal
from ..diffusion import q_marginal
from ..nn.modes import eval_mode
from .diffusion import DiffusionPrior

__all__ = ["fit_variances", "optimal_steps", "step_costs"]


@torch.no_grad()
def fit_variances(
    prior: DiffusionPrior, z_0: Tensor, c: Tensor | None = None, per_dimension: bool = False
) -> DiffusionPrior:
    r"""Returns the prior with the best reverse variances for its mean.

    .. math:: \sigma^2 = E \frac{\| z_s - \mu_\phi(z_t) \|^2}{D} = \tilde\beta_{t|s} +
        b_{t|s}^2 \, \frac{1}{D} E \| z_0 - \hat z_0(z_t) \|^2

    The last factor is measured at all times of the prior's grid and interpolated between them, so
    that the variances are the best for any other grid as well, see
    :meth:`~pyro_vaediff.priors.DiffusionPrior.with_steps`. The prior shares the denoiser with the
    given one. Fit it on training data: then its bound of *other* data remains a bound. The noise is
    drawn from the global generators.

    Arguments:
        prior: The prior, whatever its reverse variance.
        z_0: Latents of training data, samples of :math:`q(z_0 | x)`, with shape :math:`(N, \dots)`.
            A thousand are plenty for one variance per noise level.
        c: Their context, with shape :math:`(N, F)`.
        per_dimension: Whether each dimension gets variances of its own.

    Raises:
        ValueError: If the dimensions have paths of their own.

    Example:
        >>> prior = DiffusionPrior(2, num_timesteps=100)
        >>> few = fit_variances(prior, 0.1 * torch.randn(1000, 2)).with_steps(5)
    """
    if prior.schedule.shape:
        raise ValueError(
            "prior must have one path for all dimensions, got a schedule of shape "
            f"{tuple(prior.schedule.shape)}: use one of shape ()"
        )
    variance = prior.denoiser.variance
    table = (Diagonal if per_dimension else Analytic)(
        prior.event_shape,
        prior.schedule.log_snr[1:].flip(0),
        variance.start if isinstance(variance, Analytic) else variance,
    )
    times, noise = range(prior.num_timesteps, 0, -1), torch.randn_like(z_0)
    with eval_mode(prior.denoiser):
        # The same noise at all times: the error of the sample changes slowly with the time.
        error = torch.stack([squared_error(prior, z_0, noise, t, c) for t in times])
    if not per_dimension:
        error = error.mean(tuple(range(1, error.ndim)), keepdim=True)
    table.to(prior.origin).set_error(error)
    new = prior.with_steps(prior.schedule.original("times"))
    new.denoiser.variance = table
    return new


def squared_error(
    prior: DiffusionPrior, z_0: Tensor, noise: Tensor, t: int, c: Tensor | None
) -> Tensor:
    r"""Returns the mean of :math:`(z_0 - \hat z_0(z_t))^2` over latents, with their event shape."""
    q_t = q_marginal(prior.schedule, z_0, t, prior.event_dim)
    z_t = q_t.mean + q_t.stddev * noise
    # As a chain may start from noisy latents, it is that of a jump to them, see above.
    square = (z_0 - prior.denoiser(z_t, t, 0, c).mean).double().square().mean(0)
    jump = prior.denoiser.coefficients(t, 0)
    return (square - jump("betas_tilde")) / jump("b").square()


def step_costs(prior: DiffusionPrior) -> Tensor:
    r"""Returns the expected term of the bound of a step between any two times of a prior's grid.

    .. math:: \mathrm{KL}(q(z_s | z_t, z_0) \,\|\, p(z_s | z_t)) = \frac{D}{2} \log
        \frac{\sigma^2}{\tilde\beta_{t|s}}, \qquad -\log p(z_0 | z_t) = \frac{D}{2} \log (2 \pi e \,
        \sigma^2)

    The square :math:`\| z_s - \mu_\phi(z_t) \|^2` is :math:`D \sigma^2` on average, as the variance
    is the best for it. With a diagonal variance, the logarithms of the dimensions are summed.

    Arguments:
        prior: A prior with analytic or diagonal reverse variances.

    Returns:
        The costs in nats, with shape :math:`(T + 1, T + 1)` and in float64. Row :math:`t` and
        column :math:`s` have the cost of the step from :math:`t` to :math:`s`, which is infinite
        unless :math:`s < t`.

    Raises:
        ValueError: If the reverse variances are of another kind.
    """
    denoiser, schedule, variance = prior.denoiser, prior.schedule, prior.denoiser.variance
    if not isinstance(variance, Analytic):
        raise ValueError(
            f"prior must have analytic reverse variances, got {type(variance).__name__}: use "
            "fit_variances(prior, z_0)"
        )
    times, noise = schedule.original("times"), schedule.original("one_minus_alphas_cumprod")
    with torch.no_grad():
        error = variance.error(schedule.log_snr).double().cpu()
    error = error.expand(-1, *prior.event_shape).flatten(1)
    costs = error.new_full((len(times), len(times)), math.inf)
    for t in range(1, len(times)):
        later, earlier = times[t].expand(t), times[:t]
        step, beta = denoiser.step(later, earlier), schedule.variances(later, earlier)[0]
        sigma2 = step["betas_tilde"][:, None] + step["b"].square()[:, None] * error[t]
        given = beta * noise[:t] / noise[t]  # the variance of z_s given z_t and z_0
        given[0] = 1 / (2 * math.pi * math.e)  # of the first step: an entropy
        costs[t, :t] = (sigma2 / given[:, None]).log().sum(1) / 2
    return costs


def optimal_steps(prior: DiffusionPrior, num_steps: int) -> Tensor:
    r"""Returns the times of the best chain of that many steps: its negative ELBO is the lowest.

    They are chosen from the times of the prior's grid by dynamic programming over
    :func:`step_costs`, without a further evaluation of the network.

    Arguments:
        prior: A prior with analytic or diagonal reverse variances, see :func:`fit_variances`.
        num_steps: The number of steps :math:`n`, at most that of the prior.

    Returns:
        The times, in float64 with shape :math:`(n + 1,)`, for
        :meth:`~pyro_vaediff.priors.DiffusionPrior.with_steps`.

    Raises:
        ValueError: If the reverse variances or the number of steps do not allow it.

    Example:
        >>> prior = DiffusionPrior(2, num_timesteps=100, reverse_variance="analytic")
        >>> few = prior.with_steps(optimal_steps(prior, 5))
    """
    check_whole("num_steps", num_steps)
    T, costs = prior.num_timesteps, step_costs(prior)
    if num_steps > T:
        raise ValueError(f"num_steps must be at most T = {T}, got {num_steps}")
    best = torch.full_like(costs[0], math.inf)  # of the chains from each time to the start
    best[0] = 0.0
    previous = []
    for _ in range(num_steps):
        best, s = (costs + best).min(1)
        previous.append(s)
    path = [T]
    for s in reversed(previous):
        path.append(int(s[path[-1]]))
    return prior.schedule.original("times")[path[::-1]]
