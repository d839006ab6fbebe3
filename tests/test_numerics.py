r"""Finite numbers or a clear refusal, whatever the programs meet; the accuracy of float32."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.poutine.messenger import Messenger

from pyro_vaediff import VAE, DiffusionPrior
from pyro_vaediff.denoise import PARAMETERIZATIONS, REVERSE_VARIANCES
from pyro_vaediff.diffusion import base_normal, kl_normal
from pyro_vaediff.evaluate import preprocess
from pyro_vaediff.infer import PROPOSALS, ImportanceTimesteps, Timestep_ELBO, elbo_terms
from pyro_vaediff.likelihoods import AUTOREGRESSIVE, make_likelihood
from pyro_vaediff.nn import (
    ConvDecoder,
    ConvEncoder,
    ResidualMLP,
    bounded_scale,
)
from pyro_vaediff.priors import PRIORS
from pyro_vaediff.sampling import ddim
from pyro_vaediff.sampling.probability_flow import ProbabilityFlow
from pyro_vaediff.schedules import CosineSchedule, LinearSchedule, Schedule
from pyro_vaediff.train.build import make_vae
from pyro_vaediff.train.config import ModelConfig

DTYPES = (torch.float32, torch.float64)
LIKELIHOODS = (
    "gaussian", "gaussian-pixel", "gaussian-fixed", "bernoulli", "discretized-logistic",
    "logistic-mixture", "categorical", *AUTOREGRESSIVE,
)  # fmt: skip


def examples(count):
    r"""The same examples in every run, however slow the machine is."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def check_finite(loss, parameters, what):
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert loss.isfinite(), what
    assert all(g.isfinite().all() for g in gradients if g is not None), what


# --- Schedules ------------------------------------------------------------------------------------


@st.composite
def schedules(draw, max_timesteps=4000):
    r"""Those of the library, and such whose chain keeps or erases nearly everything."""
    T = draw(st.sampled_from((1, 2, 3, 1000, 4000)) | st.integers(1, max_timesteps))
    kind = draw(st.sampled_from(("linear", "cosine", "any")))
    if kind == "linear":
        return LinearSchedule(T)
    if kind == "cosine":
        return CosineSchedule(T)
    # In the logit of beta, from 1e-15 to 1 - 1e-15.
    ends = [draw(st.floats(-34.5, 34.5)) for _ in range(2)]
    return Schedule(torch.linspace(*ends, T, dtype=torch.float64).sigmoid())


@examples(100)
@given(schedules(), st.sampled_from(PARAMETERIZATIONS), st.sampled_from(sorted(REVERSE_VARIANCES)))
def test_tables_are_finite(schedule, parameterization, reverse_variance):
    T = schedule.num_timesteps
    get = schedule.original
    assert (get("alphas_cumprod").diff() <= 0).all()
    assert (get("betas_tilde") <= get("betas") * (1 + 1e-15)).all()
    assert ((get("one_minus_alphas_cumprod") > 0)[1:]).all()
    outputs = 2 if reverse_variance == "learned" else 1
    net = ResidualMLP(1, num_outputs=outputs, width=2)
    prior = DiffusionPrior(1, T, schedule, net, parameterization, reverse_variance)
    for dtype in DTYPES:
        prior = prior.to(dtype)
        # The log-SNR at t = 0 is infinite, as nothing is noise there.
        tables = {k: v[1:] if k.endswith("log_snr") else v for k, v in prior.named_buffers()}
        if get("log_alphas_cumprod")[-1] < -60:
            # Nothing is left of z_0, and its estimate is refused.
            tables.pop("denoiser.kernel.z0_skips"), tables.pop("denoiser.kernel.z0_gains")
            for call in (partial(ddim, prior, 1, 1), partial(ProbabilityFlow, prior)):
                with one_line_value_error("the schedule erases z_0: .* choose smaller betas"):
                    call()
        assert all(table.isfinite().all() for table in tables.values())
        assert (prior.denoiser.kernel.sigmas[1:] > 0).all()
        for conditioning in ("z_0", "x") if T > 1 else ():
            probs = ImportanceTimesteps()(prior, conditioning)
            assert probs.isfinite().all() and (probs > 0).all()
            assert probs.double().sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("betas", [[1e-16], [0.1, 1e-40], [0.0], [1.0], [math.nan], [-0.1], "x"])
def test_schedules_that_are_refused(betas):
    with one_line_value_error("betas must"):
        Schedule(betas)


# --- The programs ---------------------------------------------------------------------------------


