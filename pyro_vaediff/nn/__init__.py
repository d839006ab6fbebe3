r"""Networks. Encoders and decoders return distributions."""

from .azula import DiTBackbone, UNetBackbone, ViTBackbone
from .backbones import (
    BACKBONES,
    MLPBackbone,
    ResidualMLP,
    TimeAdapter,
    from_eps,
    make_backbone,
)
from .conv import ConvDecoder, ConvEncoder, check_image_size
from .coupling import coupling_flow
from .embeddings import LogSNRFeatures, sinusoidal_embedding
from .flows import FLOWS, FlowDistribution, masked_autoregressive_flow
from .mlp import MLPDecoder, MLPEncoder, mlp
from .paper import paper_decoder, paper_encoder
from .scale import bounded_scale, upcast
from .vectors import Head

__all__ = [
    "BACKBONES",
    "FLOWS",
    "ConvDecoder",
    "ConvEncoder",
    "DiTBackbone",
    "FlowDistribution",
    "Head",
    "LogSNRFeatures",
    "MLPBackbone",
    "MLPDecoder",
    "MLPEncoder",
    "ResidualMLP",
    "TimeAdapter",
    "UNetBackbone",
    "ViTBackbone",
    "bounded_scale",
    "check_image_size",
    "coupling_flow",
    "from_eps",
    "make_backbone",
    "masked_autoregressive_flow",
    "mlp",
    "paper_decoder",
    "paper_encoder",
    "sinusoidal_embedding",
    "upcast",
]
