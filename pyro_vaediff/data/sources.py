r"""Where the images come from: each function returns the train, validation and test split."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import describe_error, write_atomically
from .files import SUFFIXES, decode_files, find_images, to_array
from .groups import check_apart, find_groups, hold_out

Splits = tuple[Tensor, Tensor, Tensor]

# The class in torchvision, and what it reads under `root`.
TORCHVISION = {
    "mnist": (
        "MNIST",
        "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte",
    ),
    "fashion-mnist": (
        "FashionMNIST",
        "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte",
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


def digits(*, image_size: int | None, channels: int | None, limit: int | None, seed: int) -> Splits:
    r"""The 1797 handwritten digits that scikit-learn carries, 8x8 with values 0..16."""

    if image_size not in (None, 8) or channels not in (None, 1):
        raise ValueError(
            "the digits are 8x8 grey images: leave out image_size and channels, "
            f"not image_size={image_size}, channels={channels}"
        )
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).to(torch.uint8).unsqueeze(1)
    train, validation, test = images[_permutation(len(images), seed)].split((1197, 300, 300))
    return train[:limit], validation[:limit], test[:limit]


def from_torchvision(
    name: str,
    root: Path,
    *,
    image_size: int | None,
    channels: int | None,
    limit: int | None,
    download: bool,
    seed: int,
) -> Splits:
    r"""MNIST, Fashion-MNIST and CIFAR-10; a tenth of the train split is for validation.

    CIFAR-10's files are pickles. torchvision reads them only after their MD5 sums were found to be
    those of the official ones, so that no other pickle is ever opened.
    """

    train = np.asarray(_torchvision(name, root, download=download, train=True).data)
    test = np.asarray(_torchvision(name, root, download=download, train=False).data)
    order = _permutation(len(train), seed).numpy()
    held_out = max(1, len(train) // 10)
    parts = train[order[held_out:][:limit]], train[order[:held_out][:limit]], test[:limit]

    own = 1 if train.ndim == 3 else 3
    if image_size in (None, train.shape[1]) and channels in (None, own):
        parts = (torch.from_numpy(x).reshape(*x.shape[:3], own) for x in parts)
        return tuple(x.permute(0, 3, 1, 2).contiguous() for x in parts)
    options = {"image_size": image_size, "channels": channels or own}
    return tuple(
        torch.from_numpy(np.stack([to_array(Image.fromarray(x), **options) for x in part]))
        for part in parts
    )


def celeba(
    root: Path,
    *,
    image_size: int | None,
    channels: int | None,
    limit: int | None,
    download: bool,
) -> Splits:
    r"""CelebA's aligned faces in the official partition, which keeps persons apart.

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
    for split, files in zip(("train", "validation", "test"), names, strict=True):
        paths = [base / "img_align_celeba" / name for name in files[:limit]]
        if not paths:
            raise ValueError(f"{partition} lists no image of the {split} split")
        cache = base / f"{split}-{size}px-{depth}ch-{len(paths)}.npy"
        shape = (len(paths), depth, size, size)
        images = _read_cache(cache, shape)
        if images is None:
            label = f"celeba {split}"
            images = decode_files(paths, image_size=size, channels=depth, description=label)
            _write_cache(cache, images)
        splits.append(torch.from_numpy(images))
    return tuple(splits)


def folder(
    root: Path,
    *,
    image_size: int | None,
    channels: int | None,
    limit: int | None,
    seed: int,
    groups: Path | None,
) -> Splits:
    r"""A folder of images, split by its subfolders or else at random, in whole groups if given."""

    if not root.is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is not a folder: give the folder of images")
    named = [s for s in ("train", "val", "validation", "test") if (root / s).is_dir()]
    held_out = [s for s in ("val", "validation") if s in named]
    if len(named) > 1 and (len(held_out) > 1 or not {"train", "test"} <= set(named)):
        raise ValueError(
            f"root={str(root)!r} has the subfolders {', '.join(named)}: splits need train and "
            "test, and at most one of val and validation"
        )

    # Every split is permuted, so that its first images are not all of the first class.
    def images_in(*names: str) -> list[Path]:
        paths = find_images(root.joinpath(*names))
        return [paths[i] for i in _permutation(len(paths), seed).tolist()]

    given = "test" in named and "train" in named
    pools = {s: images_in(s) for s in named} if given else {"all": images_in()}
    group_of: dict[Path, str] = {}
    if groups is not None:
        group_of = find_groups([p for pool in pools.values() for p in pool], root, groups)
        check_apart(pools, group_of, groups)

    def cut(paths: list[Path], *splits: str) -> list[list[Path]]:
        # The splits get a tenth each, and the rest comes last.
        if groups is None:
            count = max(1, len(paths) // 10)
            cuts = [slice(i * count, (i + 1) * count) for i in range(len(splits))]
            return [paths[c] for c in (*cuts, slice(len(splits) * count, None))]
        keys = [group_of[path] for path in paths]
        if (count := len(set(keys))) <= len(splits):
            raise ValueError(
                f"groups={str(groups)!r} puts {len(paths)} images in {count} groups, but "
                f"{len(splits) + 1} splits need a group each: list more groups, or leave it out"
            )
        split_of = hold_out(keys, _permutation(count, seed).tolist(), splits)
        parts = {split: [] for split in (*splits, "train")}
        for path, split in zip(paths, split_of, strict=True):
            parts[split].append(path)
        return list(parts.values())

    if not given:
        validation, test, train = cut(pools["all"], "validation", "test")
    elif held_out:
        train, validation, test = (pools[s] for s in ("train", *held_out, "test"))
    else:
        test = pools["test"]
        validation, train = cut(pools["train"], "validation")

    parts = [part[:limit] for part in (train, validation, test)]
    if not all(parts):
        raise ValueError(
            f"root={str(root)!r} holds {len(train + validation + test)} images, which gives "
            f"{len(train)} train, {len(validation)} validation and {len(test)} test images; each "
            f"split needs at least one, so three in all, with a suffix of {' '.join(SUFFIXES)}"
        )
    paths = [path for part in parts for path in part]
    images = decode_files(paths, image_size=image_size, channels=channels)
    return torch.from_numpy(images).split([len(part) for part in parts])


def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")


def _torchvision(name: str, root: Path, **options: bool):
    r"""Opens a data set of torchvision, and says what to do if that fails for whatever reason."""

    import torchvision.datasets

    dataset, layout = TORCHVISION[name]
    try:
        return getattr(torchvision.datasets, dataset)(str(root), **options)
    except Exception as error:
        fetch = "read or download it" if options["download"] else "read it (download=False)"
        gdown = ", or pip install gdown to download it" if name == "celeba" else ""
        raise FileNotFoundError(
            f"--dataset {name}: could not {fetch} "
            f"({type(error).__name__}: {describe_error(error)}); "
            f"put {layout} under {root.resolve()}{gdown}"
        ) from error


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
