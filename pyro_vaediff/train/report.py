r"""What a run leaves to read: results, tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from .. import plotting
from ..data import ImageData
from ..evaluate import Extractor, bits_per_dim, image_statistics, reference_statistics
from ..evaluate.elbo import evaluate, preprocess
from ..files import write_csv, write_json
from ..infer import Timestep_ELBO, elbo_terms
from ..priors import DiffusionPrior
from ..sampling.samplers import reconstruct, sample, trajectory
from ..vae import VAE

__all__ = ["frechet_distances", "kl_by_timestep", "readable_terms", "report"]


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
    terms = readable_terms(vae, evaluate(vae, data.test, data.levels, elbo, progress=progress))
    loss = sum(terms.values())
    width = vae.decoder.likelihood.log_bin_width(data.levels)
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
    plotting.plot_elbo_terms(terms, out / "terms.png", "Negative ELBO of the test images")
    plotting.plot_history(history, out / "history.png")
    save_pictures(vae, data, out)
    write_json(out / "results.json", results)  # at last: a run that has results is finished
    return [*lines, f"results, tables and pictures are in {out}"]


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
def kl_by_timestep(vae: VAE, x: Tensor) -> Tensor:
    r"""Returns :math:`\mathrm{KL}(q(z_{t-1} | z_t, x) \,\|\, p(z_{t-1} | z_t))` for :math:`t = 1,
    \dots, T`, averaged over images, in nats.

    Together with :math:`\mathrm{KL}(q(z_T | x) \,\|\, p(z_T))` they sum to the KL divergence of the
    whole chain.

    Arguments:
        vae: A VAE with a diffusion prior and a Gaussian encoder.
        x: The images, with shape :math:`(B, C, H, W)`.

    Returns:
        The KLs, with shape :math:`(T,)`.
    """
    terms = elbo_terms(vae.model, vae.guide, x, elbo=Timestep_ELBO("all", conditioning="x"))
    first = terms["z_0"].mean().reshape(1)
    return torch.cat([first, terms["z_s"].mean(-1)]) if "z_s" in terms else first


@torch.no_grad()
def frechet_distances(
    vae: VAE,
    data: ImageData,
    extractor: Extractor,
    num_images: int = 10_000,
    cache_dir: Path | None = None,
    batch_size: int = 100,
    progress: bool = False,
) -> dict[str, Any]:
    r"""Returns the Fréchet distances of samples and of reconstructions to the test images.

    Samples and reconstructions are the means of :math:`p(x | z_0)`, as in the paper. The distance
    of the reconstructions is the floor that the decoder sets.

    Arguments:
        vae: The VAE.
        data: The images. The reference is the test split, or its first ``num_images``.
        extractor: The features.
        num_images: The number of images on each side, at most.
        cache_dir: Where the statistics of the reference are cached.
        batch_size: The number of images that are sampled at once.
        progress: Whether to show progress bars.
    """
    reference = data.test[:num_images]
    likelihood = vae.decoder.likelihood

    def samples():
        # A chain of a thousand steps is the faster, the more latents go through it at once.
        for many in reference.split(10 * batch_size):
            for z_0 in sample(vae.prior, len(many)).split(batch_size):
                yield likelihood.to_unit(vae.decode(z_0).mean, data.levels)

    def reconstructions():
        for batch in reference.split(batch_size):
            x = preprocess(vae, batch.to(next(vae.parameters()).device), data.levels)
            yield likelihood.to_unit(reconstruct(vae, x), data.levels)

    statistics = reference_statistics(
        reference, extractor, levels=data.levels, cache_dir=cache_dir, progress=progress
    )
    return {
        "label": extractor.label,
        "samples": image_statistics(samples(), extractor).distance(statistics),
        "reconstructions": image_statistics(reconstructions(), extractor).distance(statistics),
        "num_images": len(reference),
        "reference": f"{data.name} test split",
    }


@torch.no_grad()
def save_pictures(vae: VAE, data: ImageData, out: Path) -> None:
    r"""Writes the pictures that a model is judged by at a glance."""
    likelihood = vae.decoder.likelihood

    def to_unit(x: Tensor) -> Tensor:
        return likelihood.to_unit(x, data.levels)

    plotting.save_image_grid(
        to_unit(vae.decode(sample(vae.prior, 64)).mean), out / "samples.png", columns=8
    )
    images = data.test[:100].to(next(vae.parameters()).device)
    x = preprocess(vae, images, data.levels)
    plotting.save_reconstructions(
        images[:16].double() / (data.levels - 1),
        to_unit(reconstruct(vae, x[:16])),
        out / "reconstructions.png",
    )
    if not isinstance(vae.prior, DiffusionPrior):
        return
    times, z = trajectory(vae.prior, num_samples=6, num_frames=9)
    frames = to_unit(vae.decode(z).mean).transpose(0, 1)
    labels = [f"t = {t}" for t in times.tolist()]
    plotting.save_strip(frames, out / "denoising.png", labels)
    kl = kl_by_timestep(vae, x)
    plotting.plot_kl_by_timestep(kl, out / "kl_by_timestep.png")
    rows = [{"t": t, "nats": value} for t, value in enumerate(kl.tolist(), start=1)]
    write_csv(out / "kl_by_timestep.csv", rows)
