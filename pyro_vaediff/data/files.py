r"""Image files, decoded into one ``uint8`` array."""

from __future__ import annotations

import gzip
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from ..files import describe_error

# Files with these names are images. Pillow cannot read all of them everywhere (HEIC needs a
# plugin), but then the user hears of it, rather than training without these images.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".jp2", ".j2k", ".avif", ".heic", ".heif"),
    *(".psd", ".svg"),
)
# The sizes that are taken as they come. Any other is probably photographs, which must be resized.
NATIVE_SIZES = (8, 16, 28, 32, 48, 64, 96, 128, 256)
CHUNK = 64
# What is recognized by its contents: the common formats that Pillow cannot mistake.
FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "PSD", "JPEG2000", "AVIF")


def find_images(folder: Path) -> list[Path]:
    r"""Returns the images under a folder, hidden files excepted, in the order of their path.

    Arguments:
        folder: A folder, walked recursively through symbolic links.

    Returns:
        The paths, sorted by their parts, so that the order is the same on every system.

    Raises:
        OSError: If a subfolder or a file cannot be read.
        ValueError: If there are images whose names are not those of images. They would be missed.
    """

    def fail(error: OSError) -> None:
        raise error

    found, misnamed, visited = [], [], set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        # A symbolic link to a parent folder would otherwise repeat every image many times.
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        for name in names:
            if name.startswith("."):
                continue
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES:
                found.append(path)
            elif path.is_file() and is_image(path):
                misnamed.append(path)
    if misnamed:
        misnamed.sort()
        more = f", and {len(misnamed) - 5} more" if len(misnamed) > 5 else ""
        raise ValueError(
            f"{len(misnamed)} files are images but not named so; give them a suffix such as .png "
            f"or .jpg, or remove them: {', '.join(map(shown, misnamed[:5]))}{more}"
        )
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def is_image(path: Path) -> bool:
    r"""Returns ``True`` for a file that is an image of one of the common formats."""
    Image.init()
    try:
        Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]).close()
    except UnidentifiedImageError:
        return False
    except Image.DecompressionBombError:
        return True
    return True


def shown(path: Path) -> str:
    r"""Returns a path on one line, whatever characters it has."""
    return str(path) if str(path).isprintable() else repr(str(path))


def decode_files(
    paths: Sequence[Path],
    *,
    image_size: int | None = None,
    channels: int | None = None,
    description: str = "decoding",
) -> np.ndarray:
    r"""Returns image files, decoded with a pool of threads.

    Arguments:
        paths: The :math:`N` files, at least one.
        image_size: The side :math:`S` that images are resized and cropped to, in pixels; by
            default they must all have the same size, which is one of ``NATIVE_SIZES``.
        channels: The number of channels :math:`C`; by default 1 if all pixels are gray, else 3.
        description: The label of the progress bar.

    Returns:
        A ``uint8`` array with shape :math:`(N, C, S, S)`.

    Raises:
        ValueError: If some files cannot be used; the message names the first of them.
    """
    with warnings.catch_warnings():
        # Filters belong to the process: this one also holds in the threads, which have none.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return _decode_files(paths, image_size, channels, description)


