r"""The two programs as Pyro sees them: their sites, their densities, their parameters."""

from __future__ import annotations

import copy
import math

import pyro
import pytest
import torch
from errors import one_line_value_error
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn

from pyro_vaediff import (
    VAE,
    DiffusionPrior,
    FlowPrior,
    GaussianPrior,
    MixturePrior,
    Timestep_ELBO,
    VampPrior,
    register,
)
from pyro_vaediff.likelihoods import GaussianLikelihood
from pyro_vaediff.nn import ConvDecoder, ConvEncoder
from pyro_vaediff.testing import linear_gaussian_vae

ORDERS = ("forward", "posterior", "reversed")
PRIORS = {
    "gaussian": lambda encoder: GaussianPrior(3),
    "flow": lambda encoder: FlowPrior(3, hidden_features=[8]),
    "mixture": lambda encoder: MixturePrior(3, num_components=4),
    "vamp": lambda encoder: VampPrior(encoder, 3, IMAGE_SHAPE, num_components=4),
    "diffusion": lambda encoder: DiffusionPrior(3, 4),
}
IMAGE_SHAPE = (1, 8, 8)


def make_vae(device, prior="diffusion"):
    encoder = ConvEncoder(IMAGE_SHAPE, 3, width=4)
    decoder = ConvDecoder(3, GaussianLikelihood(IMAGE_SHAPE), width=4)
    return VAE(encoder, decoder, PRIORS[prior](encoder)).to(device)


@pytest.fixture
def x(device):
    return torch.rand(5, *IMAGE_SHAPE, device=device) * 2 - 1


# --- One law in three orders ----------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 6])
@pytest.mark.parametrize("sampled", ORDERS)
def test_the_orders_are_the_same_distribution(device, sampled, T):
    vae = linear_gaussian_vae(T).to(device)
    x = torch.randn(7, 3, dtype=torch.float64, device=device)
    vae.prior.order = sampled
    trace = poutine.trace(vae.guide).get_trace(x)
    latents = {f"z_{t}": trace.nodes[f"z_{t}"]["value"] for t in range(T + 1)}
    log_q = []
    for order in ORDERS:
        vae.prior.order = order
        conditioned = poutine.trace(poutine.condition(vae.guide, data=latents)).get_trace(x)
        conditioned.compute_log_prob()
        log_q.append(sum(conditioned.nodes[name]["log_prob"] for name in latents))
        assert conditioned.nodes["_RETURN"]["value"] is latents["z_0"]
    for other in log_q[1:]:
        torch.testing.assert_close(log_q[0], other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_the_orders_have_the_sites_of_their_factorization(device, order):
    vae = linear_gaussian_vae(3, order=order).to(device)
    trace = poutine.trace(vae.guide).get_trace(torch.randn(2, 3).double().to(device))
    assert (
        list(trace.stochastic_nodes)[1:]
        == {  # after the plate
            "forward": ["z_0", "z_1", "z_2", "z_3"],
            "posterior": ["z_0", "z_3", "z_2", "z_1"],
            "reversed": ["z_3", "z_2", "z_1", "z_0"],
        }[order]
    )


# --- Sites, shapes, plates ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_sites_of_the_unrolled_programs(device, x, order):
    vae = make_vae(device)
    vae.prior.order = order
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    latents = [f"z_{t}" for t in range(4, -1, -1)]
    assert list(model.stochastic_nodes) == ["data", *latents]
    assert set(guide.stochastic_nodes) == {"data", *latents}
    assert list(model.observation_nodes) == ["x"]
    for trace in (model, guide):
        trace.compute_log_prob()
        for name, site in trace.iter_stochastic_nodes():
            if name != "data":
                assert site["fn"].batch_shape == (5,) and site["fn"].event_shape == (3,)
                assert [(f.name, f.dim) for f in site["cond_indep_stack"]] == [("data", -1)]
                assert site["log_prob"].shape == (5,) and site["fn"].has_rsample
    assert model.nodes["x"]["fn"].event_shape == IMAGE_SHAPE
    assert model.nodes["x"]["value"] is x


def test_format_shapes_reads_like_the_chain(device, x):
    rows = poutine.trace(make_vae(device).model).get_trace(x).format_shapes().splitlines()
    rows = [row.split() for row in rows]
    start = rows.index(["Sample", "Sites:"])
    assert rows[start + 3 :] == [
        row
        for t in range(4, -1, -1)
        for row in ([f"z_{t}", "dist", "5", "|", "3"], ["value", "5", "|", "3"])
    ] + [["x", "dist", "5", "|", "1", "8", "8"], ["value", "5", "|", "1", "8", "8"]]


def test_render_model(device, x):
    pytest.importorskip("graphviz")
    vae = make_vae(device)
    source = pyro.render_model(vae.model, model_args=(x,)).source
    for t in range(4, 0, -1):
        assert f"z_{t} -> z_{t - 1}" in source
    assert "z_0 -> x" in source and "z_1 -> x" not in source
    source = pyro.render_model(vae.guide, model_args=(x,)).source
    assert "z_3 -> z_4" in source and "z_4 -> z_3" not in source


# --- Sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIORS)
def test_unconditioned_sampling(device, name):
    vae = make_vae(device, name)
    assert vae.model().shape == (1, *IMAGE_SHAPE)
    images = vae.model(num_samples=7)
    assert images.shape == (7, *IMAGE_SHAPE) and images.device.type == device.type


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", PRIORS)
def test_predictive(device, x, name, parallel):
    vae = make_vae(device, name)
    prior = Predictive(vae.model, num_samples=6, parallel=parallel)(num_samples=2)
    assert prior["x"].reshape(-1, *IMAGE_SHAPE).shape == (12, *IMAGE_SHAPE)
    posterior = Predictive(vae.model, guide=vae.guide, num_samples=6, parallel=parallel)(x)
    assert posterior["z_0"].shape == (6, 5, 3)
    # The latents are the guide's: they follow the images.
    spread = posterior["z_0"].mean(0) - vae.encoder(x).mean
    assert (spread.abs() < 6 * vae.encoder(x).stddev / 6**0.5).all()


def test_interventions_reach_the_sites(device):
    vae, z = make_vae(device), torch.ones(2, 3, device=device)
    for handler in (poutine.condition, poutine.do):
        trace = poutine.trace(handler(vae.model, data={"z_1": z})).get_trace(num_samples=2)
        mean = vae.prior.reverse(z, 1).mean
        torch.testing.assert_close(trace.nodes["z_0"]["fn"].mean, mean)


# --- Parameters -----------------------------------------------------------------------------------


def train(vae, x, loss=None):
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss or Trace_ELBO())
    # Layers that start at zero let no gradient through at first: four steps reach all of them.
    for _ in range(4):
        assert math.isfinite(svi.step(x))


