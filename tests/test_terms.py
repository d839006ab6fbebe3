r"""The terms of the negative ELBO of every prior, and how they are reported.

``test_elbo_contract`` compares the terms of a diffusion prior with their closed forms.
"""

from __future__ import annotations

import pytest
import torch
from errors import one_line_value_error

from pyro_vaediff import VAE, FlowPrior, GaussianPrior, Timestep_ELBO, TraceKL_ELBO
from pyro_vaediff.data import load
from pyro_vaediff.evaluate import evaluate, kl_by_timestep, preprocess
from pyro_vaediff.infer import (
    DReG_ELBO,
    check_mean_field,
    elbo_terms,
    make_elbo,
    particle_options,
)
from pyro_vaediff.testing import LinearGaussian, Oracle, linear_gaussian_vae
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig
from pyro_vaediff.train.report import readable_terms

MODELS = {
    "gaussian": {},
    "flow": {},
    "diffusion": {"num_timesteps": 5},
    "diffusion, T = 1": {"num_timesteps": 1},
    "diffusion, T = 2": {"num_timesteps": 2},
    "diffusion, learned": {"num_timesteps": 5, "reverse_variance": "learned"},
    "diffusion, beta_tilde": {"num_timesteps": 5, "reverse_variance": "beta_tilde"},
}
ESTIMATORS = {
    "all, z_0": Timestep_ELBO("all"),
    "all, x": Timestep_ELBO("all", conditioning="x"),
    "all, in chunks": Timestep_ELBO("all", chunk_size=2),
    "sampled, z_0": Timestep_ELBO(k=3),
    "sampled, x": Timestep_ELBO("uniform", k=3, conditioning="x"),
    "unrolled": TraceKL_ELBO(),
}


@pytest.fixture
def data():
    return load("digits", limit=12)


def tiny_vae(name, device, dtype=torch.float64):
    prior = name.partition(",")[0]
    config = ModelConfig(prior=prior, latent_dim=2, width=4, levels=17, **MODELS[name])
    vae = make_vae(config).to(device, dtype)
    for parameter in vae.prior.parameters():  # away from the start, where terms may vanish
        torch.nn.init.normal_(parameter, std=0.05)
    return vae.eval()


# --- They sum to the loss -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("model", MODELS)
def test_terms_sum_to_the_loss(device, data, model, estimator, dtype, rel):
    vae, elbo = tiny_vae(model, device, dtype), ESTIMATORS[estimator]
    x = preprocess(vae, data.test.to(device))
    torch.manual_seed(1)
    loss = elbo.loss(vae.model, vae.guide, x)
    torch.manual_seed(1)
    terms = elbo_terms(vae.model, vae.guide, x, elbo=elbo)
    assert sum(t.sum().item() for t in terms.values()) == pytest.approx(loss, rel=rel)
    assert {t.dtype for t in terms.values()} == {dtype}

    T = MODELS[model].get("num_timesteps")
    for name, term in terms.items():
        steps = {"all": T - 1, "sampled": 3} if name == "z_s" else {}
        leading = steps.get(estimator.partition(",")[0])
        assert term.shape == ((len(x),) if leading is None else (leading, len(x))), name
    if T is None:
        closed_form = model == "gaussian"  # no KL with a flow is known
        assert terms.keys() == ({"z_0", "x"} if closed_form else {"-H[z_0]", "z_0", "x"})


