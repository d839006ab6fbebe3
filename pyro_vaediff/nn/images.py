r"""The common part of backbones for latents that are images: their inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arguments import as_image
from .embeddings import LogSNRFeatures
from .vectors import with_context

__all__: list[str] = []


class ImageBackbone(nn.Module):
    r"""A backbone for latents that are images, made of maps of the latents and of what it is told.

    A subclass defines :meth:`maps`.

    Arguments:
        event_shape: The shape :math:`(C, h, w)` of a latent.
        log_snr_range: The ends of the log-SNR, see :class:`~pyro_vaediff.nn.LogSNRFeatures`.
        num_outputs: The number of outputs per latent dimension.
        embedding_dim: The number of features of the log-SNR, even.
        context_features: The number of features :math:`F` of a context that is a vector.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        log_snr_range: tuple[float, float],
        num_outputs: int,
        embedding_dim: int,
        context_features: int,
    ):
        super().__init__()
        self.event_shape = torch.Size(as_image("event_shape", event_shape, type(self).__name__))
        self.num_outputs, self.context_features = num_outputs, context_features
        self.embedding = LogSNRFeatures(log_snr_range, embedding_dim)

    def maps(self, z: Tensor, told: Tensor) -> Tensor:
        r"""Returns the outputs side by side, with :math:`C` channels each.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(N, C, h, w)`.
            told: The features of the log-SNR and the context, with shape :math:`(N, E + F)`.
        """
        raise NotImplementedError

    def forward(
        self, z: Tensor, log_snr: Tensor, c: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Returns the outputs.

        Arguments:
            z: The latents :math:`z_t`, with shape :math:`(N, C, h, w)`.
            log_snr: The log-SNR, with shape :math:`(N,)`.
            c: The context, with shape :math:`(N, F)`.
        """
        told = with_context(self.embedding(log_snr), c, self.context_features)
        outputs = self.maps(z, told).split(self.event_shape[0], 1)
        return outputs[0] if self.num_outputs == 1 else outputs
