r"""Data sets are read from the files that these tests write, in the official formats."""

import gzip
import os
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from image_files import (
    SPLITS,
    noise,
    resized,
    rows,
    sizes,
    splits,
    write_celeba,
    write_cifar10,
    write_mnist,
)
from PIL import Image

from pyro_vaediff.data import DATASETS, ImageData, load

# Official data sets


def check_labels(data, target):
    r"""Checks the labels against those of the images' bytes."""
    for images, split in zip(splits(data), SPLITS, strict=True):
        expected = [target[image.numpy().tobytes()] for image in images]
        assert getattr(data, f"{split}_labels").tolist() == expected


def test_digits():
    from sklearn.datasets import load_digits

    data = load("digits")
    assert sizes(data) == (1197, 300, 300)
    assert data.levels == 17 and not data.horizontal_flip and data.image_shape == (1, 8, 8)
    digits = load_digits()
    assert rows(*splits(data)) == rows(digits.images.astype(np.uint8))
    # No digit is there twice, so that the image tells the label.
    target = {
        x.astype(np.uint8).tobytes(): y for x, y in zip(digits.images, digits.target, strict=True)
    }
    assert len(target) == 1797 and data.num_classes == 10
    check_labels(data, target)
    assert all(map(torch.equal, splits(data), splits(load("digits"))))
    assert not torch.equal(data.test, load("digits", seed=1).test)
    limited = load("digits", image_size=8, channels=1, limit=10)
    assert all(torch.equal(a, b[:10]) for a, b in zip(splits(limited), splits(data), strict=True))


@pytest.mark.parametrize("options", [{"image_size": 16}, {"channels": 3}])
def test_digits_are_not_converted(options):
    with pytest.raises(ValueError, match="8x8 gray"):
        load("digits", **options)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist(tmp_path, name, folder):
    train, test = noise(20, 28, 28), noise(6, 28, 28, seed=1)
    write_mnist(tmp_path, folder, train, test)
    data = load(name, tmp_path)
    assert sizes(data) == (18, 2, 6)
    assert data.image_shape == (1, 28, 28) and data.levels == 256 and not data.horizontal_flip
    assert rows(data.train, data.validation) == rows(train)
    assert np.array_equal(data.test[:, 0], test)
    # write_mnist draws the labels of both splits like this.
    labels = [*noise(20, high=10), *noise(6, high=10)]
    check_labels(data, dict(zip(map(bytes, [*train, *test]), labels, strict=True)))
    assert all(map(torch.equal, splits(data), splits(load(name, str(tmp_path)))))
    assert not torch.equal(data.validation, load(name, tmp_path, seed=1).validation)
    limited = load(name, tmp_path, limit=3)
    assert sizes(limited) == (3, 2, 3)
    assert torch.equal(limited.train, data.train[:3])
    chosen = load(name, tmp_path, num_validation=5)
    assert sizes(chosen) == (15, 5, 6) and chosen.num_validation == 5
    assert rows(chosen.train, chosen.validation) == rows(train)
    with pytest.raises(ValueError, match="must be less than the 20 training images"):
        load(name, tmp_path, num_validation=20)


def test_mnist_converted(tmp_path):
    test = noise(6, 28, 28, seed=1)
    write_mnist(tmp_path, "MNIST", noise(20, 28, 28), test)
    data = load("mnist", tmp_path, image_size=32, channels=3)
    assert data.image_shape == (3, 32, 32) and sizes(data) == (18, 2, 6)
    expected = torch.stack([resized(Image.fromarray(x), 32) for x in test])
    assert torch.equal(data.test, expected.expand(-1, 3, -1, -1))


def test_cifar10(tmp_path, monkeypatch):
    train, test = noise(20, 3, 32, 32), noise(6, 3, 32, 32, seed=1)
    write_cifar10(tmp_path, train, test, monkeypatch)
    data = load("cifar10", tmp_path)
    assert sizes(data) == (18, 2, 6)
    assert data.image_shape == (3, 32, 32) and data.levels == 256 and data.horizontal_flip
    assert rows(data.train, data.validation) == rows(train)
    assert np.array_equal(data.test, test)
    check_labels(data, {bytes(x): i % 10 for part in (train, test) for i, x in enumerate(part)})
    assert all(images.is_contiguous() for images in splits(data))


