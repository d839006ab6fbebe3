r"""Evaluation of a VAE against terms that are known, whatever its data come in."""

from __future__ import annotations

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro.infer import Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vaediff import VAE, DiffusionPrior, GaussianPrior
from pyro_vaediff.evaluate import (
    Surgery,
    elbo_surgery,
    evaluate,
    kl_by_timestep,
    log_likelihood,
    preprocess,
)
from pyro_vaediff.likelihoods import make_likelihood
from pyro_vaediff.nn import ResidualMLP
from pyro_vaediff.sampling import ddim, sample, trajectory
from pyro_vaediff.testing import LinearGaussian, linear_gaussian_vae

N = 7


class Known(nn.Module):
    r"""A decoder that does not look at the latents, so that every term is known."""

    def __init__(self, *layers):
        super().__init__()
        self.loc = nn.Parameter(torch.linspace(-1, 1, 3))
        self.layers = nn.Sequential(*layers)

    def forward(self, z, c=None):
        loc = self.layers(self.loc.expand(len(z), 3))
        return dist.Normal(loc if c is None else loc + c, 1.0).to_event(1)


class Shaped(nn.Module):
    r"""A network between data and latents of other shapes."""

    def __init__(self, net, in_shape, out_shape):
        super().__init__()
        self.net, self.in_shape, self.out_shape = net, in_shape, out_shape

    def forward(self, x):
        p = self.net(x.reshape(-1, *self.in_shape))
        loc, scale = (v.reshape(-1, *self.out_shape) for v in (p.mean, p.stddev))
        return dist.Normal(loc, scale).to_event(len(self.out_shape))


class Encoder(LinearGaussian):
    def __init__(self, *layers):
        super().__init__((3,), (2,), log_scale=-0.5)
        self.layers = nn.Sequential(*layers)

    def forward(self, x, c=None):
        return super().forward(self.layers(x if c is None else x - c))


def known_vae(device, *layers):
    encoder, decoder = Encoder(*copy.deepcopy(layers)), Known(*layers)
    return VAE(encoder, decoder, GaussianPrior(2)).double().to(device)


@pytest.fixture
def x(device):
    return 3 * torch.randn(N, 3, dtype=torch.float64, device=device)


def exact_terms(vae, x, c=None):
    r"""Returns the mean reconstruction and KL over all data at once."""
    vae.eval()
    q = vae.encoder(x, c)
    kl = (q.mean.square() + q.variance - 1 - q.variance.log()).sum(-1) / 2
    terms = {"x": -vae.decoder(q.mean, c).log_prob(x).mean().item(), "z_0": kl.mean().item()}
    vae.train()
    return terms


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_it_is_the_mean_of_all_data(device, x, batch_size):
    # The last batch may be smaller than the others: its mean counts for less.
    vae = known_vae(device)
    terms = evaluate(vae, x, batch_size=batch_size)
    assert terms == pytest.approx(exact_terms(vae, x), rel=1e-12)
    loss = evaluate(vae, x, Trace_ELBO(), batch_size=batch_size)
    assert list(loss) == ["-ELBO"]