@examples(300)
@given(
    schedule=schedules(),
    latent_dim=st.sampled_from((1, 512)) | st.integers(1, 512),
    log_scale=st.floats(-6.0, 3.0),
    size=st.sampled_from((1, 3)),
    dtype=st.sampled_from(DTYPES),
    parameterization=st.sampled_from(PARAMETERIZATIONS),
    reverse_variance=st.sampled_from(sorted(REVERSE_VARIANCES)),
    conditioning=st.sampled_from(("z_0", "x")),
    timesteps=st.sampled_from(tuple(PROPOSALS)),
    entropy=st.sampled_from(("exact", "path")),
    preconditioned=st.booleans(),
)
def test_chains_are_finite(
    schedule, latent_dim, log_scale, size, dtype, parameterization, reverse_variance, conditioning,
    timesteps, entropy, preconditioned,
):  # fmt: skip
    r"""Any length, dimension and schedule, with encoder scales from 1e-6 to 1e3."""
    torch.manual_seed(0)
    T, num_outputs = schedule.num_timesteps, 2 if reverse_variance == "learned" else 1
    preconditioned &= parameterization == "eps"
    low, high = schedule.original("log_snr")[[-1, 1]].tolist()
    net = ResidualMLP(latent_dim, (low, high), num_outputs, width=8, num_blocks=1)
    torch.nn.init.normal_(net.outputs.weight, std=0.3)
    prior = DiffusionPrior(
        latent_dim,
        T,
        schedule,
        net,
        parameterization,
        reverse_variance,
        preconditioning=preconditioned,
    )
    if preconditioned:
        moments = prior.denoiser.preconditioning
        torch.nn.init.normal_(moments.mean)
        torch.nn.init.normal_(moments.log_scale, std=0.2)  # scales around e^-2 to e^2
    prior = prior.to(dtype)
    loc = torch.randn(size, latent_dim, dtype=dtype, requires_grad=True)
    raw = torch.full_like(loc, log_scale * math.log(10)).requires_grad_()

    def model():
        with pyro.plate("data", size, dim=-1):
            prior.model()

    def guide():
        with pyro.plate("data", size, dim=-1):
            prior.guide(dist.Normal(loc, raw.exp()).to_event(1))

    elbo = Timestep_ELBO(timesteps, k=2, conditioning=conditioning, entropy=entropy)
    with pyro.get_param_store().scope():
        terms = elbo.terms(model, guide)
    for name, term in terms.items():
        assert term.isfinite(), name
    check_finite(sum(terms.values()), [loc, raw, *prior.parameters()], "gradients")


@pytest.mark.parametrize("latent_dim", [1, 512])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_is_finite_in_any_dimension(device, prior, latent_dim):
    config = ModelConfig(
        prior, latent_dim, levels=17, width=2, num_components=3, prior_width=4, num_timesteps=20
    )
    config = dataclasses.replace(config, num_data=9)
    vae = make_vae(config).to(device)
    for images in (torch.zeros(1, 1, 8, 8), torch.full((3, 1, 8, 8), 16)):
        x = preprocess(vae, images.byte().to(device))
        loss = sum(Timestep_ELBO(k=2).terms(vae.model, vae.guide, x).values())
        check_finite(loss, list(vae.parameters()), prior)


@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_constant_images_and_batches_of_one_are_finite(device, likelihood, precision):
    dtype = torch.float64 if precision == "float64" else torch.float32
    config = ModelConfig(latent_dim=2, levels=17, width=4, likelihood=likelihood, num_timesteps=20)
    vae = make_vae(config).to(device, dtype)
    for value, count in ((0, 1), (16, 1), (8, 4), (16, 4)):
        x = preprocess(vae, torch.full((count, 1, 8, 8), value).byte().to(device))
        for conditioning in ("z_0", "x"):
            elbo = Timestep_ELBO(k=2, conditioning=conditioning)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = sum(elbo.terms(vae.model, vae.guide, x).values())
            assert loss.dtype == dtype  # densities are never in half precision
            check_finite(loss, list(vae.parameters()), (value, count, conditioning))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("size", [1e-3, 1e3, 1e6])
def test_extreme_outputs_of_the_networks_are_finite(device, likelihood, size):
    r"""Heads whose outputs are all but zero, or push scales and logits to their bounds."""
    torch.manual_seed(0)
    config = ModelConfig(latent_dim=2, levels=17, width=4, likelihood=likelihood, num_timesteps=20)
    vae = make_vae(config).to(device)
    with torch.no_grad():
        for head in (vae.encoder.head, vae.decoder.maps[-2]):
            head.weight.normal_(), head.bias.normal_().mul_(size)
    x = preprocess(vae, torch.randint(0, 17, (3, 1, 8, 8)).byte().to(device))
    loss = sum(Timestep_ELBO(k=2).terms(vae.model, vae.guide, x).values())
    check_finite(loss, list(vae.parameters()), likelihood)


@examples(100)
@given(st.floats(-1e30, 1e30), st.sampled_from(DTYPES))
def test_scales_stay_within_their_bounds(raw, dtype):
    raw = torch.tensor(raw, dtype=dtype, requires_grad=True)
    scale = bounded_scale(raw, floor=1e-4, ceiling=1e2)
    (slope,) = torch.autograd.grad(scale, raw)
    assert 1e-4 * (1 - 1e-6) <= scale <= 1e2 * (1 + 1e-6)
    assert slope.isfinite() and slope >= 0


# --- Float32 against float64 ----------------------------------------------------------------------


