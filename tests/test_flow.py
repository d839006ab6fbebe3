r"""The flow prior against the Jacobian of its map, computed by automatic differentiation."""

from __future__ import annotations

import copy
import pickle

import pyro
import pytest
import torch
from plates import check_sites_in_plates
from pyro.infer import Predictive
from torch import nn

from pyro_vaediff import VAE, FlowPrior, GaussianPrior, Timestep_ELBO
from pyro_vaediff.nn.flows import FlowDistribution, masked_autoregressive_flow

# Dimensions, numbers of steps, widths and features of the context, among them a single variable
# and more than hidden units.
SHAPES = [(1, 3, [8], 0), (1, 2, [8], 2), (2, 1, [8], 3), (3, 3, [8, 8], 0), (6, 2, [4, 4], 0)]


def make_flow(device, D, num_steps=3, hidden=(8,), context=0, dtype=torch.float64):
    prior = FlowPrior(D, num_steps, hidden, context)
    with torch.no_grad():
        for parameter in prior.parameters():  # away from any special start
            parameter.add_(0.2 * torch.randn_like(parameter))
    return prior.to(device, dtype)


def context_of(prior, *batch):
    r"""Returns a context, or None for a prior without."""
    F = prior.context_features
    return torch.randn(*batch, F).to(prior.origin) if F else None


def forward_map(prior, u, c=None):
    r"""Returns z_0 = f_1(...f_n(u)), by the transform of zuko's distribution."""
    return prior.distribution(c).dist.transform.inv(u)


