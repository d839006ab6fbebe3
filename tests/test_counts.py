r"""Counts of a known generator, and the page on a model of them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pyro
import torch
from errors import one_line_value_error
from test_docs import DOCS, cells

from pyro_vaediff.testing import synthetic_counts


def test_counts_have_the_mean_and_the_variance_of_their_generator():
    counts = synthetic_counts(4000, seed=1)
    mu, theta = counts.means.double(), counts.inverse_dispersions.double()
    residuals = (counts.x - mu) / (mu + mu**2 / theta).sqrt()
    for values, expected in ((residuals, 0.0), (residuals**2, 1.0)):
        se = values.std() / values.numel() ** 0.5
        assert abs(values.mean() - expected) < 5 * se and se < 0.01
    assert (counts.x == counts.x.round()).all() and (counts.x >= 0).all()


def test_a_type_is_a_curve_that_a_batch_shifts_and_a_library_size_scales():
    counts = synthetic_counts(600, num_features=9, num_types=2, num_batches=3)
    batch, log_size = counts.c.split([3, 1], dim=-1)
    torch.testing.assert_close(counts.means.sum(-1).log(), log_size[:, 0])
    assert torch.equal(batch.sum(-1), torch.ones(600))
    shares = (counts.means.log() - log_size).double()
    shares = shares - shares.mean(-1, keepdim=True)  # up to the norm of the softmax
    centers, slopes = {}, {}
    for k in range(2):
        for b in range(3):
            own = shares[(counts.types == k) & (batch.argmax(-1) == b)]
            deviations = own - own.mean(0)
            _, scales, directions = torch.linalg.svd(deviations, full_matrices=False)
            assert scales[0] > 1 and scales[1] < 1e-4 * scales[0]
            slopes[k, b] = directions[0]
            along = directions[0] * (own[0] @ directions[0])
            centers[k, b] = own[0] - along  # where the curve is, across its direction
    for k in range(2):
        for b in (1, 2):
            assert abs(slopes[k, 0] @ slopes[k, b]) > 1 - 1e-6
            assert (centers[k, 0] - centers[k, b]).norm() > 0.1
    assert abs(slopes[0, 0] @ slopes[1, 0]) < 0.9


def test_counts_are_those_of_the_seed():
    state = torch.get_rng_state()
    one, same, other = (synthetic_counts(5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.x, same.x) and not torch.equal(one.x, other.x)
    with one_line_value_error("num_types must be a whole number >= 1, got 0"):
        synthetic_counts(5, num_types=0)


def test_the_page_trains_and_its_claims_hold(no_global_state):
    page = DOCS / "howto" / "counts.md"
    code = "\n".join(cell.code for cell in cells(page))
    entries = code.split("priors = {\n")[1].split("\n}")[0].splitlines()
    assert len(entries) == 3  # a line each
    assert code.count("epochs=40") == 1
    found = {}
    with plt.rc_context():
        exec(compile(code.replace("epochs=40", "epochs=8"), str(page), "exec"), found)
        plt.close("all")
    pyro.enable_validation(True)
    # It has asserted that VampPrior and diffusion help, by more than two standard errors.
    assert set(found["gains"]) == set(found["vaes"]) == {"N(0, I)", "VampPrior", "diffusion"}
