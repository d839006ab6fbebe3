r"""Networks. Encoders and decoders return distributions."""

from .conv import ConvDecoder, ConvEncoder
from .denoiser import (
    DENOISERS,
    MLPDenoiser,
    PreconditionedDenoiser,
    ResidualDenoiser,
    make_denoiser,
    sinusoidal_embedding,
)
from .mlp import mlp
from .paper import paper_decoder, paper_encoder
from .scale import bounded_scale, upcast

__all__ = [
    "DENOISERS",
    "ConvDecoder",
    "ConvEncoder",
    "MLPDenoiser",
    "PreconditionedDenoiser",
    "ResidualDenoiser",
    "bounded_scale",
    "make_denoiser",
    "mlp",
    "paper_decoder",
    "paper_encoder",
    "sinusoidal_embedding",
    "upcast",
]
