r"""Folders of images: the splits, the pixels of every mode, and what cannot be used."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from errors import one_line_value_error
from image_files import noise, numbers, resized, sizes, splits, write_folder
from PIL import Image

from pyro_vaediff.data import load
from pyro_vaediff.data.splits import warn_of_copies

# Most tests load copies of one image.
pytestmark = pytest.mark.filterwarnings("ignore:.* are exact copies:UserWarning")

# Folders: splits


def test_folder_random_split(tmp_path):
    write_folder(tmp_path, 20)
    data = load("folder", tmp_path)
    assert sizes(data) == (16, 2, 2)
    assert data.image_shape == (1, 8, 8) and data.levels == 256 and not data.horizontal_flip
    everything = numbers(torch.cat(splits(data)))
    assert sorted(everything) == list(range(20))
    assert everything != numbers(torch.cat(splits(load("folder", tmp_path, seed=1))))
    limited = load("folder", tmp_path, limit=2)
    assert all(torch.equal(a, b[:2]) for a, b in zip(splits(limited), splits(data), strict=True))


def test_folder_split_does_not_depend_on_the_order_of_files(tmp_path):
    write_folder(tmp_path / "a", 20)
    for start in reversed(range(20)):
        write_folder(tmp_path / "b", 1, start)
    data, other = load("folder", tmp_path / "a"), load("folder", tmp_path / "b")
    assert all(map(torch.equal, splits(data), splits(other)))


@pytest.mark.parametrize(
    ("train", "held_out", "test"),
    [
        ("train", None, "test"),
        ("train", "val", "test"),
        ("train", "validation", "test"),
        ("train", "valid", "test"),
        ("Train", None, "Test"),
        ("training", None, "testing"),
        ("images/train", "images/val", "images/test"),
    ],
)
def test_folder_named_splits(tmp_path, train, held_out, test):
    write_folder(tmp_path / train, 20)
    write_folder(tmp_path / test, 7, start=20)
    expected = (18, 2, 7)
    if held_out:
        write_folder(tmp_path / held_out, 3, start=30)
        expected = (20, 3, 7)
    data = load("folder", tmp_path)
    assert sizes(data) == expected
    assert sorted(numbers(data.test)) == list(range(20, 27))
    assert all(map(torch.equal, splits(data), splits(load("folder", tmp_path))))
    if held_out:
        assert sorted(numbers(data.train)) == list(range(20))
        assert sorted(numbers(data.validation)) == [30, 31, 32]
    else:
        assert sorted(numbers(data.train) + numbers(data.validation)) == list(range(20))
    check_labels(data)


def check_labels(data):
    """The class of an image with number i is i % 3, as ``write_folder`` names the folders."""
    assert data.num_classes == 3
    for split in ("train", "validation", "test"):
        images, labels = getattr(data, split), getattr(data, f"{split}_labels")
        assert labels.tolist() == [i % 3 for i in numbers(images)]


def test_folders_of_classes(tmp_path):
    write_folder(tmp_path / "a", 20)
    check_labels(load("folder", tmp_path / "a"))
    check_labels(load("folder", tmp_path / "a", limit=1))
    Image.new("L", (8, 8), 99).save(tmp_path / "a" / "loose.png")
    data = load("folder", tmp_path / "a")
    assert data.num_classes is None and data.train_labels is None
    # Splits below the classes.
    for i in range(20):
        folder = tmp_path / "b" / f"class{i % 3}" / ("test" if i > 15 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    data = load("folder", tmp_path / "b")
    assert sorted(numbers(data.test)) == [16, 17, 18, 19]
    check_labels(data)
    # One class is none, even if it is called like a split.
    write_folder(tmp_path / "c" / "images" / "train", 20)
    (tmp_path / "c" / "images" / "train" / "class1").rename(tmp_path / "c" / "images" / "plane")
    data = load("folder", tmp_path / "c")
    assert sizes(data) == (16, 2, 2) and data.num_classes is None


@pytest.mark.parametrize("where", ["loose.png", "extra/a.png", "images/a.png"])
def test_images_beside_the_splits_are_named(tmp_path, where):
    write_folder(tmp_path / "train", 20)
    write_folder(tmp_path / "test", 5, start=20)
    (tmp_path / where).parent.mkdir(exist_ok=True)
    Image.new("L", (8, 8), 99).save(tmp_path / where)
    with one_line_value_error(rf"splits test, train, but .*{where} is in none of them: move it"):
        load("folder", tmp_path)


def test_copies_across_splits_are_counted(tmp_path):
    write_folder(tmp_path / "train", 20)
    write_folder(tmp_path / "val", 5, start=20)
    write_folder(tmp_path / "test", 5, start=30)
    write_folder(tmp_path / "train", 2, start=33)
    with pytest.warns(UserWarning, match="'folder': 2 of 5 test images are exact copies of train"):
        load("folder", tmp_path)
    for i in (33, 34):
        (tmp_path / "train" / f"class{i % 3}" / f"{i:03}.png").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sizes(load("folder", tmp_path)) == (20, 5, 5)


@pytest.mark.parametrize(
    "one, other", [("test", "train"), ("test", "validation"), ("validation", "train")]
)
def test_copies_between_any_two_splits_are_counted(one, other):
    names = ("train", "validation", "test")
    images = {
        name: torch.full((3, 1, 8, 8), 10 * i).add(torch.arange(3).reshape(3, 1, 1, 1)).byte()
        for i, name in enumerate(names)
    }
    warn_of_copies("mine", **images)
    images[one][2] = images[other][0]
    with pytest.warns(UserWarning, match=f"1 of 3 {one} images are exact copies of {other} images"):
        warn_of_copies("mine", **images)


def test_folder_limit_mixes_classes(tmp_path):
    write_folder(tmp_path / "train", 60)
    write_folder(tmp_path / "test", 60, start=60)
    data = load("folder", tmp_path, limit=20)
    for images in (data.train, data.test):
        assert {number % 3 for number in numbers(images)} == {0, 1, 2}


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"),
        ("val", "test"),
        ("train", "test", "val", "validation"),
        ("train", "Train", "test"),
    ],
)
def test_folder_ambiguous_splits(tmp_path, names):
    for name in names:
        write_folder(tmp_path / name, 5)
    with pytest.raises(ValueError, match="splits need train and test"):
        load("folder", tmp_path)


def test_folder_ignores_other_files(tmp_path):
    write_folder(tmp_path / "images", 10)
    (tmp_path / "labels.csv").write_text("a,b")
    (tmp_path / ".thumbnail.png").write_bytes(b"hidden")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_bytes(b"hidden")
    (tmp_path / "images" / "loop").symlink_to(tmp_path)
    (tmp_path / "images" / "loop2").symlink_to(tmp_path / "images" / "class0")
    assert sizes(load("folder", tmp_path)) == (8, 1, 1)


def test_folder_follows_links(tmp_path):
    write_folder(tmp_path / "elsewhere", 10)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    assert sizes(load("folder", tmp_path / "images")) == (8, 1, 1)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_folder_with_too_few_images(tmp_path, count):
    write_folder(tmp_path, count)
    with pytest.raises(ValueError, match=f"holds {count} images.*three in all"):
        load("folder", tmp_path)
    write_folder(tmp_path, 3)
    assert sizes(load("folder", tmp_path)) == (1, 1, 1)


def test_folder_with_an_empty_split(tmp_path):
    write_folder(tmp_path / "train", 5)
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="4 train, 1 validation and 0 test"):
        load("folder", tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("folder", tmp_path / "nowhere")


# Folders: pixels


def load_one(tmp_path, name, *, save, **options):
    r"""Loads a folder of three copies of an image, and returns it."""

    for i in range(3):
        save(tmp_path / f"{i}{name}")
    data = load("folder", tmp_path, **options)
    assert sizes(data) == (1, 1, 1)
    assert torch.equal(data.train, data.test)
    return data.train[0].numpy()


def on_white(colour, alpha):
    return np.round(colour * (alpha / 255.0) + 255.0 * (1 - alpha / 255.0))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".gif", ".tiff", ".PNG", ".pgm"])
def test_grey_images(tmp_path, suffix):
    pixels = noise(16, 16)
    options = {"lossless": True} if suffix == ".webp" else {}
    image = Image.fromarray(pixels)
    found = load_one(tmp_path, suffix, save=lambda path: image.save(path, **options))
    assert np.array_equal(found, pixels[None])


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".tif", ".PPM"])
def test_color_images(tmp_path, suffix):
    pixels = noise(16, 16, 3)
    options = {"lossless": True} if suffix == ".webp" else {}
    image = Image.fromarray(pixels)
    found = load_one(tmp_path, suffix, save=lambda path: image.save(path, **options))
    assert np.array_equal(found, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_jpeg_images(tmp_path, suffix):
    pixels = np.stack(np.broadcast_arrays(*np.ogrid[0:128:8, 0:128:8], 64), axis=-1).astype(
        np.uint8
    )
    image = Image.fromarray(pixels)
    options = {"quality": 100, "subsampling": 0}
    found = load_one(tmp_path, suffix, save=lambda path: image.save(path, **options))
    # A smooth image survives JPEG up to rounding.
    assert np.abs(found.astype(int) - pixels.transpose(2, 0, 1)).max() <= 3


def test_channels(tmp_path):
    pixels = noise(16, 16, 3)
    found = load_one(tmp_path, ".png", save=Image.fromarray(pixels).save, channels=1)
    luma = pixels @ [0.299, 0.587, 0.114]  # ITU-R 601
    assert found.shape == (1, 16, 16)
    assert np.abs(found[0] - luma).max() <= 0.51

    grey = tmp_path / "grey"
    grey.mkdir()
    found = load_one(grey, ".png", save=Image.fromarray(pixels[..., 0]).save, channels=3)
    assert np.array_equal(found, np.stack([pixels[..., 0]] * 3))


def test_one_colour_image_makes_all_of_them_rgb(tmp_path):
    write_folder(tmp_path, 10)
    assert load("folder", tmp_path).image_shape == (1, 8, 8)
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "colour.png")
    data = load("folder", tmp_path)
    assert data.image_shape == (3, 8, 8)
    found = sorted(tuple(x[:, 0, 0].tolist()) for images in splits(data) for x in images)
    assert found == sorted([(i, i, i) for i in range(10)] + [(10, 20, 30)])


def test_alpha_is_composited_on_white(tmp_path):
    pixels = noise(16, 16, 4)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    found = load_one(tmp_path, ".png", save=Image.fromarray(pixels).save)
    expected = on_white(pixels[..., :3].astype(float), pixels[..., 3:]).transpose(2, 0, 1)
    assert (found[:, 0] == 255).all()
    assert np.array_equal(found[:, 1], pixels[1, :, :3].T)
    assert np.abs(found - expected).max() <= 1


def test_grey_alpha_is_composited_on_white(tmp_path):
    pixels = noise(16, 16, 2)
    image = Image.merge("LA", [Image.fromarray(pixels[..., i].copy()) for i in range(2)])
    found = load_one(tmp_path, ".png", save=image.save)
    assert found.shape == (1, 16, 16)
    assert np.abs(found[0] - on_white(pixels[..., 0].astype(float), pixels[..., 1])).max() <= 1


@pytest.mark.parametrize("transparency", [None, 3, bytes([255, 255, 255, 0])])
def test_palette_images(tmp_path, transparency):
    palette = np.array([[255, 0, 0], [0, 255, 0], [1, 2, 3], [9, 8, 7]], np.uint8)
    pixels = noise(16, 16, high=4)
    image = Image.fromarray(pixels).convert("P")
    image.putdata(pixels.ravel().tolist())
    image.putpalette(palette.ravel().tolist())
    options = {} if transparency is None else {"transparency": transparency}
    found = load_one(tmp_path, ".png", save=lambda path: image.save(path, **options))
    if transparency is not None:
        palette[3] = 255
    assert np.array_equal(found, palette[pixels].transpose(2, 0, 1))


def test_transparent_colour(tmp_path):
    pixels = noise(16, 16, 3)
    pixels[3, 4] = 1, 2, 3
    image = Image.fromarray(pixels)
    found = load_one(tmp_path, ".png", save=lambda p: image.save(p, transparency=(1, 2, 3)))
    pixels[3, 4] = 255
    assert np.array_equal(found, pixels.transpose(2, 0, 1))


def test_one_bit_images(tmp_path):
    pixels = noise(16, 16, high=2).astype(bool)
    found = load_one(tmp_path, ".png", save=Image.fromarray(pixels).save)
    assert np.array_equal(found[0], pixels * np.uint8(255))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_images_are_rounded(tmp_path, suffix):
    pixels = noise(16, 16, high=65536)
    pixels[0, :5] = 0, 128, 129, 65535, 65407
    found = load_one(tmp_path, suffix, save=Image.fromarray(pixels).save)
    assert np.array_equal(found[0], np.round(pixels / 65535.0 * 255.0))
    assert found.dtype == np.uint8 and found[0, 0, :4].tolist() == [0, 0, 1, 255]


def test_cmyk_images(tmp_path):
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    found = load_one(tmp_path, ".tif", save=image.save)
    assert found[:, 0, 0].tolist() == [0, 255, 255]


def test_first_frame(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    found = load_one(
        tmp_path, ".gif", save=lambda p: frames[0].save(p, save_all=True, append_images=frames[1:])
    )
    assert (found == 10).all()


def test_photographs_are_turned_upright(tmp_path):
    pixels = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: rotate by 90 degrees clockwise to display.
    image = Image.fromarray(pixels)
    found = load_one(tmp_path, ".png", save=lambda path: image.save(path, exif=exif))
    assert np.array_equal(found[0], np.rot90(pixels, -1))


@pytest.mark.parametrize("width, height", [(178, 218), (218, 177), (64, 64), (40, 33), (65, 64)])
def test_resize_is_that_of_torchvision(tmp_path, width, height):
    image = Image.fromarray(noise(height, width, 3))
    found = load_one(tmp_path, ".png", save=image.save, image_size=64)
    assert np.array_equal(found, resized(image, 64))


# Folders: what cannot be used


def test_bad_files_are_named(tmp_path):
    write_folder(tmp_path, 200)
    for name in ("jpg", "png"):
        Image.fromarray(noise(8, 8, 3)).save(tmp_path / f"whole.{name}")
        whole = (tmp_path / f"whole.{name}").read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(whole[:-50])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.gif").touch()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    bad = ["cut.jpg", "cut.png", "text.png", "empty.gif", "dangling.png"]
    with pytest.raises(ValueError, match=r"^5 of 207 images cannot be used") as error:
        load("folder", tmp_path)
    message = str(error.value)
    assert all(str(tmp_path / name) in message for name in bad)
    assert "more" not in message and "\n" not in message

    (tmp_path / "drawing.svg").write_text("<svg/>")
    (tmp_path / "phone.heic").write_bytes(b"ftypheic")
    with pytest.raises(ValueError, match=r"^7 of 209 images .*, and 2 more$"):
        load("folder", tmp_path)
    for name in [*bad, "drawing.svg", "phone.heic"]:
        (tmp_path / name).unlink()
    assert sum(sizes(load("folder", tmp_path))) == 202


def test_all_files_are_bad(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"^3 of 3 images"):
        load("folder", tmp_path)


@pytest.mark.parametrize("pixels", [np.zeros((8, 8), np.float32), np.zeros((8, 8), np.int32)])
def test_deep_pixels_are_refused(tmp_path, pixels):
    write_folder(tmp_path, 5)
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"1 of 6 .*deep\.tif \(32-bit"):
        load("folder", tmp_path)


@pytest.mark.parametrize("side", [24, 16])  # Pillow warns above the limit, raises above twice it.
def test_decompression_bomb(tmp_path, monkeypatch, side):
    write_folder(tmp_path, 5)
    Image.new("L", (side, side)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    filters = list(warnings.filters)
    with pytest.raises(ValueError, match=r"1 of 6 .*bomb\.png .*bomb"):
        load("folder", tmp_path, image_size=8)
    assert warnings.filters == filters


def test_elongated_image(tmp_path):
    write_folder(tmp_path, 5)
    Image.new("L", (1, 30_000)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"line\.png \(1x30000 .*elongated"):
        load("folder", tmp_path, image_size=64)


@pytest.mark.parametrize("width, height", [(8, 9), (16, 16)])
def test_mixed_sizes(tmp_path, width, height):
    write_folder(tmp_path, 30)
    Image.new("L", (width, height)).save(tmp_path / "odd.png")
    with pytest.raises(ValueError, match=r"pixels.*--image-size"):
        load("folder", tmp_path)
    assert sum(sizes(load("folder", tmp_path, image_size=8))) == 31


@pytest.mark.parametrize("width, height", [(64, 48), (100, 100)])
def test_sizes_that_must_be_asked_for(tmp_path, width, height):
    for i in range(3):
        Image.new("L", (width, height)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=f"{width}x{height} pixels: .*--image-size"):
        load("folder", tmp_path)
    assert load("folder", tmp_path, image_size=32).image_shape == (1, 32, 32)


@pytest.mark.parametrize(
    "train, test",
    [
        ("train", "dev"),
        ("train", "eval"),
        ("train", "tests"),
        ("train_images", "test_images"),
        ("images/TrainSet", "images/TestSet"),
    ],
)
def test_names_that_are_only_like_splits_are_refused(tmp_path, train, test):
    write_folder(tmp_path / train, 20)
    write_folder(tmp_path / test, 5, start=20)
    names = f"{Path(test).name}, {Path(train).name}"
    with one_line_value_error(f"subfolders ({names}|{', '.join(names.split(', ')[::-1])}): rename"):
        load("folder", tmp_path)
