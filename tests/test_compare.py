r"""Any estimator on the bench, for any pair of programs; and paired differences."""

from __future__ import annotations

import csv
import inspect
import math
import re
import sys
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from errors import one_line_value_error
from PIL import Image
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_vaediff import VAE, DiffusionPrior, GaussianPrior, Timestep_ELBO
from pyro_vaediff.bench import (
    Difference,
    Reference,
    common_random_numbers,
    compare,
    draw,
    exact_reference,
    find_programs,
    paired_difference,
    programs_of,
)
from pyro_vaediff.testing import LinearGaussian, Oracle, linear_gaussian_vae


class Conjugate:
    r"""z ~ N(0, 1) and x ~ N(w z, 1), whose guide N(m, s^2) has its parameters in Pyro's store."""

    def __init__(self, device):
        self.x = torch.randn(20, dtype=torch.float64, device=device)

    def model(self, x):
        w = pyro.param("w", lambda: torch.tensor(0.8).to(x))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)

    def guide(self, x):
        loc = pyro.param("loc", lambda: torch.zeros_like(x))
        scale = pyro.param(
            "scale", lambda: torch.tensor(0.7).to(x), constraint=dist.constraints.positive
        )
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    @property
    def loss(self):
        r"""The exact negative ELBO at the initial parameters, in nats per datum."""
        m, s, w = 0.0, 0.7, 0.8
        kl = (m**2 + s**2 - 1) / 2 - math.log(s)
        square = self.x.square() + (w * s) ** 2
        return (kl + (square / 2 + math.log(2 * math.pi) / 2).mean()).item()


@pytest.fixture
def conjugate(device):
    return Conjugate(device)


ESTIMATORS = {"sampled": Trace_ELBO(), "closed form": TraceMeanField_ELBO()}


def quick(*args, **options):
    return compare(*args, **{"draws": 40, "repeats": 3, "warmup": 2} | options)


# --- Any programs ---------------------------------------------------------------------------------


def test_programs_without_a_diffusion_prior(conjugate):
    comparison = compare(conjugate.model, conjugate.guide, conjugate.x, ESTIMATORS, repeats=3)
    assert comparison.groups == ("model", "guide") and comparison.baseline == "sampled"
    assert abs(comparison.reference.value - conjugate.loss) < 5 * comparison.reference.value_se
    sampled, closed = comparison.records
    for row in (sampled, closed):
        assert row["draws"] == 100
        assert 0 < row["bias_se"] < 0.05 and abs(row["bias"]) < 5 * row["bias_se"]
        exact_bias = comparison.reference.value + row["bias"] - conjugate.loss
        assert abs(exact_bias) < 5 * row["sd"] / 10
        for group in comparison.groups:
            assert abs(row[f"{group}_bias"]) < 5 * row[f"{group}_bias_se"] < 1
            assert 0 < row[f"{group}_variance_se"] < 0.3 * row[f"{group}_variance"]
            merit = sampled[f"{group}_variance"] * sampled["ms"]
            merit /= row[f"{group}_variance"] * row["ms"]
            assert row[f"{group}_merit"] == pytest.approx(merit)
        assert row["megabytes"] > 0 and row["ms"] > 0 and row["ms_se"] >= 0
        assert row["variance"] == pytest.approx(row["sd"] ** 2)
    assert closed["guide_variance"] < sampled["guide_variance"]
    assert sampled["difference"] == sampled["difference_se"] == sampled["guide_merit_se"] == 0
    assert abs(closed["difference"]) < 5 * closed["difference_se"]


def test_the_variance_of_a_gradient_is_the_exact_one(conjugate):
    r"""With z = s eps, d(-log p(x | z)) / dw is (w z - x) z per datum, and all data average it."""
    x, s, w = conjugate.x, 0.7, 0.8
    rows = quick(conjugate.model, conjugate.guide, x, ESTIMATORS, draws=400).records
    exact = ((2 * (w * s**2) ** 2 + (s * x).square()).sum() / len(x) ** 2).item()
    for row in rows:
        assert row["model_variance_se"] < 0.15 * exact
        assert abs(row["model_variance"] - exact) < 5 * row["model_variance_se"]


