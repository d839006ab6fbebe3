r"""Diffusion priors: the paper's contribution, as a pair of Pyro programs."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from ..arguments import check_choice
from ..denoise import Denoiser, ReverseVariance, make_reverse_variance
from ..diffusion import Start, q_marginal, q_reverse, q_step
from ..nn.backbones import make_backbone
from ..nn.modes import shallow_copy
from ..register import register
from ..schedules import Schedule, Times, make_schedule
from .base import Prior, SiteInfer

__all__ = ["DiffusionPrior"]

ORDERS = ("forward", "posterior", "reversed")


class DiffusionPrior(Prior):
    r"""A diffusion prior, with latent sites :math:`z_T, \dots, z_0`.

    .. math::
        p(z_T) & = \mathcal{N}(0, I) & \quad (13) \\
        p_\phi(z_{t-1} | z_t) & = \mathcal{N}(\mu_\phi(z_t, t), \sigma_t^2 I) & \quad (14)

    :meth:`model` and :meth:`guide` are *effectful statements*, of the message types
    ``"diffusion_model"`` and ``"diffusion_guide"``. By default they run as written below, one
    sample site per timestep. An effect handler may interpret the same statements differently, as
    :class:`~pyro_vaediff.infer.Timestep_ELBO` does.

    The reverse kernel is the :class:`~pyro_vaediff.denoise.Denoiser`'s, which owns the schedule.
    With a network that starts at zero, the prior starts exactly at :math:`\mathcal{N}(0, I)`.

    In continuous time, the bound is the limit of infinitely many steps, see
    :class:`~pyro_vaediff.infer.Timestep_ELBO`. The model draws samples by the chain of the
    schedule's grid, of a thousand steps by default; :meth:`with_steps` returns the prior of a chain
    of any number of steps, which has a bound of its own.

    Arguments:
        event_shape: The shape of a latent; a number :math:`D` means :math:`(D,)`.
        num_timesteps: The number of steps :math:`T`, or ``None`` for continuous time.
        schedule: ``"linear"``, ``"cosine"``, a :class:`~pyro_vaediff.schedules.Schedule` or its
            variances :math:`\beta_t`.
        backbone: The network, see :mod:`~pyro_vaediff.nn.backbones` for how it is called. By
            default, a :class:`~pyro_vaediff.nn.ResidualMLP`, or for latents of shape :math:`(C, h,
            w)` a :class:`~pyro_vaediff.nn.ConvBackbone`.
        parameterization: What the network predicts: ``"eps"``, ``"z0"``, ``"mu"`` or ``"v"``.
        reverse_variance: The variance :math:`\sigma_t^2`: ``"beta"`` for :math:`\beta_t`,
            ``"beta_tilde"`` for :math:`\tilde\beta_t` (the paper's), ``"learned"``, or the best
            one for the mean, ``"analytic"`` or per dimension ``"diagonal"``.
        preconditioning: Whether the network starts from a Gaussian with learned moments.
        order: The factorization of the guide, ``"forward"``, ``"posterior"`` or ``"reversed"``.
            All three are the same distribution.
        context_features: The number of features :math:`F` of the context, or its shape if it is an
            image; 0 for none. With ``None``, the prior ignores the context of its program: the
            latents do not depend on it. An example is the batch that a datum comes from.
        context_dropout: The probability of dropping the context of a datum in train mode, see
            :class:`~pyro_vaediff.denoise.Context`. If it is positive, ``model()`` without a context
            is a program as well.
        denoiser: A complete :class:`~pyro_vaediff.denoise.Denoiser`, in place of the options that
            it is made of: all from ``num_timesteps`` to ``preconditioning``.

    References:
        | Diffusion Priors in Variational Autoencoders (Wehenkel & Louppe, 2021)
        | https://arxiv.org/abs/2106.15671

    Example:
        >>> prior = DiffusionPrior(5, num_timesteps=3)
        >>> trace = pyro.poutine.trace(prior.model).get_trace()
        >>> list(trace.stochastic_nodes)
        ['z_3', 'z_2', 'z_1', 'z_0']
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_timesteps: int | None = 1000,
        schedule: str | Schedule | Tensor | Sequence[float] = "linear",
        backbone: nn.Module | None = None,
        parameterization: str = "eps",
        reverse_variance: str | ReverseVariance = "beta",
        preconditioning: bool = False,
        order: str = "forward",
        context_features: int | Sequence[int] | None = 0,
        context_dropout: float = 0.0,
        denoiser: Denoiser | None = None,
    ):
        super().__init__(event_shape)
        check_choice("order", order, ORDERS)
        if denoiser is None:
            schedule = make_schedule(schedule, num_timesteps)
            reverse_variance = make_reverse_variance(reverse_variance, self.event_shape)
            if backbone is None:
                backbone = make_backbone(
                    "residual" if self.event_dim != 3 else "conv",
                    self.event_shape,
                    schedule,
                    num_outputs=reverse_variance.num_outputs,
                    context_features=context_features or 0,
                )
            denoiser = Denoiser(
                backbone,
                schedule,
                self.event_shape,
                parameterization,
                reverse_variance,
                preconditioning,
                context_features,
                context_dropout,
            )
        elif not isinstance(denoiser, Denoiser) or denoiser.event_shape != self.event_shape:
            raise ValueError(
                f"denoiser must be a Denoiser of latents of shape {tuple(self.event_shape)}, got a "
                f"{type(denoiser).__name__}: pass a network as backbone"
            )
        self.denoiser = denoiser
        self.order = order

    @property
    def schedule(self) -> Schedule:
        r"""The denoiser's schedule."""
        return self.denoiser.schedule

    @property
    def continuous(self) -> bool:
        r"""Whether the bound is that of continuous time, and :attr:`num_timesteps` the model's."""
        return self.schedule.continuous

    @property
    def chain(self) -> DiffusionPrior:
        r"""The prior of the chain that the model runs, with a learned path as it is now.

        Code that reads the tables of a schedule takes those of this prior.
        """
        return self.with_steps(self.schedule.original("times")) if self.schedule.learned else self

    @property
    def num_timesteps(self) -> int:
        r"""The number of steps :math:`T`."""
        return self.schedule.num_timesteps

    @effectful(type="diffusion_model")
    def model(self, c: Tensor | None = None) -> Tensor:
        register("prior", self)
        if self.schedule.learned:
            return self.chain.model(c)
        T = self.num_timesteps
        z = pyro.sample(f"z_{T}", self.standard_normal())
        for t in range(T, 0, -1):
            z = pyro.sample(f"z_{t - 1}", self.reverse(z, t, c))
        return z

    @effectful(type="diffusion_guide")
    def guide(self, q_z0: dist.TorchDistribution, c: Tensor | None = None) -> Tensor:
        self.check_posterior(q_z0)
        if self.continuous:
            raise ValueError(
                "a prior in continuous time has no sites for all of time: use Timestep_ELBO, or "
                "prior.with_steps(n) for the programs of a chain"
            )
        return getattr(self, f"guide_{self.order}")(q_z0)

    def guide_forward(self, q_z0: dist.TorchDistribution) -> Tensor:
        r"""Samples from :math:`q(z_0|x) \prod_{t=1}^T q(z_t | z_{t-1})`, equation (9)."""
        z_0 = z = pyro.sample("z_0", q_z0, infer=self.role(0))
        for t in range(1, self.num_timesteps + 1):
            q_t = q_step(self.schedule, z, t, event_dim=self.event_dim)
            z = pyro.sample(f"z_{t}", q_t, infer=self.role(t))
        return z_0

    def guide_posterior(self, q_z0: dist.TorchDistribution) -> Tensor:
        r"""Samples from :math:`q(z_0|x) \, q(z_T|z_0) \prod_{t=T}^2 q(z_{t-1} | z_t, z_0)`."""
        z_0 = pyro.sample("z_0", q_z0, infer=self.role(0))
        self._guide_backwards(z_0, last=2)
        return z_0

    def guide_reversed(self, q_z0: dist.TorchDistribution) -> Tensor:
        r"""Samples from :math:`q(z_T|x) \prod_{t=T}^1 q(z_{t-1} | z_t, x)`.

        Raises:
            ValueError: If :math:`q(z_0 | x)` is not Gaussian.
        """
        return self._guide_backwards(q_z0, last=1)

    def _guide_backwards(self, start: Start, last: int) -> Tensor:
        # In this order the model's only parent of z_{t-1} is z_t, which comes before z_{t-1} in
        # the guide as well: the KL divergences of these sites are legal in closed form.
        T, n, legal = self.num_timesteps, self.event_dim, SiteInfer(closed_form_kl=True)
        q_T = q_marginal(self.schedule, start, T, n)
        z = pyro.sample(f"z_{T}", q_T, infer=legal | self.role(T))
        for t in range(T, last - 1, -1):
            q_s = q_reverse(self.schedule, start, z, t, event_dim=n)
            z = pyro.sample(f"z_{t - 1}", q_s, infer=legal | self.role(t - 1))
        return z

    def role(self, s: int) -> SiteInfer:
        r"""Returns the role of the site of :math:`z_s`: the step from :math:`s + 1`, or an end."""
        if s == self.num_timesteps:
            return {"role": "last"}
        role = SiteInfer(role="steps" if s else "first", t=s + 1)
        role["prior"] = self  # type: ignore[typeddict-item]  # Pyro means a distribution by it
        return role

    def reverse(self, z: Tensor, t: int | Tensor, c: Tensor | None = None) -> dist.Independent:
        r"""Returns :math:`p_\phi(z_{t-1} | z_t)`, equation (14).

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, \dots)`.
            t: The timestep(s) :math:`t \geq 1`, an integer or an integer tensor with shape
                :math:`(*)`.
            c: The context, with shape :math:`(B, F)`.
        """
        return self.denoiser(z, t, c=c)

    def denoise(self, z: Tensor, t: Times, c: Tensor | None = None) -> Tensor:
        r"""Returns the estimate of :math:`E[z_0 | z_t]` that the reverse mean implies.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, \dots)`.
            t: The timestep(s) :math:`t \geq 1`.
            c: The context, with shape :math:`(B, F)`.
        """
        return self.denoiser.denoise(z, t, c)

    def with_steps(self, steps: int | Tensor) -> DiffusionPrior:
        r"""Returns the prior of a chain with other steps: the same denoiser on another grid.

        It is a program of its own, with its own ELBO and samples, and shares all parameters.

        Arguments:
            steps: The number of steps, or the times of a grid from 0 to 1.

        Example:
            >>> prior = DiffusionPrior(2, num_timesteps=1000).with_steps(3)
            >>> list(pyro.poutine.trace(prior.model).get_trace().stochastic_nodes)
            ['z_3', 'z_2', 'z_1', 'z_0']
        """
        new = shallow_copy(self)
        new.denoiser = self.denoiser.with_steps(steps)
        return new

    def check_signal(self) -> None:
        r"""Raises a ``ValueError`` if nothing is left of :math:`z_0` in :math:`z_T`."""
        self.denoiser.check_signal()
