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
from .conv_backbone import ConvBackbone
from .coupling import coupling_flow
from .embeddings import LogSNRFeatures, sinusoidal_embedding
from .flow_encoder import (
    POSTERIOR_FLOWS,
    FlowEncoder,
    coupling_posterior,
    inverse_autoregressive_flow,
)
from .flows import FLOWS, FlowDistribution, masked_autoregressive_flow
from .ladder import LadderEncoder, LadderPosterior, LadderStep, check_latent_groups, ladder_path
from .mlp import MLPDecoder, MLPEncoder, mlp
from .noise_matched import NoiseMatched
from .paper import paper_decoder, paper_encoder
from .pixelcnn import MaskedConv2d, PixelCNN, check_kernel_sizes
from .resnet import ResNetDecoder, ResNetEncoder, check_latent_shape
from .scale import bounded_scale, upcast
from .vectors import Head

__all__ = [
    "BACKBONES",
    "FLOWS",
    "POSTERIOR_FLOWS",
    "ConvBackbone",
    "ConvDecoder",
    "ConvEncoder",
    "DiTBackbone",
    "FlowDistribution",
    "FlowEncoder",
    "Head",
    "LadderEncoder",
    "LadderPosterior",
    "LadderStep",
    "LogSNRFeatures",
    "MLPBackbone",
    "MLPDecoder",
    "MLPEncoder",
    "MaskedConv2d",
    "NoiseMatched",
    "PixelCNN",
    "ResNetDecoder",
    "ResNetEncoder",
    "ResidualMLP",
    "TimeAdapter",
    "UNetBackbone",
    "ViTBackbone",
    "bounded_scale",
    "check_image_size",
    "check_kernel_sizes",
    "check_latent_groups",
    "check_latent_shape",
    "coupling_flow",
    "coupling_posterior",
    "from_eps",
    "inverse_autoregressive_flow",
    "ladder_path",
    "make_backbone",
    "masked_autoregressive_flow",
    "mlp",
    "paper_decoder",
    "paper_encoder",
    "sinusoidal_embedding",
    "upcast",
]
