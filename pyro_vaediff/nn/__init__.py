r"""Networks. Encoders and decoders return distributions."""

from .backbones import (
    BACKBONES,
    MLPBackbone,
    ResidualMLP,
    TimeAdapter,
    from_eps,
    make_backbone,
    sinusoidal_embedding,
)
from .conv import ConvDecoder, ConvEncoder, check_image_size
from .mlp import MLPDecoder, MLPEncoder, mlp
from .paper import paper_decoder, paper_encoder
from .scale import bounded_scale, upcast
from .vectors import Head

__all__ = [
    "BACKBONES",
    "ConvDecoder",
    "ConvEncoder",
    "Head",
    "MLPBackbone",
    "MLPDecoder",
    "MLPEncoder",
    "ResidualMLP",
    "TimeAdapter",
    "bounded_scale",
    "check_image_size",
    "from_eps",
    "make_backbone",
    "mlp",
    "paper_decoder",
    "paper_encoder",
    "sinusoidal_embedding",
    "upcast",
]
