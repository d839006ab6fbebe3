r"""The denoiser, which is the reverse kernel between any two times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..arguments import as_shape, check_choice, check_ends
from ..diffusion import normal
from ..nn.modes import eval_mode, shallow_copy
from ..schedules import Schedule, Times, at_time, is_index
from .context import Context
from .kernel import Kernel
from .preconditioning import Preconditioning
from .variances import Learned, ReverseVariance, make_reverse_variance

__all__ = ["PARAMETERIZATIONS", "Denoiser"]

PARAMETERIZATIONS = ("eps", "z0", "mu", "v")


class Denoiser(nn.Module):
    r"""The reverse kernel :math:`p_\phi(z_s | z_t)` of a diffusion, for any :math:`s < t`.

    Arguments:
        backbone: The network, see :mod:`~pyro_vaediff.nn.backbones` for how it is called. It is
            called once at construction, to check what it returns.
        schedule: The schedule, whose grid integer times are on.
        event_shape: The shape of a latent.
        parameterization: What the network predicts (up to the part of it that is linear in
            :math:`z_t`): the noise ``"eps"``, the clean latents ``"z0"``, the mean ``"mu"``, or the
            velocity ``"v"``.
        reverse_variance: The variance :math:`\sigma^2`: ``"beta"``, ``"beta_tilde"``,
            ``"learned"``, ``"analytic"``, ``"diagonal"``, or a :class:`ReverseVariance`.
        preconditioning: Whether the network is left with the departure of the latents from a
            Gaussian with learned moments, see :class:`Preconditioning`. It predicts ``"eps"`` then,
            and :meth:`denoise` is :math:`E[z_0 | z_t]` of that Gaussian while the network returns
            zero, whatever the variance.
        context_features: The number of features :math:`F` of the context, or its shape, such as
            :math:`(C, h, w)`; 0 for none, ``None`` to ignore that of the program.
        context_dropout: The probability of dropping the context of a datum in train mode, see
            :class:`~pyro_vaediff.denoise.Context`, for
            :func:`~pyro_vaediff.sampling.guided`.

    Raises:
        ValueError: If an option is unknown or out of range, or the backbone does not return what it
            must.
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: Schedule,
        event_shape: Sequence[int],
        parameterization: str = "eps",
        reverse_variance: str | ReverseVariance = "beta",
        preconditioning: bool = False,
        context_features: int | Sequence[int] | None = 0,
        context_dropout: float = 0.0,
    ):
        super().__init__()
        shape = as_shape("context_features", context_features) if context_features else ()
        self.context = Context(None if context_features is None else shape, context_dropout)
        check_choice("parameterization", parameterization, PARAMETERIZATIONS)
        if preconditioning and parameterization != "eps":
            raise ValueError(
                f"a preconditioned denoiser predicts 'eps': parameterization must be 'eps', got "
                f"{parameterization!r}"
            )
        self.event_shape, self.event_dim = torch.Size(event_shape), len(event_shape)
        self.backbone, self.schedule = backbone, schedule
        self.parameterization = parameterization
        self.variance = make_reverse_variance(reverse_variance, self.event_shape)
        self.preconditioning = Preconditioning(event_shape) if preconditioning else None
        self.continuous = schedule.continuous  #: Whether the network is trained in continuous time.
        if self.continuous and (parameterization == "mu" or not self.variance.fixed):
            raise ValueError(
                "in continuous time, a mean 'mu' and a learned variance have no limit, got "
                f"parameterization={parameterization!r} and a {type(self.variance).__name__} "
                "variance: use 'eps' and 'beta'"
            )
        self._home = schedule.original("times")  # the grid that the network is trained on
        self.kernel = Kernel(self.tables(self._home))
        self.check_backbone()

    def forward(
        self, z: Tensor, t: Times, s: Times | None = None, c: Tensor | None = None
    ) -> dist.Independent:
        r"""Returns :math:`p_\phi(z_s | z_t)`, equation (14) for :math:`s = t - 1`.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, \dots)`.
            t: The time(s), index(es) of the grid or times in :math:`[0, 1]`, with shape
                :math:`(*)`.
            s: The earlier time(s), if ``t`` is no index; the step before an index by default.
            c: The context, with shape :math:`(B, F)`.
        """
        log_snr, kernel = self.log_snr(t), self.coefficients(t, s)
        net, *others = self.network_at(z, log_snr, c)
        scale = self.variance.scale(kernel, log_snr, others)
        mean = torch.addcmul(kernel("skips") * z, kernel("gains"), net)
        return normal(mean, scale, self.event_dim)

    def denoise(self, z: Tensor, t: Times, c: Tensor | None = None) -> Tensor:
        r"""Returns the estimate of :math:`E[z_0 | z_t]` that the reverse mean implies.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, \dots)`.
            t: The time(s), positive.
            c: The context, with shape :math:`(B, F)`.

        Raises:
            ValueError: If the chain erases :math:`z_0`, so that nothing is to be estimated.
        """
        self.check_signal()
        kernel = self.coefficients(t, None)
        return kernel("z0_skips") * z + kernel("z0_gains") * self.network(z, t, c)[0]

    def noise(self, z: Tensor, t: Times, c: Tensor | None = None) -> Tensor:
        r"""Returns the noise :math:`\hat\epsilon` that the estimate of :math:`z_0` implies, in
        continuous time.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(*, \dots)`.
            t: The time(s), positive.
            c: The context, with shape :math:`(B, F)`.
        """
        log_snr = self.schedule.ready(self.schedule.log_snr_at(t), self.event_dim)
        gain = {
            "eps": torch.ones_like(log_snr),
            "z0": -torch.exp(log_snr / 2),
            "v": torch.sigmoid(log_snr).sqrt(),
        }[self.parameterization]
        skip = torch.sigmoid(-log_snr).sqrt()
        return skip.to(z) * z + gain.to(z) * self.network(z, t, c)[0]

    def network(self, z: Tensor, t: Times, c: Tensor | None = None) -> tuple[Tensor, ...]:
        r"""Returns the outputs of the network, in full precision also under autocast."""
        return self.network_at(z, self.log_snr(t), c)

    def network_at(self, z: Tensor, log_snr: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        r"""Returns the outputs of the network at log-SNRs."""
        check_ends("z", z, self.event_shape)
        c = self.context(c)
        log_snr, shape = log_snr.to(z), self.schedule.shape
        with torch.autocast(z.device.type, enabled=False):
            told = log_snr.mean([*range(-len(shape), 0)]) if shape else log_snr
            if self.preconditioning is None:
                return self.evaluate(z, told, c)
            expanded = self.schedule.ready(log_snr, self.event_dim)
            return self.preconditioning(lambda z: self.evaluate(z, told, c), z, expanded)

    def log_snr(self, t: Times) -> Tensor:
        r"""Returns the log-SNR at indices or times, in the dtype of the tables."""
        if is_index(t) and not self.schedule.learned:
            return at_time(self.schedule.log_snr, t, 0)
        return self.schedule.log_snr_at(t).to(self.schedule.log_snr)

    def evaluate(self, z: Tensor, log_snr: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        r"""Returns the outputs of the backbone, which is called as it wants to be."""
        batch = z.shape[: z.ndim - self.event_dim]
        dtype = next((p.dtype for p in self.backbone.parameters()), z.dtype)
        inputs = [z, log_snr] if c is None else [z, log_snr, c]
        if not getattr(self.backbone, "any_batch", False):
            inputs[0] = z.reshape(-1, *self.event_shape)
            inputs[1] = log_snr.expand(batch).reshape(-1)
            if c is not None:
                shape = self.context.shape
                inputs[2] = c.expand(*batch, *shape).reshape(-1, *shape)
        outputs = self.backbone(*(x.to(dtype) for x in inputs))
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        return tuple(out.to(z.dtype).reshape(z.shape) for out in outputs)

    def coefficients(self, t: Times, s: Times | None) -> Callable[[str], Tensor]:
        r"""Returns a function from the names of tables to their entries, ready for latents."""
        if is_index(t) and s is None:
            if isinstance(t, int) and t < 1:
                raise ValueError(f"t must be from 1 to T = {self.schedule.num_timesteps}, got {t}")
            if not self.schedule.learned:
                return lambda name: at_time(getattr(self.kernel, name), t, self.event_dim)
            s = t - 1
        like = self.kernel.skips
        ends = (t, self.before(t) if s is None else s)
        grid = self.schedule.original_on("times", like.device)
        later, earlier = (
            grid[u] if is_index(u) else torch.as_tensor(u, dtype=torch.float64, device=like.device)
            for u in ends
        )
        values = self.compute(later, earlier)
        return lambda name: self.schedule.ready(values[name], self.event_dim).to(like)

    @torch.no_grad()
    def tables(self, times: Tensor) -> dict[str, Tensor]:
        r"""Returns the tables of a grid, in float64 and zero at :math:`t = 0`."""
        steps = self.compute(times[1:], times[:-1])
        return {name: torch.cat([torch.zeros_like(x[:1]), x]) for name, x in steps.items()}

    def compute(self, t: Tensor, s: Tensor) -> dict[str, Tensor]:
        r"""Returns the coefficients of the reverse kernel between times, in float64."""
        if self.continuous:  # where no coefficient is that of a step that it was trained for
            return self.step(t, s)
        home = self.before(t)
        at_home = self.step(t, home)
        if bool((s == home).all()):
            return at_home
        # On another grid the network means the same estimate of z_0 as on its own.
        step = self.step(t, s)
        step["skips"] = step["a"] + step["b"] * at_home["z0_skips"]
        step["gains"] = step["b"] * at_home["z0_gains"]
        return step | {name: at_home[name] for name in ("z0_skips", "z0_gains")}

    def before(self, t: Times) -> Tensor:
        r"""Returns the times that come a step of the home grid before the given ones."""
        t = torch.as_tensor(t, dtype=torch.float64)
        grid = self._home.to(t.device)
        upper = torch.searchsorted(grid, (t - 1e-9).contiguous()).clamp(1, len(grid) - 1)
        on_grid = (t - grid[upper]).abs() < 1e-9
        before = torch.where(on_grid, grid[upper - 1], t - (grid[upper] - grid[upper - 1]))
        return before.clamp(min=0)

    def step(self, t: Tensor, s: Tensor) -> dict[str, Tensor]:
        r"""Returns the coefficients of a reverse kernel that the network was trained for."""
        beta, beta_tilde = self.schedule.variances(t, s)
        log_snr_t, log_snr_s = (self.schedule.log_snr_at(u) for u in (t, s))
        one_minus, alpha = torch.sigmoid(-log_snr_t), 1 - beta
        a = alpha.sqrt() * torch.sigmoid(-log_snr_s) / one_minus
        b = torch.sigmoid(log_snr_s).sqrt() * beta / one_minus
        gains = {
            "mu": torch.ones_like(b),
            "z0": b,
            # z_0 = (z_t - sqrt(1 - abar) eps) / sqrt(abar), where abar cancels that in b
            "eps": -beta / (alpha * one_minus).sqrt(),
            "v": -b * one_minus.sqrt(),  # z_0 = sqrt(abar) z_t - sqrt(1 - abar) v
        }[self.parameterization]
        variance = self.variance(beta, beta_tilde)
        # The linear part of a Gaussian with other moments is that of the preconditioning, and of
        # infinitely many steps that of their limit: z0_skips = sqrt(abar).
        as_beta = self.preconditioning is not None or self.continuous
        skips = (alpha if as_beta else 1 - variance).sqrt()
        return {
            "a": a,
            "b": b,
            "betas_tilde": beta_tilde,
            "sigmas": variance.sqrt(),
            "log_ranges": Learned.log_range(beta, beta_tilde),
            "skips": skips,
            "gains": gains,
            "z0_skips": (skips - a) / b,
            "z0_gains": gains / b,
        }

    def with_steps(self, steps: int | Tensor) -> Denoiser:
        r"""Returns a denoiser with the same network, for the steps of another chain.

        Arguments:
            steps: The number of steps, or the times of a grid, see
                :meth:`~pyro_vaediff.schedules.Schedule.with_steps`.
        """
        new = shallow_copy(self)
        new.schedule = self.schedule.with_steps(steps)
        new.kernel = Kernel(new.tables(new.schedule.original("times"))).to(self.kernel.skips)
        return new

    def check_signal(self) -> None:
        r"""Raises a ``ValueError`` if nothing is left of :math:`z_0` in :math:`z_T`."""
        log_signal = self.schedule.original("log_alphas_cumprod")[-1].min().item()
        if log_signal < -60:
            raise ValueError(
                f"the schedule erases z_0: log alphas_cumprod is {log_signal:.0f} at T, but must "
                "be at least -60 to estimate z_0 from z_t; choose smaller betas"
            )

    @torch.no_grad()
    def check_backbone(self) -> None:
        r"""Raises a ``ValueError`` unless the backbone returns what it must."""
        like = next(self.backbone.parameters(), torch.zeros(()))
        inputs = [like.new_zeros(2, *self.event_shape), like.new_zeros(2)]
        if self.context.shape:
            inputs.append(like.new_zeros(2, *self.context.shape))
        with eval_mode(self.backbone):  # the statistics of a BatchNorm stay as they are
            outputs = self.backbone(*inputs)
        expected = self.variance.num_outputs
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        shapes = [tuple(out.shape) if isinstance(out, Tensor) else type(out) for out in outputs]
        if shapes != [tuple(inputs[0].shape)] * expected:
            what = "a tensor" if expected == 1 else f"{expected} tensors"
            raise ValueError(
                f"the backbone {type(self.backbone).__name__} must return {what} of the shape of "
                f"z, {tuple(inputs[0].shape)}, as the reverse variance is a "
                f"{type(self.variance).__name__}, got {shapes}: see pyro_vaediff.nn.backbones"
            )
