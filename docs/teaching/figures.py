r"""Writes the key figures, as PDF and SVG, and slides of them: ``figures.py --out figures``.

Nothing is trained: every figure is computed from closed forms or on a grid.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vaediff import DiffusionPrior, Timestep_ELBO
from pyro_vaediff.diffusion import normal, q_reverse_moments
from pyro_vaediff.evaluate import guide_marginals, model_marginals
from pyro_vaediff.infer import ImportanceTimesteps, UniformTimesteps, elbo_terms
from pyro_vaediff.nn import MLPBackbone
from pyro_vaediff.plotting import (
    draw_heat_map,
    draw_way_back,
    plot_elbo_terms,
    plot_kl_by_timestep,
)
from pyro_vaediff.plotting.charts import save
from pyro_vaediff.plotting.style import BLACK, BLUE, VERMILLION, legend, slide
from pyro_vaediff.schedules import CosineSchedule, LinearSchedule, Schedule
from pyro_vaediff.testing import Oracle, linear_gaussian_vae

WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
LOCS = torch.tensor([-0.934, 0.363, 1.315], dtype=torch.float64)
SCALES = torch.tensor([0.13, 0.087, 0.173], dtype=torch.float64)
DATA = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(LOCS, SCALES))
GRID = torch.linspace(-6, 6, 601, dtype=torch.float64)


class Slide(NamedTuple):
    r"""A figure with its words."""

    title: str
    alt: str
    says: str
    draw: Callable[[Path], None]


def bound(path: Path) -> None:
    # x ~ N(w z, sigma^2), z ~ N(0, 1): the posterior is N(m, s^2).
    w, sigma, x = 1.5, 0.7, 2.0
    precision = 1 + w**2 / sigma**2
    m, s = w * x / sigma**2 / precision, precision**-0.5
    evidence = dist.Normal(0.0, (w**2 + sigma**2) ** 0.5).log_prob(torch.tensor(x)).item()
    figure, axes = slide("The ELBO is log p(x) minus a KL divergence", panels=2)
    panels = (
        ("mean of the guide", m, torch.linspace(-0.5, 2.7, 200), lambda v: (v, s)),
        ("scale of the guide", s, torch.linspace(0.1, 1.2, 200), lambda v: (m, v)),
    )
    for ax, (label, best, values, guide) in zip(axes, panels, strict=True):
        q = dist.Normal(*guide(values))
        gap = torch.distributions.kl_divergence(q, dist.Normal(m, s))
        ax.axhline(evidence, color=BLACK, linestyle="--", label="log p(x)")
        ax.plot(values, evidence - gap, color=BLUE, linewidth=2.5, label="ELBO")
        ax.plot(best, evidence, "o", color=VERMILLION, markersize=9, label="the posterior")
        ax.set(xlabel=label, ylim=(evidence - 5, evidence + 0.4))
    axes[0].set_ylabel("nats")
    legend(axes[1])
    save(figure, path)


def schedule(path: Path) -> None:
    figure, (left, right) = slide("How fast the chain forgets is chosen, not learned", panels=2)
    t = torch.arange(1, 101)
    for chosen, dashes, name in (
        (LinearSchedule(100), "-", "linear"),
        (CosineSchedule(100), "--", "cosine"),
    ):
        left.plot(
            t,
            chosen.alphas_cumprod[1:].sqrt(),
            dashes,
            color=BLUE,
            linewidth=3,
            label=f"signal, {name}",
        )
        noise = chosen.one_minus_alphas_cumprod[1:].sqrt()
        left.plot(t, noise, dashes, color=VERMILLION, label=f"noise, {name}")
        right.plot(t, chosen.log_snr[1:], dashes, color=BLACK, label=name)
    left.set(xlabel="timestep t", ylabel="scale in $z_t$")
    right.set(xlabel="timestep t", ylabel="log-SNR")
    legend(left)
    legend(right)
    save(figure, path)


def best_kernel(chain: Schedule, z: Tensor, t: int) -> dist.Independent:
    r"""Returns the Gaussian with the mean and the variance of the true way back of the data."""
    start = dist.Normal(LOCS, SCALES).to_event(1)  # the three modes, as if they were dimensions
    mean, variance = q_reverse_moments(chain, start, z, t)
    alpha_bar, one_minus = chain.signal(t, event_dim=0)
    parts = dist.Normal(alpha_bar.sqrt() * LOCS, (alpha_bar * SCALES**2 + one_minus).sqrt())
    share = (parts.log_prob(z) + WEIGHTS.log()).softmax(-1)  # of each mode, given z_t
    loc = (share * mean).sum(-1, keepdim=True)
    spread = (share * (variance + (mean - loc) ** 2)).sum(-1, keepdim=True)
    return normal(loc, spread.sqrt())


def best_marginals(chain: Schedule) -> Tensor:
    T = chain.num_timesteps
    return model_marginals([partial(best_kernel, chain, t=t) for t in range(T, 0, -1)], GRID)


def few_and_many(path: Path) -> None:
    figure, axes = slide("Gaussian steps: few of them blur, many do not", panels=4)
    for ax, T in zip(axes, (2, 8, 32), strict=False):
        density = best_marginals(CosineSchedule(T).double())
        draw_heat_map(ax, density, GRID)
        missed = (DATA.log_prob(GRID).exp() * (DATA.log_prob(GRID) - density[0].log())).nansum()
        nats = missed.item() * (GRID[1] - GRID[0]).item()
        ax.set(title=f"model, T = {T}\nmisses {nats:.2f} nats", ylim=(-2.7, 2.7))
    draw_heat_map(axes[3], guide_marginals(CosineSchedule(32).double(), DATA, GRID), GRID)
    axes[3].set(title="guide, T = 32\n", ylim=(-2.7, 2.7))
    save(figure, path)


def way_back(path: Path) -> None:
    chain, t, z_t = CosineSchedule(32).double(), 16, 0.1
    figure, (left, right) = slide("The guide knows where it is going", panels=2)
    for ax, density, name in (
        (left, guide_marginals(chain, DATA, GRID), "guide: $q(z_t)$, $q(z_s | z_t, z_0)$"),
        (right, best_marginals(chain), "model: $p(z_t)$, paths from one $z_t$"),
    ):
        draw_heat_map(ax, density, GRID)
        ax.set(title=name, ylim=(-2.7, 2.7))
    draw_way_back(left, chain, LOCS[0].item(), z_t, t, label="to the lowest mode")
    draw_way_back(left, chain, LOCS[2].item(), z_t, t, BLUE, "--", "to the highest mode")
    legend(left)
    pyro.set_rng_seed(0)
    z = torch.full((10, 1), z_t, dtype=torch.float64)
    paths = [z]
    for u in range(t, 0, -1):
        paths.append(best_kernel(chain, paths[-1], u).sample())
    for line in torch.cat(paths, dim=1):
        right.plot(range(t, -1, -1), line, color=VERMILLION, linewidth=1.2)
    save(figure, path)


def terms(path: Path) -> None:
    vae = linear_gaussian_vae(num_timesteps=4, seed=0)
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Oracle(vae, x).terms("z_0")
    sums = {name: value.sum().item() for name, value in found.items()}
    plot_elbo_terms(sums, path, "The terms of equation (11)")


def nats(path: Path) -> None:
    # At N(0, I), as its network starts at zero: so a small one will do.
    prior = DiffusionPrior(2, num_timesteps=100, backbone=MLPBackbone(2, hidden_features=[8]))
    pyro.set_rng_seed(0)
    x = torch.tensor([[0.8, -0.5]]).expand(1000, 2)  # a mean over that many draws

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior.model()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior.guide(dist.Normal(x, 0.05).to_event(1))

    with torch.no_grad(), pyro.get_param_store().scope():
        found = elbo_terms(model, guide, x, elbo=Timestep_ELBO("all", conditioning="x"))
    kl = torch.cat([found["z_0"].reshape(1, -1), found["z_s"]]).mean(-1)
    plot_kl_by_timestep(kl, path, "Few steps have most of the KL")


def proposals(path: Path) -> None:
    prior = DiffusionPrior(8, num_timesteps=1000)
    figure, (axes,) = slide("Look where the KL is, and divide by the probability")
    t = torch.arange(2, 1001)
    for proposal, dashes, name in (
        (UniformTimesteps(), "--", "uniform"),
        (ImportanceTimesteps(), "-", "importance"),
    ):
        axes.plot(t, proposal(prior, "z_0"), dashes, color=BLUE, linewidth=2.5, label=name)
    axes.set(xscale="log", yscale="log", xlabel="timestep t", ylabel="probability r(t)")
    legend(axes)
    save(figure, path)


SLIDES = {
    "bound": Slide(
        "The bound and its gap",
        "The ELBO over the guide's mean and scale: hills below the dashed line log p(x).",
        "The ELBO touches log p(x) where the guide is the posterior, and nowhere else.",
        bound,
    ),
    "schedule": Slide(
        "The schedule",
        "Signal falls and noise rises along the chain; the log-SNR falls, for two schedules.",
        "What is left of a datum at time t is known in advance.",
        schedule,
    ),
    "few-and-many": Slide(
        "Few steps and many",
        "Heat maps over time and latent: with 2 steps the modes run together, with 32 they part.",
        "The best Gaussian steps back: each is simple, and many of them are enough.",
        few_and_many,
    ),
    "way-back": Slide(
        "The way back",
        "Two heat maps. Bands lead from one point to two modes; paths of the model to all three.",
        "Given where it started, the guide's step back is one Gaussian; the model has to decide.",
        way_back,
    ),
    "terms": Slide(
        "The terms of the bound",
        "A waterfall of the terms of the negative ELBO, which add up to it.",
        "Reconstruction, entropy, the end of the chain, its steps, and the first step.",
        terms,
    ),
    "nats": Slide(
        "Where the nats are",
        "The KL of each step falls with t; nearly all of its sum is in the first steps.",
        "The steps next to the data are the expensive ones.",
        nats,
    ),
    "proposals": Slide(
        "Which timesteps to draw",
        "The uniform proposal is flat, the importance proposal falls with t.",
        "Any proposal is unbiased with the weight 1 / r(t); a good one is also quiet.",
        proposals,
    ),
}


def write_figures(out: Path) -> list[Path]:
    r"""Writes all figures and the slides, and returns their paths.

    Arguments:
        out: The folder, which is made if it does not exist.
    """
    out.mkdir(parents=True, exist_ok=True)
    written, pages = (
        [],
        ["---\nmarp: true\npaginate: true\n---\n\n# Diffusion priors as programs\n"],
    )
    for name, (title, alt, says, draw) in SLIDES.items():
        for suffix in (".pdf", ".svg"):
            draw(out / f"{name}{suffix}")
            written.append(out / f"{name}{suffix}")
        pages.append(f"\n---\n\n# {title}\n\n![h:480 {alt}]({name}.svg)\n\n{says}\n")
    (out / "slides.md").write_text("".join(pages), encoding="utf-8")
    return [*written, out / "slides.md"]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes the key figures and slides of them.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    out = parser.parse_args(args).out
    if out.exists() and not out.is_dir():
        parser.error(f"--out must be a folder, got the file {str(out)!r}: choose another path")
    for path in write_figures(out):
        print(path)


if __name__ == "__main__":
    main()
