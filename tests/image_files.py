r"""Images and the files that hold them in the official formats, written from the specifications."""

import pickle
import struct
from hashlib import md5

import numpy as np
import torchvision
from PIL import Image
from torchvision.transforms import functional as reference

SPLITS = ("train", "validation", "test")


def noise(*shape, seed=0, high=256):
    dtype = np.uint8 if high <= 256 else np.uint16
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def rows(*arrays):
    r"""The images as a sorted list of bytes: equal lists are equal multisets of images."""
    return sorted(np.ascontiguousarray(image).tobytes() for array in arrays for image in array)


def splits(data):
    return [getattr(data, split) for split in SPLITS]


def sizes(data):
    return tuple(len(images) for images in splits(data))


def resized(image, size):
    r"""The paper's transform of one PIL image, by torchvision."""
    return reference.pil_to_tensor(reference.center_crop(reference.resize(image, size), size))


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


def write_mnist(root, folder, train, test):
    for stem, images in (("train", train), ("t10k", test)):
        write_idx(root / folder / "raw" / f"{stem}-images-idx3-ubyte", images)
        write_idx(root / folder / "raw" / f"{stem}-labels-idx1-ubyte", noise(len(images), high=10))


def write_cifar10(root, train, test, monkeypatch):
    r"""Five batches and a test batch of shape (N, 3, 32, 32); image i is of class i % 10."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, content):
        # The official files come from Python 2 and an old NumPy, which differ in these bytes.
        blob = pickle.dumps(content, protocol=2)
        blob = blob.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        blob = blob.replace(b"\x89\x88\x87R", b"K\x00K\x01\x87R")
        (folder / name).write_bytes(blob)
        return [name, md5(blob).hexdigest()]

    def write_batch(name, images, start=0):
        labels = [(start + i) % 10 for i in range(len(images))]
        return write(name, {"data": images.reshape(len(images), 3072), "labels": labels})

    parts, size = np.split(train, 5), len(train) // 5
    train_list = [write_batch(f"data_batch_{i + 1}", p, size * i) for i, p in enumerate(parts)]
    test_list = [write_batch("test_batch", test)]
    name, digest = write("batches.meta", {"label_names": list("abcdefghij")})
    meta = {"filename": name, "key": "label_names", "md5": digest}
    for key, value in (("train_list", train_list), ("test_list", test_list), ("meta", meta)):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, key, value)


def write_celeba(root, partition="001012011020"):
    r"""Aligned JPEG images of 178x218 pixels; returns them decoded, in lists by split."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    images, lines = ([], [], []), []
    for i, split in enumerate(partition, start=1):
        path = folder / "img_align_celeba" / f"{i:06}.jpg"
        Image.fromarray(noise(218, 178, 3, seed=i)).save(path)
        images[int(split)].append(Image.open(path).copy())
        lines.append(f"{path.name} {split}\n")
    (folder / "list_eval_partition.txt").write_text("".join(lines))
    return images


def write_folder(root, count, start=0, size=8):
    r"""Grey images whose pixels are their number."""
    for i in range(start, start + count):
        path = root / f"class{i % 3}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (size, size), i).save(path)


def numbers(images):
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()
