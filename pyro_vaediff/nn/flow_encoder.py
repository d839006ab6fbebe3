r"""Posteriors that are normalizing flows, on top of any Gaussian encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import zuko
from torch import Tensor, nn

from ..arguments import as_shape, check_whole
from ..diffusion import base_normal
from .coupling import coupling_flow
from .flows import FlowDistribution, masked_autoregressive_flow
from .mlp import zero_last
from .scale import upcast

__all__ = ["POSTERIOR_FLOWS", "FlowEncoder", "coupling_posterior", "inverse_autoregressive_flow"]


class FlowEncoder(nn.Module):
    r"""An amortized posterior that is a normalizing flow of what a Gaussian encoder draws.

    .. math:: u \sim \mathcal{N}(m(x), s(x)^2), \qquad z_0 = f_n \circ \dots \circ f_1(u; h),
        \qquad h = (m(x), \log s(x))

    Each step :math:`f_i` is told the context :math:`h`, which is all that the encoder says of
    :math:`x`. If the flow starts at the identity, as those of :data:`POSTERIOR_FLOWS` do, the
    posterior starts exactly at the Gaussian one.

    Its density is that of the change of variables,

    .. math:: \log q(z_0 | x) = \log \mathcal{N}(u | m(x), s(x)^2) - \sum_{i=1}^n \log \left|
        \det \frac{\partial f_i}{\partial u_{i-1}} \right| ,

    and a draw is scored as it is made. There is neither a mean nor an entropy or a KL divergence in
    closed form, and no :math:`q(z_t | x)`: estimators sample :math:`\log q(z_0 | x)`, and the
    chain of a diffusion prior is conditioned on :math:`z_0`.

    Arguments:
        encoder: The Gaussian encoder, for latents of any shape.
        flow: A flow of zuko's over vectors of the :math:`D` variables of a latent, with :math:`2 D`
            features of context, which maps latents to noise. Its base distribution is not used.

    References:
        | Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), equation (13)
        | https://arxiv.org/abs/1505.05770

        | Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
          equations (9) to (11)
        | https://arxiv.org/abs/1606.04934

    Example:
        >>> from pyro_vaediff.nn import ConvEncoder
        >>> encoder = ConvEncoder((1, 8, 8), latent_dim=16)
        >>> encoder = FlowEncoder(encoder, inverse_autoregressive_flow(16, context=32))
        >>> q_z0 = encoder(torch.zeros(5, 1, 8, 8))
        >>> q_z0.log_prob(q_z0.rsample()).shape
        torch.Size([5])
    """

    def __init__(self, encoder: nn.Module, flow: zuko.flows.Flow):
        super().__init__()
        self.encoder, self.transform = encoder, flow.transform

    def forward(self, x: Tensor, *context: Tensor) -> FlowDistribution:
        r"""Returns :math:`q(z_0 | x)`.

        Arguments:
            x: The data, as the encoder takes them.
            context: The context, if there is one.

        Raises:
            ValueError: If the encoder is not Gaussian.
        """
        q = self.encoder(x, *context)
        normals, shape, n = base_normal(q), q.batch_shape + q.event_shape, len(q.event_shape)
        if normals is None:
            raise ValueError(
                "encoder must return a diagonal Gaussian, which the flow starts from, got a "
                f"{type(q).__name__}: leave the flow out"
            )
        loc, scale = (upcast(v).expand(shape).flatten(-n) for v in (normals.loc, normals.scale))
        with torch.autocast(loc.device.type, enabled=False):
            transform = self.transform(torch.cat([loc, scale.log()], -1))
        base = zuko.distributions.DiagNormal(loc, scale)
        return FlowDistribution(zuko.distributions.NormalizingFlow(transform, base), q.event_shape)


def inverse_autoregressive_flow(
    event_shape: int | Sequence[int],
    context: int,
    num_steps: int = 4,
    hidden_features: Sequence[int] = (200, 200),
) -> zuko.flows.Flow:
    r"""Returns an inverse autoregressive flow that starts at the identity.

    Sampling is its parallel direction: a draw and its score take one pass of each network, and the
    score of another draw takes :math:`D`. See
    :func:`~pyro_vaediff.nn.masked_autoregressive_flow`.

    Arguments:
        event_shape: The shape of a latent, which is seen as a vector, or its number of variables.
        context: The number of features of the context.
        num_steps: The number of steps.
        hidden_features: The width of each hidden layer of a step.
    """
    check_whole("num_steps", num_steps)
    flow = masked_autoregressive_flow(event_shape, context, num_steps, hidden_features, True)
    for step in flow.transform.transforms:
        zero_last(step.inv.hyper)
    return flow


def coupling_posterior(
    event_shape: int | Sequence[int], context: int, num_steps: int = 4
) -> zuko.flows.Flow:
    r"""Returns a flow of coupling layers, which draws and scores any latent in one pass each.

    For latents that are images, the networks of the steps are convolutional; a vector is an image
    of one pixel. See :func:`~pyro_vaediff.nn.coupling_flow`.

    Arguments:
        event_shape: The shape of a latent, or its number of variables :math:`D`.
        context: The number of features of the context.
        num_steps: The number of steps.
    """
    shape = as_shape("event_shape", event_shape)
    if len(shape) == 3:
        return coupling_flow(shape, context, num_steps, (32, 32))
    return coupling_flow((torch.Size(shape).numel(), 1, 1), context, num_steps, (200, 200))


#: The flows of posteriors, as functions ``(event_shape, context, num_steps)``.
POSTERIOR_FLOWS: dict[str, Callable[..., zuko.flows.Flow]] = {
    "iaf": inverse_autoregressive_flow,
    "coupling": coupling_posterior,
}
