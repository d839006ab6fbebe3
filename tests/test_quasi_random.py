r"""Scrambled Sobol points as noise: evenly spread, without bias, and with less variance."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy import stats
from torch.quasirandom import SobolEngine
from unbiased import assert_matches_oracle

from pyro_vaediff import Timestep_ELBO
from pyro_vaediff.bench import draw, exact_reference
from pyro_vaediff.infer import Antithetic, QuasiRandom, Timesteps
from pyro_vaediff.infer.collapse import PLATE
from pyro_vaediff.testing import linear_gaussian_vae

NORMAL = torch.distributions.Normal(0.0, 1.0)


def run(program, *plates):
    return poutine.trace(QuasiRandom(*plates)(program)).get_trace().nodes


def program(device, k=8, num_data=16, dim=2):
    r"""Like the guide of a diffusion prior: z_0, and timesteps of it."""
    zeros = torch.zeros(dim, dtype=torch.float64, device=device)

    def guide():
        with pyro.plate("data", num_data, dim=-1):
            pyro.sample("z_0", dist.Normal(zeros, 1.0).to_event(1))
            with pyro.plate("steps", k, dim=-2):
                pyro.sample("t", Timesteps(torch.full((10,), 0.1, device=device), 2))
                pyro.sample("z_t", dist.Normal(zeros, 1.0).to_event(1))

    return guide


def strata(z, n):
    r"""Returns how many draws are in each of n strata of equal probability."""
    return torch.bincount((n * NORMAL.cdf(z.double().cpu())).long().flatten(), minlength=n)


# --- The points -----------------------------------------------------------------------------------


def test_the_draws_of_a_batch_are_one_in_each_stratum(device):
    nodes = run(program(device), "data", "steps")
    for site, n in (("z_0", 16), ("z_t", 128)):
        value = nodes[site]["value"]
        assert value.shape[-1] == 2 and value.dtype == torch.float64
        for coordinate in value.unbind(-1):
            assert (strata(coordinate, n) == 1).all(), site
    counts = torch.bincount(nodes["t"]["value"].flatten(), minlength=12)[2:]
    assert counts.sum() == 128 and (counts - 12.8).abs().max() < 2


def test_the_draws_of_each_datum_are_one_in_each_stratum(device):
    nodes = run(program(device, k=8, num_data=50), "steps")
    for column in nodes["z_t"]["value"].unbind(1):
        for coordinate in column.unbind(-1):
            assert (strata(coordinate, 8) == 1).all()
    # Data have shifts of their own, and a z_0 outside of the plate stays independent noise.
    first = nodes["z_t"]["value"][0, :, 0]
    assert first.unique().numel() == 50 and strata(first, 8).min() > 0
    assert strata(nodes["z_0"]["value"], 50).max() > 1


def test_sites_are_even_jointly(device):
    r"""Sixteen points of z_0 and t: one in each cell of four times four, as in a (0, 4, 2)-net."""

    def guide():
        with pyro.plate("data", 16):
            pyro.sample("z_0", dist.Normal(torch.zeros(16, dtype=torch.float64), 1.0))
            pyro.sample("t", Timesteps(torch.full((4,), 0.25), 1))

    for _ in range(5):
        nodes = run(guide, "data")
        row = (4 * NORMAL.cdf(nodes["z_0"]["value"])).long()
        cells = torch.bincount(4 * row + nodes["t"]["value"] - 1, minlength=16)
        assert (cells == 1).all()


@pytest.mark.parametrize("plates", [("data",), ("data", "steps"), ("steps",)])
def test_each_draw_has_its_law(plates):
    z, t = [], []
    guide = program("cpu", k=2, num_data=3)
    for _ in range(1500):
        nodes = run(guide, *plates)
        z.append(torch.cat([nodes["z_0"]["value"][1], nodes["z_t"]["value"][1, 2]]))
        t.append(nodes["t"]["value"][1, 2])
    z, t = torch.stack(z), torch.stack(t)
    for column in z.unbind(1):
        assert stats.kstest(column.numpy(), stats.norm.cdf).pvalue > 1e-4
    assert stats.chisquare(torch.bincount(t, minlength=12)[2:].numpy()).pvalue > 1e-4
    # Coordinates of one draw are independent.
    columns = [*z.unbind(1), t]
    for a, b in itertools.combinations(columns, 2):
        assert stats.spearmanr(a.numpy(), b.numpy()).pvalue > 1e-5


def test_it_follows_the_seed_and_leaves_other_sites_alone(device):
    zero = torch.zeros(4, device=device)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("laplace", dist.Laplace(zero, 1.0))
            pyro.sample("x", dist.Normal(zero, 1.0), obs=zero)
            pyro.sample("z", dist.Normal(zero, 1.0))
        pyro.sample("outside", dist.Normal(0.0, 1.0))

    torch.manual_seed(0)
    expected = poutine.trace(guide).get_trace().nodes["laplace"]["value"]
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nodes = run(guide, "data")
        values.append(nodes["z"]["value"])
        assert (nodes["x"]["value"] == 0).all()
        if seed == 0:
            assert torch.equal(nodes["laplace"]["value"], expected)
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert values[0].dtype == torch.float32 and values[0].device.type == device.type


def test_more_sites_than_the_sequence_has_coordinates():
    size = SobolEngine.MAXDIM // 2

    def guide():
        with pyro.plate("data", 2):
            for i in range(3):
                pyro.sample(f"z_{i}", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    nodes = run(guide, "data")
    for i in range(3):
        assert nodes[f"z_{i}"]["value"].isfinite().all()
    assert not torch.equal(nodes["z_0"]["value"], nodes["z_2"]["value"])


@pytest.mark.parametrize("inside", [False, True])
def test_beside_antithetic_noise_the_inner_handler_wins(inside):
    guide, handlers = program("cpu"), [Antithetic("steps"), QuasiRandom("steps", "data")]
    for handler in handlers if inside else handlers[::-1]:
        guide = handler(guide)
    z = poutine.trace(guide).get_trace().nodes["z_t"]["value"]
    assert torch.equal(z[:4], -z[4:]) == inside


# --- In estimators --------------------------------------------------------------------------------


class PerDatum(Timestep_ELBO):
    def _get_trace(self, model, guide, args, kwargs):
        return super()._get_trace(model, QuasiRandom(*self.mirrored_plates)(guide), args, kwargs)


@pytest.mark.parametrize("conditioning", ["z_0", "x"])
@pytest.mark.parametrize("k", [1, 4])
def test_points_of_each_datum_are_unbiased(device, conditioning, k):
    x = torch.randn(2, 3, dtype=torch.float64, device=device)
    elbo = PerDatum("uniform", k=k, conditioning=conditioning)
    assert_matches_oracle(elbo, linear_gaussian_vae(4).to(device), x, target=0.05)


def test_points_of_particles_are_unbiased(device):
    x = torch.randn(2, 3, dtype=torch.float64, device=device)
    elbo = PerDatum(k=2, num_particles=4, vectorize_particles=True, max_plate_nesting=3)
    assert_matches_oracle(elbo, linear_gaussian_vae(3).to(device), x, target=0.05)


def around(elbo):
    r"""The handler as a context around any estimator."""

    class Around:
        def loss_and_grads(self, *args):
            with QuasiRandom("data", PLATE):
                return elbo.loss_and_grads(*args)

    return Around()


@pytest.mark.parametrize(
    "elbo",
    [Timestep_ELBO(k=1, antithetic=False), Timestep_ELBO(k=8, antithetic=False), Trace_ELBO()],
    ids=["k=1", "k=8", "Trace_ELBO"],
)
def test_points_of_a_batch_are_unbiased_and_have_less_variance(device, elbo):
    r"""Against the closed form of value and gradient, over independent batches."""
    pyro.enable_validation(False)
    vae = linear_gaussian_vae(3).to(device)
    x = torch.randn(1, 3, dtype=torch.float64, device=device).repeat(64, 1)
    exact = exact_reference(vae, x)
    independent, points = (draw(e, vae, itertools.repeat(x, 60)) for e in (elbo, around(elbo)))
    mean, se = points.values.mean().item(), points.values.std().item() / 60**0.5
    assert se < 0.02 * abs(exact.value) and abs(mean - exact.value) < 5 * se
    for name, rows in points.gradients.items():
        error, se = rows.mean(0) - exact.gradients[name], rows.std(0) / 60**0.5
        assert (se < 0.1 * exact.gradients[name].norm()).all()
        assert (error.abs() < 5 * se + 1e-10).all(), name
        # Gradients are quadratic forms of the noise.
        others = independent.gradients[name]
        assert rows.var(0).sum() < 0.6 * others.var(0).sum(), name
    assert points.values.var() < 0.3 * independent.values.var()