def test_nothing_is_left_behind(conjugate):
    pyro.param("mine", torch.ones(()))
    conjugate.guide(conjugate.x)
    store = pyro.get_param_store()
    before = {name: value.detach().clone() for name, value in store.items()}
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    quick(conjugate.model, conjugate.guide, conjugate.x, ESTIMATORS)
    assert torch.equal(torch.randn(3), expected)
    assert list(store) == list(before) == ["mine", "loc", "scale"]
    assert all(torch.equal(store[name], value) for name, value in before.items())


def test_it_measures_where_svi_has_arrived(conjugate):
    svi = SVI(conjugate.model, conjugate.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    before = quick(conjugate.model, conjugate.guide, conjugate.x, ESTIMATORS).reference.value
    for _ in range(100):
        svi.step(conjugate.x)
    after = quick(conjugate.model, conjugate.guide, conjugate.x, ESTIMATORS).reference.value
    assert after < before - 0.05


def test_an_autoguide_and_a_model_without_parameters(device):
    x = torch.randn(6, device=device)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), device=device), 1.0))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model)
    comparison = quick(model, guide, (), ESTIMATORS, reference=Trace_ELBO(num_particles=5))
    assert comparison.groups == ("guide",)
    assert all(row["guide_variance"] > 0 for row in comparison.records)


def test_a_score_function_needs_a_reference_that_can_do_it(device):
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3, device=device)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        p = pyro.param("p", lambda: torch.full((2,), 0.6, device=device))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(p))

    estimators = {"REINFORCE": Trace_ELBO(), "graph": TraceGraph_ELBO()}
    with one_line_value_error("site 'z' is not reparameterized"):
        quick(model, guide, x, estimators)
    reference = Trace_ELBO(num_particles=10)
    for row in quick(model, guide, x, estimators, reference=reference, warmup=0).records:
        assert abs(row["guide_bias"]) < 5 * row["guide_bias_se"]


# --- VAEs -----------------------------------------------------------------------------------------


def test_a_vae_with_groups_and_an_exact_reference(device):
    vae = linear_gaussian_vae(4).to(device)
    x = torch.randn(10, 3, dtype=torch.float64, device=device)
    estimators = {"uniform": Timestep_ELBO("uniform", k=1), "default": Timestep_ELBO()}
    groups, exact = dict(vae.named_children()), exact_reference(vae, x)
    options = {"groups": groups, "baseline": "default"}
    comparison = quick(vae.model, vae.guide, x, estimators, reference=exact, **options)
    assert comparison.groups == ("encoder", "decoder", "prior")
    assert comparison.reference is exact
    uniform, default = comparison.records
    for row in (uniform, default):
        assert abs(row["bias"]) < 5 * row["bias_se"]
        for group in groups:
            assert abs(row[f"{group}_bias"]) < 5 * row[f"{group}_bias_se"]
    assert default["prior_merit"] == 1 and default["prior_variance"] < uniform["prior_variance"]
    assert abs(uniform["difference"]) < 5 * uniform["difference_se"]
    assert not pyro.get_param_store() and all(p.grad is None for p in vae.parameters())


@pytest.mark.parametrize("num_timesteps", [None, 5, 0])
def test_other_vaes(device, num_timesteps):
    r"""In continuous time, with a chain, and with a Gaussian prior."""
    prior = GaussianPrior(2) if num_timesteps == 0 else DiffusionPrior(2, num_timesteps)
    vae = VAE(LinearGaussian(3, 2, -1.0), LinearGaussian(2, 3, 0.0), prior).double().to(device)
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    groups = {"inference": vae.encoder}
    comparison = quick(vae.model, vae.guide, (x,), {"ours": Timestep_ELBO()}, groups=groups)
    assert comparison.groups == ("inference", "other")
    (row,) = comparison.records
    assert abs(row["bias"]) < 5 * row["bias_se"] and row["inference_merit"] == 1


