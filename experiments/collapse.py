r"""Shows that the collapse of latent diffusion is a missing entropy: four objectives, one network.

    python experiments/collapse.py

trains encoder, decoder and diffusion prior of the digits jointly, from the same weights, with

    denoising     reconstruction + the loss L_simple of the denoiser, whose gradient reaches the
                  encoder: how latent diffusion would be trained end to end
    denoising+kl  the same + 1e-6 KL(q(z_0|x) || N(0, I)), as in autoencoders for latent diffusion
    simple        the first with -H[q(z_0|x)] and KL(q(z_T|z_0) || p(z_T)): only the weights of the
                  noise levels are not those of the bound
    elbo          the bound

and records after every few epochs what becomes of the latents. The folder ``--out`` then holds

    collapse.csv  a row per objective, seed and recorded epoch, of the validation images: the root
                  mean square of the posterior means and of the posterior scales, the number of
                  active units, the reconstruction and the -ELBO in nats
    collapse.md   the page to read: the end of every run, mean and standard error over seeds
    collapse.png  the same against epochs

The -ELBO is that of the same bound for all objectives.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import exit_on_error
from following import LATENTS, Row, Study, latents
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vaediff.diffusion import base_normal, kl_normal
from pyro_vaediff.infer import Estimator, Reweighted, Term, Timestep_ELBO
from pyro_vaediff.infer.reweighted import simple
from pyro_vaediff.train import ModelConfig, Trainer


def denoising(term: Term) -> Tensor | None:
    r"""Returns a term of the reconstruction and L_simple alone."""
    return None if term.role in ("entropy", "last") else simple(term)


def denoising_kl(term: Term) -> Tensor | None:
    r"""Returns a term of :func:`denoising`, or a millionth of KL(q(z_0|x) || N(0, I))."""
    if term.role != "entropy":
        return denoising(term)
    q = base_normal(term.site["fn"])
    assert q is not None
    standard = torch.distributions.Normal(torch.zeros_like(q.loc), torch.ones_like(q.scale))
    kl = kl_normal(q, standard).flatten(term.value.ndim).sum(-1)
    return 1e-6 * scale_and_mask(kl, term.site["scale"], term.site["mask"])


def objectives(k: int) -> dict[str, Callable[[], Estimator]]:
    r"""Returns the objectives by name."""
    return {
        "denoising": lambda: Reweighted(Timestep_ELBO(k=k), denoising),
        "denoising+kl": lambda: Reweighted(Timestep_ELBO(k=k), denoising_kl),
        "simple": lambda: Reweighted(Timestep_ELBO(k=k), simple),
        "elbo": lambda: Timestep_ELBO(k=k),
    }


class Collapse(Study):
    r"""One network, four objectives."""

    name, key = "collapse", "objective"
    title = "The collapse of latent diffusion is a missing entropy"
    variants = tuple(objectives(1))
    quantities = LATENTS
    logarithmic = ("mean", "scale")
    hidden = ("active",)

    def model(self, variant: str, args: argparse.Namespace) -> tuple[ModelConfig, Estimator]:
        model = ModelConfig(latent_dim=16, width=args.width, levels=17)
        return model, objectives(args.k)[variant]()

    def measure(self, trainer: Trainer) -> Row:
        return latents(trainer)


def main(argv: list[str] | None = None) -> None:
    Collapse(__doc__).main(argv)


if __name__ == "__main__":
    with exit_on_error():
        main()
