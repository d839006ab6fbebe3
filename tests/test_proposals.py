r"""The law of sampled timesteps, and the probabilities that a prior is assigned."""

from __future__ import annotations

import itertools

import pytest
import torch
from errors import one_line_value_error
from pyro import poutine
from scipy import stats

from pyro_vaediff import VAE, DiffusionPrior, Timestep_ELBO
from pyro_vaediff.denoise import BetaTilde
from pyro_vaediff.infer import (
    ImportanceTimesteps,
    LossAwareTimesteps,
    Proposal,
    Timesteps,
    UniformTimesteps,
    typical_kl,
    variance_kl,
)
from pyro_vaediff.testing import LinearGaussian, linear_gaussian_vae
from pyro_vaediff.testing.affine import condition, white_noise

PROBS = torch.tensor([0.5, 0.03, 0.2, 0.07, 0.2], dtype=torch.float64)


# --- The distribution -----------------------------------------------------------------------------


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_every_element_of_a_batch_has_the_same_law(device, low_discrepancy):
    timesteps = Timesteps(PROBS.to(device), first=2, low_discrepancy=low_discrepancy)
    timesteps = timesteps.expand([2, 3])
    draws = torch.stack([timesteps.sample() for _ in range(4000)]).cpu()
    assert draws.shape == (4000, 2, 3)
    for element in draws.flatten(1).T:
        counts = torch.bincount(element - 2, minlength=5)
        assert stats.chisquare(counts, 4000 * PROBS).pvalue > 1e-5


def test_low_discrepancy_samples_are_spread_evenly(device):
    k, num_data = 4, 25
    timesteps = Timesteps(PROBS.to(device), low_discrepancy=True).expand([k, num_data])
    for _ in range(100):
        sample = timesteps.sample().cpu()
        # An interval of length p catches floor(n p) or ceil(n p) of n points at distance 1 / n.
        for n, points in ((k * num_data, sample.flatten()), *((k, datum) for datum in sample.T)):
            excess = torch.bincount(points - 1, minlength=5) - n * PROBS
            assert (excess.abs() < 1).all()
    iid = Timesteps(PROBS.to(device)).expand([k * num_data])
    counts = torch.stack([torch.bincount(iid.sample().cpu() - 1, minlength=5) for _ in range(100)])
    assert ((counts - k * num_data * PROBS).abs() > 1).any()


