r"""The flow of coupling layers, against the Jacobian of its map and as a prior in programs."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from errors import one_line_value_error
from image_latents import EVENT, Decoder, Encoder
from plates import check_sites_in_plates
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vaediff import VAE, FlowPrior, GaussianPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.nn import FlowDistribution, coupling_flow
from pyro_vaediff.nn.coupling import coupling_masks
from pyro_vaediff.train.build import make_prior
from pyro_vaediff.train.config import ModelConfig

# Shapes, among them one channel, one pixel, and three channels; numbers of steps, the features of
# the context.
SETTINGS = [((2, 2, 4), 8, 0), ((2, 2, 4), 3, 2), ((1, 3, 2), 2, 0), ((3, 1, 1), 4, 3)]
SETTINGS += [((3, 3, 2), 8, 2)]


def make_flow(device, shape, num_steps=8, context=0, hidden=(6, 6, 4), dtype=torch.float64):
    prior = FlowPrior(shape, num_steps, hidden, context, flow="coupling")
    with torch.no_grad():
        for parameter in prior.parameters():  # away from the start
            parameter.add_(0.1 * torch.randn_like(parameter))
    return prior.to(device, dtype)


def context_of(prior, *batch):
    F = prior.context_features
    return torch.randn(*batch, F).to(prior.origin) if F else None


def to_noise(prior, z, c=None):
    return prior.distribution(c).dist.transform(z)


# --- The density ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, num_steps, context", SETTINGS)
def test_log_prob_is_the_change_of_variables(device, shape, num_steps, context):
    prior = make_flow(device, shape, num_steps, context)
    for z in torch.randn(3, *shape, dtype=torch.float64, device=device):
        c, flat = context_of(prior), z.flatten()
        jacobian = torch.autograd.functional.jacobian(lambda z: to_noise(prior, z, c), flat)  # noqa: B023
        u = to_noise(prior, flat, c).unflatten(-1, shape)
        expected = prior.standard_normal().log_prob(u) + torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(prior.log_prob(z, c), expected, atol=1e-10, rtol=0)
        off = jacobian - torch.diag(jacobian.diagonal())
        assert off.abs().max() > 1e-3  # it is no product of densities of single variables


@pytest.mark.parametrize("shape, num_steps, context", SETTINGS)
def test_sampling_inverts_scoring_to_the_precision_of_the_dtype(device, shape, num_steps, context):
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        prior = make_flow(device, shape, num_steps, context, dtype=dtype)
        q = prior.distribution(context_of(prior, 20)).dist.transform
        z = torch.randn(20, prior.latent_dim, dtype=dtype, device=device)
        torch.testing.assert_close(q.inv(q(z)), z, atol=atol, rtol=0)
        torch.testing.assert_close(q(q.inv(z)), z, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_starts_at_a_standard_normal(device, dtype):
    prior = FlowPrior((3, 4, 5), flow="coupling", context_features=2).to(device, dtype)
    c = context_of(prior, 6)
    z = 3 * torch.randn(6, 3, 4, 5, dtype=dtype, device=device)
    assert torch.equal(to_noise(prior, z.flatten(1), c), z.flatten(1))
    torch.testing.assert_close(prior.log_prob(z, c), prior.standard_normal().log_prob(z))


def test_the_density_integrates_to_one(device):
    prior = make_flow(device, (1, 2, 2), hidden=(4, 4))
    proposal = dist.StudentT(torch.full((), 4.0, device=device).double(), 0.0, 2.0)
    proposal = proposal.expand([1, 2, 2]).to_event(3)
    with torch.no_grad():
        z = proposal.sample([100_000])
        weights = (prior.log_prob(z) - proposal.log_prob(z)).exp()
    se = weights.std() / len(weights) ** 0.5
    assert se < 0.02
    assert (weights.mean() - 1).abs() < 5 * se


def test_gradients_of_scores_and_of_samples(device):
    prior = make_flow(device, (2, 1, 2), num_steps=4, hidden=(3,))
    z = torch.randn(2, 2, 1, 2, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda z: prior.distribution().log_prob(z), z)
    prior.zero_grad()
    prior.distribution().rsample([4]).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in prior.parameters())


# --- The layers -----------------------------------------------------------------------------------


def test_masks_alternate():
    C, pixels = 4, torch.tensor([[True, False], [False, True]])
    halves = [torch.tensor(half) for half in ([1, 0, 1, 0], [1, 1, 0, 0])]
    expected = []
    for half in halves:
        for mask in (pixels.expand(C, 2, 2), half.bool()[:, None, None].expand(C, 2, 2)):
            expected += [mask, ~mask]
    for mask, other in zip(coupling_masks((C, 2, 2)), 2 * expected, strict=False):
        assert torch.equal(mask, other)
    for shape in ((1, 1, 2), (1, 4, 3), (2, 1, 1), (3, 2, 2), (5, 1, 1)):
        masks = torch.stack(list(itertools.islice(coupling_masks(shape), 12))).flatten(1)
        assert masks.any(1).all() and not masks.all(1).any()
        # Any two channels of a pixel are told apart by a mask.
        columns = masks.reshape(12, shape[0], -1)
        for i, j in itertools.combinations(range(shape[0]), 2):
            assert (columns[:, i] != columns[:, j]).any(0).all()


def test_a_step_keeps_what_its_mask_says_and_couples_the_rest_to_it(device):
    prior = make_flow(device, (2, 2, 3), num_steps=6)
    z = torch.randn(12, dtype=torch.float64, device=device)
    steps = prior.flow.transform.transforms[1:]  # the first one is elementwise
    for step, mask in zip(steps, coupling_masks((2, 2, 3)), strict=False):
        kept = mask.flatten()
        jacobian = torch.autograd.functional.jacobian(step(), z)
        assert torch.equal(step()(z)[kept], z[kept])
        assert torch.equal(jacobian[kept], torch.eye(12, device=device).double()[kept])
        moved = jacobian[~kept][:, ~kept]
        assert torch.equal(moved, torch.diag(moved.diagonal()))
        assert (jacobian[~kept][:, kept] != 0).any(1).all()


def test_every_variable_depends_on_every_other(device):
    prior = make_flow(device, (4, 3, 3))
    z = torch.randn(36, dtype=torch.float64, device=device)
    assert torch.autograd.functional.jacobian(lambda z: to_noise(prior, z), z).all()


def test_log_scales_are_bounded(device):
    prior = make_flow(device, (2, 2, 2), num_steps=1)
    with torch.no_grad():
        for sign in (-1, 1):
            prior.flow.transform.transforms[1].conditioner.outputs.bias.fill_(sign * 1e6)
            step = prior.flow.transform.transforms[1]()
            ladj = step.call_and_ladj(torch.zeros(8, device=device).double())[1]
            assert ladj.item() == pytest.approx(sign * 4 * math.log(1000), rel=1e-3)


def test_scoring_and_drawing_take_one_evaluation_of_each_network(device):
    prior, calls = make_flow(device, (2, 2, 4), num_steps=5), []
    for step in prior.flow.transform.transforms[1:]:
        step.conditioner.register_forward_hook(lambda *_: calls.append(1))
    q = prior.distribution()
    z = q.rsample([3])
    log_prob = q.log_prob(z)
    assert len(calls) == 5
    torch.testing.assert_close(q.log_prob(z.clone()), log_prob, atol=1e-10, rtol=0)
    assert len(calls) == 10


# --- The context ----------------------------------------------------------------------------------


def test_the_context_moves_the_density(device):
    prior = make_flow(device, (2, 3, 2), context=2)
    z = torch.randn(5, 2, 3, 2, dtype=torch.float64, device=device)
    c = torch.eye(2, dtype=torch.float64, device=device)
    one, other = (prior.log_prob(z, row.expand(5, 2)) for row in c)
    assert (one - other).abs().min() > 1e-6
    mixed = prior.log_prob(z, c[[0, 1, 0, 1, 0]])
    expected = torch.stack([one[0], other[1], one[2], other[3], one[4]])
    torch.testing.assert_close(mixed, expected, atol=1e-10, rtol=0)
    assert prior.distribution(c[[0, 1, 0]]).sample([4]).shape == (4, 3, 2, 3, 2)


@pytest.mark.parametrize("context", [0, 2])
def test_sites_in_plates_of_data_and_of_particles(device, context):
    prior = make_flow(device, (2, 1, 3), context=context)
    _, z = check_sites_in_plates(prior, context_of(prior, 4))
    assert z.shape == (5, 4, 2, 1, 3)


# --- Training, and programs -----------------------------------------------------------------------


def test_it_learns_a_correlated_image(device):
    D, noise = 16, 0.3
    prior = FlowPrior((1, 4, 4), 4, (8, 8), flow="coupling").to(device)

    def images(N):
        shared = torch.randn(N, 1, 1, 1, device=device)
        return shared + noise * torch.randn(N, 1, 4, 4, device=device)

    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (-prior.log_prob(images(64)).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        losses = -prior.log_prob(images(4000))
    # Between the entropy of the images and that of independent pixels.
    entropy = (D * math.log(2 * math.pi * math.e) + (D - 1) * math.log(noise**2)) / 2
    entropy += math.log(D + noise**2) / 2
    independent = D * math.log(2 * math.pi * math.e * (1 + noise**2)) / 2
    se = losses.std() / len(losses) ** 0.5
    assert se < 0.1
    assert entropy - 5 * se < losses.mean() < (entropy + independent) / 2


class FlowEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.flow = coupling_flow(EVENT, context=3, num_steps=2, hidden_features=(8,))

    def forward(self, x):
        return FlowDistribution(self.flow(x), EVENT)


@pytest.mark.parametrize("make_elbo", [Trace_ELBO, TraceKL_ELBO, Timestep_ELBO])
def test_the_bound_starts_at_that_of_a_standard_normal_prior(device, make_elbo):
    prior = FlowPrior(EVENT, 4, (8, 8), flow="coupling")
    vae = VAE(Encoder(), Decoder(), prior).to(device, torch.float64)
    gaussian = VAE(vae.encoder, vae.decoder, GaussianPrior(EVENT)).to(device, torch.float64)
    x, losses = torch.randn(6, 3, dtype=torch.float64, device=device), []
    for program in (vae, gaussian):
        pyro.set_rng_seed(0)
        elbo = make_elbo() if program is vae else Trace_ELBO()
        losses.append([elbo.loss(program.model, program.guide, x) for _ in range(400)])
    flow, standard = (torch.tensor(values) for values in losses)
    if make_elbo is Trace_ELBO:  # path by path
        torch.testing.assert_close(flow, standard)
    se = (flow.var() + standard.var()).sqrt() / 400**0.5
    assert se < 2
    assert (flow.mean() - standard.mean()).abs() < 5 * se
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.1)
    make_elbo().loss_and_grads(vae.model, vae.guide, x)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in vae.parameters())


def test_a_posterior(device):
    vae = VAE(FlowEncoder(), Decoder(), GaussianPrior(EVENT)).to(device, torch.float64)
    x, calls = torch.randn(6, 3, dtype=torch.float64, device=device), []
    for step in vae.encoder.flow.transform.transforms[1:]:
        step.conditioner.register_forward_hook(lambda *_: calls.append(1))
    assert math.isfinite(TraceKL_ELBO().loss_and_grads(vae.model, vae.guide, x))
    assert len(calls) == 2


# --- As objects -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_after_use_and_states(device, make_copy):
    prior, other = (make_flow(device, (2, 2, 3)) for _ in range(2))
    z = torch.randn(10, 2, 2, 3, dtype=torch.float64, device=device)
    before = prior.log_prob(z)
    prior.distribution().rsample([3])
    assert (other.log_prob(z) != before).any()
    other.load_state_dict(prior.state_dict())
    copied = make_copy(prior)
    for same in (other, copied):
        assert torch.equal(same.log_prob(z), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(0.1)
    assert torch.equal(prior.log_prob(z), before)
    assert (copied.log_prob(z) != before).any()


def test_densities_are_in_full_precision_under_autocast(device):
    prior = make_flow(device, (2, 4, 4), dtype=torch.float32)
    z = torch.randn(9, 2, 4, 4, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        actual = prior.log_prob(z)
        assert prior.distribution().rsample().dtype == torch.float32
    assert torch.equal(actual, prior.log_prob(z))


@pytest.mark.parametrize("context", [0, 2])
def test_a_flow_of_zukos_is_a_prior(device, context):
    flow = zuko.flows.NSF(6, context, transforms=1, hidden_features=(8,))
    prior = FlowPrior((1, 2, 3), context_features=context, flow=flow).to(device)
    z, c = torch.randn(5, 1, 2, 3, device=device), context_of(prior, 5)
    torch.testing.assert_close(prior.log_prob(z, c), flow(c).log_prob(z.flatten(1)))
    assert prior.model(c).shape == ((1, 2, 3) if c is None else (5, 1, 2, 3))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: FlowPrior(4, flow="coupling"), r"^event_shape .*\(C, h, w\) .* flow, got \(4,\)$"),
        (lambda: FlowPrior((2, 2), flow="coupling"), r"^event_shape .*\(C, h, w\) .*\(2, 2\)$"),
        (
            lambda: FlowPrior((1, 1, 1), flow="coupling"),
            r"two variables or more, got .*1, 1\)",
        ),
        (
            lambda: FlowPrior(4, flow="glow"),
            "unknown flow 'glow': .* autoregressive, coupling",
        ),
        (lambda: FlowPrior((1, 2, 2), 0, flow="coupling"), "num_steps .* got 0"),
        (lambda: FlowPrior((1, 2, 2), 1, (), flow="coupling"), r"hidden_features .* got \(\)"),
        (lambda: FlowPrior(3, 2, flow=zuko.flows.MAF(3)), "given has no use for num_steps$"),
        (lambda: FlowPrior(3, flow=zuko.flows.MAF(4)), r"vectors of 3 variables, got .*\(4,\)$"),
        (lambda: FlowPrior(3, flow=zuko.flows.MAF(3, 2)), "with context_features=0, got one that"),
        (
            lambda: FlowPrior(3, context_features=1, flow=zuko.flows.MAF(3, 2)),
            "with context_features=1, got one that fails",
        ),
        (
            lambda: make_prior(ModelConfig(prior="flow", flow="coupling")),
            r"for a coupling flow, got \(16,\)",
        ),
        (lambda: ModelConfig(prior="flow", flow="glow"), "unknown flow 'glow'"),
    ],
)
def test_bad_input(make, match):
    with one_line_value_error(match):
        make()


def test_an_option_of_a_configuration():
    prior = make_prior(ModelConfig(prior="flow", prior_width=8))
    assert type(prior.flow) is zuko.flows.MAF
