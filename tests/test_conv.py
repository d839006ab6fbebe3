r"""Convolutional encoders and decoders: shapes, independence of the examples, hand-made counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_vaediff.likelihoods import make_likelihood
from pyro_vaediff.nn import (
    ConvDecoder,
    ConvEncoder,
    MLPDecoder,
    MLPEncoder,
    check_image_size,
    mlp,
    paper_decoder,
    paper_encoder,
)

SIZES = [8, 16, 28, 32, 64]
BATCH_SHAPES = [(), (1,), (5,), (0,), (2, 3), (3, 1, 2)]


def make_pair(device, size=8, channels=1, latent_dim=3, likelihood="gaussian", **kwargs):
    torch.manual_seed(0)
    image_shape = (channels, size, size)
    encoder = ConvEncoder(image_shape, latent_dim, **{"width": 8} | kwargs)
    likelihood = make_likelihood(likelihood, image_shape, levels=4)
    decoder = ConvDecoder(latent_dim, likelihood, **{"width": 8} | kwargs)
    return encoder.to(device), decoder.to(device)


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


# --- Shapes ---


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_channel_and_norm(device, size, channels, norm):
    encoder, decoder = make_pair(device, size, channels, norm=norm)
    x = torch.randn(4, channels, size, size, device=device)
    q_z0 = encoder(x)
    assert (q_z0.batch_shape, q_z0.event_shape) == ((4,), (3,))
    p_x = decoder(q_z0.rsample())
    assert (p_x.batch_shape, p_x.event_shape) == ((4,), (channels, size, size))
    # Every parameter matters, and the signal neither dies nor explodes on the way. The bias of a
    # convolution before a BatchNorm is the exception: the norm takes it away again.
    (p_x.log_prob(x).sum() - q_z0.log_prob(torch.zeros(3, device=device)).sum()).backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad.isfinite().all(), name
        if norm != "batch" or not name.endswith("bias"):
            assert parameter.grad.abs().max() > 0, name
    assert 0.05 < q_z0.mean.std() < 5 and 0.05 < p_x.mean.std() < 5
    assert (q_z0.stddev > 0.1).all() and (q_z0.stddev < 10).all()


@pytest.mark.parametrize(
    "name", ["gaussian-pixel", "bernoulli", "discretized-logistic", "categorical"]
)
def test_decoder_outputs_the_maps_of_the_likelihood(device, name):
    _, decoder = make_pair(device, 28, 3, likelihood=name)
    p_x = decoder(torch.randn(2, 3, device=device))
    assert (p_x.batch_shape, p_x.event_shape) == ((2,), (3, 28, 28))
    assert p_x.log_prob(p_x.sample()).isfinite().all()


@pytest.mark.parametrize("batch_shape", BATCH_SHAPES)
def test_leading_dimensions_are_batch_dimensions(device, batch_shape):
    encoder, decoder = make_pair(device)
    encoder, decoder = encoder.double(), decoder.double()
    x = torch.randn(*batch_shape, 1, 8, 8, dtype=torch.float64, device=device)
    q_z0 = encoder(x)
    p_x = decoder(q_z0.mean)
    assert q_z0.batch_shape == p_x.batch_shape == batch_shape
    flat = encoder(x.reshape(-1, 1, 8, 8)) if x.numel() else q_z0
    for computed, exact in [
        (q_z0.mean, flat.mean),
        (q_z0.stddev, flat.stddev),
        (p_x.mean, decoder(flat.mean).mean),
    ]:
        torch.testing.assert_close(computed, exact.reshape(computed.shape), atol=1e-10, rtol=0)


def test_28_pixels_are_the_centre_of_32(device):
    small, large = make_pair(device, 28), make_pair(device, 32)
    for a, b in zip(small, large, strict=True):
        b.load_state_dict(a.state_dict())
    x = torch.randn(2, 1, 28, 28, device=device)
    padded = torch.zeros(2, 1, 32, 32, device=device)
    padded[..., 2:30, 2:30] = x
    torch.testing.assert_close(small[0](x).mean, large[0](padded).mean)
    z = torch.randn(2, 3, device=device)
    torch.testing.assert_close(small[1](z).mean, large[1](z).mean[..., 2:30, 2:30])


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        *[((n, n), (4, 4)) for n in (8, 16, 28, 32, 64, 128, 256)],
        *[((n, n), (3, 3)) for n in (12, 48, 96)],
        ((28, 20), (7, 5)),
        ((33, 47), (5, 6)),
        ((8, 256), (4, 128)),
    ],
)
def test_any_size(device, shape, sides):
    # The pixels that count are all of them, and no others: those of the padding do not.
    check_image_size(*shape)
    encoder = ConvEncoder((2, *shape), 3, width=2).to(device)
    decoder = ConvDecoder(3, make_likelihood("gaussian", (2, *shape)), width=2).to(device)
    area = sides[0] * sides[1]
    assert encoder.head.in_features / area == encoder.features[-4].out_channels
    assert decoder.maps[1].unflattened_size[1:] == sides
    x = torch.randn(1, 2, *shape, device=device, requires_grad=True)
    mean = decoder(encoder(x).mean).mean
    assert mean.shape == x.shape
    mean.square().sum().backward()
    assert (x.grad.abs().amax(1) > 0).all()


# --- Independence of the examples ---


def change_of_others(module, inputs):
    """How much the outputs for the other data change when the first datum is changed."""
    changed = inputs.clone()
    changed[0] = 3 * inputs[0] + 1
    before, after = module(inputs).mean, module(changed).mean
    assert (before[0] - after[0]).abs().max() > 1e-2
    return (before[1:] - after[1:]).abs().max().item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"norm": "group"}])
def test_examples_are_independent(device, size, options):
    encoder, decoder = make_pair(device, size, **options)
    x, z = torch.randn(4, 1, size, size, device=device), torch.randn(4, 3, device=device)
    assert encoder.training and decoder.training
    assert change_of_others(encoder, x) < 1e-6
    assert change_of_others(decoder, z) < 1e-6


def test_batch_norm_couples_examples_in_train_mode_only(device):
    encoder, decoder = make_pair(device, norm="batch")
    x, z = torch.randn(4, 1, 8, 8, device=device), torch.randn(4, 3, device=device)
    assert change_of_others(encoder, x) > 1e-3
    assert change_of_others(decoder, z) > 1e-3
    assert change_of_others(encoder.eval(), x) < 1e-6
    assert change_of_others(decoder.eval(), z) < 1e-6


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("options", [{}, {"norm": "group"}])
def test_decoder_sees_the_length_of_the_latent(device, size, options):
    _, decoder = make_pair(device, size, latent_dim=40, **options)
    z = torch.randn(32, 40, device=device)
    near, far = decoder(z).mean, decoder(3 * z).mean
    # A GroupNorm right after the latent would leave a change of 0.12 standard deviations here.
    assert (far - near).square().mean().sqrt() > 0.2 * far.std()


# --- MLPs and contexts ---


@pytest.mark.parametrize("gated", [False, True])
def test_mlps_are_those_of_the_papers(device, gated):
    encoder = MLPEncoder((1, 28, 28), 40, gated=gated).to(device)
    decoder = MLPDecoder(40, make_likelihood("bernoulli", (1, 28, 28)), gated=gated).to(device)
    layers = 2 if gated else 1  # of the same size: the features and their gate
    assert num_parameters(encoder) == layers * (785 * 300 + 301 * 300) + 301 * 80
    assert num_parameters(decoder) == layers * (41 * 300 + 301 * 300) + 301 * 784
    q_z0 = encoder(torch.rand(2, 5, 1, 28, 28, device=device))
    assert (q_z0.batch_shape, q_z0.event_shape) == ((2, 5), (40,))
    p_x = decoder(q_z0.rsample())
    assert (p_x.batch_shape, p_x.event_shape) == ((2, 5), (1, 28, 28))
    with pytest.raises(ValueError, match=r"x must end in shape \(1, 28, 28\)"):
        encoder(torch.rand(5, 784, device=device))
    with pytest.raises(ValueError, match=r"z must end in shape \(40,\)"):
        decoder(torch.rand(5, 41, device=device))


def test_a_gate_multiplies(device):
    net = mlp(3, 2, (4,), gated=True).to(device)
    x = torch.randn(5, 3, device=device)
    value, gate = net[0](x).chunk(2, -1)
    torch.testing.assert_close(net(x), net[-1](value * torch.sigmoid(gate)))


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_a_context_is_a_row_per_datum(device, kind):
    Encoder, Decoder = (ConvEncoder, ConvDecoder) if kind == "conv" else (MLPEncoder, MLPDecoder)
    torch.manual_seed(0)
    likelihood = make_likelihood("gaussian", (1, 8, 8))
    encoder = Encoder((1, 8, 8), 2, context_features=3).to(device)
    decoder = Decoder(2, likelihood, context_features=3).to(device)
    x, c = torch.randn(4, 1, 8, 8, device=device), torch.randn(4, 3, device=device)
    q_z0 = encoder(x, c)
    z = q_z0.rsample((5,))
    p_x = decoder(z, c)
    assert p_x.batch_shape == (5, 4)
    for s, i in [(0, 0), (4, 3)]:  # the datum alone, with its own context
        torch.testing.assert_close(encoder(x[i], c[i]).mean, q_z0.mean[i])
        torch.testing.assert_close(decoder(z[s, i], c[i]).mean, p_x.mean[s, i])
    assert (encoder(x, c.flip(0)).mean - q_z0.mean).abs().max() > 1e-3
    assert (decoder(z, c.flip(0)).mean - p_x.mean).abs().max() > 1e-3
    for wrong in (None, c[:, :2]):
        with pytest.raises(ValueError, match="c must be a context with 3 features"):
            encoder(x, wrong)
    with pytest.raises(ValueError, match=r"a context with 0 features .*, got 3"):
        Encoder((1, 8, 8), 2).to(device)(x, c)


# --- Numerics ---


def test_posterior_scale_is_bounded(device):
    encoder, _ = make_pair(device)
    encoder.min_scale, encoder.max_scale = 1e-2, 5.0
    x = 1e6 * torch.randn(64, 1, 8, 8, device=device)
    nn.init.normal_(encoder.head.weight, std=1e6)
    scale = encoder(x).stddev
    assert scale.min().item() == pytest.approx(1e-2)
    assert scale.max().item() == pytest.approx(5.0, rel=1e-5)


@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian-pixel", "categorical"])
def test_densities_stay_in_float32_under_autocast(device, likelihood):
    encoder, decoder = make_pair(device, 16, likelihood=likelihood)
    x = torch.linspace(-1, 1, 4, device=device).repeat(4, 1, 16, 4)
    with torch.autocast(device.type, torch.bfloat16):
        assert encoder.head(encoder.features(x)).dtype == torch.bfloat16
        q_z0 = encoder(x)
        p_x = decoder(q_z0.mean)
        tensors = [q_z0.mean, q_z0.stddev, p_x.mean, p_x.log_prob(x)]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    torch.testing.assert_close(q_z0.mean, encoder(x).mean, atol=0.03, rtol=0.03)


def test_float64(device):
    encoder, decoder = (module.double() for module in make_pair(device))
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, device=device)
    p_x = decoder(encoder(x).rsample())
    assert p_x.log_prob(x).dtype == p_x.mean.dtype == torch.float64


# --- The presets of the paper ---


@pytest.mark.parametrize(
    ("size", "latent_dim", "count"),
    [
        # w = 10: 3-10, 10-20, 20-40 (4 x 4 kernels, biases), two BatchNorms, head 40 x 4 x 4 -> 80.
        (32, 40, 490 + (3220 + 40) + (12840 + 80) + 51280),
        # One more convolution 40-40 with its BatchNorm.
        (64, 40, 490 + (3220 + 40) + (12840 + 80) + (25640 + 80) + 51280),
        # w = 25: 3-25, 25-50, 50-100, head 100 x 4 x 4 -> 200.
        (32, 100, 1225 + (20050 + 100) + (80100 + 200) + 320200),
    ],
)
def test_paper_encoder_has_the_counted_parameters(size, latent_dim, count):
    encoder = paper_encoder((3, size, size), latent_dim)
    assert num_parameters(encoder) == count
    assert encoder(torch.zeros(2, 3, size, size)).event_shape == (latent_dim,)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        # 40 -> 512 x 4 x 4, 512-256, 256-128, 128-3; BatchNorm after all but the last.
        (32, 335872 + 1024 + (2097408 + 512) + (524416 + 256) + 6147),
        # 40 -> 512 x 4 x 4, 512-512 twice, 512-256, 256-3; no norm.
        (64, 335872 + 2 * 4194816 + 2097408 + 12291),
    ],
)
def test_paper_decoder_has_the_counted_parameters(size, count):
    decoder = paper_decoder(40, make_likelihood("gaussian-fixed", (3, size, size)))
    assert num_parameters(decoder) == count
    assert decoder(torch.zeros(2, 40)).event_shape == (3, size, size)


@pytest.mark.parametrize(("options", "norms"), [({}, 0), ({"norm": "group"}, 1)])
def test_encoder_has_the_counted_parameters(options, norms):
    # 8 pixels, w = 32: 3 x 3 convolution 1-32, 4 x 4 convolution 32-64 and its norm, head.
    count = (9 * 32 + 32) + (16 * 32 * 64 + 64 + norms * 128) + (64 * 16 * 4 + 4)
    assert num_parameters(ConvEncoder((1, 8, 8), 2, **options)) == count
    # 64 pixels, w = 32: 3-32-64-128-256; the channels stop at 8w.
    convolutions = 16 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256) + 32 + 64 + 128 + 256
    head = 256 * 16 * 80 + 80
    count = convolutions + norms * 2 * (64 + 128 + 256) + head
    assert num_parameters(ConvEncoder((3, 64, 64), 40, **options)) == count


@pytest.mark.parametrize("name", ["gaussian", "gaussian-fixed"])
def test_paper_decoder_squashes_a_mean(device, name):
    torch.manual_seed(0)
    decoder = paper_decoder(4, make_likelihood(name, (3, 32, 32))).to(device)
    z = 10 * torch.randn(8, 4, device=device)
    before = decoder.maps[:-1](z)
    torch.testing.assert_close(decoder(z).mean, before.tanh())


@pytest.mark.parametrize("name", ["gaussian-pixel", "bernoulli", "discretized-logistic"])
def test_paper_decoder_leaves_other_maps_alone(device, name):
    decoder = paper_decoder(4, make_likelihood(name, (3, 32, 32))).to(device)
    assert not any(isinstance(module, nn.Tanh) for module in decoder.modules())


def test_paper_presets_are_selu_and_batch_norm():
    likelihood = make_likelihood("gaussian", (3, 32, 32))
    for module in (paper_encoder((3, 32, 32), 40), paper_decoder(40, likelihood)):
        kinds = {type(m) for m in module.modules()}
        assert nn.SELU in kinds and nn.BatchNorm2d in kinds
        assert not kinds & {nn.SiLU, nn.GroupNorm}


# --- Broken input ---


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"image_shape": (1, 8)}, "image_shape"),
        ({"image_shape": (0, 8, 8)}, "image_shape"),
        ({"image_shape": (1, 7, 8)}, "7 x 8 pixels: .* 8 to 256 .*--image-size"),
        ({"image_shape": (1, 64, 257)}, "64 x 257 pixels: .*--image-size"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"latent_dim": 2.0}, "latent_dim"),
        ({"width": 0}, "width"),
        ({"norm": "layer"}, "unknown norm .*: choose one of group, batch, none"),
        ({"channels": (8,)}, "channels must be 2 positive ints"),
        ({"channels": (8, 0)}, "channels must be 2 positive ints"),
        ({"min_scale": 0.0}, "min_scale"),
        ({"min_scale": 2.0, "max_scale": 1.0}, "max_scale"),
    ],
)
def test_encoder_rejects(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ConvEncoder(**{"image_shape": (1, 8, 8), "latent_dim": 2} | kwargs)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"latent_dim": 0}, "latent_dim"),
        ({"width": -1}, "width"),
        ({"norm": "layer"}, "norm"),
        ({"channels": (8, 8, 8)}, "channels"),
        ({"likelihood": make_likelihood("gaussian", (1, 7, 7))}, "--image-size"),
        ({"likelihood": make_likelihood("bernoulli", (1, 8, 8)), "tanh": True}, "tanh"),
    ],
)
def test_decoder_rejects(kwargs, match):
    likelihood = make_likelihood("gaussian", (1, 8, 8))
    with pytest.raises(ValueError, match=match):
        ConvDecoder(**{"latent_dim": 2, "likelihood": likelihood} | kwargs)


def test_wrong_inputs_raise(device):
    encoder, decoder = make_pair(device)
    for shape in [(4, 3, 8, 8), (4, 1, 16, 16), (8, 8), (4, 64)]:
        with pytest.raises(ValueError, match=r"x must end in shape \(1, 8, 8\)"):
            encoder(torch.zeros(shape, device=device))
    for shape in [(4, 2), ()]:
        with pytest.raises(ValueError, match=r"z must end in shape \(3,\)"):
            decoder(torch.zeros(shape, device=device))


def test_paper_presets_reject_other_sizes():
    with pytest.raises(ValueError, match="image_shape must have 32 or 64"):
        paper_encoder((1, 28, 28), 40)
    with pytest.raises(ValueError, match="image_shape must have 32 or 64"):
        paper_decoder(40, make_likelihood("gaussian", (1, 28, 28)))
    with pytest.raises(ValueError, match="latent_dim must be at least 4"):
        paper_encoder((3, 32, 32), 3)
