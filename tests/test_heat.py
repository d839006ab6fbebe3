r"""Densities along one-dimensional chains against closed forms, and their heat maps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from torch.distributions import Categorical, Laplace, MixtureSameFamily, Normal

from pyro_vaediff import DiffusionPrior
from pyro_vaediff.diffusion import q_reverse
from pyro_vaediff.evaluate import guide_marginals, model_marginals
from pyro_vaediff.plotting import draw_heat_map, draw_way_back
from pyro_vaediff.schedules import LinearSchedule

Z = torch.linspace(-7, 7, 701, dtype=torch.float64)
WIDTH = (Z[1] - Z[0]).item()


def mixture(means, sds, weights):
    means, sds, weights = (torch.tensor(v, dtype=torch.float64) for v in (means, sds, weights))
    return MixtureSameFamily(Categorical(weights), Normal(means, sds))


def axes():
    return Figure().subplots()


def test_a_mixture_diffuses_into_the_convolution_of_its_density():
    schedule = LinearSchedule(5).double()
    q_z0 = mixture([-1.5, 0.2, 1.0], [0.2, 0.1, 0.4], [0.5, 0.2, 0.3])
    densities = guide_marginals(schedule, q_z0, Z)
    assert densities.shape == (6, len(Z))
    torch.testing.assert_close(densities[0], q_z0.log_prob(Z).exp(), atol=1e-10, rtol=0)
    for t in range(1, 6):
        abar = schedule.alphas_cumprod[t]
        noise = Normal(abar.sqrt() * Z, (1 - abar).sqrt())  # q(z_t | z_0), for each z_0 of the grid
        convolved = noise.log_prob(Z.unsqueeze(-1)).exp() @ densities[0] * WIDTH
        torch.testing.assert_close(densities[t], convolved, atol=1e-10, rtol=0)


def test_the_true_way_back_gives_the_marginals_of_the_guide():
    # The chain starts at N(0, 1): so q(z_T) is that for a q(z_0) which is.
    schedule = LinearSchedule(20).double()
    q_z0 = Normal(torch.zeros(1, dtype=torch.float64), 1.0)
    kernels = [partial(q_reverse, schedule, q_z0, t=t) for t in range(20, 0, -1)]
    densities = model_marginals(kernels, Z)
    exact = guide_marginals(schedule, mixture([0.0], [1.0], [1.0]), Z)
    torch.testing.assert_close(densities, exact, atol=1e-10, rtol=0)


def test_marginals_of_a_prior_are_those_of_its_samples():
    torch.manual_seed(0)
    prior = DiffusionPrior(1, 4, schedule=[0.1, 0.2, 0.3, 0.4]).double()
    with torch.no_grad():
        for parameter in prior.denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        densities = model_marginals([partial(prior.reverse, t=t) for t in (4, 3, 2, 1)], Z)
        n = 40_000
        z = torch.randn(n, 1, dtype=torch.float64)
        for t in (4, 3, 2, 1):
            z = prior.reverse(z, t).sample()
            below = (z < 0.3).double().mean()
            exact = densities[t - 1][Z < 0.3].sum() * WIDTH
            se = (exact * (1 - exact) / n).sqrt()
            assert abs(below - exact) < 5 * se + WIDTH and se < 0.003
    assert (densities[0] - densities[4]).abs().max() > 0.05  # it is no Gaussian any more


def test_a_grid_that_loses_probability_is_refused():
    kernels = [lambda z: torch.distributions.Independent(Normal(z, 0.001), 1)]
    with pytest.raises(ValueError, match="take more points, or a wider grid"):
        model_marginals(kernels, torch.linspace(-6, 6, 61))
    with pytest.raises(ValueError, match="from -1 to 1"):
        model_marginals([], torch.linspace(-1, 1, 61))


@pytest.mark.parametrize(
    "q_z0",
    [
        Normal(0.0, 1.0),
        MixtureSameFamily(Categorical(torch.ones(2)), Laplace(torch.zeros(2), 1.0)),
    ],
)
def test_what_is_no_mixture_of_gaussians_is_refused(q_z0):
    with pytest.raises(ValueError, match=f"MixtureSameFamily of Normal.*{type(q_z0).__name__}"):
        guide_marginals(LinearSchedule(3), q_z0, Z)


def test_heat_map_has_a_column_per_timestep_whose_largest_value_is_black():
    ax = axes()
    density = torch.tensor([[0.0, 5.0, 10.0], [0.2, 0.4, 0.1]], requires_grad=True)
    image = draw_heat_map(ax, density, torch.tensor([-1.0, 0.0, 1.0]))
    expected = torch.tensor([[0.0, 0.5, 1.0], [0.5, 1.0, 0.25]], dtype=torch.float64).T
    torch.testing.assert_close(torch.tensor(image.get_array().data), expected)
    assert image.get_extent() == [-0.5, 1.5, -1.5, 1.5] and image.origin == "lower"
    grey = torch.tensor(image.cmap(image.norm([0.0, 0.5, 1.0]))[:, :3])
    assert (grey == grey[:, :1]).all() and (grey[:-1] > grey[1:]).all()
    assert ax.get_xlabel() == "timestep t"


@pytest.mark.parametrize(
    ("density", "z", "match"),
    [
        (torch.ones(3), torch.zeros(3), r"shape \(T \+ 1, n\)"),
        (torch.ones(2, 3), torch.zeros(4), r"got \(2, 3\) and \(4,\)"),
        (torch.ones(2, 1), torch.zeros(1), r"got \(2, 1\)"),
        (torch.tensor([[1.0, torch.nan]]), torch.tensor([0.0, 1.0]), "must be finite"),
        (torch.tensor([[1.0, -1.0]]), torch.tensor([0.0, 1.0]), "at least 0"),
        (torch.zeros(1, 2), torch.tensor([0.0, 1.0]), "positive somewhere"),
    ],
)
def test_broken_densities_raise(density, z, match):
    with pytest.raises(ValueError, match=match):
        draw_heat_map(axes(), density, z)


def test_way_back_goes_through_both_points_and_has_the_guide_s_moments():
    ax, schedule = axes(), LinearSchedule(10)
    draw_way_back(ax, schedule, z_0=1.5, z_t=-0.5, t=6, label="from here")
    lower, upper, mean = (torch.tensor(line.get_ydata()) for line in ax.lines[:3])
    for end, value in ((0, 1.5), (6, -0.5)):
        assert lower[end] == upper[end] == mean[end] == value
    q = q_reverse(schedule, torch.tensor([1.5]), torch.tensor([-0.5]), 6)  # z_5 given both
    assert mean[5].item() == pytest.approx(q.mean.item())
    assert (upper - mean)[5].item() == pytest.approx(2 * q.stddev.item(), abs=1e-6)
    assert ax.lines[2].get_label() == "from here"
    draw_way_back(axes(), schedule, 0.0, 1.0, t=1)  # there is nothing between


@pytest.mark.parametrize("t", [0, 11])
def test_there_is_no_way_back_from_outside_of_the_chain(t):
    with pytest.raises(ValueError, match=f"t must be from 1 to T = 10, got {t}"):
        draw_way_back(axes(), LinearSchedule(10), 0.0, 0.0, t)
