r"""What a run leaves to read: results, tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
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
from ..priors import DiffusionPrior
from ..sampling import point, reconstruct, sample, trajectory
from ..vae import VAE

__all__ = ["readable_terms", "report"]


def report(
    vae: VAE,
    data: ImageData,
    history: list[dict[str, float]],
    out: str | Path,
    extractor: Extractor | None = None,
    elbo: ELBO | None = None,
    num_images: int = 10_000,
    seed: int = 0,
    progress: bool = False,
    extra: dict[str, Any] | None = None,
) -> list[str]:
    r"""Evaluates a trained VAE on test images and writes results, tables and pictures.

    Arguments:
        vae: The VAE, in eval mode.
        data: The images.
        history: The records of the training epochs.
        out: The run directory.
        extractor: The features of the Fréchet distance, if it is wanted.
        elbo: The estimator of the test images' negative ELBO, see
            :func:`~pyro_vaediff.evaluate.elbo.evaluate`.
        num_images: The number of images on each side of the Fréchet distance, at most.
        seed: The seed of everything that is sampled.
        progress: Whether to show progress bars.
        extra: More entries for ``results.json``.

    Returns:
        Lines that say what was found, and where it is.
    """
    out = Path(out)
    torch.manual_seed(seed)
    terms = readable_terms(vae, evaluate(vae, data.test, elbo, progress=progress))
    loss = sum(terms.values())
    width = 0.0 if vae.space is None else vae.space.log_bin_width
    results: dict[str, Any] = {
        "test_images": len(data.test),
        "test_negative_elbo": loss,
        "test_bits_per_dim": bits_per_dim(loss, data.image_shape, width),
        "terms": terms,
        "best_epoch": 1 + min(range(len(history)), key=lambda i: history[i]["validation"]),
    }
    lines = [
        f"test -ELBO {loss:.2f} nats per datum, {results['test_bits_per_dim']:.3f} bits/dim"
        f"{' (of the dequantized density)' if width else ''}, on {len(data.test)} images",
        *(f"    {value:9.2f}  {name}" for name, value in terms.items()),
    ]
    if extractor is not None:
        results["frechet"] = frechet_distances(
            vae, data, extractor, num_images, cache_dir=out.parent / "statistics", progress=progress
        )
        lines.append(
            "{label}: samples {samples:.2f}, reconstructions {reconstructions:.2f} "
            "({num_images} images on each side, reference: {reference})".format(
                **results["frechet"]
            )
        )
    results |= extra or {}
    write_csv(out / "terms.csv", [{"term": name, "nats": value} for name, value in terms.items()])
    # Before the pictures: a run that has results is finished, whatever becomes of them.
    write_json(out / "results.json", results)
    plotting.plot_elbo_terms(terms, out / "terms.png", "Negative ELBO of the test images")
    plotting.plot_history(history, out / "history.png")
    missing = save_pictures(vae, data, out)
    return [*lines, *missing, f"results, tables and pictures are in {out}"]


def readable_terms(vae: VAE, terms: dict[str, float]) -> dict[str, float]:
    r"""Names the terms of :func:`evaluate` by what they mean, in the order of the derivation."""
    names = {"x": "-log p(x | z_0), reconstruction"}
    if isinstance(vae.prior, DiffusionPrior):
        T = vae.prior.num_timesteps
        names |= {
            "-H[z_0]": "log q(z_0 | x), negative entropy",
            f"z_{T}": "KL(q(z_T | z_0) || p(z_T))",
            "z_s": "KL of the steps t = 2..T",
            "z_0": "-log p(z_0 | z_1), the step t = 1",
        }
        terms = dict(terms)
        terms["z_s"] = terms.get("z_s", 0.0) + terms.pop("constant", 0.0)
    elif "-H[z_0]" in terms:
        names |= {"-H[z_0]": "log q(z_0 | x), negative entropy", "z_0": "-log p(z_0)"}
    else:
        names |= {"z_0": "KL(q(z_0 | x) || p(z_0))"}
    return {label: terms[name] for name, label in names.items() if name in terms}


@torch.no_grad()
def save_pictures(vae: VAE, data: ImageData, out: Path) -> list[str]:
    r"""Writes the pictures that a model is judged by at a glance, and returns what is missing."""
    parameter, missing = next(vae.parameters()), []

    def decode(z_0: Tensor) -> Tensor:
        return to_unit(vae, point(vae.decoder(z_0)))

    plotting.save_image_grid(decode(sample(vae.prior, 64)), out / "samples.png", columns=8)
    images = data.test[:100].to(parameter.device)
    x = preprocess(vae, images)
    plotting.save_reconstructions(
        images[:16].double() / (data.levels - 1),
        to_unit(vae, reconstruct(vae, x[:16])),
        out / "reconstructions.png",
    )
    if isinstance(vae.prior, DiffusionPrior):
        times, z = trajectory(vae.prior, num_samples=6, num_frames=9)
        frames, labels = decode(z).transpose(0, 1), [f"t = {t}" for t in times.tolist()]
        plotting.save_strip(frames, out / "denoising.png", labels)
        try:
            kl = kl_by_timestep(vae, x)
        except ValueError as error:  # of a posterior that is no Gaussian
            missing.append(f"kl_by_timestep is not available: {str(error).partition(chr(10))[0]}")
        else:
            plotting.plot_kl_by_timestep(kl, out / "kl_by_timestep.png")
            rows = [{"t": t, "nats": value} for t, value in enumerate(kl.tolist(), start=1)]
            write_csv(out / "kl_by_timestep.csv", rows)
    return missing


def to_unit(vae: VAE, x: Tensor) -> Tensor:
    r"""Returns images in [0, 1]; without a pixel space they are there already."""
    return x.clamp(0, 1) if vae.space is None else vae.space.to_unit(x)
