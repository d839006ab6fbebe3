r"""Data sets: images as ``uint8`` tensors, in three splits.

An image is an array of ``levels`` integer values. Nothing here rescales or dequantizes it, because
that is up to the pixel space; nothing here augments it, either: ``batches`` draws the paper's
horizontal flips anew at every epoch. All but CelebA come with the labels of their images, a folder
if it has a subfolder for each class.

=================  =====================  ===========================  ====================
name               images                 train / validation / test    on disk, under ``root``
=================  =====================  ===========================  ====================
``digits``           8x8 gray, 17 levels    1197 / 300 / 300             nothing: scikit-learn
``mnist``            28x28 gray             54,000 / 6,000 / 10,000      ``MNIST/raw/``
``fashion-mnist``    28x28 gray             54,000 / 6,000 / 10,000      ``FashionMNIST/raw/``
``cifar10``          32x32 RGB              45,000 / 5,000 / 10,000      ``cifar-10-batches-py/``
``celeba``           64x64 RGB              162,770 / 19,867 / 19,962    ``celeba/``
``folder``           any                    yours, or 80 / 10 / 10 %     ``root`` itself
=================  =====================  ===========================  ====================

The files of MNIST and Fashion-MNIST are read unpacked (``*-ubyte``) or as they are downloaded
(``*-ubyte.gz``).

The test split is the official one. The validation split is CelebA's own or, elsewhere, a seeded
tenth of the official train split, or as many of its images as one asks for. CelebA's three splits
share no person.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import check_choice, check_seed, check_whole
from . import sources
from .folders import folder
from .groups import list_name
from .minibatch import batches
from .splits import warn_of_copies

__all__ = ["DATASETS", "ImageData", "batches", "load"]

VALIDATED = ("mnist", "fashion-mnist", "cifar10")  # whose validation images are of our choice
DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "celeba", "folder")


@dataclass(frozen=True, eq=False)
class ImageData:
    r"""Images in three splits, checked once on construction.

    Arguments:
        name: The name of the data set.
        train: The images to train on, ``uint8`` with shape :math:`(N, C, H, W)` and values in
            ``0 .. levels - 1``.
        validation: The images that select the best model, like ``train``.
        test: The images that are reported on, like ``train``.
        levels: The number of values that a pixel can take.
        horizontal_flip: Whether training flips images at random, as the paper does for CIFAR-10.
        groups: The name and the checksum of the list of groups that the splits keep apart, if any.
        num_validation: The number of validation images that was asked for, if one was.
        train_labels: The class of each training image, ``int64`` with shape :math:`(N,)` and values
            in ``0 .. num_classes - 1``, or ``None``.
        validation_labels: Those of the validation images.
        test_labels: Those of the test images.
        num_classes: The number of classes, if there are labels.

    Raises:
        ValueError: If a split is empty, has another dtype or image shape, or a value is out of
            range, or labels are not as above.
    """

    name: str
    train: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    levels: int = 256
    horizontal_flip: bool = False
    groups: str | None = field(default=None, repr=False)
    num_validation: int | None = field(default=None, repr=False)
    train_labels: Tensor | None = field(default=None, repr=False)
    validation_labels: Tensor | None = field(default=None, repr=False)
    test_labels: Tensor | None = field(default=None, repr=False)
    num_classes: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.levels, int) and 2 <= self.levels <= 256):
            raise ValueError(
                f"data set {self.name!r}: levels must be from 2 to 256, as pixels are uint8, not "
                f"{self.levels!r}"
            )
        for split in ("train", "validation", "test"):
            images = getattr(self, split)
            where = f"data set {self.name!r}: {split}"
            if not isinstance(images, Tensor):
                raise ValueError(f"{where} must be a tensor, not {type(images).__name__}")
            if images.dtype != torch.uint8 or images.ndim != 4:
                raise ValueError(
                    f"{where} must be a uint8 tensor (N, C, H, W), "
                    f"not {images.dtype} {tuple(images.shape)}"
                )
            if images.numel() == 0:
                raise ValueError(f"{where} holds no image")
            if images.shape[1:] != self.train.shape[1:]:
                raise ValueError(
                    f"{where} has images of shape {tuple(images.shape[1:])}, "
                    f"but train of shape {self.image_shape}"
                )
            # Every uint8 is a valid level when there are 256, and scanning CelebA takes seconds.
            if self.levels < 256 and int(images.max()) >= self.levels:
                raise ValueError(
                    f"{where} holds the value {int(images.max())}, "
                    f"but levels={self.levels} allows 0..{self.levels - 1}"
                )
            labels = getattr(self, f"{split}_labels")
            if labels is None and self.num_classes is None:
                continue
            if labels is None or self.num_classes is None:
                raise ValueError(f"{where}_labels and num_classes go together: give both or none")
            if not (
                (labels.dtype, labels.shape) == (torch.int64, images.shape[:1])
                and 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes
            ):
                raise ValueError(
                    f"{where}_labels must be {len(images)} int64 numbers in "
                    f"0..{self.num_classes - 1}, not {labels.dtype} {tuple(labels.shape)}"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        r"""The shape :math:`(C, H, W)` of one image."""
        _, channels, height, width = self.train.shape
        return channels, height, width


def load(
    name: str,
    root: str | Path = "data",
    *,
    image_size: int | None = None,
    channels: int | None = None,
    download: bool = True,
    seed: int = 0,
    limit: int | None = None,
    groups: str | Path | None = None,
    num_validation: int | None = None,
) -> ImageData:
    r"""Returns a data set, loaded into memory.

    Resizing follows the paper: the shorter side is resized to ``image_size`` (bilinear,
    antialiased) and the center square is kept.

    With ``name="folder"``, ``root`` is a folder of images, nested to any depth. Subfolders
    ``train`` and ``test`` (and optionally ``val``) are the splits, at any depth and in any case,
    also if they are called ``training``, ``testing``, ``valid`` or ``validation``; otherwise a
    seeded permutation of all images is cut 80 / 10 / 10 %. Other subfolders are classes, which give
    labels if each image is in one. Images are turned upright (EXIF), transparency is composited on
    white, 16-bit gray is rounded to 8 bits and 16-bit color cut to 8 bits, and the first frame of
    an animation is taken. Hidden files are ignored, and so are those which are no images; an image
    that cannot be read, or is not named as one, is an error.

    Images of one person, scene or film are alike, so that a model which saw some of them is not
    tested by the others. With ``groups``, each group is in one split only: the groups are permuted,
    and validation and test are filled with whole groups until they have a tenth of the images each,
    or as close to it as the groups allow. Splits that are given as subfolders must not share a
    group.

    Arguments:
        name: One of ``DATASETS``.
        root: The folder that holds the data sets, or the images themselves for ``"folder"``.
        image_size: The side of the square images, in pixels; by default the data set's own (64 for
            CelebA). A folder then needs square images of one size.
        channels: 1 (gray) or 3 (RGB); by default the data set's own. A folder is gray if every
            pixel that is loaded is.
        download: Whether to download what is missing from ``root``. CelebA also needs the package
            ``gdown`` for that.
        seed: The seed of the permutations that make the splits.
        limit: Keep only the first ``limit`` images of each split.
        groups: For ``"folder"``, a text file with lines ``FILE GROUP``, such as CelebA's
            ``identity_CelebA.txt``. A file is named by its path relative to ``root`` or by its name
            alone. All images must be listed; other files may be.
        num_validation: For ``"mnist"``, ``"fashion-mnist"`` and ``"cifar10"``, the number of
            training images that are kept for validation, in place of a tenth of them. Published
            likelihoods of the first two are with 10,000.

    Returns:
        The three splits, with labels where there are any. A warning says if they share an image.

    Raises:
        ValueError: If an argument is out of range, an image is unusable, there are too few, or
            ``groups`` does not list them or has a group in two of the given splits.
        FileNotFoundError: If the data is neither in ``root`` nor can be downloaded, or ``groups``
            does not exist.

    References:
        | Deep Learning Face Attributes in the Wild (Liu et al., 2015)
        | https://arxiv.org/abs/1411.7766
        | Learning Multiple Layers of Features from Tiny Images (Krizhevsky, 2009)
        | https://www.cs.toronto.edu/~kriz/cifar.html

    Example:
        >>> data = load("digits")
        >>> data
        ImageData(name='digits', levels=17, horizontal_flip=False)
        >>> data.train.shape
        torch.Size([1197, 1, 8, 8])
    """
    check_choice("data set", name, DATASETS)
    numbers = {"image_size": image_size, "limit": limit, "num_validation": num_validation}
    for argument, value in numbers.items():
        if value is not None:
            check_whole(argument, value)
    check_seed(seed)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (gray) or 3 (RGB), not {channels}")
    if groups is not None and name != "folder":
        raise ValueError(
            f"groups={str(groups)!r} is for the data set 'folder', not {name!r}: leave it out "
            "(--groups)"
        )
    if num_validation is not None and name not in VALIDATED:
        raise ValueError(
            f"num_validation={num_validation} is for {', '.join(VALIDATED)}, not {name!r}: leave "
            "it out (--num-validation)"
        )
    root = Path(root).expanduser()
    options = {"image_size": image_size, "channels": channels, "limit": limit}

    listed = None if groups is None else Path(groups).expanduser()
    if name == "digits":
        source = sources.digits(**options, seed=seed)
    elif name == "folder":
        source = folder(root, **options, seed=seed, groups=listed)
    elif name == "celeba":
        source = sources.celeba(root, **options, download=download)
    else:
        options |= {"num_validation": num_validation}
        source = sources.from_torchvision(name, root, **options, download=download, seed=seed)
    if name != "celeba":  # its splits are official, and to read them all takes seconds
        warn_of_copies(name, *source.images)
    train_labels, validation_labels, test_labels = source.labels or (None, None, None)
    return ImageData(
        name,
        *source.images,
        levels=17 if name == "digits" else 256,
        horizontal_flip=name == "cifar10",
        groups=None if listed is None else list_name(listed),
        num_validation=num_validation,
        train_labels=train_labels,
        validation_labels=validation_labels,
        test_labels=test_labels,
        num_classes=source.num_classes,
    )
