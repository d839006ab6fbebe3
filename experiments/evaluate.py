r"""Evaluates trained models beyond the bound that they were trained on.

    python experiments/evaluate.py runs/digits-*

For each run directory, on test images of its data set:

- the importance-weighted log p(x), so that all priors are compared on the same number; beside it
  the negative ELBO of the same images, which says how much the bound leaves, and the differences
  between the runs, which must be of one data set. For a diffusion prior it is that of its chain in
  100 steps, which takes less time for the same standard error, or with ``--log-prior flow`` the
  exact one of its probability flow: models of their own, each with a likelihood. Below each number
  there is what it is, as ``pyro_vaediff.evaluate.audit`` says it;
- ELBO surgery: the mean KL as the mutual information of x and z_0, and the KL divergence of the
  aggregate posterior from the prior; and the number of active units;
- the negative ELBO of the images of log p(x) with the aggregate posterior of *all training images*
  as the prior: a bound as well. On the training images no prior of that encoder is above it; on
  others it is where learned priors head for, and no strict limit.

What a model has no closed form for is left out, and it says so: both of the latter with a posterior
that is an inverse autoregressive flow, and the last one with any flow.

The numbers are printed and go to evaluation.json in the run directory, where ``table.py`` finds
them, and likelihood.png there has log p(x) by the number of samples: where it still rises, it is
below log p(x). A run that has been evaluated with the same options is left as it is.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import exit_on_error, parse_device

from pyro_vaediff.arguments import check_seed
from pyro_vaediff.data import ImageData
from pyro_vaediff.evaluate import (
    Surgery,
    aggregate_prior,
    audit,
    bits_per_dim,
    elbo_surgery,
    evaluate,
    log_likelihood,
    log_likelihood_by_samples,
)
from pyro_vaediff.files import read_json, write_json
from pyro_vaediff.plotting import plot_log_likelihood
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.train.pictures import Missing, pixel_space
from pyro_vaediff.train.runs import load_data, load_vae
from pyro_vaediff.vae import VAE

EVALUATION, PLOT = "evaluation.json", "likelihood.png"
NUM_STEPS = {"chain": 100, "flow": 8}  # by density of a diffusion prior


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--root", default="data", help="where the data are (%(default)s)")
    parser.add_argument("--groups", type=Path, metavar="FILE", help="the list that the runs had")
    parser.add_argument("--no-download", action="store_true", help="never download data")
    parser.add_argument(
        "--num-images", type=int, default=200, help="test images for log p(x) (%(default)s)"
    )
    parser.add_argument(
        "--num-samples", type=int, default=16, help="draws of z_0 per image (%(default)s)"
    )
    parser.add_argument(
        "--log-prior",
        choices=NUM_STEPS,
        default="chain",
        help="the density of a diffusion prior: that of its chain, from a draw of all latents per "
        "sample, or the exact one of its probability flow (%(default)s)",
    )
    parser.add_argument(
        "--num-steps",
        type=int,
        help="its steps (" + ", ".join(f"{n} of the {of}" for of, n in NUM_STEPS.items()) + ")",
    )
    parser.add_argument(
        "--batch-size", type=int, default=500, help="latents at a time (%(default)s)"
    )
    parser.add_argument(
        "--surgery-images",
        type=int,
        default=1000,
        help="test images for ELBO surgery; mutual information is log of it at most (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", type=parse_device, default="cpu", help="(%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    for name in ("num_images", "num_samples", "num_steps", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, got {getattr(args, name)}")
    if args.surgery_images < 2:
        raise ValueError(f"--surgery-images must be at least 2, got {args.surgery_images}")
    check_seed(args.seed, "--seed")
    return args


def likelihood(vae: VAE, data: ImageData, args: argparse.Namespace) -> dict[str, Any]:
    r"""Returns the importance-weighted log p(x), and the negative ELBO of the same images."""
    images = data.test[: args.num_images]
    density = density_of(vae, args.log_prior, args.num_steps)
    common = {"seed": args.seed, "progress": not args.quiet}
    by_samples = log_likelihood_by_samples(
        vae, images, args.num_samples, batch_size=args.batch_size, **common, **density
    )
    log_px = by_samples[args.num_samples]
    nats, width = -log_px.mean().item(), pixel_space(vae).log_bin_width
    elbo = sum(evaluate(vae, images, **common).values())
    return {
        "negative_log_likelihood": nats,
        "standard_error": log_px.std().item() / len(images) ** 0.5 if len(images) > 1 else None,
        "bits_per_dim": bits_per_dim(nats, data.image_shape, width),
        "negative_elbo": elbo,
        "gap": elbo - nats,
        "images": len(images),
        "samples": args.num_samples,
        "by_samples": {k: rounded(-values.mean()) for k, values in by_samples.items()},
        "log_likelihoods": [rounded(value) for value in log_px],
    } | density


def density_of(vae: VAE, log_prior: str, num_steps: int | None = None) -> dict[str, Any]:
    r"""Returns the options of the density of a diffusion prior, and none for other priors."""
    if not isinstance(vae.prior, DiffusionPrior):
        return {}
    steps = min(NUM_STEPS[log_prior], vae.prior.num_timesteps) if num_steps is None else num_steps
    return {"log_prior": log_prior, "num_steps": steps}


def rounded(nats: torch.Tensor) -> float:
    return round(nats.item(), 4)


def classes(vae: VAE, args: argparse.Namespace) -> dict[str, str]:
    r"""Returns what each number of :func:`likelihood` is, in one line."""
    density = density_of(vae, args.log_prior, args.num_steps)
    log_px = audit(log_likelihood, vae, num_samples=args.num_samples, **density)
    elbo = audit(evaluate, vae)
    return {
        "negative_log_likelihood_is": log_px.text,
        "negative_elbo_is": elbo.text,
        "gap_is": elbo.against(log_px),
    }


def ceiling(vae: VAE, data: ImageData, args: argparse.Namespace) -> dict[str, Any]:
    r"""Returns the negative ELBO with the aggregate posterior of the training data as the prior, of
    the images of :func:`likelihood`."""
    images, common = data.test[: args.num_images], {"seed": args.seed, "progress": not args.quiet}
    prior = aggregate_prior(vae, data.train, **common)
    best = VAE(vae.encoder, vae.decoder, prior, vae.space)
    return {
        "negative_elbo": sum(evaluate(best, images, **common).values()),
        "negative_elbo_is": audit(evaluate, best).text,
        "images": len(images),
        "training_images": len(data.train),
    }


def as_numbers(surgery: Surgery) -> dict[str, Any]:
    r"""Returns the results of ELBO surgery, without those of single units."""
    numbers: dict[str, Any] = {}
    for name, value in asdict(surgery).items():
        if name in ("mutual_information", "marginal_kl", "total_kl"):
            numbers |= {name: value[0], f"{name}_se": value[1]}
        elif not isinstance(value, torch.Tensor):
            numbers[name] = value
    return numbers


def evaluate_run(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    r"""Returns all numbers of a run."""
    start = time.perf_counter()
    vae, _ = load_vae(path, args.device)
    data = load_data(path, args.root, not args.no_download, args.groups)
    images = data.test[: args.surgery_images]
    common = {"seed": args.seed, "progress": not args.quiet}
    results = {"likelihood": likelihood(vae, data, args) | classes(vae, args)}
    missing = Missing()
    with missing.unless("surgery"):
        results["surgery"] = as_numbers(elbo_surgery(vae, images, **common))
        if isinstance(vae.prior, DiffusionPrior):
            # The same with log p(z_0) of the probability flow, which is no bound.
            flow = density_of(vae, "flow")
            results["surgery_flow"] = as_numbers(elbo_surgery(vae, images, **flow, **common))
    with missing.unless("aggregate"):
        results["aggregate"] = ceiling(vae, data, args)
    if missing.reasons:
        results["not_available"] = missing.reasons
    return results | {"seconds": time.perf_counter() - start}


def describe(results: dict[str, Any]) -> list[str]:
    r"""Returns the results in lines to be read."""
    likelihood = results["likelihood"]
    error = likelihood["standard_error"]
    lines = [
        f"    log p(x) >= {-likelihood['negative_log_likelihood']:.2f} nats"
        + (f" ± {error:.2f}" if error is not None else "")
        + f", {likelihood['bits_per_dim']:.3f} bits/dim ({likelihood['images']} images, "
        f"{likelihood['samples']} samples); the ELBO is {likelihood['gap']:.2f} nats below"
    ]
    names = {"negative_log_likelihood": "log p(x)", "negative_elbo": "ELBO", "gap": "compared"}
    lines += [
        f"        {name}: {likelihood[f'{key}_is']}"
        for key, name in names.items()
        if f"{key}_is" in likelihood  # files of earlier versions have none
    ]
    for name in ("surgery", "surgery_flow"):
        if (part := results.get(name)) is not None:
            lines.append(
                f"    KL {part['total_kl']:.2f} = mutual information "
                f"{part['mutual_information']:.2f} (at most {part['max_mutual_information']:.2f}) "
                f"+ marginal KL {part['marginal_kl']:.2f} ± {part['marginal_kl_se']:.2f}"
                + {"surgery": "", "surgery_flow": " by the probability flow"}[name]
                + f", {part['active_units']} active units"
            )
    if (part := results.get("aggregate")) is not None:
        gain = likelihood["negative_elbo"] - part["negative_elbo"]
        lines.append(
            f"    ELBO {-part['negative_elbo']:.2f} nats, {gain:+.2f}, with the aggregate "
            f"posterior of {part['training_images']:,} training images as prior"
        )
    missing = results.get("not_available", {}).items()
    return lines + [f"    not available for {name}: {reason}" for name, reason in missing]


def compare(found: dict[Path, list[float]]) -> list[str]:
    r"""Returns the differences from the run with the highest log p(x), image by image."""
    values = {path: torch.tensor(numbers, dtype=torch.float64) for path, numbers in found.items()}
    best = max(values, key=lambda path: values[path].mean().item())
    lines = [f"log p(x) less than that of {best}, in pairs of the same image:"]
    for path in sorted(values, key=lambda path: -values[path].mean().item()):
        difference = values[best] - values[path]
        error = difference.std().item() / len(difference) ** 0.5
        lines.append(f"    {difference.mean():7.2f} ± {error:.2f} nats  {path}")
    return lines


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    found: dict[Path, list[float]] = {}
    names = "num_images", "num_samples", "log_prior", "num_steps", "surgery_images", "seed"
    options = {name: getattr(args, name) for name in names}
    for path in args.runs:
        if not path.is_dir():
            raise FileNotFoundError(f"no run directory at {path}")
        file = path / EVALUATION
        results = read_json(file) if file.exists() else {}
        if results.get("options") != options:
            results = evaluate_run(path, args) | {"options": options}
            by_samples = results["likelihood"]["by_samples"].items()
            plot_log_likelihood({k: -value for k, value in by_samples}, path / PLOT)
            write_json(file, results)
        print("\n".join([str(path), *describe(results)]), flush=True)
        found[path] = results["likelihood"]["log_likelihoods"]
    if len(found) > 1 and args.num_images > 1:
        print("\n".join(compare(found)))


if __name__ == "__main__":
    with exit_on_error("runs that were evaluated are kept"):
        main()