def test_terms_of_particles_are_averaged(device):
    vae, x = linear_gaussian_vae(3).to(device), torch.randn(2, 3, dtype=torch.float64).to(device)
    torch.manual_seed(1)
    average = elbo_terms(vae.model, vae.guide, x, elbo=Timestep_ELBO("all", num_particles=4))
    torch.manual_seed(1)
    single = [elbo_terms(vae.model, vae.guide, x, elbo=Timestep_ELBO("all")) for _ in range(4)]
    for name, term in average.items():
        mean = torch.stack([terms[name] for terms in single]).mean(0)
        torch.testing.assert_close(term, mean, atol=1e-10, rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_chunks_are_one_term(device, chunk_size):
    T, replicas = 5, 5_000
    vae, x = linear_gaussian_vae(T).to(device), torch.randn(2, 3, dtype=torch.float64).to(device)
    elbo = Timestep_ELBO("all", conditioning="x", chunk_size=chunk_size)
    with torch.no_grad():
        term = elbo_terms(vae.model, vae.guide, x.repeat(replicas, 1), elbo=elbo)["z_s"]
    assert term.shape == (T - 1, replicas * 2)
    draws, exact = term.unflatten(-1, (replicas, 2)), Oracle(vae, x).terms("x")["z_s"].detach()
    mean, se = draws.mean(1), draws.std(1) / replicas**0.5
    assert se.max() < 0.05
    assert ((mean - exact).abs() < 5 * se + 1e-10).all()


# --- Which closed forms are legal -----------------------------------------------------------------


@pytest.mark.parametrize("make", [GaussianPrior, FlowPrior])
def test_priors_with_one_site_allow_closed_forms(device, make):
    encoder, decoder = LinearGaussian(3, 2, log_scale=-0.5), LinearGaussian(2, 3, log_scale=0.0)
    vae = VAE(encoder, decoder, make(2)).double().to(device)
    x = torch.randn(2, 3, dtype=torch.float64, device=device)
    assert check_mean_field(vae.model, vae.guide, x) == {}


# --- Evaluation and report ------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_is_the_loss_per_datum(device, data, model):
    vae, elbo = tiny_vae(model, device), Timestep_ELBO("all", chunk_size=2)
    terms = evaluate(vae, data.test, elbo, seed=3)
    torch.manual_seed(3)
    x = preprocess(vae, data.test.to(device))
    loss = elbo.loss(vae.model, vae.guide, x) / len(x)
    assert sum(terms.values()) == pytest.approx(loss, rel=1e-12)
    assert not any(name.startswith("z_s[") for name in terms)

    readable = readable_terms(vae, terms)
    assert sum(readable.values()) == pytest.approx(loss, rel=1e-12)
    assert len(readable) == {"gaussian": 2, "flow": 3}.get(model, 5)
    torch.manual_seed(3)
    x = preprocess(vae, data.test.to(device))
    exact = elbo_terms(vae.model, vae.guide, x, elbo=elbo)["x"].mean().item()
    assert readable["-log p(x | z_0), reconstruction"] == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("T", [1, 2, 6])
def test_kl_by_timestep(device, T):
    vae = linear_gaussian_vae(T).to(device)
    x = torch.randn(2, 3, dtype=torch.float64, device=device)
    exact = Oracle(vae, x).terms("x")
    steps = torch.cat([exact["z_0"].reshape(1, -1), exact["z_s"]]).detach().mean(-1)
    draws = torch.stack([kl_by_timestep(vae, x.repeat(500, 1)) for _ in range(20)])
    assert draws.shape == (20, T)
    assert not draws.requires_grad
    mean, se = draws.mean(0), draws.std(0) / 20**0.5
    assert se.max() < 0.05
    assert ((mean - steps).abs() < 5 * se + 1e-10).all()

    # With KL(q(z_T | x) || p(z_T)), they are the KL of the whole chain: the loss without x.
    oracle = Oracle(vae, x)
    chain = (oracle.negative_elbo - oracle.reconstruction).mean().detach()
    total, se = draws.sum(1).mean(), draws.sum(1).std() / 20**0.5
    assert (total + exact[f"z_{T}"].mean().detach() - chain).abs() < 5 * se + 1e-10


# --- Estimators by name ---------------------------------------------------------------------------


def test_estimators_by_name():
    elbo = make_elbo("timestep", timesteps="uniform", k=3, conditioning="x", weighting="elbo")
    assert type(elbo) is Timestep_ELBO
    assert (elbo.collapse.k, elbo.collapse.conditioning) == (3, "x")
    for name, kind in (("trace", "Trace_ELBO"), ("trace-kl", "TraceKL_ELBO")):
        assert type(make_elbo(name, k=3)).__name__ == kind
    elbo = make_elbo("dreg", k=3, entropy="path", **particle_options(4))
    assert type(elbo) is DReG_ELBO and elbo.num_particles == 4 and elbo.vectorize_particles
    with one_line_value_error("unknown estimator 'vr': choose one of timestep, trace, trace-kl, i"):
        make_elbo("vr")