class SameNoise(Messenger):
    r"""Draws Gaussian noise in float64, so that both precisions see the same."""

    def _pyro_sample(self, msg):
        normal = base_normal(msg["fn"])
        if msg["value"] is None and normal is not None:
            noise = torch.randn(
                *msg["fn"].batch_shape, *msg["fn"].event_shape, dtype=torch.float64, device="cpu"
            )
            msg["value"] = normal.loc + normal.scale * noise.to(normal.loc)


def terms_of(vae, x, elbo):
    def guide(x):
        with SameNoise():
            return vae.guide(x)

    torch.manual_seed(1)
    with torch.no_grad():
        return elbo_terms(vae.model, guide, x, elbo=elbo)


# The relative errors that the documentation states, of the means over data.
TERM, LOSS = 1e-4, 1e-5


@pytest.mark.parametrize(
    "options",
    [
        *({"reverse_variance": v, "conditioning": c} for v in REVERSE_VARIANCES for c in "zx"),
        *({"parameterization": name} for name in PARAMETERIZATIONS[1:]),
        {"schedule": "cosine"},
        {"schedule": "cosine", "conditioning": "x"},
        {"latent_dim": 128},
        {"likelihood": "discretized-logistic"},
        {"likelihood": "categorical"},
    ],
    ids=str,
)
def test_float32_agrees_with_float64_term_by_term(device, options):
    torch.manual_seed(0)
    options = dict(options)
    conditioning = "x" if options.pop("conditioning", "z") == "x" else "z_0"
    D, T = options.pop("latent_dim", 8), 1000
    likelihood = make_likelihood(options.pop("likelihood", "gaussian"), (1, 8, 8), 17)
    prior = DiffusionPrior(D, T, **options)
    # Not at zero, where the initial denoiser is.
    torch.nn.init.normal_(prior.denoiser.backbone.outputs.weight, std=0.02)
    encoder, decoder = ConvEncoder((1, 8, 8), D, width=8), ConvDecoder(D, likelihood, width=8)
    vae = VAE(encoder, decoder, prior).to(device)
    x = likelihood.space(17).preprocess(torch.randint(0, 17, (8, 1, 8, 8)).byte()).to(device)

    elbo = Timestep_ELBO("all", conditioning=conditioning, entropy="exact")
    single = terms_of(vae, x, elbo)
    double = terms_of(copy.deepcopy(vae).double(), x.double(), elbo)
    assert single.keys() == double.keys()
    errors = {}
    for name, term in double.items():
        # The mean over the data; of the KLs of the steps, summed over the timesteps.
        assert single[name].dtype == torch.float32 and term.dtype == torch.float64
        errors[name] = float((single[name].double().sum() - term.sum()) / term.sum())
    assert all(abs(error) < TERM for error in errors.values()), errors
    losses = [sum(t.double().sum() for t in terms.values()) for terms in (single, double)]
    assert abs(losses[0] - losses[1]) < LOSS * abs(losses[1])


@pytest.mark.parametrize("prior", [name for name in PRIORS if name != "diffusion"])
def test_float32_agrees_with_float64_for_other_priors(device, prior):
    torch.manual_seed(0)
    config = ModelConfig(prior, 8, levels=17, width=8, num_components=20, prior_width=30)
    vae = make_vae(dataclasses.replace(config, num_data=50)).to(device)
    x = preprocess(vae, torch.randint(0, 17, (8, 1, 8, 8)).byte().to(device))
    single = terms_of(vae, x, Timestep_ELBO(entropy="exact"))
    double = terms_of(copy.deepcopy(vae).double(), x.double(), Timestep_ELBO(entropy="exact"))
    for name, term in double.items():
        assert abs(single[name].double().sum() - term.sum()) < 1e-5 * abs(term.sum()), name


@examples(100)
@given(st.floats(-1e3, 1e3), st.floats(-6.0, 3.0), st.floats(-6.0, 3.0))
def test_the_kl_of_normals(shift, log_q, log_p):
    r"""Against the textbook's formula in float64, which has digits enough unless it is tiny."""
    m, s, c = shift, 10**log_q, 10**log_p
    ratio = (s / c) ** 2
    expected = (ratio - 1 - math.log(ratio) + (m / c) ** 2) / 2
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        q, p = (
            dist.Normal(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
            for a, b in ((m, s), (0.0, c))
        )
        found = kl_normal(q, p).item()
        assert found >= 0
        assert found == pytest.approx(expected, rel=tolerance, abs=10 * tolerance * 1e-3)


@pytest.mark.parametrize("excess", [1e-3, 1e-5, -1e-5, -1e-3])
def test_the_kl_of_normals_that_are_nearly_the_same(excess):
    # (r - 1)^2 up to third order; r itself is rounded to float32.
    r = torch.tensor(1 + excess, dtype=torch.float32)
    one = torch.ones((), dtype=torch.float32)
    found = kl_normal(dist.Normal(0 * one, r), dist.Normal(0 * one, one)).item()
    u = r.item() - 1
    assert found == pytest.approx(u**2 - u**3 / 3, rel=2e-3 if abs(excess) < 1e-4 else 1e-3)
