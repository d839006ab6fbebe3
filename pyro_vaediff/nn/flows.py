r"""Normalizing flows from zuko, as distributions over latents of any shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import constraints
from torch import Size, Tensor, nn

__all__ = ["FlowDistribution", "masked_autoregressive_flow"]


class FlowDistribution(ZukoToPyro):
    r"""The distribution of a flow of zuko's, over latents of any shape.

    As with :class:`pyro.contrib.zuko.ZukoToPyro`, a sample is scored when it is drawn, at next to
    no cost. Densities are computed in full precision also under autocast.

    Arguments:
        flow: The distribution over vectors, such as ``zuko.flows.MAF(features)(c)``.
        event_shape: The shape of a latent.
    """

    arg_constraints: dict = {}  # noqa: RUF012  (as in torch)

    def __init__(self, flow: torch.distributions.Distribution, event_shape: Sequence[int]):
        super().__init__(flow)
        self._shape = Size(event_shape)
        self._drawn: tuple[Tensor, Tensor] | None = None

    @property
    def event_shape(self) -> Size:
        return self._shape

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self._shape))

    def expand(self, batch_shape: Size, _instance: object = None) -> FlowDistribution:
        return FlowDistribution(self.dist.expand(Size(batch_shape)), self._shape)

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008, immutable
        with torch.autocast(self.device_type, enabled=False):
            flat, log_prob = self.dist.rsample_and_log_prob(Size(sample_shape))
        z = flat.unflatten(-1, self._shape)
        self._drawn = z, log_prob
        return z

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008, immutable
        with torch.no_grad():
            return self.rsample(sample_shape)

    def __call__(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008, immutable
        return self.rsample(sample_shape)

    def log_prob(self, z: Tensor) -> Tensor:
        drawn, log_prob = self._drawn or (None, None)
        # Of a sample that was drawn without gradients, the score has them nevertheless.
        if z is drawn and (log_prob.requires_grad or not torch.is_grad_enabled()):
            return log_prob
        with torch.autocast(self.device_type, enabled=False):
            return self.dist.log_prob(z.flatten(-len(self._shape)))

    @property
    def device_type(self) -> str:
        return self.dist.base.base_dist.loc.device.type


def masked_autoregressive_flow(
    features: int, context: int = 0, num_steps: int = 3, hidden_features: Sequence[int] = (300,) * 3
) -> nn.Module:
    r"""Returns a masked autoregressive flow, which is scored in one pass and sampled in :math:`D`.

    Its steps are affine, and the order of the variables is reversed from one to the next.

    Arguments:
        features: The number of variables :math:`D`.
        context: The number of features :math:`F` of the context.
        num_steps: The number of steps.
        hidden_features: The width of each hidden layer of the conditioners. They are widened to
            :math:`D` if they are narrower, as the masks need at least one unit per variable.
    """
    widths = [max(width, features) for width in hidden_features]
    return zuko.flows.MAF(
        features, context, transforms=num_steps, hidden_features=widths, activation=nn.ELU
    )
