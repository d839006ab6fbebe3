r"""Statistics over seeds and their page, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from errors import one_line_value_error
from grid.summary import flatten, page, summarize, with_all_keys
from study import Statistic, statistic

ROWS = {"gaussian": "Gaussian", "flow": "flow", "diffusion": "diffusion"}


def record(row, seed, loss, latent_dim=2, dataset="digits", **others):
    return {
        **{"dataset": dataset, "latent_dim": latent_dim, "row": row, "seed": seed},
        **{"test_images": 300, "test_negative_elbo": loss, "test_bits_per_dim": loss / 10},
        **{"parameters.prior": 1234 * latent_dim},
        **others,
    }


def distance(samples, label="Fréchet distance (features=pixels)", count=300):
    return {
        **{"frechet.label": label, "frechet.samples": samples},
        **{"frechet.reconstructions": samples / 2, "frechet.num_images": count},
        **{"frechet.reference": "digits test split"},
    }


def make_page(records, latent_dims=(2,), num_seeds=2, **others):
    digits = {"digits": "Digits"}, ROWS, {"digits": latent_dims}
    return page("Title", "Caption.", records, *digits, num_seeds, **others)


def tables(text):
    r"""The tables of a page by the line of text above them, as a list of cells by row."""
    found, above = {}, ""
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
            rows = found.setdefault(above, [])
            rows.append([cell.strip() for cell in line[1:-1].split("|")])
        elif line:
            above = line.lstrip("# ")
    for rows in found.values():
        assert {len(row) for row in rows} == {len(rows[0])} and set(rows[1]) == {"---"}
        del rows[1]
    return found


LOSS = "Test −ELBO (nats per image, 300 images)"


def test_a_statistic():
    # The mean of 1, 2, 6 is 3; the squares of the deviations sum to 4 + 1 + 9 = 14.
    found = statistic([1.0, 2.0, 6.0])
    assert found == Statistic(3.0, pytest.approx(math.sqrt(7)), 3)
    assert found.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert statistic([4]).mean == 4 and math.isnan(statistic([4]).sd)
    assert math.isnan(statistic([1.0, math.nan]).mean)
    assert math.isnan(statistic([1.0, -math.inf]).mean)
    with one_line_value_error("values must hold at least one number"):
        statistic([])


def test_ties():
    best = Statistic(1.0, 0.3, 9)  # the standard errors are 0.1 and 0.24: 0.26 together
    assert Statistic(1.25, 0.72, 9).ties(best)
    assert not Statistic(1.27, 0.72, 9).ties(best)
    assert best.ties(best)
    one = Statistic(1.0, math.nan, 1)
    assert one.ties(one)
    assert not Statistic(1.0 + 1e-9, 1.0, 3).ties(one)


def test_flatten():
    results = {"a": 1, "b": {"c": "x", "d": {"e": 2.5}}, "list": [1, 2], "none": None}
    assert flatten(results) == {"a": 1, "b.c": "x", "b.d.e": 2.5}


def test_records_with_all_keys():
    assert with_all_keys([{"a": 1}, {"b": 2}]) == [{"a": 1, "b": ""}, {"a": "", "b": 2}]


def test_the_summary_by_hand():
    records = [
        record("gaussian", 0, 1.0, **distance(8.0)),
        record("flow", 0, -5.0),
        record("gaussian", 1, 3.0, **distance(9.0)),
    ]
    summary = {
        (row["row"], row["metric"]): (row["mean"], row["sd"], row["n"])
        for row in summarize(records)
        if (row["dataset"], row["latent_dim"]) == ("digits", 2)
    }
    assert summary["gaussian", "test_negative_elbo"] == (2.0, pytest.approx(math.sqrt(2)), 2)
    assert summary["gaussian", "frechet.samples"] == (8.5, pytest.approx(math.sqrt(0.5)), 2)
    assert summary["flow", "test_negative_elbo"] == (-5.0, "", 1)
    assert ("gaussian", "frechet.label") not in summary and ("flow", "seed") not in summary
    assert {type(row["mean"]) for row in summarize(records)} == {float}


def test_the_page_by_hand():
    records = [
        record("gaussian", 0, 100.0),
        record("gaussian", 1, 102.0),
        record("flow", 0, -2000.5),
        record("flow", 1, -2001.5),
        record("diffusion", 0, -2001.4),
        record("diffusion", 1, -2000.4),
        record("gaussian", 0, 7.0, latent_dim=4),
    ]
    text = make_page(records, (2, 4))
    assert text.startswith("# Title\n\nCaption.\n\n## Digits\n") and text.endswith("|\n")
    found = tables(text)
    assert found[LOSS] == [
        ["prior", "D = 2", "D = 4"],
        ["Gaussian", "101.00 ± 1.41", "7.00 (n = 1)"],
        ["flow", "**−2,001.00 ± 0.71**", "-"],
        ["diffusion", "**−2,000.90 ± 0.71**", "-"],
    ]
    assert found["Bits/dim"][1] == ["Gaussian", "10.100 ± 0.141", "0.700 (n = 1)"]
    assert found["Parameters of the prior"][1:3] == [
        ["Gaussian", "2,468", "4,936"],
        ["flow", "2,468", "-"],
    ]
    assert len(found) == 3  # no Fréchet distance was computed


def test_the_clear_winner_is_bold_alone():
    losses = {"gaussian": 3.0, "flow": 2.0, "diffusion": 1.0}
    records = [record(row, s, loss + s / 100) for row, loss in losses.items() for s in (0, 1)]
    cells = [row[1] for row in tables(make_page(records))[LOSS][1:]]
    assert cells == ["3.00 ± 0.01", "2.00 ± 0.01", "**1.00 ± 0.01**"]
    # Without a standard error there is no tie.
    cells = [row[1] for row in tables(make_page(records[::2], num_seeds=1))[LOSS][1:]]
    assert cells == ["3.00", "2.00", "**1.00**"]


def test_a_number_that_is_not_finite_is_never_the_best():
    records = [record("gaussian", 0, math.nan), record("flow", 0, 1.0), record("diffusion", 0, 2.0)]
    cells = [row[1] for row in tables(make_page(records, num_seeds=1))[LOSS][1:]]
    assert cells == ["nan", "**1.00**", "2.00"]


def test_distances_of_different_features_are_not_compared():
    records = [
        record("gaussian", 0, 1.0, **distance(8.0)),
        record("flow", 0, 1.0, **distance(6.0)),
        record("gaussian", 1, 1.0, **distance(90.0, label="FID", count=1000)),
        record("diffusion", 0, 1.0),
    ]
    text = make_page(records, num_seeds=1)
    sections = text.split("\n### ")
    pixels = tables(next(s for s in sections if s.startswith("Fréchet distance (features=pixels)")))
    (samples, reconstructions) = pixels.values()
    assert samples[1:] == [["Gaussian", "8.00"], ["flow", "**6.00**"], ["diffusion", "-"]]
    assert reconstructions[1][1] == "4.00"
    assert next(iter(pixels)) == "Of 300 samples, and as many images of the digits test split:"
    fid = tables(next(s for s in sections if s.startswith("FID")))
    assert next(iter(fid)).startswith("Of 1,000 samples")
    assert next(iter(fid.values()))[1:] == [
        ["Gaussian", "90.00"],
        ["flow", "-"],
        ["diffusion", "-"],
    ]


def test_a_page_without_records_and_with_pictures():
    assert "No run is finished yet." in make_page([])
    text = make_page([record("flow", 0, 1.0)], pictures={"digits": ["samples-digits.png"]})
    assert "![Digits](samples-digits.png)" in text


def test_differences_in_pairs_of_the_same_seed():
    # The seeds differ by 100 nats, the rows by 1 and 3: mean 2, sd sqrt(2), standard error 1.
    records = [
        record("diffusion", 0, 10.0), record("flow", 0, 11.0),
        record("diffusion", 1, 110.0), record("flow", 1, 113.0),
        record("flow", 2, 500.0), record("gaussian", 1, 90.0),
    ]  # fmt: skip
    text = make_page(records, num_seeds=3, reference="diffusion")
    above = "Difference from diffusion, in pairs of the same seed (± standard error):"
    assert tables(text)[above] == [
        ["prior", "D = 2"],
        ["Gaussian", "−20.00 (n = 1)"],
        ["flow", "2.00 ± 1.00 (n = 2)"],
    ]
    assert "in pairs" not in make_page(records)
    assert tables(make_page(records[:1], reference="diffusion"))[above][1] == ["Gaussian", "-"]


def test_below_a_number_there_is_what_it_is():
    is_chain = {"test_negative_elbo_is": "a bound by the chain"}
    nll = "likelihood.negative_log_likelihood"
    is_flow = {nll: 8.5, f"{nll}_is": "a bound by the flow"}
    records = [
        record("gaussian", 0, 10.0, test_negative_elbo_is="a bound by the model"),
        record("flow", 0, 10.0, test_negative_elbo_is="a bound by the model"),
        record("diffusion", 0, 10.0, **is_chain, **is_flow),
        record("diffusion", 1, 10.0, **is_chain),
    ]
    lines = make_page(records).splitlines()
    notes = {
        max(h for h in range(i) if lines[h].startswith("###")): line
        for i, line in enumerate(lines)
        if line.startswith("<small>")
    }
    elbo = "<small>Gaussian, flow: a bound by the model. diffusion: a bound by the chain.</small>"
    assert {lines[h].lstrip("# "): line for h, line in notes.items()} == {
        LOSS: elbo,
        "Bits/dim": elbo,
        "Importance-weighted −log p(x) (nats per image)": (
            "<small>diffusion: a bound by the flow.</small>"
        ),
    }
    assert "<small>" not in make_page([record("flow", 0, 1.0)])


def test_evaluations_are_on_the_page_if_there_are_any():
    records = [record("flow", 0, 10.0, **{"likelihood.negative_log_likelihood": 8.5})]
    above = "Importance-weighted −log p(x) (nats per image)"
    assert tables(make_page(records, num_seeds=1))[above][2] == ["flow", "8.50"]
    assert above not in make_page([record("flow", 0, 10.0)])