def test_programs_of_a_vae(device):
    vae = linear_gaussian_vae(4).to(device)
    x = torch.randn(3, 3, dtype=torch.float64, device=device)
    programs = programs_of(vae)
    assert programs_of(programs) is programs
    found = find_programs(vae.model, vae.guide, x, Trace_ELBO())
    of_guide, of_encoder = (
        [id(p) for p in ps] for ps in (found.groups["guide"], vae.encoder.parameters())
    )
    assert of_guide == of_encoder
    assert {id(p) for p in found.parameters} == {id(p) for p in vae.parameters()}
    torch.manual_seed(1)
    sample = draw(Trace_ELBO(), vae, [x])
    torch.manual_seed(1)
    again = draw(Trace_ELBO(), found, [(x,)])
    assert torch.equal(sample.values, again.values)
    assert torch.equal(sample.gradients["encoder"], again.gradients["guide"])


class Biased(Timestep_ELBO):
    r"""Forgets one part in ten of what it has."""

    def differentiable_loss(self, *args, **kwargs):
        return 0.9 * super().differentiable_loss(*args, **kwargs)


def test_a_bias_is_found(device):
    vae = linear_gaussian_vae(4).to(device)
    x = torch.randn(10, 3, dtype=torch.float64, device=device)
    estimators = {"ours": Timestep_ELBO(), "mine": Biased()}
    comparison = quick(vae.model, vae.guide, x, estimators)
    mine = comparison.records[1]
    loss = Oracle(vae, x).negative_elbo.mean().item()
    assert abs(mine["bias"] + 0.1 * loss) < 5 * mine["bias_se"] < 0.1 * loss
    # The same random numbers: the difference is known far better than either of them.
    assert abs(mine["difference"] + 0.1 * loss) < 5 * mine["difference_se"]
    assert mine["difference_se"] < 0.2 * mine["bias_se"]
    for group in comparison.groups:
        assert abs(mine[f"{group}_bias"] + 0.1) < 5 * mine[f"{group}_bias_se"]


# --- The table ------------------------------------------------------------------------------------


WITH_SE = {"bias", "variance", "difference", "ms", "merit"}


def test_files(conjugate, tmp_path):
    comparison = quick(conjugate.model, conjugate.guide, conjugate.x, ESTIMATORS)
    comparison.write(tmp_path / "bench.csv")
    with open(tmp_path / "bench.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["estimator"] for row in rows] == list(ESTIMATORS)
    # The columns are those of the docstring, and no others.
    listed = re.findall(r"^``(\w+)``\s", inspect.getdoc(compare), flags=re.M)
    several = ["bias", "variance", "difference", "ms"] + [
        f"GROUP_{w}" for w in ("variance", "bias", "merit")
    ]
    listed += [f"{name}_se" for name in several]
    columns = {n.replace("GROUP", g) for n in listed for g in comparison.groups}
    assert set(rows[0]) == columns
    for group in (None, "guide"):
        comparison.plot(tmp_path / "pareto.png", group)
        with Image.open(tmp_path / "pareto.png") as image:
            assert image.size == (1600, 720)
    with one_line_value_error("unknown group 'decoder': choose one of model, guide"):
        comparison.plot(tmp_path / "pareto.png", "decoder")
    header, *lines = str(comparison).splitlines()
    assert header.split()[:4] == ["estimator", "bias", "variance", "ms"] and len(lines) == 2


def test_an_estimator_without_variance_is_not_plotted(device, tmp_path):
    vae = linear_gaussian_vae(3).to(device)
    x = torch.randn(4, 3, dtype=torch.float64, device=device)

    class Exact:
        num_particles = 1

        def loss(self, model, guide, x):
            return Trace_ELBO().loss(model, guide, x)

        def loss_and_grads(self, model, guide, x):
            loss = Oracle(vae, x).negative_elbo.sum()
            loss.backward()
            return loss.item()

    estimators = {"ours": Timestep_ELBO(), "exact": Exact()}
    comparison = quick(vae.model, vae.guide, x, estimators, reference=None)
    assert comparison.records[1]["guide_merit"] > 1e20
    comparison.plot(tmp_path / "pareto.png")


def test_a_data_frame(conjugate, monkeypatch):
    comparison = quick(conjugate.model, conjugate.guide, conjugate.x, ESTIMATORS)

    class Frame:
        def __init__(self, records):
            self.records = records

        def set_index(self, name):
            return self.records, name

    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=Frame))
    assert comparison.frame == (list(comparison.records), "estimator")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"^frame needs pandas, .*: pip install pandas") as error:
        _ = comparison.frame
    assert "\n" not in str(error.value)


