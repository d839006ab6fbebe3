r"""Splits that keep groups of images apart, such as all the images of one person."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path


def list_name(path: str | Path) -> str:
    r"""Returns the name and the checksum of a list of groups, which identify it anywhere."""
    path = Path(path).expanduser()
    check_list(path)
    return f"{path.name} (sha256 {sha256(path.read_bytes()).hexdigest()[:16]})"


def check_list(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"groups={str(path)!r} is not a file: give a list 'FILE GROUP'")


def read_groups(path: Path) -> dict[str, str]:
    r"""Returns the group of each file that a list names.

    Arguments:
        path: A text file with lines ``FILE GROUP``. Only the file's name may contain spaces.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not text, a line is not ``FILE GROUP``, or a file has two groups.
    """
    check_list(path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"groups={str(path)!r} is not UTF-8 text: {error}") from error
    groups: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match line.rsplit(maxsplit=1):
            case [file, group]:
                file = composed(file.strip())
                if groups.setdefault(file, group) != group:
                    raise ValueError(
                        f"{path}, line {number}: {file!r} is in group {group!r} here, but in "
                        f"{groups[file]!r} above: keep one"
                    )
            case []:
                continue
            case _:
                raise ValueError(f"{path}, line {number}: expected 'FILE GROUP', not {line!r}")
    return groups


def composed(name: str) -> str:
    r"""Returns a name with composed letters (NFC): macOS writes files with decomposed ones."""
    return unicodedata.normalize("NFC", name)


def find_groups(paths: Sequence[Path], root: Path, listed: Path) -> dict[Path, str]:
    r"""Returns the group of each image.

    Arguments:
        paths: The images, under ``root``.
        root: The folder that the list is about.
        listed: The list, which names an image by its path relative to ``root`` or else by its name.

    Raises:
        ValueError: If the list cannot be read, does not name an image, or gives a name that two
            images have.
    """
    groups = read_groups(listed)
    found: dict[Path, str] = {}
    named: dict[str, Path] = {}
    missing: list[str] = []
    for path in paths:
        relative = path.relative_to(root).as_posix()
        name = composed(relative) if composed(relative) in groups else composed(path.name)
        if name not in groups:
            missing.append(relative)
        elif (other := named.setdefault(name, path)) != path:
            raise ValueError(
                f"groups={str(listed)!r} lists {name!r}, which may be {other} or {path}: list "
                "the paths relative to the folder"
            )
        else:
            found[path] = groups[name]
    if missing:
        missing.sort()
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"groups={str(listed)!r} does not name {len(missing)} of {len(paths)} images: add "
            f"lines 'FILE GROUP' for {', '.join(missing[:5])}{more}, or remove the images"
        )
    return found


def check_apart(
    splits: Mapping[str, Sequence[Path]], group_of: Mapping[Path, str], listed: Path
) -> None:
    r"""Raises a ``ValueError`` if two splits share a group, naming an image of each."""
    seen: dict[str, tuple[str, Path]] = {}
    for split, paths in splits.items():
        for path in paths:
            other, example = seen.setdefault(group_of[path], (split, path))
            if other != split:
                raise ValueError(
                    f"groups={str(listed)!r}: group {group_of[path]!r} is in {other} and {split} "
                    f"({example}, {path}): move its images to one of them"
                )


def hold_out(groups: Sequence[str], order: Sequence[int], splits: Sequence[str]) -> list[str]:
    r"""Gives whole groups to the splits that are held out, a tenth of the images each.

    Going through the groups, each goes to the split that lacks most, if that has room for it. Then
    the smallest group that is left goes to a split that is empty or comes closer to its share.

    Arguments:
        groups: The group of each of the :math:`N` images, at least one more than splits.
        order: A permutation of the groups, which are numbered in alphabetical order.
        splits: The splits to hold out, at most two.

    Returns:
        The split of each image, ``"train"`` for the rest. None is empty.
    """
    sizes = Counter(groups)
    share = max(1, len(groups) // 10)
    lacks = dict.fromkeys(splits, share)
    split_of, rest = {}, []
    names = sorted(sizes)
    for group in (names[i] for i in order):
        split = max(lacks, key=lacks.__getitem__)
        if sizes[group] <= lacks[split]:
            split_of[group] = split
            lacks[split] -= sizes[group]
        else:
            rest.append(group)
    # What is left is larger than what any split lacks. An empty split comes first: it lacks most.
    for split in sorted(lacks, key=lacks.__getitem__, reverse=True):
        group = min(rest, key=sizes.__getitem__)
        if lacks[split] == share or sizes[group] < 2 * lacks[split]:
            split_of[group] = split
            rest.remove(group)
    return [split_of.get(group, "train") for group in groups]