@pytest.mark.parametrize("D, num_steps, hidden, context", SHAPES)
def test_log_prob_is_the_change_of_variables(device, D, num_steps, hidden, context):
    prior = make_flow(device, D, num_steps, hidden, context)
    for u in torch.randn(4, D, dtype=torch.float64, device=device):
        c = context_of(prior)
        z = forward_map(prior, u, c).detach()
        jacobian = torch.autograd.functional.jacobian(lambda u: forward_map(prior, u, c), u)  # noqa: B023
        expected = prior.standard_normal().log_prob(u) - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(prior.log_prob(z, c), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("D, num_steps, hidden, context", SHAPES)
def test_sampling_inverts_scoring_to_the_precision_of_the_dtype(
    device, D, num_steps, hidden, context
):
    for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        prior = make_flow(device, D, num_steps, hidden, context, dtype)
        c = context_of(prior, 50)
        u = torch.randn(50, D, dtype=dtype, device=device)
        z = forward_map(prior, u, c)
        assert z.dtype == dtype
        back = prior.distribution(c).dist.transform(z.clone())  # a copy, so that no cache answers
        torch.testing.assert_close(back, u, atol=atol, rtol=0)


def test_the_order_is_reversed_between_steps(device):
    prior = make_flow(device, 4, num_steps=4)
    u = torch.randn(4, dtype=torch.float64, device=device)
    for i, step in enumerate(prior.flow.transform.transforms):
        jacobian = torch.autograd.functional.jacobian(step(), u)
        above, below = jacobian.triu(1), jacobian.tril(-1)
        zero, full = (above, below) if i % 2 == 0 else (below, above)
        assert (zero == 0).all() and (full != 0).sum() == 6


def test_a_flow_over_images_is_that_over_vectors(device):
    flat = make_flow(device, 6)
    prior = FlowPrior((1, 2, 3), 3, (8,)).to(device, torch.float64)
    prior.load_state_dict(flat.state_dict())
    z = torch.randn(5, 1, 2, 3, dtype=torch.float64, device=device)
    torch.testing.assert_close(prior.log_prob(z), flat.log_prob(z.flatten(1)), atol=1e-12, rtol=0)
    assert prior.distribution().expand([4]).sample([2]).shape == (2, 4, 1, 2, 3)


def test_the_context_moves_the_density(device):
    prior = FlowPrior(3, 2, (8,), context_features=2).to(device, torch.float64)
    z = torch.randn(5, 3, dtype=torch.float64, device=device)
    c = torch.eye(2, dtype=torch.float64, device=device)
    one, other = (prior.log_prob(z, row.expand(5, 2)) for row in c)
    assert (one - other).abs().min() > 1e-6
    mixed = prior.log_prob(z, c[[0, 1, 0, 1, 0]])
    expected = torch.stack([one[0], other[1], one[2], other[3], one[4]])
    torch.testing.assert_close(mixed, expected, atol=1e-12, rtol=0)
    assert prior.distribution(c[[0, 1, 0]]).sample().shape == (3, 3)


@pytest.mark.parametrize("D", [1, 2])
def test_samples_have_the_density(device, D):
    prior = make_flow(device, D)
    with torch.no_grad():
        z = prior.distribution().sample([20_000])
        # The density, integrated over a grid of ten standard deviations on either side.
        line = torch.linspace(-10, 10, 801).to(z)
        lines = [m + s * line for m, s in zip(z.mean(0), z.std(0), strict=True)]
        grid = torch.cartesian_prod(*lines).reshape(-1, D)
        cell = torch.stack([line[1] - line[0] for line in lines]).prod()
        mass = prior.distribution().log_prob(grid).exp() * cell
    assert mass.sum().item() == pytest.approx(1, abs=2e-3)  # with tails beyond the grid
    # The fraction of the samples below their mean in every coordinate, and below it in the first.
    for columns in (slice(None), slice(1)):
        below = (z < z.mean(0))[:, columns].all(-1).double()
        expected = mass[(grid < z.mean(0))[:, columns].all(-1)].sum()
        se = below.std() / len(z) ** 0.5
        assert se < 0.005
        assert (below.mean() - expected).abs() < 5 * se + 0.005  # the edge of the grid's cells


def test_the_same_tensor_is_scored_afresh_after_a_step(device):
    prior, z = make_flow(device, 3), torch.randn(10, 3, dtype=torch.float64, device=device)
    optimizer = torch.optim.SGD(prior.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = -prior.distribution().log_prob(z).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        fresh = -prior.distribution().log_prob(z.clone()).mean()
        torch.testing.assert_close(-prior.distribution().log_prob(z).mean(), fresh)
    assert losses[0] > losses[1] > losses[2]


def test_the_score_of_a_draw_is_that_of_its_value(device):
    prior = make_flow(device, 3)
    q = prior.distribution()
    z = q.rsample([5])
    torch.testing.assert_close(q.log_prob(z), prior.log_prob(z.clone()), atol=1e-9, rtol=0)
    # Samples are drawn without gradients; scoring them has gradients nevertheless.
    z = q.sample([5])
    assert q.log_prob(z).requires_grad
    with torch.no_grad():  # where the score at the draw would do, but for the change
        z = q.sample([5])
        z.mul_(2)
        assert torch.equal(q.log_prob(z), prior.log_prob(z.clone()))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("D", [1, 3])
def test_copies_after_use(device, D, make_copy):
    prior = make_flow(device, D)
    z = torch.randn(10, D, dtype=torch.float64, device=device)
    before = prior.distribution().log_prob(z)  # leaves a graph in the caches
    prior.distribution().rsample([3])
    other = make_copy(prior)
    assert (other.distribution().log_prob(z) == before).all()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert (prior.distribution().log_prob(z) == before).all()
    assert (other.distribution().log_prob(z) != before).any()


def test_gradients_of_scores_and_of_samples(device):
    for D in (1, 3):
        prior = make_flow(device, D)
        torch.autograd.gradcheck(
            lambda z: prior.distribution().log_prob(z),  # noqa: B023, called at once
            torch.randn(2, D, dtype=torch.float64, device=device, requires_grad=True),
        )
        prior.zero_grad()
        prior.distribution().rsample([4]).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())


def test_a_posterior_takes_one_evaluation_of_each_network(device):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = masked_autoregressive_flow(16, 3, 2, (8,), inverse=True)

        def forward(self, x):
            return FlowDistribution(self.flow(x), (16,))

    class Decoder(nn.Module):
        def forward(self, z):
            return pyro.distributions.Normal(z[..., :3], 1.0).to_event(1)

    vae, calls = VAE(Encoder(), Decoder(), GaussianPrior(16)).to(device, torch.float64), []
    for step in vae.encoder.flow.transform.transforms:
        step.transform.hyper.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(6, 3, dtype=torch.float64, device=device)
    Timestep_ELBO(max_plate_nesting=1).loss_and_grads(vae.model, vae.guide, x)
    assert len(calls) == 2
    assert all(p.grad is not None and p.grad.any() for p in vae.encoder.parameters())
    # What was stored while drawing is the density, which a copy gets by D passes of each.
    q = vae.encoder(x)
    z = q.rsample()
    torch.testing.assert_close(q.log_prob(z), vae.encoder(x).log_prob(z.clone()))


@pytest.mark.parametrize("context", [0, 2])
def test_sites_in_plates_of_data_and_of_particles(device, context):
    prior = make_flow(device, (1, 3), context=context)
    c = context_of(prior, 4)
    model, z = check_sites_in_plates(prior, c)
    assert z.shape == (5, 4, 1, 3)
    observed = pyro.poutine.condition(model, {"z_0": torch.zeros_like(z)})
    expected = 5 * prior.log_prob(torch.zeros_like(z[0]), c).sum()
    trace = pyro.poutine.trace(observed).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    for parallel in (False, True):
        draws = Predictive(pyro.plate("data", 4)(prior.model), num_samples=7, parallel=parallel)(c)
        assert draws["z_0"].shape == (7, 4, 1, 3)


@pytest.mark.parametrize(("D", "context"), [(1, 0), (1, 2), (5, 0), (5, 2)])
def test_densities_are_in_full_precision_under_autocast(device, D, context):
    prior = make_flow(device, D, context=context, dtype=torch.float32)
    z, c = torch.randn(9, D, device=device), context_of(prior, 9)
    with torch.autocast(device.type, torch.bfloat16):
        actual = prior.log_prob(z, c)
        assert prior.distribution(c).rsample().dtype == torch.float32
    assert torch.equal(actual, prior.log_prob(z, c))


def test_bad_input(device):
    z, c = torch.randn(4, 3, device=device), torch.randn(4, 2, device=device)
    for features, context in ((0, c), (2, None), (3, c)):
        with pytest.raises(ValueError, match=f"context_features={features}"):
            FlowPrior(3, 1, (8,), features).to(device).log_prob(z, context)
    with pytest.raises(ValueError, match="float32 or float64"):
        FlowPrior(3, 1, (8,)).to(device, torch.bfloat16).distribution()
    with pytest.raises(ValueError, match="shape"):
        FlowPrior((1, 3), 1, (8,)).to(device).log_prob(z[:, :, None])  # as many numbers
