r"""Normalizing flow priors."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
import zuko
from torch import Tensor

from ..arguments import check_choice, check_whole
from ..nn.flows import FLOWS, FlowDistribution
from ..register import register
from .base import Prior

__all__ = ["FlowPrior"]


class FlowPrior(Prior):
    r"""A normalizing flow, :math:`z_0 = f_1 \circ \dots \circ f_n(u)` with :math:`u \sim
    \mathcal{N}(0, I)`.

    The default is masked autoregressive: each step is affine and autoregressive, and the order of
    the variables is reversed from one to the next. A prior scores latents in every training step
    and samples rarely: the steps score in one pass and sample in :math:`D` (the MAF direction).
    Latents of any shape are seen as vectors. For those that are images, ``"coupling"`` is a flow of
    convolutional coupling layers, see :func:`~pyro_vaediff.nn.coupling_flow`.

    Arguments:
        event_shape: The shape of a latent; a number :math:`D` means :math:`(D,)`.
        num_steps: The number of steps, by default 3 autoregressive ones, as in the paper, or 8
            coupling layers.
        hidden_features: The width of each hidden layer of the conditioners: of linear layers, which
            are widened to :math:`D` if they are narrower, as the masks need at least one unit per
            variable, by default (300, 300, 300); or of convolutions, by default (32, 32, 32).
        context_features: The number of features :math:`F` of the context, 0 for none, ``None`` to
            ignore that of the program.
        flow: ``"autoregressive"``, ``"coupling"``, or a flow of zuko's to :math:`\mathcal{N}(0, I)`
            over vectors of :math:`D` variables, the latents flattened. It is called once at
            construction, as a check.

    Raises:
        ValueError: If an argument is not as above.

    References:
        | Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017)
        | https://arxiv.org/abs/1705.07057

    Example:
        >>> prior = FlowPrior((4, 8, 8), flow="coupling")
        >>> prior.model().shape
        torch.Size([4, 8, 8])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_steps: int | None = None,
        hidden_features: Sequence[int] | None = None,
        context_features: int | None = 0,
        flow: str | zuko.flows.Flow = "autoregressive",
    ):
        super().__init__(event_shape)
        self.context_features = context_features
        options = {"num_steps": num_steps, "hidden_features": hidden_features}
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(flow, zuko.flows.Flow):
            if given:
                raise ValueError(f"a flow that is given has no use for {' and '.join(given)}")
            self.flow = flow
            self.check_flow()
            return
        check_choice("flow", flow, FLOWS)
        if num_steps is not None:
            check_whole("num_steps", num_steps)
        if hidden_features is not None and (not hidden_features or min(hidden_features) < 1):
            raise ValueError(f"hidden_features must be one or more widths, got {hidden_features}")
        self.flow = FLOWS[flow](self.event_shape, context_features or 0, **given)

    @torch.no_grad()
    def check_flow(self) -> None:
        r"""Raises a ``ValueError`` unless the flow scores latents in their context."""
        like = next(self.flow.parameters(), self.origin)
        c = like.new_zeros(2, self.context_features) if self.context_features else None
        what = f"flow must be one to N(0, I) over vectors of {self.latent_dim} variables"
        try:
            flow = self.flow(c)
            if flow.event_shape != (self.latent_dim,):
                raise ValueError(f"{what}, got event shape {tuple(flow.event_shape)}")
            FlowDistribution(flow, self.event_shape).log_prob(like.new_zeros(2, *self.event_shape))
        except (RuntimeError, AttributeError) as error:  # of torch, for shapes that do not fit
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{what}, with context_features={self.context_features}, got one that fails: "
                f"{reason}"
            ) from error

    def distribution(self, c: Tensor | None = None) -> FlowDistribution:
        r"""Returns :math:`p(z_0 | c)`, whose log-density is exact.

        Raises:
            ValueError: If the context is not what the prior was made for, or if the prior is in
                half precision.
        """
        c = None if self.context_features is None else c
        features, dtype = 0 if c is None else c.shape[-1], self.origin.dtype
        if features != (self.context_features or 0):
            raise ValueError(
                f"the context must have context_features={self.context_features} features (0 is "
                f"none), got {features}"
            )
        if torch.finfo(dtype).bits < 32:
            raise ValueError(f"a FlowPrior must be in float32 or float64, not in {dtype}")
        with torch.autocast(self.origin.device.type, enabled=False):
            flow = self.flow(None if c is None else c.to(dtype))
        return FlowDistribution(flow, self.event_shape)

    def model(self, c: Tensor | None = None) -> Tensor:
        register("prior", self)
        return pyro.sample("z_0", self.distribution(c))
