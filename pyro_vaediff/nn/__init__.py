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
from .conv import ConvDecoder, ConvEncoder
from .mlp import mlp
from .paper import paper_decoder, paper_encoder
from .scale import bounded_scale, upcast

__all__ = [
    "BACKBONES",
    "ConvDecoder",
    "ConvEncoder",
    "MLPBackbone",
    "ResidualMLP",
    "TimeAdapter",
    "bounded_scale",
    "from_eps",
    "make_backbone",
    "mlp",
    "paper_decoder",
    "paper_encoder",
    "sinusoidal_embedding",
    "upcast",
]