FORMS = {
    "tensor": lambda x, c: (x, c),
    "single precision": lambda x, c: (x.float(), None if c is None else c.float()),
    "batches": lambda x, c: (list(x.split(3)), None),
    "pairs": lambda x, c: (zip(x.split(3), c.split(3), strict=True), None),
    "data set": lambda x, c: (TensorDataset(x), None),
    "data set of pairs": lambda x, c: (TensorDataset(x, c), None),
    "loader": lambda x, c: (DataLoader(TensorDataset(x, c), 4), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_data_come_in_many_forms(device, x, form):
    vae = known_vae(device)
    c = None if form in ("batches", "data set") else torch.randn_like(x)
    data, context = FORMS[form](x, c)
    terms = evaluate(vae, data, c=context, batch_size=3)
    assert terms == pytest.approx(exact_terms(vae, x, c), rel=1e-6 if "single" in form else 1e-12)


def test_images_go_through_the_pixel_space(device):
    images = torch.randint(0, 17, (N, 3, 1, 1), dtype=torch.uint8)
    vae = known_vae(device)
    vae.encoder = Shaped(vae.encoder, (3,), (2,))
    vae.decoder = Shaped(vae.decoder, (2,), (3, 1, 1))
    with one_line_value_error("vae.space is None"):
        evaluate(vae, images)
    vae.space = make_likelihood("discretized-logistic", (3, 1, 1), 17).space(17)
    x = preprocess(vae, images)
    torch.testing.assert_close(x, (images.double() / 8 - 1).to(device), atol=1e-6, rtol=0)
    terms = evaluate(vae, images, batch_size=3)
    assert terms == pytest.approx(evaluate(vae, x, batch_size=3), rel=1e-12)
    with one_line_value_error("17"):
        evaluate(vae, images + 1)


def seeded(fn):
    r"""Returns a function with a seed, as the others have, of one that has none."""

    def call(*args, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return fn(*args, **kwargs)

    return call


FUNCTIONS = {
    "evaluate": evaluate,
    "log_likelihood": lambda vae, x, **kwargs: log_likelihood(vae, x, 2, **kwargs),
    "elbo_surgery": elbo_surgery,
    "kl_by_timestep": seeded(kl_by_timestep),
}


class Told(nn.Module):
    r"""A backbone that remembers the contexts that it is told, and does not use them."""

    def __init__(self):
        super().__init__()
        self.net, self.told = ResidualMLP(2, width=8), []
        nn.init.normal_(self.net.outputs.weight, std=0.1)

    def forward(self, z, log_snr, c=None):
        if c is not None:
            self.told.append(c)
        return self.net(z, log_snr)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_networks_are_told_the_context(device, x, name):
    # The encoder subtracts the context, and the decoder adds it: the number is that of x - c.
    vae, c = known_vae(device), torch.randn_like(x)
    vae.prior = DiffusionPrior(2, 4, backbone=Told(), context_features=3).double().to(device)
    vae.prior.denoiser.backbone.told.clear()  # of the check at construction
    options = {} if name == "kl_by_timestep" else {"batch_size": 4}
    found = FUNCTIONS[name](vae, x, c=c, **options)
    told = torch.cat(vae.prior.denoiser.backbone.told)
    assert {tuple(row) for row in told.tolist()} == {tuple(row) for row in c.tolist()}
    assert_equal(found, FUNCTIONS[name](vae, x - c, c=torch.zeros_like(c), **options))


def assert_equal(a, b):
    r"""Asserts that results are the same, up to rounding, tensors or not."""
    if isinstance(a, Surgery):
        a, b = vars(a), vars(b)
    torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_done_in_eval_mode_and_leaves_nothing_behind(device, x, name):
    vae, modes = known_vae(device, nn.BatchNorm1d(3), nn.Dropout(0.9)), []
    for layer in (*vae.encoder.layers, *vae.decoder.layers):
        layer.register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    vae.decoder.layers[0].running_mean += 1.0
    vae.decoder.layers[1].eval()  # frozen, in a VAE that trains
    training = [module.training for module in vae.modules()]
    buffers = [buffer.clone() for buffer in vae.buffers()]
    state = torch.get_rng_state()
    result = FUNCTIONS[name](vae, x)
    assert [module.training for module in vae.modules()] == training
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert str(FUNCTIONS[name](vae, x)) == str(result)  # a function of its seed
    assert modes and not any(modes)
    assert all(map(torch.equal, vae.buffers(), buffers))
    assert not list(pyro.get_param_store())
    if name == "evaluate":
        assert result == pytest.approx(exact_terms(vae, x), rel=1e-12)


def test_a_vae_is_saved_after_an_evaluation(device):
    vae = linear_gaussian_vae(3).to(device)
    x = torch.randn(2, 3, dtype=torch.float64, device=device)
    for fn in FUNCTIONS.values():
        fn(vae, x)
        torch.save(vae, io.BytesIO())
    for fn in (sample, trajectory, lambda prior, n: ddim(prior, n, 2)):
        fn(vae.prior, 2)
        torch.save(vae, io.BytesIO())


def test_a_diffusion_prior_of_any_event_shape(device, x):
    # At its start the prior is N(0, I), with the same likelihood.
    vae = known_vae(device)
    vae.encoder = Shaped(vae.encoder, (3,), (1, 2, 1))
    vae.decoder = Shaped(vae.decoder, (1, 2, 1), (3,))
    estimates = []
    for prior in (GaussianPrior((1, 2, 1)), DiffusionPrior((1, 2, 1), 20)):
        vae.prior = prior.double().to(device)
        estimates.append(log_likelihood(vae, x, 5))
    torch.testing.assert_close(*estimates, atol=1e-8, rtol=0)


def test_errors(device, x):
    vae = known_vae(device)
    for call, match in {
        (lambda: evaluate(vae, x[:0])): "data must hold at least one datum",
        (lambda: evaluate(vae, [])): "data must hold at least one datum",
        (lambda: evaluate(vae, [x], c=x)): "c must be None if data are batches",
        (lambda: evaluate(vae, x, "timestep")): "elbo must be an estimator of the ELBO",
        (lambda: evaluate(vae, x, batch_size=0)): "batch_size must be a whole number >= 1, got 0",
        (lambda: evaluate(vae, x, seed=-1)): "seed must be a whole number",
    }.items():
        with one_line_value_error(match):
            call()
