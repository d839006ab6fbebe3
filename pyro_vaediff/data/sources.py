r"""Where the images come from: each function returns a :class:`Source`."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import describe_error, write_atomically
from .files import decode_files, read_idx, to_array
from .splits import Source, Splits, permutation, three

# The class in torchvision, and what it reads under ``root``.
TORCHVISION = {
    "mnist": (
        "MNIST",
        "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte (or .gz)",
    ),
    "fashion-mnist": (
        "FashionMNIST",
        "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte (or .gz)",
    ),
    "cifar10": (
        "CIFAR10",
        "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta} "
        "(the contents of cifar-10-python.tar.gz)",
    ),
    "celeba": (
        "CelebA",
        "celeba/img_align_celeba/*.jpg (unzipped) and celeba/list_eval_partition.txt",
    ),
}


def digits(*, image_size: int | None, channels: int | None, limit: int | None, seed: int) -> Source:
    r"""Returns the 1797 handwritten digits of scikit-learn, 8x8 with values 0..16."""
    if image_size not in (None, 8) or channels not in (None, 1):
        raise ValueError(
            "the digits are 8x8 gray images: leave out image_size and channels, "
            f"not image_size={image_size}, channels={channels}"
        )
    from sklearn.datasets import load_digits

    data = load_digits()
    order = permutation(len(data.images), seed)

    def cut(x: Tensor) -> Splits:
        train, validation, test = x[order].split((1197, 300, 300))
        return train[:limit], validation[:limit], test[:limit]

    images = torch.from_numpy(data.images).to(torch.uint8).unsqueeze(1)
    return Source(cut(images), cut(torch.from_numpy(data.target).long()), 10)


def from_torchvision(
    name: str,
    root: Path,
    *,
    image_size: int | None,
    channels: int | None,
    limit: int | None,
    num_validation: int | None,
    download: bool,
    seed: int,
) -> Source:
    r"""Returns MNIST, Fashion-MNIST or CIFAR-10; a tenth of the train split is for validation,
    unless the number is given.

    CIFAR-10's files are pickles. torchvision reads them only after their MD5 sums were found to be
    those of the official ones, so that no other pickle is ever opened.
    """
    train = _torchvision(name, root, download=download, train=True)
    test = _torchvision(name, root, download=download, train=False)
    order = permutation(len(train.data), seed).numpy()
    held_out = num_validation or max(1, len(order) // 10)
    if held_out >= len(order):
        raise ValueError(
            f"num_validation must be less than the {len(order)} training images of {name}, got "
            f"{num_validation}"
        )

    def cut(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, ...]:
        return train[order[held_out:][:limit]], train[order[:held_out][:limit]], test[:limit]

    parts = cut(np.asarray(train.data), np.asarray(test.data))
    labels = cut(np.asarray(train.targets, np.int64), np.asarray(test.targets, np.int64))
    own = 1 if parts[0].ndim == 3 else 3
    size, channels = image_size or parts[0].shape[1], channels or own

    def convert(part: np.ndarray) -> Tensor:
        if (size, channels) == (part.shape[1], own):
            images = torch.from_numpy(part).reshape(*part.shape[:3], own)
            return images.permute(0, 3, 1, 2).contiguous()
        arrays = [to_array(Image.fromarray(x), image_size=size, channels=channels) for x in part]
        return torch.from_numpy(np.stack(arrays))

    return Source(three(map(convert, parts)), three(map(torch.from_numpy, labels)), 10)


def celeba(
    root: Path,
    *,
    image_size: int | None,
    channels: int | None,
    limit: int | None,
    download: bool,
) -> Source:
    r"""Returns CelebA's aligned faces in the official partition, which keeps persons apart.

    Of the files that torchvision wants, only the images and the partition are needed. Decoding all
    202,599 images takes a minute or more, so each split is cached beside them, in a file named
    after the split, size, channels and count. Delete these files after a change of the images.
    """
    base = root / "celeba"
    partition = base / "list_eval_partition.txt"
    if not (partition.is_file() and (base / "img_align_celeba").is_dir()):
        _torchvision("celeba", root, download=download)

    names: tuple[list[str], ...] = ([], [], [])
    for number, line in enumerate(partition.read_text().splitlines(), start=1):
        match line.split():
            case [name, ("0" | "1" | "2") as split] if Path(name).name == name:
                names[int(split)].append(name)
            case []:
                continue
            case _:
                raise ValueError(
                    f"{partition}, line {number}: expected 'FILE 0|1|2', where FILE is in "
                    f"img_align_celeba, not {line!r}"
                )

    size, depth = image_size or 64, channels or 3
    splits = []
    for name, files in zip(("train", "validation", "test"), names, strict=True):
        paths = [base / "img_align_celeba" / file for file in files[:limit]]
        if not paths:
            raise ValueError(f"{partition} lists no image of the {name} split")
        cache = base / f"{name}-{size}px-{depth}ch-{len(paths)}.npy"
        shape = (len(paths), depth, size, size)
        images = _read_cache(cache, shape)
        if images is None:
            label = f"celeba {name}"
            images = decode_files(paths, image_size=size, channels=depth, description=label)
            _write_cache(cache, images)
        splits.append(torch.from_numpy(images))
    return Source(three(splits))


def _torchvision(name: str, root: Path, **options: bool) -> Any:
    r"""Opens a data set of torchvision, and says what to do if that fails for whatever reason."""
    import torchvision.datasets

    dataset, layout = TORCHVISION[name]
    try:
        if "mnist" in name and (packed := _packed(root / dataset / "raw")):
            images, labels = packed[:2] if options["train"] else packed[2:]
            return SimpleNamespace(data=read_idx(images), targets=read_idx(labels))
        return getattr(torchvision.datasets, dataset)(str(root), **options)
    except Exception as error:
        fetch = "read or download it" if options["download"] else "read it (download=False)"
        gdown = ", or pip install gdown to download it" if name == "celeba" else ""
        raise FileNotFoundError(
            f"--dataset {name}: could not {fetch} "
            f"({type(error).__name__}: {describe_error(error)}); "
            f"put {layout} under {root.resolve()}{gdown}"
        ) from error


def _packed(folder: Path) -> list[Path]:
    r"""Returns the files of MNIST if some are only there as they are downloaded, gzipped."""
    # torchvision reads unpacked files only, and unpacks none but those that it has downloaded.
    kinds = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    plain = [folder / f"{kind}-ubyte" for kind in kinds]
    files = [path if path.is_file() else path.with_suffix(".gz") for path in plain]
    return files if files != plain and all(path.is_file() for path in files) else []


def _read_cache(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    # Mapped, so that a start is instant; copy-on-write, as a tensor must be writable.
    try:
        images = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _write_cache(path: Path, images: np.ndarray) -> None:
    # A read-only folder costs time, not the run.
    try:
        write_atomically(path, lambda file: np.save(file, images, allow_pickle=False))
    except OSError as error:
        warnings.warn(f"could not cache the decoded images as {path} ({error})", stacklevel=2)
