r"""Compares encoders with a learned noise and with one that is fixed on the diffusion path.

    python experiments/noise_matched.py

trains encoder, decoder and diffusion prior of the digits jointly, from the same weights, by the
bound, with

    learned   q(z_0|x) = N(mu(x), sigma(x)^2), and a chain that starts at clean latents
    fixed L   q(z_0|x) = N(alpha_0 mu(x), sigma_0^2) at the log-SNR L, where the chain starts as
              well; its reverse variances are those of the posterior given z_0

and records after every few epochs what becomes of the latents, and the noise of the gradients. The
folder ``--out`` then holds

    noise_matched.csv  a row per noise, seed and recorded epoch, of the validation images: the root
                       mean square of the posterior means and scales, the number of active units,
                       the reconstruction and the -ELBO in nats; and of 100 training images the
                       total variance of the gradients of encoder and prior over 100 draws of the
                       estimator, divided by the squared length of their mean
    noise_matched.md   the page to read: the end of every run, mean and standard error over seeds
    noise_matched.png  the same against epochs
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from common import exit_on_error
from following import LATENTS, Row, Study, latents

from pyro_vaediff.bench import draw, noise_of
from pyro_vaediff.evaluate import preprocess
from pyro_vaediff.infer import Estimator, Timestep_ELBO
from pyro_vaediff.train import ModelConfig, Trainer

LOG_SNRS = (2.0, 3.0, 5.0, 7.0)
DRAWS = 100


class NoiseMatchedStudy(Study):
    r"""One network, several noises of the encoder."""

    name, key = "noise_matched", "noise"
    title = "The noise of the encoder: learned, or on the diffusion path"
    variants = ("learned", *(f"fixed {log_snr:g}" for log_snr in LOG_SNRS))
    quantities: ClassVar[Mapping[str, str]] = LATENTS | {
        "encoder": "gradient noise, encoder",
        "prior": "gradient noise, prior",
    }
    logarithmic = ("mean", "scale", "encoder", "prior")
    hidden = ("active", "reconstruction")

    def model(self, variant: str, args: argparse.Namespace) -> tuple[ModelConfig, Estimator]:
        model = ModelConfig(latent_dim=16, width=args.width, levels=17)
        if variant != "learned":
            log_snr = float(variant.split()[-1])
            model = replace(model, noise_log_snr=log_snr, reverse_variance="beta_tilde")
        return model, Timestep_ELBO(k=args.k)

    def measure(self, trainer: Trainer) -> Row:
        row, vae = latents(trainer), trainer.vae
        x = preprocess(vae, trainer.data.train.x[:100].to(trainer.device))
        with torch.random.fork_rng([]):
            draws = draw(trainer.elbo, vae, [x] * DRAWS)
        for name in ("encoder", "prior"):
            gradients = draws.gradients[name]
            noise = noise_of(gradients, gradients.mean(0))
            row[name] = 1 / noise.snr**2 if noise.snr else float("inf")
        return row


def main(argv: list[str] | None = None) -> None:
    NoiseMatchedStudy(__doc__).main(argv)


if __name__ == "__main__":
    with exit_on_error():
        main()