def snapshot(vae):
    return {name: p.detach().clone() for name, p in vae.named_parameters()}


def changed(vae, before):
    return {name for name, p in vae.named_parameters() if (p != before[name]).any()}


@pytest.mark.parametrize("make_loss", [Trace_ELBO, Timestep_ELBO])
@pytest.mark.parametrize("pair", ["same class", "deep copy", "other prior"])
def test_two_models_in_one_process_both_train(device, x, pair, make_loss):
    first = make_vae(device)
    train(first, x)  # its names are in the store before there is a second one
    second = {
        "same class": lambda: make_vae(device),
        "deep copy": lambda: copy.deepcopy(first),
        "other prior": lambda: make_vae(device, "flow"),
    }[pair]()
    for vae, other in ((first, second), (second, first)):
        before, others = snapshot(vae), snapshot(other)
        train(vae, x, loss=make_loss())
        assert changed(vae, before) == set(before)
        assert not changed(other, others)


def test_shared_networks_are_registered_once_and_train(device, x):
    first = make_vae(device)
    second = VAE(first.encoder, first.decoder, DiffusionPrior(3, 2).to(device))
    for vae in (first, second, first):
        before = snapshot(vae)
        train(vae, x)
        assert changed(vae, before) == set(before)
    assert len(pyro.get_param_store()) == len({*first.parameters(), *second.parameters()})


@pytest.mark.parametrize("part", ["encoder", "decoder", "prior"])
def test_a_frozen_part_stays_as_it_is(device, x, part):
    vae = make_vae(device)  # warnings are errors
    getattr(vae, part).requires_grad_(False)
    before = snapshot(vae)
    train(vae, x)
    assert changed(vae, before) == {name for name in before if not name.startswith(part)}
    train(vae, x, loss=Timestep_ELBO())


def test_training_the_prior_alone_has_no_gradient_for_the_encoder(device):
    vae = linear_gaussian_vae(3).to(device)
    x = torch.randn(2, 3, dtype=torch.float64, device=device)
    for elbo in (Trace_ELBO(), Timestep_ELBO()):
        elbo.loss_and_grads(vae.prior_model, vae.prior_guide, x)
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert all(p.grad.any() for p in vae.prior.parameters())


def test_training_goes_on_in_another_dtype(device, x):
    vae = make_vae(device)
    train(vae, x)
    pyro.clear_param_store()
    vae.double()
    before = snapshot(vae)
    train(vae, x.double())
    assert changed(vae, before) == set(before)
    assert {p.dtype for p in vae.parameters()} == {torch.float64}


def test_register_names_objects_not_classes():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    assert register("net", first) is first
    register("net", first)
    names = set(pyro.get_param_store().keys())
    assert len(names) == 2 and names == {"net$$$weight", "net$$$bias"}
    register("net", second)
    assert len(pyro.get_param_store()) == 4
    with pyro.get_param_store().scope():
        register("net", first)
        assert set(pyro.get_param_store().keys()) == names


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda vae, x: vae.guide(x[:0]), "x must be a non-empty batch"),
        (lambda vae, x: vae.model(x.to(torch.uint8)), "floating-point images, got torch.uint8"),
        (lambda vae, x: vae.model(x / 0 * 0), "NaN or infinite"),
        (lambda vae, x: vae.model(x[:, :, 1:]), r"x must have shape \(B, 1, 8, 8\)"),
        (lambda vae, x: vae.model(num_samples=0), "num_samples must be a whole number >= 1, got 0"),
    ],
)
def test_bad_images(device, x, call, match):
    with one_line_value_error(match):
        call(make_vae(device), x)


@pytest.mark.parametrize("name", PRIORS)
def test_the_encoder_and_the_prior_must_fit(device, x, name):
    vae = make_vae(device, name)
    vae.encoder = ConvEncoder(IMAGE_SHAPE, 2, width=4).to(device)
    with one_line_value_error(r"event shape \(3,\), as the prior has, got \(2,\)"):
        Timestep_ELBO().loss(vae.model, vae.guide, x)