def test_celeba(tmp_path):
    images = write_celeba(tmp_path)
    data = load("celeba", tmp_path, download=False)
    assert sizes(data) == (6, 4, 2) == tuple(map(len, images))
    assert data.image_shape == (3, 64, 64) and not data.horizontal_flip
    for split, originals in zip(splits(data), images, strict=True):
        assert torch.equal(split, torch.stack([resized(image, 64) for image in originals]))

    other = load("celeba", tmp_path, image_size=32, channels=1, limit=2)
    assert sizes(other) == (2, 2, 2)
    assert torch.equal(other.train[1], resized(images[0][1].convert("L"), 32))


def test_celeba_cache(tmp_path):
    write_celeba(tmp_path)
    first = load("celeba", tmp_path)
    limited = load("celeba", tmp_path, limit=2)
    for path in tmp_path.rglob("*.jpg"):
        path.unlink()
    second = load("celeba", tmp_path)
    assert all(map(torch.equal, splits(first), splits(second)))
    assert torch.equal(load("celeba", tmp_path, limit=2).train, limited.train)
    second.train[0] = 0  # A mapped file must neither be read-only nor change on disk.
    assert torch.equal(load("celeba", tmp_path).train, first.train)
    with pytest.raises(ValueError, match=r"000001\.jpg"):
        load("celeba", tmp_path, image_size=32)


@pytest.mark.parametrize("content", [b"", b"text", "half", "pickle", "other shape"])
def test_celeba_cache_damaged(tmp_path, content):
    write_celeba(tmp_path)
    data = load("celeba", tmp_path)
    cache = tmp_path / "celeba" / "train-64px-3ch-6.npy"
    if content == "half":
        cache.write_bytes(cache.read_bytes()[:30000])
    elif content == "pickle":
        np.save(cache, np.array([os.getcwd], dtype=object), allow_pickle=True)
    elif content == "other shape":
        np.save(cache, np.zeros((6, 3, 32, 32), np.uint8))
    else:
        cache.write_bytes(content)
    assert torch.equal(load("celeba", tmp_path).train, data.train)
    assert np.array_equal(np.load(cache), data.train)


def test_celeba_cache_unwritable(tmp_path, monkeypatch):
    images = write_celeba(tmp_path)

    def fail(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="could not cache.*read-only"):
        data = load("celeba", tmp_path)
    assert sizes(data) == tuple(map(len, images))
    assert [p.name for p in (tmp_path / "celeba").iterdir() if "npy" in p.name] == []


def test_celeba_bad_partition(tmp_path):
    write_celeba(tmp_path)
    partition = tmp_path / "celeba" / "list_eval_partition.txt"
    partition.write_text("000001.jpg 0\n000002.jpg 3\n")
    with pytest.raises(ValueError, match=r"line 2: .*'000002\.jpg 3'"):
        load("celeba", tmp_path)
    partition.write_text("000001.jpg 0\n000002.jpg 1\n")
    with pytest.raises(ValueError, match="no image of the test split"):
        load("celeba", tmp_path)


def test_celeba_is_downloaded_by_torchvision(tmp_path, monkeypatch):
    def download(root, download):
        assert download
        write_celeba(Path(root))

    monkeypatch.setattr(torchvision.datasets, "CelebA", download)
    assert sizes(load("celeba", tmp_path)) == (6, 4, 2)


@pytest.mark.parametrize(
    "name, dataset, layout",
    [
        ("mnist", "MNIST", r"MNIST/raw/.*-ubyte"),
        ("fashion-mnist", "FashionMNIST", r"FashionMNIST/raw/.*-ubyte"),
        ("cifar10", "CIFAR10", r"cifar-10-batches-py/.*cifar-10-python\.tar\.gz"),
        ("celeba", "CelebA", r"celeba/img_align_celeba/.*list_eval_partition\.txt.*gdown"),
    ],
)
def test_download_fails(tmp_path, monkeypatch, name, dataset, layout):
    def offline(self):
        raise URLError("no route to host")

    monkeypatch.setattr(getattr(torchvision.datasets, dataset), "download", offline)
    with pytest.raises(FileNotFoundError, match=f"--dataset {name}: .*no route.*{layout}") as error:
        load(name, tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"--dataset .*download=False.*not found.*put"):
        load(name, tmp_path, download=False)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("kept", [(), ("train",)])