BAD = [
    ({"estimators": {}}, "estimators must hold at least one estimator by name, got none"),
    ({"baseline": "other"}, "unknown baseline 'other': choose one of sampled, closed form"),
    ({"draws": 3}, "draws must be a whole number >= 4, got 3"),
    ({"repeats": 0}, "repeats must be a whole number >= 1, got 0"),
    ({"warmup": -1}, "warmup must be a whole number >= 0, got -1"),
    ({"model": lambda x: None, "guide": lambda x: None}, "model and guide must have a parameter"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[message[:20] for _, message in BAD])
def test_bad_arguments(conjugate, options, message):
    right = {"model": conjugate.model, "guide": conjugate.guide, "estimators": ESTIMATORS}
    with one_line_value_error(message):
        compare(data=conjugate.x, **right | options)


# --- Common random numbers ------------------------------------------------------------------------


def test_common_random_numbers_end_with_their_context(device):
    torch.manual_seed(0)
    expected = torch.randn(4, device=device)
    torch.manual_seed(0)
    numbers = []
    for seed in (5, 5, 6):
        with common_random_numbers(seed):
            numbers.append(torch.randn(3, device=device))
    assert torch.equal(numbers[0], numbers[1]) and not torch.equal(numbers[0], numbers[2])
    assert torch.equal(torch.randn(4, device=device), expected)


def test_a_paired_difference_of_two_models(device):
    r"""Two VAEs that differ a little: the difference of their closed forms, in a few draws."""
    pyro.enable_validation(False)
    one, other = (linear_gaussian_vae(4, seed=0).to(device) for _ in range(2))
    with torch.no_grad():
        other.decoder.bias += 0.05
    x, elbo = torch.randn(10, 3, dtype=torch.float64, device=device), Timestep_ELBO()
    exact = (Oracle(one, x).negative_elbo - Oracle(other, x).negative_elbo).sum().item()
    difference = paired_difference(
        *(lambda vae=vae: elbo.loss(vae.model, vae.guide, x) for vae in (one, other)), draws=60
    )
    assert abs(difference.mean - exact) < 5 * difference.se
    assert difference.se < 0.1 * difference.independent_se
    assert difference.se < 0.2 * abs(exact) < difference.independent_se


def test_differences_by_hand():
    first, second = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 2, 6], [0.0, 2, 4]))
    difference = Difference.of(first, second)
    assert difference.mean == pytest.approx(1.0)
    assert difference.se == pytest.approx(1 / 3**0.5)
    assert difference.independent_se == pytest.approx(((7 + 4) / 3) ** 0.5)


def test_paired_standard_errors_are_true():
    def noisy(shift):
        return shift + torch.randn(()) + 0.1 * shift * torch.randn(())

    many = [
        paired_difference(lambda: noisy(1.0), lambda: noisy(0.0), draws=30, seed=seed)
        for seed in range(200)
    ]
    means = torch.tensor([d.mean for d in many])
    se = torch.tensor([d.se for d in many]).square().mean().sqrt().item()
    assert se == pytest.approx(means.std().item(), rel=0.25)
    assert abs(means.mean() - 1) < 5 * means.std() / 200**0.5
    again = paired_difference(lambda: noisy(1.0), lambda: noisy(0.0), draws=30)
    assert again == many[0] and many[0] != many[1]


def test_too_few_pairs():
    with one_line_value_error("draws must be a whole number >= 2, got 1"):
        paired_difference(lambda: 0.0, lambda: 0.0, draws=1)


def test_a_reference_of_programs_is_a_reference(conjugate):
    programs = find_programs(conjugate.model, conjugate.guide, conjugate.x, Trace_ELBO())
    with poutine.trace(param_only=True) as capture:
        conjugate.guide(conjugate.x)
    names = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
    assert [id(p) for p in programs.groups["guide"]] == [id(p) for p in names]
    assert Reference(0.0, 0.0, {}, {}).relative_se == {}