def _decode_files(
    paths: Sequence[Path], image_size: int | None, channels: int | None, description: str
) -> np.ndarray:
    # Each chunk writes its images in place, so that memory holds them only once.
    size = image_size or _native_size(paths)
    images = np.empty((len(paths), channels or 3, size, size), dtype=np.uint8)

    def decode(start: int) -> list[str]:
        problems = []
        for i in range(start, min(start + CHUNK, len(paths))):
            # Broken files raise all kinds of errors from Pillow's decoders. None is hidden.
            try:
                # Opening a pipe would wait forever.
                if paths[i].exists() and not paths[i].is_file():
                    raise ValueError("not a file")
                with Image.open(paths[i]) as image:
                    if image_size is None and image.size != (size, size):
                        raise ValueError(
                            f"{image.width}x{image.height} pixels, not {size}x{size}: "
                            "pass image_size (--image-size) to resize"
                        )
                    images[i] = to_array(image, image_size=image_size, channels=images.shape[1])
            except Exception as error:
                reason = str(error).replace(f" {str(paths[i])!r}", "").rstrip(":")
                reason = " ".join(reason.split()) or type(error).__name__
                problems.append(f"{shown(paths[i])} ({reason})")
        return problems

    problems: list[str] = []
    bar = tqdm(total=len(paths), desc=description, unit="image", disable=None, leave=False)
    with bar, ThreadPoolExecutor() as pool:
        for chunk in pool.map(decode, range(0, len(paths), CHUNK)):
            problems += chunk
            bar.update(min(CHUNK, len(paths) - bar.n))
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{len(problems)} of {len(paths)} images cannot be used; mend or remove them: "
            f"{', '.join(problems[:5])}{more}"
        )
    if channels is None and all((image == image[:1]).all() for image in images):
        images = images[:, :1].copy()
    return images


def read_idx(path: Path) -> np.ndarray:
    r"""Returns the array of bytes of a file in the format of MNIST (IDX), gzipped or not.

    Arguments:
        path: The file. It is unpacked in memory, so that its folder may be read-only.

    Raises:
        ValueError: If it is damaged.

    References:
        | The MNIST database of handwritten digits (LeCun et al., 1998)
        | http://yann.lecun.com/exdb/mnist/
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        magic, dims = divmod(struct.unpack_from(">I", content)[0], 256)
        if magic != 8:
            raise ValueError("it does not begin as an array of bytes does")
        shape = struct.unpack_from(f">{dims}I", content, 4)
        return np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (EOFError, ValueError, struct.error, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{shown(path)} is damaged, replace it: {describe_error(error)}"
        ) from error


def to_array(image: Image.Image, *, image_size: int | None, channels: int) -> np.ndarray:
    r"""Returns an image of any mode in 8 bits and, if asked, resized and cropped.

    The size is that of torchvision's ``Resize(image_size)`` and ``CenterCrop(image_size)``.

    Arguments:
        image: An image.
        image_size: The side :math:`S` of the result, in pixels, or ``None`` to keep the size.
        channels: The number of channels :math:`C`, 1 (gray) or 3 (RGB).

    Returns:
        A ``uint8`` array with shape :math:`(C, S, S)`.

    Raises:
        ValueError: If the pixels have no definite 8-bit value.
    """
    ImageOps.exif_transpose(image, in_place=True)
    image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    image = image.convert("L" if channels == 1 else "RGB")

    if image_size is not None and image.size != (image_size, image_size):
        scale = min(image.size)
        width, height = (int(image_size * side / scale) for side in image.size)
        if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too elongated to resize")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - image_size) / 2), round((height - image_size) / 2)
        image = image.crop((left, top, left + image_size, top + image_size))

    pixels = np.asarray(image).reshape(*image.size[::-1], channels)
    return pixels.transpose(2, 0, 1)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    r"""Returns an image with 16-bit gray rounded to 8 bits, which Pillow itself would clip."""
    # Some versions of Pillow open 16-bit PNG and PGM files in the 32-bit mode.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        pixels = np.asarray(image).astype(np.int64)
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no definite 8-bit value: convert it first")
    return image


def _native_size(paths: Sequence[Path]) -> int:
    r"""Returns the size of the first image that opens."""
    for path in paths:
        # A file that does not open is left for ``decode_files`` to name.
        with suppress(Exception):
            if path.is_file():
                with Image.open(path) as image:
                    break
    else:
        return NATIVE_SIZES[0]
    width, height = image.size
    if width != height or width not in NATIVE_SIZES:
        raise ValueError(
            f"{shown(path)} has {width}x{height} pixels: pass image_size (--image-size) to resize "
            f"images that are not square with a side of {', '.join(map(str, NATIVE_SIZES))}"
        )
    return width
