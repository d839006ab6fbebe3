r"""Normalizing flow priors."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor

from ..arguments import check_whole
from ..nn.flows import FlowDistribution, masked_autoregressive_flow
from ..register import register
from .base import Prior

__all__ = ["FlowPrior"]


class FlowPrior(Prior):
    r"""A masked autoregressive flow, :math:`z_0 = f_1 \circ \dots \circ f_n(u)` with :math:`u \sim
    \mathcal{N}(0, I)`.

    Each step is affine and autoregressive, and the order of the variables is reversed from one to
    the next. A prior scores latents in every training step and samples rarely: the steps score in
    one pass and sample in :math:`D` (the MAF direction). Latents of any shape are seen as vectors.

    Arguments:
        event_shape: The shape of a latent; a number :math:`D` means :math:`(D,)`.
        num_steps: The number of affine autoregressive steps. The paper uses 3.
        hidden_features: The width of each hidden layer of the conditioners. They are widened to
            :math:`D` if they are narrower, as the masks need at least one unit per variable.
        context_features: The number of features :math:`F` of the context, 0 for none.

    References:
        | Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017)
        | https://arxiv.org/abs/1705.07057
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_steps: int = 3,
        hidden_features: Sequence[int] = (300, 300, 300),
        context_features: int = 0,
    ):
        super().__init__(event_shape)
        check_whole("num_steps", num_steps)
        if not hidden_features or min(hidden_features) < 1:
            raise ValueError(f"hidden_features must be one or more widths, got {hidden_features}")
        self.context_features = context_features
        self.flow = masked_autoregressive_flow(
            self.latent_dim, context_features, num_steps, hidden_features
        )

    def distribution(self, c: Tensor | None = None) -> FlowDistribution:
        r"""Returns :math:`p(z_0 | c)`, whose log-density is exact.

        Raises:
            ValueError: If the context is not what the prior was made for, or if the prior is in
                half precision.
        """
        features, dtype = 0 if c is None else c.shape[-1], self.origin.dtype
        if features != self.context_features:
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