@pytest.mark.parametrize("low_discrepancy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thousands_of_timesteps(device, dtype, low_discrepancy):
    n = 4000
    probs = torch.full((n,), 1 / n, dtype=dtype, device=device)
    sample = Timesteps(probs, first=2, low_discrepancy=low_discrepancy).sample([100, n])
    assert sample.min() >= 2 and sample.max() <= n + 1
    counts = torch.bincount(sample.flatten() - 2, minlength=n).double()
    assert (counts - 100).abs().max() < (2 if low_discrepancy else 5.5 * 10)


def test_log_prob_and_support(device):
    probs = PROBS.to(device)
    timesteps = Timesteps(probs, first=2).expand([3])
    assert timesteps.batch_shape == (3,) and timesteps.event_shape == ()
    values = timesteps.enumerate_support()
    assert values.tolist() == [[t] * 3 for t in range(2, 7)]
    assert timesteps.enumerate_support(expand=False).tolist() == [[t] for t in range(2, 7)]
    assert (timesteps.log_prob(values) == probs.log().unsqueeze(-1)).all()
    for outside in (1, 7):
        with pytest.raises(ValueError, match="support"):
            timesteps.log_prob(torch.full((3,), outside, device=device))
    with pytest.raises(ValueError, match="probs"):
        Timesteps(2 * probs)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("T", [5, 1000])
@pytest.mark.parametrize("proposal", ["uniform", "importance", "loss-aware"])
def test_weights_are_the_inverse_probabilities(device, proposal, T, k):
    # With the law of t above, E[sum_j 1{t_j = tau} / k r(tau)] = 1 for every tau, however rare.
    x = torch.randn(7, 3, dtype=torch.float64, device=device)
    vae = VAE(LinearGaussian(3, 2, -0.5), LinearGaussian(2, 3, 0.0), DiffusionPrior(2, T))
    vae = vae.to(device, torch.float64)
    elbo = Timestep_ELBO(proposal, k=k)
    probs = elbo.proposal(vae.prior, "z_0")
    assert probs.shape == (T - 1,) and (probs > 0).all()
    assert probs.sum().item() == pytest.approx(1)
    guide_trace = poutine.trace(elbo.collapse(vae.guide)).get_trace(x)
    t = guide_trace.nodes["t"]["value"]
    assert t.shape == (k, 7) and t.min() >= 2 and t.max() <= T
    replayed = poutine.replay(elbo.collapse(vae.model), trace=guide_trace)
    for trace in (guide_trace, poutine.trace(replayed).get_trace(x)):
        torch.testing.assert_close(trace.nodes["z_s"]["scale"], 1 / (k * probs[t - 2]))


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_timesteps_are_spread_evenly_iff_the_estimator_says_so(device, low_discrepancy):
    vae, x = linear_gaussian_vae(5).to(device), torch.randn(7, 3).double().to(device)
    elbo = Timestep_ELBO(low_discrepancy=low_discrepancy)
    trace = poutine.trace(elbo.collapse(vae.guide)).get_trace(x)
    assert trace.nodes["t"]["fn"].low_discrepancy is low_discrepancy


# --- Probabilities --------------------------------------------------------------------------------


def kl_under_a_standard_normal(prior, t, scale, with_constant):
    r"""Returns the expected KL of step t given m, for z_0 = m + scale xi ~ N(0, 1).

    The prior that leaves N(0, I) unchanged has the mean sqrt(1 - sigma^2) z_t.
    """
    m, *noise = white_noise([1] * (t + 2), like=torch.zeros(1, 1, dtype=torch.float64))
    betas = prior.schedule.original("betas")
    z = [m * (1 - scale**2) ** 0.5 + noise[0] * scale]
    for s in range(1, t + 1):
        z.append(z[-1] * (1 - betas[s]).sqrt() + noise[s] * betas[s].sqrt())
    q, q_variance = condition(z[t - 1], [z[t], m])
    if isinstance(prior.denoiser.variance, BetaTilde) and t > 1:
        sigma2 = condition(z[t - 1], [z[t], z[0]])[1].squeeze()
    else:
        sigma2 = betas[t]
    ratio = q_variance.squeeze() / sigma2
    kl = (q - z[t] * (1 - sigma2).sqrt()).mean_square.squeeze() / (2 * sigma2)
    return kl + (ratio - 1 - ratio.log()) / 2 if with_constant else kl


@pytest.mark.parametrize("conditioning", ["z_0", "x"])
@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde", "learned"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_importance_is_exact_for_a_standard_normal(
    device, schedule, reverse_variance, conditioning
):
    prior = DiffusionPrior(2, 8, schedule, reverse_variance=reverse_variance).double().to(device)
    scale = 0.3 if conditioning == "x" else 0.0
    with_constant = conditioning == "x" or reverse_variance == "learned"
    kl = torch.stack(
        [kl_under_a_standard_normal(prior, t, scale, with_constant) for t in range(2, 9)]
    )
    probs = ImportanceTimesteps(scale=0.3, uniform=0.2)(prior, conditioning)
    expected = 0.8 * kl / kl.sum() + 0.2 / 7
    torch.testing.assert_close(probs.cpu(), expected, atol=1e-10, rtol=0)
    assert (UniformTimesteps()(prior, conditioning) == 1 / 7).all()


def test_typical_kl_is_exact_from_the_first_step(device):
    for scale in (0.3, 1.0):
        prior = DiffusionPrior(2, 5).double().to(device)
        kl = [kl_under_a_standard_normal(prior, t, scale, True) for t in range(1, 6)]
        torch.testing.assert_close(
            typical_kl(prior, scale)[1:], torch.stack(kl), atol=1e-10, rtol=0
        )


@pytest.mark.parametrize("reverse_variance", ["beta", "beta_tilde", "learned"])
def test_the_first_step_given_z_0_is_finite(device, reverse_variance):
    # q(z_0 | z_1, z_0) is a point, whose variance has no finite KL: only its mean counts.
    prior = DiffusionPrior(2, 5, reverse_variance=reverse_variance).double().to(device)
    expected = kl_under_a_standard_normal(prior, 1, 0.0, False)
    torch.testing.assert_close(typical_kl(prior, 0.0)[1], expected, atol=1e-10, rtol=0)
    kl = variance_kl(prior)
    assert kl.isfinite().all() and (kl[:2] == 0).all()


@pytest.mark.parametrize("T", [2, 3, 1000])
@pytest.mark.parametrize("Chosen", [UniformTimesteps, ImportanceTimesteps, LossAwareTimesteps])
def test_probabilities_of_any_chain(device, Chosen, T):
    prior = DiffusionPrior(2, T).to(device)
    for conditioning in ("z_0", "x"):
        probs = Chosen()(prior, conditioning)
        assert probs.shape == (T - 1,) and probs.device.type == device.type
        assert (probs > 0.05 / T).all() and probs.sum().item() == pytest.approx(1, abs=1e-5)


def test_one_importance_serves_several_priors(device):
    importance = ImportanceTimesteps()
    priors = [DiffusionPrior(2, 5, schedule).to(device) for schedule in ("linear", "cosine")] * 2
    # The prior changes where the conditioning does not, and the other way round.
    for prior, conditioning in itertools.product(priors, ("z_0", "x", "z_0")):
        expected = ImportanceTimesteps()(prior, conditioning)
        torch.testing.assert_close(importance(prior, conditioning), expected)


