r"""Files in a folder of images that are no images, or unusual ones: used or named."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from image_files import noise, sizes, splits, write_celeba, write_folder
from PIL import Image

from pyro_vaediff.data import load


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + crc(name + content)


def crc(content):
    return struct.pack(">I", zlib.crc32(content))


def png(width, height, depth, colour, rows, *more):
    r"""A PNG file, written from the specification: Pillow itself does not write all kinds."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *more, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def encoded(tmp_path, suffix, image=None, **options):
    path = tmp_path / f"encoded{suffix}"
    (image or Image.fromarray(noise(8, 8, 3))).save(path, **options)
    content = path.read_bytes()
    path.unlink()
    return content


# --- What cannot be used --------------------------------------------------------------------------


def bad_checksum(tmp_path):
    content = bytearray(encoded(tmp_path, ".png"))
    content[content.index(b"IDAT") + 8] ^= 0xFF
    return bytes(content)


def gif_bomb(tmp_path):
    content = encoded(tmp_path, ".gif")
    return content[:6] + struct.pack("<HH", 65535, 65535) + content[10:]


def jpeg_bomb(tmp_path):
    content = encoded(tmp_path, ".jpg")
    at = content.index(b"\xff\xc0") + 5  # the height and the width in the start of the frame
    return content[:at] + struct.pack(">HH", 65500, 65500) + content[at + 4 :]


BAD = {
    # name: (a function that makes the contents, what the message says)
    "empty.png": (lambda _: b"", "cannot identify image file"),
    "text.jpg": (lambda _: b"no image\n" * 20, "cannot identify image file"),
    "zeros.tif": (lambda _: bytes(1000), "cannot identify image file"),
    "drawing.svg": (lambda _: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot identify"),
    "cut.png": (lambda p: encoded(p, ".png")[:-60], "truncated"),
    "cut.jpg": (lambda p: encoded(p, ".jpg")[:-60], "truncated"),
    "cut.gif": (lambda p: encoded(p, ".gif")[:-60], "truncated"),
    "cut.bmp": (lambda p: encoded(p, ".bmp")[:-60], "truncated"),
    "cut.tif": (lambda p: encoded(p, ".tif")[:-200], ""),
    "cut.webp": (lambda p: encoded(p, ".webp", lossless=True)[:-60], ""),
    "header.png": (lambda p: encoded(p, ".png")[:20], ""),
    "checksum.png": (bad_checksum, ""),
    "too-large.png": (lambda _: png(20_000, 20_000, 1, 0, [bytes(2500)]), "decompression bomb"),
    "large.png": (lambda _: png(12_000, 12_000, 1, 0, [bytes(1500)]), "decompression bomb"),
    "large.gif": (gif_bomb, "decompression bomb"),
    "large.jpg": (jpeg_bomb, "decompression bomb"),
    "text-bomb.png": (
        lambda _: png(
            8, 8, 8, 0, [bytes(8)] * 8, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**26)))
        ),
        "MAX_TEXT_CHUNK",
    ),
    "deep.tif": (
        lambda p: encoded(p, ".tif", Image.fromarray(np.zeros((8, 8), np.float32))),
        "32-bit pixels",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name):
    make, reason = BAD[name]
    write_folder(tmp_path / "images", 3)
    (tmp_path / "images" / name).write_bytes(make(tmp_path))
    filters = list(warnings.filters)
    with pytest.raises(ValueError, match=r"^1 of 4 images cannot be used; mend or remove") as info:
        load("folder", tmp_path / "images", image_size=8)
    message = str(info.value)
    path, _, what = message.partition("them: ")[2].partition(" (")
    assert path == str(tmp_path / "images" / name)
    assert reason in what and what.endswith(")") and len(what) > 5, message
    assert "\n" not in message
    assert warnings.filters == filters


def test_what_is_not_a_file_is_named(tmp_path):
    write_folder(tmp_path, 3)
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait forever
    with pytest.raises(ValueError, match=r"^2 of 5 .*link\.png \(.*No such file.*pipe\.png \(not"):
        load("folder", tmp_path)


