r"""Folders of images: their splits and their classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .files import SUFFIXES, decode_files, find_images, shown
from .groups import check_apart, find_groups, hold_out
from .splits import Source, permutation, three

# What folders of splits are called, in any case.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What they may be called, too, but then nobody knows which split is meant.
LIKE_SPLITS = {*SPLITS, "dev", "eval", "evaluation", "heldout", "holdout", "validate"}


def folder(
    root: Path,
    *,
    image_size: int | None,
    channels: int | None,
    limit: int | None,
    seed: int,
    groups: Path | None,
) -> Source:
    r"""Returns a folder's images, split by its subfolders or else at random, in whole groups."""
    if not root.is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is not a folder: give the folder of images")
    pools = {
        # Every split is permuted, so that its first images are not all of the first class.
        split: [paths[i] for i in permutation(len(paths), seed).tolist()]
        for split, paths in given_splits(root, find_images(root)).items()
    }
    given = "all" not in pools
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
        split_of = hold_out(keys, permutation(count, seed).tolist(), splits)
        parts: dict[str, list[Path]] = {split: [] for split in (*splits, "train")}
        for path, split in zip(paths, split_of, strict=True):
            parts[split].append(path)
        return list(parts.values())

    if not given:
        validation, test, train = cut(pools["all"], "validation", "test")
    elif "validation" in pools:
        train, validation, test = (pools[s] for s in ("train", "validation", "test"))
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
    lengths = [len(part) for part in parts]
    split_images = three(torch.from_numpy(images).split(lengths))

    # The classes are those of all images, also if there is a limit.
    names = {path: class_name(path, root, given) for pool in pools.values() for path in pool}
    classes = {name: i for i, name in enumerate(sorted(set(names.values())))}
    if "" in classes or len(classes) < 2:
        return Source(split_images)
    labels = torch.tensor([classes[names[path]] for path in paths])
    return Source(split_images, three(labels.split(lengths)), len(classes))


def given_splits(root: Path, paths: Sequence[Path]) -> dict[str, list[Path]]:
    r"""Returns the images of each split that subfolders name, or all of them as ``"all"``.

    Raises:
        ValueError: If there are subfolders for some of the splits only, or with names that are only
            like those of splits, or images in none of them.
    """
    names = {path.name for path in root.iterdir() if path.name.lower() in SPLITS and path.is_dir()}
    split_of = [split_folder(path, root) for path in paths]
    names.update(name for name in split_of if name)
    splits = [SPLITS[name.lower()] for name in names]
    if len(names) < 2:  # one alone may be a class: trains, say
        alike = names | {name for path in paths if (name := split_folder(path, root, like_split))}
        if len(alike) > 1:
            raise ValueError(
                f"root={str(root)!r} has the subfolders {', '.join(sorted(alike))}: rename them to "
                "train, val and test if they are splits, or else so that none is called like one"
            )
        return {"all": list(paths)}
    if len(splits) > len(set(splits)) or not {"train", "test"} <= set(splits):
        raise ValueError(
            f"root={str(root)!r} has the subfolders {', '.join(sorted(names))}: splits need train "
            "and test, and at most one of val and validation"
        )
    pools: dict[str, list[Path]] = {s: [] for s in ("train", "validation", "test") if s in splits}
    for path, name in zip(paths, split_of, strict=True):
        if name is None:
            raise ValueError(
                f"root={str(root)!r} has the splits {', '.join(sorted(names))}, but {shown(path)} "
                "is in none of them: move it, or give the folder that holds the splits only"
            )
        pools[SPLITS[name.lower()]].append(path)
    return pools


def is_split(name: str) -> bool:
    return name.lower() in SPLITS


def like_split(name: str) -> bool:
    r"""Returns ``True`` if a word of a name is that of a split: ``test_images``, ``TrainSet``."""
    words = re.findall(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]+", name)
    return any(re.sub("(set)?s?$", "", word.lower()) in LIKE_SPLITS for word in words)


def split_folder(path: Path, root: Path, named: Callable[[str], bool] = is_split) -> str | None:
    r"""Returns the outermost folder of an image that names a split, if there is one."""
    return next(filter(named, path.relative_to(root).parts[:-1]), None)


def class_name(path: Path, root: Path, given: bool) -> str:
    r"""Returns the folder that names the class of an image, or "": the first below its split.

    Splits may lie below the classes, too: ``cats/train``.
    """
    folders = path.relative_to(root).parts[:-1]
    if not given:
        return folders[0] if folders else ""
    at = folders.index(split_folder(path, root) or "")
    return next(iter((*folders[at + 1 :], *folders[:at][::-1])), "")
