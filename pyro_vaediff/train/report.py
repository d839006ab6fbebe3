r"""What a run leaves to read: results, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import plotting
from ..data import ImageData
from ..evaluate import (
    Extractor,
    bits_per_dim,
    evaluate,
    frechet_distances,
    kl_by_timestep,
    preprocess,
)
from ..files import write_csv, write_json
from ..infer import Estimator
from ..likelihoods import PixelSpace
from ..sampling import point, reconstruct, sample, trajectory
from ..sampling.samplers import check_diffusion
from ..vae import VAE, call
from .splits import one_hot

__all__ = ["readable_terms", "report"]


class Missing:
    r"""Collects what is not available for a model, and why."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    @contextmanager
    def unless(self, name: str) -> Iterator[None]:
        r"""Goes on if a number or a picture has no closed form, or asks for what a model lacks."""
        try:
            yield
        except (NotImplementedError, AttributeError, ValueError, RuntimeError) as error:
            self.reasons[name] = (str(error) or type(error).__name__).splitlines()[0]

    def lines(self) -> list[str]:
        return [f"not available for {name}: {reason}" for name, reason in self.reasons.items()]


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
) -> list[str]:
    r"""Evaluates a trained VAE on test data and writes results, tables and pictures.

    What a model has no closed form, mean or pixel space for is left out, and the results say so.
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

    Returns:
        Lines that say what was found, and where it is.
    """
    out, missing = Path(out), Missing()
    torch.manual_seed(seed)
    test = data.test if isinstance(data, ImageData) else data
    c, classes = context(data) if labels else (None, None)
    terms = readable_terms(vae, evaluate(vae, test, elbo, c=c, progress=progress))
    validated = [record for record in history if "validation" in record]
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
    lines = [
        f"{summary}, on {len(test)} images",
        *(f"    {value:9.2f}  {name}" for name, value in terms.items()),
    ]
    if extractor is not None:
        with missing.unless("Fréchet distances"):
            if not isinstance(data, ImageData):
                raise ValueError("data are no ImageData")
            cache = out.parent / "statistics"
            found = frechet_distances(
                vae, data, extractor, num_images, cache_dir=cache, progress=progress, c=c
            )
            results["frechet"] = found
            lines.append(
                "{label}: samples {samples:.2f}, reconstructions {reconstructions:.2f} "
                "({num_images} images on each side, reference: {reference})".format(**found)
            )
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
        plotting.plot_elbo_terms(terms, out / "terms.png", "Negative ELBO of the test images")
    with missing.unless("history.png"):
        plotting.plot_history(validated, out / "history.png")
    with missing.unless("kl_by_timestep.png"):
        if kl is not None:
            plotting.plot_kl_by_timestep(kl, out / "kl_by_timestep.png")
    save_pictures(vae, test, x, None if c is None else c[: len(x)].to(x), classes, out, missing)
    if len(missing.reasons) > known:
        save()
    return [*lines, *missing.lines(), f"results, tables and pictures are in {out}"]


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
    names = {"x": "-log p(x | z_0), reconstruction"}
    if T is not None:
        names |= {
            "-H[z_0]": "log q(z_0 | x), negative entropy",
            f"z_{T}": "KL(q(z_T | z_0) || p(z_T))",
            "z_s": "KL of the steps t = 2..T",
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


def pixel_space(vae: VAE) -> PixelSpace:
    if vae.space is None:
        raise ValueError("vae.space is None, data are no 8-bit images")
    return vae.space


@torch.no_grad()
def save_pictures(
    vae: VAE,
    test: Tensor,
    x: Tensor,
    c: Tensor | None,
    classes: int | None,
    out: Path,
    missing: Missing,
) -> None:
    r"""Writes the pictures that a model is judged by at a glance; samples by class, if it has any.

    Arguments:
        vae: The VAE.
        test: The test images.
        x: The first of them in x-space.
        c: Their context.
        classes: The number of classes, if the context is the class: samples are in rows by class.
        out: The run directory.
        missing: Where to note what is not available.
    """
    with missing.unless("pictures"):
        space = pixel_space(vae)

        def to_unit(z: Tensor, c: Tensor | None) -> Tensor:
            return space.to_unit(point(call(vae.decoder, z, c)))

        with missing.unless("samples.png"):
            given = None
            if classes is not None:  # a row of eight for each class
                given = one_hot(torch.arange(classes).repeat_interleave(8), classes).to(x)
            z = sample(vae.prior, 64 if given is None else len(given), given)
            plotting.save_image_grid(to_unit(z, given), out / "samples.png", columns=8)
        with missing.unless("reconstructions.png"):
            few = None if c is None else c[:16]
            plotting.save_reconstructions(
                test[:16].to(x.device).double() / (space.levels - 1),
                space.to_unit(reconstruct(vae, x[:16], few)),
                out / "reconstructions.png",
            )
        if num_timesteps(vae) is None:
            return
        with missing.unless("denoising.png"):
            given = None if c is None else c[:6]
            count = 6 if given is None else len(given)
            prior = check_diffusion(vae.prior)
            times, z = trajectory(prior, num_samples=count, num_frames=9, c=given)
            frames = torch.stack([to_unit(frame, given) for frame in z], dim=1)
            labels = [f"t = {t}" for t in times.tolist()]
            plotting.save_strip(frames, out / "denoising.png", labels)
