r"""Normalizing flows from zuko, as distributions over latents of any shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import constraints
from torch import Size, Tensor, nn

from ..arguments import as_shape
from .coupling import coupling_flow

__all__ = ["FLOWS", "FlowDistribution", "masked_autoregressive_flow"]


class FlowDistribution(ZukoToPyro):
    r"""The distribution of a flow of zuko's, over latents of any shape.

    As with :class:`pyro.contrib.zuko.ZukoToPyro`, a sample is scored when it is drawn, at next to
    no cost; a copy of it is scored anew. Densities are computed in full precision also under
    autocast.

    Arguments:
        flow: The distribution over vectors, such as ``zuko.flows.MAF(features)(c)``.
        event_shape: The shape of a latent.

    Example:
        A posterior, for which a step takes one evaluation of each network:

        >>> flow = masked_autoregressive_flow(16, context=32, inverse=True)
        >>> q_z0 = FlowDistribution(flow(torch.randn(8, 32)), (16,))
        >>> q_z0.log_prob(q_z0.rsample()).shape
        torch.Size([8])
    """

    dist: zuko.distributions.NormalizingFlow
    arg_constraints: dict = {}  # noqa: RUF012  (as in torch)

    def __init__(self, flow: torch.distributions.Distribution, event_shape: Sequence[int]):
        super().__init__(flow)
        self._batch_shape, self._event_shape = flow.batch_shape, Size(event_shape)
        self._drawn: tuple[Tensor, int, Tensor] | None = None

    @property
    def event_shape(self) -> Size:
        return self._event_shape

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self._event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FlowDistribution:
        return FlowDistribution(self.dist.expand(Size(batch_shape)), self._event_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.autocast(self.device_type, enabled=False):
            flat, log_prob = self.dist.rsample_and_log_prob(Size(sample_shape))
        z = flat.unflatten(-1, self._event_shape)
        self._drawn = z, z._version, log_prob
        return z

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def __call__(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.rsample(sample_shape)

    def log_prob(self, z: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(z)
        if self._drawn is not None:
            drawn, version, log_prob = self._drawn
            # Of a sample that was drawn without gradients, the score has them nevertheless.
            usable = log_prob.requires_grad or not torch.is_grad_enabled()
            if z is drawn and z._version == version and usable:  # not changed in place since
                return log_prob
        with torch.autocast(self.device_type, enabled=False):
            return self.dist.log_prob(z.flatten(-len(self._event_shape)))

    @property
    def device_type(self) -> str:
        return self.dist.base.base_dist.loc.device.type

    @property
    def is_inverse_autoregressive(self) -> bool:
        r"""Whether it takes :math:`D` passes to score a sample that it did not draw itself."""
        steps = getattr(self.dist.transform, "transforms", [self.dist.transform])
        return any(isinstance(t.inv, zuko.transforms.AutoregressiveTransform) for t in steps)


def masked_autoregressive_flow(
    event_shape: int | Sequence[int],
    context: int = 0,
    num_steps: int = 3,
    hidden_features: Sequence[int] = (300, 300, 300),
    inverse: bool = False,
) -> zuko.flows.Flow:
    r"""Returns a masked autoregressive flow, which is scored in one pass and sampled in :math:`D`.

    That is the direction for a prior. A posterior is sampled in each training step and scores its
    samples only, for which the ``inverse`` takes one pass. The steps are affine, and the order of
    the variables is reversed from one to the next. Latents of any shape are seen as vectors.

    Arguments:
        event_shape: The shape of a latent, or its number of variables :math:`D`.
        context: The number of features :math:`F` of the context.
        num_steps: The number of steps.
        hidden_features: The width of each hidden layer of the conditioners. They are widened to
            :math:`D` if they are narrower, as the masks need at least one unit per variable.
        inverse: Whether it is sampled in one pass and scores others' samples in :math:`D`.

    References:
        | Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016)
        | https://arxiv.org/abs/1606.04934
    """
    features = math.prod(as_shape("event_shape", event_shape))
    widths = [max(width, features) for width in hidden_features]
    flow = zuko.flows.MAF(
        features, context, transforms=num_steps, hidden_features=widths, activation=nn.ELU
    )
    if not inverse:
        return flow
    return zuko.flows.Flow([step.inv for step in flow.transform.transforms], flow.base)


#: The flows, as functions ``(event_shape, context, num_steps, hidden_features)``.
FLOWS: dict[str, Callable[..., zuko.flows.Flow]] = {
    "autoregressive": masked_autoregressive_flow,
    "coupling": coupling_flow,
}