# --- Learning -------------------------------------------------------------------------------------


def test_loss_aware_learns_the_optimal_proposal(device):
    T, prior = 6, DiffusionPrior(2, 6).double().to(device)
    rms = torch.tensor([0.0, 0.0, 3.0, 0.5, 1.0, 0.0, 2.0], dtype=torch.float64, device=device)
    proposal = LossAwareTimesteps(decay=0.98, uniform=0.1)
    for _ in range(800):
        probs = proposal(prior, "z_0")
        t = Timesteps(probs, 2, low_discrepancy=True).expand([4, 50]).sample()
        proposal.update(t, rms[t] * torch.randn(t.shape, dtype=torch.float64, device=device))
    expected = 0.9 * rms[2:] / rms.sum() + 0.1 / (T - 1)
    torch.testing.assert_close(proposal(prior, "z_0"), expected, atol=0.02, rtol=0)

    # The proposal has nearly the smallest variance among all; the uniform one has not.
    def second_moment(r):
        return (rms[2:].square() / r).sum()

    optimum = rms.sum() ** 2
    assert second_moment(proposal(prior, "z_0")) < 1.2 * optimum
    assert second_moment(UniformTimesteps()(prior, "z_0")) > 1.5 * optimum


def test_loss_aware_leaves_unseen_timesteps_alone(device):
    prior = DiffusionPrior(2, 4).double().to(device)
    proposal = LossAwareTimesteps(decay=0.75, uniform=0.3)
    proposal(prior, "z_0")
    before = proposal.squares.clone()
    t = torch.tensor([[2, 2], [4, 2]], device=device)
    terms = torch.tensor([[1.0, 2.0], [5.0, 4.0]], device=device)
    proposal.update(t, terms)
    torch.testing.assert_close(proposal.squares[[0, 1, 3]], before[[0, 1, 3]])
    expected = 0.75 * before[[2, 4]] + 0.25 * before.new_tensor([(1 + 4 + 16) / 3, 25.0])
    torch.testing.assert_close(proposal.squares[[2, 4]], expected)
    rms = proposal.squares[2:].sqrt()
    torch.testing.assert_close(proposal(prior, "z_0"), 0.7 * rms / rms.sum() + 0.3 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_aware_state_survives_a_round_trip(device, dtype):
    prior = DiffusionPrior(2, 4).to(device, dtype)
    elbo = Timestep_ELBO("loss-aware")
    elbo.propose(prior)(prior, "z_0")
    elbo.proposal.update(torch.tensor([2, 3], device=device), torch.ones(2, device=device))
    # A checkpoint may be loaded before the prior is seen, and from another device.
    state = {name: value.cpu() for name, value in elbo.state_dict().items()}
    other = Timestep_ELBO("loss-aware")
    other.load_state_dict(state)
    assert (other.propose(prior)(prior, "z_0") == elbo.proposal(prior, "z_0")).all()
    other.proposal.update(torch.tensor([2, 3], device=device), torch.ones(2, device=device))


def test_proposals_without_a_memory_have_no_state():
    for timesteps in ("all", "uniform", "importance"):
        elbo = Timestep_ELBO(timesteps)
        assert not elbo.state_dict()
        elbo.load_state_dict({})


@pytest.mark.parametrize("vectorize", [False, True])
def test_any_proposal_may_learn(device, vectorize):
    probs = PROBS[:-1].to(device) / PROBS[:-1].sum()

    class Recorder(Proposal):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, prior, conditioning):
            return probs

        def update(self, t, terms):
            self.seen.append((t, terms))

    proposal, x = Recorder(), torch.randn(7, 3, dtype=torch.float64, device=device)
    vae = linear_gaussian_vae(5).to(device)
    elbo = Timestep_ELBO(proposal, k=3, num_particles=2, vectorize_particles=vectorize)
    elbo.loss(vae.model, vae.guide, x)
    assert not proposal.seen
    model, guide = (poutine.scale(program, scale=0.1) for program in (vae.model, vae.guide))
    loss = elbo.terms(model, guide, x)["z_s"]
    ((t, terms),) = proposal.seen  # once for all particles
    assert t.shape == terms.shape and t.numel() == 2 * 3 * 7
    assert not terms.requires_grad and (terms >= 0).all()
    # They are KLs: the loss has them times their weights 1 / k r(t), and in the programs' scale.
    weighted = 0.1 * terms / (3 * probs[t - 2])
    torch.testing.assert_close(weighted.sum() / 2, loss.detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "Chosen, options, match",
    [
        (ImportanceTimesteps, {"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        (ImportanceTimesteps, {"uniform": 0.0}, "uniform must be in"),
        (LossAwareTimesteps, {"uniform": 1.5}, "uniform must be in"),
        (LossAwareTimesteps, {"decay": 1.0}, "decay must be in"),
    ],
)
def test_bad_options(Chosen, options, match):
    with one_line_value_error(match):
        Chosen(**options)
