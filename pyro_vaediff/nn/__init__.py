r"""Networks. Encoders and decoders return distributions."""

from .conv import ConvDecoder, ConvEncoder
from .denoiser import MLPDenoiser, sinusoidal_embedding
from .mlp import mlp
from .paper import paper_decoder, paper_encoder
from .scale import bounded_scale, upcast

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "MLPDenoiser",
    "bounded_scale",
    "mlp",
    "paper_decoder",
    "paper_encoder",
    "sinusoidal_embedding",
    "upcast",
]
