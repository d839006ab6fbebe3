r"""Antithetic noise and path-derivative entropies: less noise, and no bias."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from scipy import stats

from pyro_vaediff import DiffusionPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.infer import Antithetic, Timesteps
from pyro_vaediff.infer.timestep_elbo import PLATE
from pyro_vaediff.testing import linear_gaussian_vae

# --- The handler ----------------------------------------------------------------------------------


def run(program, *plates):
    return poutine.trace(Antithetic(*plates)(program)).get_trace().nodes


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("dim", [-1, -2])
def test_the_halves_are_mirror_images(device, size, dim):
    shape = (5, size) if dim == -1 else (size, 5)
    loc = torch.randn(*shape, 3, dtype=torch.float64, device=device)
    scale = torch.rand(3, dtype=torch.float64, device=device) + 0.1

    def program():
        with pyro.plate("pairs", size, dim=dim), pyro.plate("data", 5, dim=-3 - dim):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    noise = (run(program, "pairs")["z"]["value"] - loc) / scale
    noise = noise.movedim(dim - 1, 0)
    half = size // 2
    torch.testing.assert_close(noise[half:], -noise[:half], atol=1e-12, rtol=0)
    assert noise.dtype == torch.float64 and noise.abs().min() > 0
    # Nothing else depends on anything else: the first halves are all different.
    assert noise[:half].unique().numel() == noise[:half].numel()


def test_each_draw_has_the_law_of_a_single_one(device):
    def program():
        with pyro.plate("pairs", 4, dim=-2), pyro.plate("data", 5000, dim=-1):
            pyro.sample("z", dist.Normal(torch.tensor(2.0, device=device), 0.5))

    z = run(program, "pairs")["z"]["value"].cpu()
    for row in z:
        assert stats.kstest(row.numpy(), stats.norm(2.0, 0.5).cdf).pvalue > 1e-4
    # Draws that are not of the same pair are independent.
    assert stats.pearsonr(z[0].numpy(), z[1].numpy()).pvalue > 1e-4


def test_the_first_plate_wins(device):
    def program():
        with pyro.plate("particles", 2, dim=-3), pyro.plate("data", 4, dim=-1):
            pyro.sample("z_0", dist.Normal(torch.zeros(3, device=device), 1.0).to_event(1))
            with pyro.plate("steps", 6, dim=-2):
                pyro.sample("z_t", dist.Normal(torch.zeros(3, device=device), 1.0).to_event(1))

    nodes = run(program, "steps", "particles")
    z_0, z_t = nodes["z_0"]["value"], nodes["z_t"]["value"]
    assert (z_0[0] == -z_0[1]).all()
    assert (z_t[:, :3] == -z_t[:, 3:]).all() and (z_t[0] != -z_t[1]).all()


def test_timesteps_are_shared_and_evenly_spread(device):
    k, num_data = 8, 25
    probs = torch.full((10,), 0.1, device=device)

    def program():
        with pyro.plate("data", num_data, dim=-1), pyro.plate("steps", k, dim=-2):
            pyro.sample("t", Timesteps(probs, 1, low_discrepancy=True))

    t = run(program, "steps")["t"]["value"]
    assert t.shape == (k, num_data) and (t[:4] == t[4:]).all()
    assert torch.bincount(t[:4].flatten(), minlength=11)[1:].tolist() == [10] * 10


def test_other_sites_stay_as_they_are(device):
    observed = torch.ones(4, device=device)
    zero = torch.zeros(4, device=device)

    def program():
        with pyro.plate("pairs", 4):
            pyro.sample("laplace", dist.Laplace(zero, 1.0))
            pyro.sample("score", NonreparameterizedNormal(zero, 1.0))
            pyro.sample("x", dist.Normal(zero, 1.0), obs=observed)
        with pyro.plate("odd", 3):
            pyro.sample("single", dist.Normal(zero[:3], 1.0))
        with pyro.plate("others", 4):
            pyro.sample("normal", dist.Normal(zero, 1.0))

    torch.manual_seed(0)
    nodes = run(program, "pairs", "odd")
    torch.manual_seed(0)
    expected = poutine.trace(program).get_trace().nodes
    for name in ("laplace", "score", "x", "single", "normal"):
        assert (nodes[name]["value"] == expected[name]["value"]).all(), name


# --- In the estimators ----------------------------------------------------------------------------


def guide_trace(elbo, vae, x):
    ((_, trace),) = elbo._get_traces(vae.model, vae.guide, (x,), {})
    return trace.nodes


def test_timesteps_of_a_datum_are_mirrored_about_its_z_0(device):
    x = torch.randn(7, 3, dtype=torch.float64, device=device)
    nodes = guide_trace(Timestep_ELBO(k=4), linear_gaussian_vae(5).to(device), x)
    noise = (nodes["z_t"]["value"] - nodes["z_t"]["fn"].mean) / nodes["z_t"]["fn"].stddev
    torch.testing.assert_close(noise[:2], -noise[2:], atol=1e-12, rtol=0)
    assert (nodes["t"]["value"][:2] == nodes["t"]["value"][2:]).all()
    assert nodes["t"]["cond_indep_stack"][0].name in ("data", PLATE)

    nodes = guide_trace(Timestep_ELBO(k=4, antithetic=False), linear_gaussian_vae(5).to(device), x)
    noise = (nodes["z_t"]["value"] - nodes["z_t"]["fn"].mean) / nodes["z_t"]["fn"].stddev
    assert (noise[:2] + noise[2:]).abs().min() > 1e-6


@pytest.mark.parametrize("order", ["forward", "posterior", "reversed"])
def test_whole_chains_are_mirrored_over_particles(device, order):
    x = torch.randn(7, 3, dtype=torch.float64, device=device)
    elbo = TraceKL_ELBO(num_particles=2, vectorize_particles=True)
    vae = linear_gaussian_vae(5, order=order).to(device)
    nodes = guide_trace(elbo, vae, x)
    for t in range(6):
        # In a linear chain, mirrored noise means mirrored states.
        z = nodes[f"z_{t}"]["value"]
        alpha_bar = vae.prior.schedule.alphas_cumprod[t]
        mean = alpha_bar.sqrt() * vae.encoder(x).mean
        torch.testing.assert_close(z.mean(0).squeeze(0), mean, atol=1e-10, rtol=0)


def encoder_variance(elbo, vae, x, draws=400):
    gradients = []
    for _ in range(draws):
        vae.zero_grad()
        elbo.loss_and_grads(vae.model, vae.guide, x)
        gradients.append(torch.cat([p.grad.flatten() for p in vae.encoder.parameters()]))
    return torch.stack(gradients).var(0).sum()


def test_mirrored_particles_have_less_noise_than_independent_ones(device):
    x = torch.randn(7, 3, dtype=torch.float64, device=device)
    vae = linear_gaussian_vae(4, seed=1).to(device)
    options = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 3}
    independent = encoder_variance(Timestep_ELBO("all", antithetic=False, **options), vae, x)
    mirrored = encoder_variance(Timestep_ELBO("all", **options), vae, x)
    assert mirrored < 0.5 * independent


def test_plates_of_the_programs_around_are_left_alone(device):
    # A user's own plate holds different latents, not draws of the same estimate.
    prior = DiffusionPrior(2, 4).to(device)

    def model():
        with pyro.plate("timesteps", 6):
            prior.model()

    def guide():
        with pyro.plate("timesteps", 6):
            prior.guide(dist.Normal(torch.zeros(2, device=device), 1.0).to_event(1))

    ((_, trace),) = Timestep_ELBO(k=2)._get_traces(model, guide, (), {})
    assert trace.nodes["z_0"]["value"].abs().unique().numel() == 12


def test_guessing_the_plates_does_not_change_what_is_drawn(device):
    x = torch.randn(7, 3, dtype=torch.float64, device=device)
    vae = linear_gaussian_vae(4, seed=1).to(device)
    losses = []
    for nesting in ({}, {"max_plate_nesting": 3}):
        elbo = Timestep_ELBO(num_particles=2, vectorize_particles=True, **nesting)
        torch.manual_seed(3)
        losses.append(elbo.loss(vae.model, vae.guide, x))
    assert losses[0] == losses[1]


# --- The path derivative --------------------------------------------------------------------------


class Conjugate:
    r"""z ~ N(0, 1) and x ~ N(z, 1), with a guide that starts at the posterior N(x / 2, 1 / 2)."""

    def __init__(self, device):
        self.x = torch.randn(5, dtype=torch.float64, device=device)
        self.loc = (self.x / 2).requires_grad_()
        self.scale = torch.full_like(self.x, 0.5**0.5).requires_grad_()

    def model(self):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x)

    def guide(self):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(self.loc, self.scale))

    def gradient(self, entropy):
        loss = TraceKL_ELBO(entropy=entropy).differentiable_loss(self.model, self.guide)
        return loss, torch.stack(torch.autograd.grad(loss, (self.loc, self.scale)))


def test_the_path_derivative_sticks_the_landing(device):
    problem = Conjugate(device)
    sd = torch.full_like(problem.x, 2**0.5)
    evidence = dist.Normal(torch.zeros_like(sd), sd).log_prob(problem.x).sum()
    for _ in range(20):
        loss, gradient = problem.gradient("path")
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
        torch.testing.assert_close(loss, -evidence, atol=1e-12, rtol=0)
        assert problem.gradient("exact")[1].abs().max() > 1e-3


def test_the_path_derivative_of_any_reparameterized_site(device):
    # E[d/dz log q(z) dz/dtheta] = -dH/dtheta, and H = 1 + log 2b for a Laplace distribution.
    b = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, device=device, requires_grad=True)

    def guide():
        with pyro.plate("draws", 40_000, dim=-2), pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Laplace(torch.zeros_like(b), b))

    def model():
        with pyro.plate("draws", 40_000, dim=-2), pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Laplace(torch.zeros_like(b), b).mask(False))

    loss = TraceKL_ELBO(entropy="path").differentiable_loss(model, guide) / 40_000
    (gradient,) = torch.autograd.grad(loss, b)
    # z = b u with |u| ~ Exp(1): the gradient of one draw is -|u| / b, of mean and sd 1 / b.
    torch.testing.assert_close(gradient * b, -torch.ones_like(b), atol=5 / 200, rtol=0)


def test_bad_options():
    with one_line_value_error("unknown entropy 'score': choose one of exact, path"):
        TraceKL_ELBO(entropy="score")
