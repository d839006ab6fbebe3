r"""Diffusion priors: the paper's contribution, as a pair of Pyro programs."""

from __future__ import annotations

from functools import cached_property

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from ..arguments import check_choice
from ..diffusion import at_time, normal, q_marginal, q_reverse, q_step
from ..nn.denoiser import ResidualDenoiser
from ..register import register
from ..schedules import Schedule, Tables, make_schedule
from .base import Prior

__all__ = ["DiffusionPrior"]

ORDERS = ("forward", "posterior", "reversed")
PARAMETERIZATIONS = ("eps", "z0", "mu", "v")
REVERSE_VARIANCES = ("beta", "beta_tilde", "learned")


class DiffusionPrior(Prior):
    r"""A diffusion prior, with latent sites :math:`z_T, \dots, z_0`.

    .. math::
        p(z_T) & = \mathcal{N}(0, I) & \quad (13) \\
        p_\phi(z_{t-1} | z_t) & = \mathcal{N}(\mu_\phi(z_t, t), \sigma_t^2 I) & \quad (14)

    :meth:`model` and :meth:`guide` are *effectful statements*, of the message types
    ``"diffusion_model"`` and ``"diffusion_guide"``. By default they run as written below, one
    sample site per timestep. An effect handler may interpret the same statements otherwise, as
    :class:`~pyro_vaediff.infer.Timestep_ELBO` does.

    The reverse mean is the mean of a prior that leaves :math:`\mathcal{N}(0, I)` unchanged, plus
    the output of the denoiser,

    .. math:: \mu_\phi(z_t, t) = \sqrt{1 - \sigma_t^2} \, z_t + g_t \, \mathrm{net}(z_t, t),

    where the gain :math:`g_t` depends on the quantity that the network is said to predict. With a
    network that starts at zero, the prior starts exactly at :math:`p(z_0) = \mathcal{N}(0, I)`.

    Arguments:
        latent_dim: The number of latent dimensions :math:`D`.
        num_timesteps: The number of steps :math:`T`.
        schedule: The variance schedule, ``"linear"``, ``"cosine"`` or a
            :class:`~pyro_vaediff.schedules.Schedule`.
        denoiser: The network, called with :math:`z_t` of shape :math:`(*, D)` and :math:`t`, which
            returns a tensor of shape :math:`(*, D)`, or :math:`(*, 2D)` if the variance is learned.
            By default, a :class:`~pyro_vaediff.nn.ResidualDenoiser`.
        parameterization: What the network predicts (up to the part of it that is linear in
            :math:`z_t`): the noise ``"eps"``, the clean latents ``"z0"``, the mean ``"mu"``, or the
            velocity ``"v"``.
        reverse_variance: The variance :math:`\sigma_t^2`: ``"beta"`` for :math:`\beta_t`,
            ``"beta_tilde"`` for :math:`\tilde\beta_t` (the paper's; :math:`\beta_1` at :math:`t =
            1`, where :math:`\tilde\beta_1 = 0` is no density), or ``"learned"`` per dimension.
        order: The factorization of the guide, ``"forward"``, ``"posterior"`` or ``"reversed"``.
            All three are the same distribution.

    References:
        | Diffusion Priors in Variational Autoencoders (Wehenkel & Louppe, 2021)
        | https://arxiv.org/abs/2106.15671

    Example:
        >>> prior = DiffusionPrior(latent_dim=5, num_timesteps=3)
        >>> trace = pyro.poutine.trace(prior.model).get_trace()
        >>> list(trace.stochastic_nodes)
        ['z_3', 'z_2', 'z_1', 'z_0']
    """

    def __init__(
        self,
        latent_dim: int,
        num_timesteps: int = 1000,
        schedule: str | Schedule = "linear",
        denoiser: nn.Module | None = None,
        parameterization: str = "eps",
        reverse_variance: str = "beta",
        order: str = "forward",
    ):
        super().__init__(latent_dim)
        check_choice("parameterization", parameterization, PARAMETERIZATIONS)
        check_choice("reverse_variance", reverse_variance, REVERSE_VARIANCES)
        check_choice("order", order, ORDERS)

        self.schedule = make_schedule(schedule, num_timesteps)
        self.num_timesteps = num_timesteps
        self.parameterization = parameterization
        self.reverse_variance = reverse_variance
        self.order = order
        if denoiser is None:
            num_outputs = 2 if reverse_variance == "learned" else 1
            denoiser = ResidualDenoiser(latent_dim, self.schedule, num_outputs)
        self.denoiser = denoiser
        if (theirs := getattr(denoiser, "parameterization", parameterization)) != parameterization:
            raise ValueError(
                f"a {type(denoiser).__name__} predicts {theirs!r}: parameterization must be "
                f"{theirs!r}, got {parameterization!r}"
            )

        self.kernel = Tables(reverse_tables(self.schedule, parameterization, reverse_variance))

    # The two programs -----------------------------------------------------------------------------

    @effectful(type="diffusion_model")
    def model(self) -> Tensor:
        register("prior", self)
        T = self.num_timesteps
        z = pyro.sample(f"z_{T}", self.standard_normal())
        for t in range(T, 0, -1):
            z = pyro.sample(f"z_{t - 1}", self.reverse(z, t))
        return z

    @effectful(type="diffusion_guide")
    def guide(self, q_z0: dist.TorchDistribution) -> Tensor:
        self.check_posterior(q_z0)
        return getattr(self, f"guide_{self.order}")(q_z0)

    def guide_forward(self, q_z0: dist.TorchDistribution) -> Tensor:
        r"""Samples from :math:`q(z_0|x) \prod_{t=1}^T q(z_t | z_{t-1})`, equation (9)."""
        z_0 = z = pyro.sample("z_0", q_z0)
        for t in range(1, self.num_timesteps + 1):
            z = pyro.sample(f"z_{t}", q_step(self.schedule, z, t))
        return z_0

    def guide_posterior(self, q_z0: dist.TorchDistribution) -> Tensor:
        r"""Samples from :math:`q(z_0|x) \, q(z_T|z_0) \prod_{t=T}^2 q(z_{t-1} | z_t, z_0)`."""
        z_0 = pyro.sample("z_0", q_z0)
        self._guide_backwards(z_0, last=2)
        return z_0

    def guide_reversed(self, q_z0: dist.TorchDistribution) -> Tensor:
        r"""Samples from :math:`q(z_T|x) \prod_{t=T}^1 q(z_{t-1} | z_t, x)`.

        Raises:
            ValueError: If :math:`q(z_0 | x)` is not Gaussian.
        """
        return self._guide_backwards(q_z0, last=1)

    def _guide_backwards(self, start: Tensor | dist.TorchDistribution, last: int) -> Tensor:
        # In this order the model's only parent of z_{t-1} is z_t, which comes before z_{t-1} in
        # the guide as well: the KL divergences of these sites are legal in closed form.
        infer, T = {"closed_form_kl": True}, self.num_timesteps
        z = pyro.sample(f"z_{T}", q_marginal(self.schedule, start, T), infer=dict(infer))
        for t in range(T, last - 1, -1):
            z = pyro.sample(f"z_{t - 1}", q_reverse(self.schedule, start, z, t), infer=dict(infer))
        return z

    # The reverse kernel ---------------------------------------------------------------------------

    def reverse(self, z: Tensor, t: int | Tensor) -> dist.Independent:
        r"""Returns :math:`p_\phi(z_{t-1} | z_t)`, equation (14).

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, D)`.
            t: The timestep(s) :math:`t \geq 1`, an integer or an integer tensor with shape
                :math:`(*)`.
        """
        if isinstance(t, int) and t < 1:
            raise ValueError(f"t must be from 1 to T = {self.num_timesteps}, got {t}")
        scale = at_time(self.kernel.sigmas, t)
        net = self.network(z, t)
        if self.reverse_variance == "learned":
            # log sigma_t^2 starts at log beta_t and stays within twice the width of the interval
            # [log beta_tilde_t, log beta_t] around it: it can neither overflow nor vanish.
            net, u = net.chunk(2, dim=-1)
            scale = scale * torch.exp(at_time(self.kernel.log_ranges, t) * torch.tanh(u / 2))
        return normal(
            at_time(self.kernel.skips, t) * z + at_time(self.kernel.gains, t) * net, scale
        )

    def network(self, z: Tensor, t: int | Tensor) -> Tensor:
        r"""Evaluates the denoiser, in the precision of the latents also under autocast."""
        if z.shape[-1:] != self.origin.shape:
            raise ValueError(f"z must end in shape ({self.latent_dim},), got {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            return self.denoiser(z, t)

    def denoise(self, z: Tensor, t: int | Tensor) -> Tensor:
        r"""Returns the estimate of :math:`E[z_0 | z_t]` that the reverse mean implies.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, D)`.
            t: The timestep(s) :math:`t \geq 1`.

        Raises:
            ValueError: If the chain erases :math:`z_0`, so that nothing is to be estimated.
        """
        self.check_signal()
        net = self.network(z, t)[..., : self.latent_dim]  # without the variance, if learned
        return at_time(self.kernel.z0_skips, t) * z + at_time(self.kernel.z0_gains, t) * net

    def check_signal(self) -> None:
        r"""Raises a ``ValueError`` if nothing is left of :math:`z_0` in :math:`z_T`."""
        if (log_signal := self.schedule.original("log_alphas_cumprod")[-1].item()) < -60:
            raise ValueError(
                f"the schedule erases z_0: log alphas_cumprod is {log_signal:.0f} at T, but must "
                "be at least -60 to estimate z_0 from z_t; choose smaller betas"
            )

    # What is known without data -------------------------------------------------------------------

    @cached_property
    def variance_kl(self) -> Tensor:
        r"""The part of :math:`\mathrm{KL}(q(z_{t-1}|z_t, z_0) \,\|\, p(z_{t-1}|z_t))` due to the
        variances, per dimension and for a fixed :math:`\sigma_t^2`, with shape :math:`(T + 1,)`.

        .. math:: \frac{1}{2} \left( \frac{\tilde\beta_t}{\sigma_t^2} - 1 - \log
            \frac{\tilde\beta_t}{\sigma_t^2} \right)
        """
        ratio = self.schedule.original("betas_tilde") / self.kernel.original("sigmas").square()
        ratio[:2] = 1.0  # no steps
        return (ratio - 1 - ratio.log()) / 2

    def typical_kl(self, scale: float) -> Tensor:
        r"""Returns the expected KL of each step if both the aggregate posterior and the prior are
        :math:`\mathcal{N}(0, I)`, per dimension and without :attr:`variance_kl` if it is constant.

        Arguments:
            scale: The encoder's scale :math:`s`, with :math:`s = 0` for KLs given :math:`z_0`.

        Returns:
            The KLs in nats, in float64, with shape :math:`(T + 1,)` and zero at :math:`t = 0`.
        """
        original = self.schedule.original
        alpha_bar, sigma = original("alphas_cumprod"), self.kernel.original("sigmas")
        v = alpha_bar * scale**2 + original("one_minus_alphas_cumprod")
        v[0] = scale**2
        ratio = torch.where(v > 0, v.roll(1) / v, 0.0)
        # E|mu_q - skip z_t|^2 for z_t = m_t + sqrt(v_t) eps, where m ~ N(0, 1 - s^2)
        skip, gain = self.kernel.original("skips"), original("alphas").sqrt() * ratio
        of_m = (alpha_bar.roll(1).sqrt() - skip * alpha_bar.sqrt()).square()
        kl = (of_m * max(0.0, 1 - scale**2) + (gain - skip).square() * v) / (2 * sigma.square())
        if scale > 0:
            rho = ratio * original("betas") / sigma.square()
            kl = kl + (rho - 1 - rho.log()) / 2
        elif self.reverse_variance == "learned":
            kl = kl + self.variance_kl
        kl[0] = 0.0
        return kl


def reverse_tables(
    schedule: Schedule, parameterization: str, reverse_variance: str
) -> dict[str, Tensor]:
    r"""Returns the tables of the reverse kernel, in float64.

    The posterior mean of the forward diffusion is linear, :math:`\tilde\mu_t = a_t z_t + b_t z_0`.
    Each prediction determines :math:`z_0` linearly, hence also the reverse mean. Only its gain
    :math:`g_t` matters, as the part linear in :math:`z_t` is replaced by
    :math:`\sqrt{1 - \sigma_t^2} \, z_t`.
    """
    beta, alpha, beta_tilde, alpha_bar, one_minus = (
        schedule.original(name).clone()
        for name in (
            "betas", "alphas", "betas_tilde", "alphas_cumprod", "one_minus_alphas_cumprod"
        )
    )  # fmt: skip
    a = alpha.sqrt() * one_minus.roll(1) / one_minus
    b = alpha_bar.roll(1).sqrt() * beta / one_minus

    gains = {
        "mu": torch.ones_like(b),
        "z0": b,
        # z_0 = (z_t - sqrt(1 - abar) eps) / sqrt(abar), where abar cancels that in b
        "eps": -beta / (alpha * one_minus).sqrt(),
        "v": -b * one_minus.sqrt(),  # z_0 = sqrt(abar) z_t - sqrt(1 - abar) v
    }[parameterization]

    # The posterior variance is zero at t = 1, where its ratio to beta continues that at t = 2.
    ratio = beta_tilde / beta
    ratio[1] = ratio[2] if len(ratio) > 2 else 0.5
    variance = beta.clone()
    if reverse_variance == "beta_tilde":
        variance[2:] = beta_tilde[2:]
    skips = (1 - variance).sqrt()
    tables = {
        "sigmas": variance.sqrt(),
        # The interval is no wider than e^5, so that gradients cannot overflow in float32. That of
        # the usual schedules is not even as wide as e^2.
        "log_ranges": -ratio.log().clamp(min=-5.0),
        "skips": skips,
        "gains": gains,
        "noise_scales": beta / (2 * alpha * one_minus).sqrt(),
        "z0_skips": (skips - a) / b,
        "z0_gains": gains / b,
    }
    for table in tables.values():
        table[0] = 0.0  # 0 / 0 at t = 0, where there is no reverse step
    return tables