def test_a_message_has_one_line_also_if_a_name_has_two(tmp_path):
    write_folder(tmp_path, 3)
    (tmp_path / "two\nlines.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"two\\nlines\.png") as info:
        load("folder", tmp_path)
    assert "\n" not in str(info.value)


def test_all_bad_files_are_counted(tmp_path):
    write_folder(tmp_path / "images", 3)
    for name, (make, _) in BAD.items():
        (tmp_path / "images" / name).write_bytes(make(tmp_path))
    count = len(BAD)
    message = rf"^{count} of {count + 3} images .*, and {count - 5} more$"
    with pytest.raises(ValueError, match=message):
        load("folder", tmp_path / "images", image_size=8)


# --- What would be missed -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".tif", ".webp", ".avif", ".jp2"])
def test_images_with_other_names_are_named(tmp_path, suffix):
    write_folder(tmp_path / "images", 10)
    try:
        content = encoded(tmp_path, suffix)
    except (OSError, KeyError) as error:  # Pillow is built without some formats here and there
        pytest.skip(f"Pillow does not write {suffix}: {error}")
    (tmp_path / "images" / f"photo{suffix}.bak").write_bytes(content)
    (tmp_path / "images" / "class0" / "photo").write_bytes(content)
    with pytest.raises(ValueError, match=r"^2 files are images but not named so; give") as info:
        load("folder", tmp_path / "images")
    assert all(name in str(info.value) for name in (f"photo{suffix}.bak", "class0/photo"))


def test_other_files_may_lie_beside_the_images(tmp_path):
    write_folder(tmp_path, 10)
    others = {
        "labels.csv": b"file,label\n",
        "README": b"",
        "a.txt": b"GIF",
        "Thumbs.db": b"\xd0\xcf\x11\xe0",
        "sound.wav": b"RIFF\0\0\0\0WAVEfmt ",
        "film.mp4": b"\0\0\0\x18ftypmp42",
        "x.npy": b"\x93NUMPY",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    assert sum(sizes(load("folder", tmp_path))) == 10


# --- What is converted ----------------------------------------------------------------------------


def test_every_kind_of_image_arrives(tmp_path):
    colour, grey = noise(16, 16, 3), noise(16, 16)
    deep = noise(16, 16, 3, seed=1, high=65536)
    kinds = {
        "rgb.png": Image.fromarray(colour),
        "grey.png": Image.fromarray(grey),
        "rgba.png": Image.fromarray(noise(16, 16, 4)),
        "grey-alpha.png": Image.fromarray(noise(16, 16, 2)),
        "palette.png": Image.fromarray(colour).quantize(16),
        "palette.gif": Image.fromarray(255 - colour).quantize(16),
        "bits.png": Image.fromarray(grey > 100),
        "deep.png": Image.fromarray(noise(16, 16, seed=2, high=65536)),
        "cmyk.jpg": Image.fromarray(colour).convert("CMYK"),
        "cmyk.tif": Image.fromarray(255 - colour).convert("CMYK"),
        "small.png": Image.fromarray(noise(5, 9, 3)),
        "photo.webp": Image.fromarray(noise(40, 30, 3)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
    rows = [deep[i].astype(">u2").tobytes() for i in range(16)]
    (tmp_path / "deep-colour.png").write_bytes(png(16, 16, 16, 2, rows))
    data = load("folder", tmp_path, image_size=16)
    assert data.image_shape == (3, 16, 16) and sum(sizes(data)) == len(kinds) + 1
    found = torch.cat(splits(data)).numpy()
    for expected in (colour, grey[..., None].repeat(3, -1), (deep // 256).astype(np.uint8)):
        assert any(np.array_equal(image, expected.transpose(2, 0, 1)) for image in found)


def test_the_partition_of_celeba_stays_in_its_folder(tmp_path):
    write_celeba(tmp_path)
    outside = tmp_path / "outside.jpg"
    Image.fromarray(noise(218, 178, 3)).save(outside)
    partition = tmp_path / "celeba" / "list_eval_partition.txt"
    for name in ("../../outside.jpg", str(outside)):
        partition.write_text(f"000001.jpg 0\n{name} 1\n")
        with pytest.raises(ValueError, match=r"line 2: .* where FILE is in img_align_celeba"):
            load("celeba", tmp_path, download=False)