def test_mnist_as_it_is_downloaded(tmp_path, monkeypatch, name, folder, kept):
    r"""Files are read that are gzipped, whether or not some are unpacked beside them."""
    write_mnist(tmp_path, folder, noise(20, 28, 28), noise(6, 28, 28, seed=1))
    raw = tmp_path / folder / "raw"
    plain = load(name, tmp_path)
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", forbidden)
    for path in list(raw.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        if not path.name.startswith(kept):
            path.unlink()
    files = sorted(raw.iterdir())
    for download in (True, False):
        packed = load(name, tmp_path, download=download)
        assert all(map(torch.equal, splits(packed), splits(plain)))
        for split in SPLITS:
            labels = (getattr(data, f"{split}_labels") for data in (packed, plain))
            assert torch.equal(*labels)
    assert sorted(raw.iterdir()) == files


def forbidden(self):
    raise AssertionError("nothing is to be downloaded")


@pytest.mark.parametrize(
    "content, reason",
    [
        (gzip.compress(bytes(3000))[:-20], "end-of-stream"),
        (b"<html>moved</html>", "Not a gzipped file"),
        (gzip.compress(b"<html>moved</html>"), "does not begin as"),
        (gzip.compress(struct.pack(">4I", 0x803, 20, 28, 28) + bytes(100)), "cannot reshape"),
        (gzip.compress(b""), "unpack_from"),
    ],
)
def test_damaged_gzipped_mnist(tmp_path, content, reason):
    write_mnist(tmp_path, "MNIST", noise(20, 28, 28), noise(6, 28, 28))
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.unlink()
    path.with_suffix(".gz").write_bytes(content)
    message = f"--dataset mnist: .*ubyte.gz is damaged, replace it: .*{reason}"
    with pytest.raises(FileNotFoundError, match=message):
        load("mnist", tmp_path)


def test_damaged_mnist(tmp_path):
    write_mnist(tmp_path, "MNIST", noise(20, 28, 28), noise(6, 28, 28))
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match="--dataset mnist: could not read"):
        load("mnist", tmp_path)


# Arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "cifar"}, "'cifar': choose one of " + ", ".join(DATASETS)),
        ({"limit": 0}, "limit must be a whole number >= 1, got 0"),
        (
            {"num_validation": 5},
            "num_validation=5 is for mnist, fashion-mnist, cifar10, not 'digits'",
        ),
        ({"image_size": 0}, "image_size must be a whole number >= 1, got 0"),
        ({"channels": 2}, "channels must be 1 .* not 2"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load(**{"name": "digits", "root": tmp_path, **options})


def test_image_data_is_checked():
    good = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert ImageData("x", good, good, good).image_shape == (1, 8, 8)
    for bad, message in [
        (good[:0], "test holds no image"),
        (good.float(), "test must be a uint8 tensor"),
        (good[0], "test must be a uint8 tensor"),
        (good[..., :4], "test has images of shape"),
        (good + 17, "test holds the value 17, but levels=17"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageData("x", good, good, bad, levels=17)
    assert ImageData("x", good, good, good + 16, levels=17).levels == 17
    labels = torch.tensor([0, 9])
    options = {"train_labels": labels, "validation_labels": labels, "test_labels": labels}
    assert ImageData("x", good, good, good, num_classes=10, **options).num_classes == 10
    for bad, message in [
        ({"num_classes": None}, "train_labels and num_classes go together"),
        ({"test_labels": None}, "test_labels and num_classes go together"),
        (
            {"test_labels": labels[:1]},
            r"must be 2 int64 numbers in 0\.\.9, not .*\(1,\)",
        ),
        ({"test_labels": labels.int()}, "test_labels must be 2 int64 numbers"),
        ({"num_classes": 9}, r"train_labels must be 2 int64 numbers in 0\.\.8"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageData("x", good, good, good, **{"num_classes": 10, **options, **bad})
