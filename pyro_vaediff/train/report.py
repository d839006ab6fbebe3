r"""The report of a run: results, tables and pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import plotting
from ..data import ImageData
from ..evaluate import (
    Extractor,
    active_units,
    audit,
    bits_per_dim,
    evaluate,
    frechet_distances,
    kl_by_group,
    kl_by_timestep,
    preprocess,
)
from ..files import write_csv, write_json
from ..infer import Estimator
from ..infer.objectives import group_of
from ..priors import DiffusionPrior
from ..sampling import num_evaluations, sample
from ..vae import VAE
from .pictures import Missing, pixel_space, save_pictures
from .splits import one_hot

__all__ = ["readable_terms", "report"]

NUM_ACTIVE = 1000  # the images that active units are counted with


def report(
    vae: VAE,
    data: ImageData | Tensor,
    history: list[dict[str, float]],
    out: str | Path,
    extractor: Extractor | None = None,
    elbo: Estimator | None = None,
    num_images: int = 10_000,
    seed: int = 0,
    progress: bool = False,
    extra: dict[str, Any] | None = None,
    labels: bool = False,
    guidance: float = 0.0,
    sampler: str = "ancestral",
    num_steps: int | None = None,
) -> list[str]:
    r"""Evaluates a trained VAE on test data and writes results, tables and pictures.

    Whatever needs a closed form, a mean or a pixel space that the model lacks is left out, and the
    results say so.
    The numbers are written before any picture is drawn.

    Arguments:
        vae: The VAE, in eval mode.
        data: The images, or test data in x-space with shape :math:`(N, \dots)`.
        history: The records of the training epochs.
        out: The run directory.
        extractor: The features of the Fréchet distance, if it is wanted.
        elbo: The estimator of the test data's negative ELBO, see
            :func:`~pyro_vaediff.evaluate.evaluate`.
        num_images: The number of images on each side of the Fréchet distance, at most.
        seed: The seed of everything that is sampled.
        progress: Whether to show progress bars.
        extra: More entries for ``results.json``.
        labels: Whether the labels of the images are the context, one-hot.
        guidance: The weight of :func:`~pyro_vaediff.sampling.guided` samples, for one more picture;
            all other pictures and numbers are those of the model.
        sampler: The sampler of the prior, see :func:`~pyro_vaediff.sampling.sample`.
        num_steps: The number of its steps.

    Returns:
        Lines that say what was found, and where it is.
    """
    out, missing = Path(out), Missing()
    torch.manual_seed(seed)
    test = data.test if isinstance(data, ImageData) else data
    c, classes = context(data) if labels else (None, None)
    terms = readable_terms(vae, evaluate(vae, test, elbo, c=c, progress=progress))
    validated = [record for record in history if "validation" in record]
    draw = partial(sample, sampler=sampler, num_steps=num_steps)
    loss = sum(terms.values())
    results: dict[str, Any] = {
        "test_images": len(test),
        "test_negative_elbo": loss,
        "terms": terms,
    }
    if validated:
        best = min(validated, key=lambda record: record["validation"])
        results["best_epoch"] = int(best["epoch"])
    summary = f"test -ELBO {loss:.2f} nats per datum"
    with missing.unless("bits/dim"):
        width = pixel_space(vae).log_bin_width
        bits = results["test_bits_per_dim"] = bits_per_dim(loss, test.shape[1:], width)
        summary += f", {bits:.3f} bits/dim{' (of the dequantized density)' if width else ''}"
    lines = [f"{summary}, on {len(test)} images"]
    with missing.unless("what the negative ELBO is"):
        text = results["test_negative_elbo_is"] = audit(evaluate, vae, elbo=elbo).text
        lines.append(f"    {text}")
    lines += [f"    {value:9.2f}  {name}" for name, value in terms.items()]
    if isinstance(vae.prior, DiffusionPrior):
        evaluations = num_evaluations(vae.prior, sampler, num_steps)
        results["sampling"] = {"sampler": sampler, "evaluations": evaluations}
    if extractor is not None:
        with missing.unless("Fréchet distances"):
            if not isinstance(data, ImageData):
                raise ValueError("data are no ImageData")
            cache = out.parent / "statistics"
            found = frechet_distances(
                vae, data, extractor, num_images, cache, progress=progress, c=c, draw=draw
            )
            results["frechet"] = found
            lines.append(
                "{label}: samples {samples:.2f}, reconstructions {reconstructions:.2f} "
                "({num_images} images on each side, reference: {reference})".format(**found)
            )
    with missing.unless("active units"):
        few = None if c is None else c[:NUM_ACTIVE]
        results["latents"] = uses = use_of_latents(vae, test[:NUM_ACTIVE], few, terms)
        lines += [describe_use(group, use) for group, use in uses.items()]
    kl, x = None, preprocess(vae, test[:100])
    if num_timesteps(vae) is not None:
        with missing.unless("the KL by timestep"):
            kl = kl_by_timestep(vae, x, None if c is None else c[: len(x)].to(x))
            rows = [{"t": t, "nats": value} for t, value in enumerate(kl.tolist(), start=1)]
            write_csv(out / "kl_by_timestep.csv", rows)
    write_csv(out / "terms.csv", [{"term": name, "nats": value} for name, value in terms.items()])
    results |= extra or {}

    def save() -> None:
        not_available = {"not_available": missing.reasons} if missing.reasons else {}
        write_json(out / "results.json", results | not_available)

    save()
    known = len(missing.reasons)
    with missing.unless("terms.png"):
        shown = by_group(terms)
        plotting.plot_elbo_terms(shown, out / "terms.png", "Negative ELBO of the test images")
    with missing.unless("history.png"):
        plotting.plot_history(validated, out / "history.png")
    with missing.unless("kl_by_timestep.png"):
        if kl is not None:
            plotting.plot_kl_by_timestep(kl, out / "kl_by_timestep.png")
    few = None if c is None else c[: len(x)].to(x)
    save_pictures(vae, test, x, few, classes, out, missing, guidance, draw)
    if guidance:
        lines.append(f"guided.png: guidance {guidance}, these samples are not the model's")
    if len(missing.reasons) > known:
        save()
    return [*lines, *missing.lines(), f"results, tables and pictures are in {out}"]


def use_of_latents(
    vae: VAE, test: Tensor, c: Tensor | None, terms: dict[str, float]
) -> dict[str, dict[str, float]]:
    r"""Returns the active units of each group of latents, and its KL if there are several."""
    units, kls = active_units(vae, test, c=c), kl_by_group(terms)
    uses = {group: {"active_units": n.active, "units": n.total} for group, n in units.items()}
    return {
        group: use | ({"kl": kls[group]} if len(uses) > 1 else {}) for group, use in uses.items()
    }


def by_group(terms: dict[str, float]) -> dict[str, float]:
    r"""Returns terms in which those of each group of latents are merged into its KL."""
    kls = {group: kl for group, kl in kl_by_group(terms).items() if group}
    rest = {name: value for name, value in terms.items() if not group_of(name)}
    return rest | {f"KL of {group}": kl for group, kl in kls.items()}


def describe_use(group: str, use: dict[str, float]) -> str:
    r"""Returns a line on the latents of a group."""
    kl = f", KL {use['kl']:.2f} nats" if "kl" in use else ""
    where = f"{group}: " if group else ""
    return f"{where}{use['active_units']} of {use['units']} latents are active{kl}"


def context(data: ImageData | Tensor) -> tuple[Tensor, int]:
    r"""Returns the labels of the test images, one-hot, and the number of classes."""
    if not isinstance(data, ImageData) or data.test_labels is None or data.num_classes is None:
        raise ValueError("labels=True needs ImageData with labels, such as the digits")
    return one_hot(data.test_labels, data.num_classes), data.num_classes


def readable_terms(vae: VAE, terms: dict[str, float]) -> dict[str, float]:
    r"""Returns the terms of :func:`~pyro_vaediff.evaluate.evaluate` by what they mean, in the order
    of the derivation; those of several priors keep their names.
    """
    T, terms = num_timesteps(vae), dict(terms)
    times = "times from 1 to T" if getattr(vae.prior, "continuous", False) else "steps t = 2..T"
    names = {"x": "-log p(x | z_0), reconstruction"}
    if T is not None:
        names |= {
            "-H[z_0]": "log q(z_0 | x), negative entropy",
            f"z_{T}": "KL(q(z_T | z_0) || p(z_T))",
            "z_s": f"KL of the {times}",
            "z_0": "-log p(z_0 | z_1), the step t = 1",
        }
        if "z_s" in terms or "constant" in terms or "z_0" in terms:
            terms["z_s"] = terms.get("z_s", 0.0) + terms.pop("constant", 0.0)
    elif "-H[z_0]" in terms:
        names |= {"-H[z_0]": "log q(z_0 | x), negative entropy", "z_0": "-log p(z_0)"}
    else:
        names |= {"z_0": "KL(q(z_0 | x) || p(z_0))"}
    known = {label: terms[name] for name, label in names.items() if name in terms}
    return known | {name: value for name, value in terms.items() if name not in names}


def num_timesteps(vae: VAE) -> int | None:
    r"""Returns the length of the prior's chain, or ``None`` if it has none."""
    return getattr(vae.prior, "num_timesteps", None)
