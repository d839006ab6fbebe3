r"""The loss of ``Timestep_ELBO`` for a VAE with a diffusion prior, written with tensors only.

``benchmark.py`` compares its cost with that of the programs. It has neither distributions nor
effect handlers, and no choice: a Gaussian likelihood with a shared scale, the ``beta`` reverse
variance, KLs given z_0, and low-discrepancy timesteps from the importance proposal, in pairs with
mirrored noise, and the path derivative of the entropy.
"""

from __future__ import annotations

import copy
import math
from functools import reduce
from operator import add

import pyro
import torch
from torch import Tensor, nn

from pyro_vaediff.denoise import Beta
from pyro_vaediff.infer import ImportanceTimesteps, Timestep_ELBO, Timesteps
from pyro_vaediff.infer.trace_kl_elbo import sites
from pyro_vaediff.likelihoods import GaussianLikelihood
from pyro_vaediff.nn import ConvDecoder, ConvEncoder, bounded_scale
from pyro_vaediff.priors import DiffusionPrior
from pyro_vaediff.train.optim import per_datum
from pyro_vaediff.vae import VAE


class ByHand:
    r"""The loss of ``Timestep_ELBO(k=k)`` in nats per datum.

    Raises:
        ValueError: If the VAE or ``k`` is none that this loss is written for.
    """

    def __init__(self, vae: VAE, k: int = 8):
        if not isinstance(vae.prior, DiffusionPrior) or vae.prior.num_timesteps < 2:
            raise ValueError(
                f"vae must have a diffusion prior of 2 timesteps or more, got {vae.prior}"
            )
        encoder, decoder, denoiser = vae.encoder, vae.decoder, vae.prior.denoiser
        if not (isinstance(encoder, ConvEncoder) and isinstance(decoder, ConvDecoder)):
            raise ValueError("vae must have the networks ConvEncoder and ConvDecoder")
        head = decoder.likelihood
        choice = (denoiser.parameterization, denoiser.variance, denoiser.preconditioning, head)
        if not (
            choice[0] == "eps"
            and isinstance(choice[1], Beta)
            and choice[2] is None
            and isinstance(head, GaussianLikelihood)
            and hasattr(head, "raw_sigma")
        ):
            raise ValueError(
                "vae must have the parameterization 'eps', the reverse variance 'beta', no "
                f"preconditioning and a Gaussian likelihood with a shared sigma, got {choice}"
            )
        if k < 2 or k % 2:
            raise ValueError(f"k must be even, as timesteps come in pairs, got {k}")
        self.encoder, self.decoder, self.likelihood = encoder, decoder, head
        self.k, self.backbone = k, denoiser.backbone
        self.prior = prior = vae.prior
        like = next(vae.parameters())
        beta = prior.schedule.original("betas")
        alpha_bar = (1 - beta).cumprod(0)
        self.log_snr = prior.schedule.original("log_snr").to(like)
        # At t, the entry of a quantity at t - 1 comes first.
        previous = torch.cat([alpha_bar[:1], alpha_bar[:-1]])
        one_minus = torch.cat([torch.ones_like(beta[:1]), 1 - alpha_bar[1:]])  # 0 / 0 at t = 0

        def column(table: Tensor) -> Tensor:
            return table.to(like).unsqueeze(-1)

        self.beta, self.sigma = column(beta), column(beta.sqrt())
        self.root_alpha, self.root_alpha_bar = column((1 - beta).sqrt()), column(alpha_bar.sqrt())
        self.noise = column((1 - alpha_bar).sqrt())
        self.a = column((1 - beta).sqrt() * (1 - previous) / one_minus)
        self.b = column(previous.sqrt() * beta / one_minus)
        self.gain = column(beta / ((1 - beta) * one_minus).sqrt())

        ratio = ((1 - previous) / one_minus)[2:]
        self.constant = prior.latent_dim * ((ratio - 1 - ratio.log()) / 2).sum().item()
        self.probs = ImportanceTimesteps()(prior, "z_0")
        cdf = self.probs.double().cumsum(0)
        self.cdf = cdf / cdf[-1]

    def draw_timesteps(self, batch_size: int) -> Tensor:
        n = self.k // 2 * batch_size
        u = torch.arange(n, dtype=torch.float64, device=self.cdf.device) / n
        u = (u + torch.rand((), dtype=torch.float64, device=self.cdf.device)) % 1
        index = torch.searchsorted(self.cdf, u.reshape(-1, batch_size), right=True)
        return 2 + index.clamp(max=len(self.cdf) - 1).repeat(2, 1)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Draws the noise of z_0, of z_1 and of the z_t, and the timesteps t."""
        shape = (len(x), self.prior.latent_dim)
        shapes = (shape, shape, (self.k // 2, *shape))
        eps_0, eps_1, eps_t = (x.new_empty(s).normal_() for s in shapes)
        return eps_0, eps_1, torch.cat([eps_t, -eps_t]), self.draw_timesteps(len(x))

    def reverse_mean(self, z: Tensor, t: int | Tensor) -> Tensor:
        return self.root_alpha[t] * z - self.gain[t] * self.backbone(z, self.log_snr[t])

    def loss(self, x: Tensor, eps_0: Tensor, eps_1: Tensor, eps_t: Tensor, t: Tensor) -> Tensor:
        encoder, decoder = self.encoder, self.decoder
        T, log_2pi = self.prior.num_timesteps, math.log(2 * math.pi)

        loc, raw = encoder.head(encoder.features(x)).chunk(2, dim=-1)
        scale = bounded_scale(raw, encoder.min_scale, encoder.max_scale)
        z_0 = loc + scale * eps_0
        error = (z_0 - loc.detach()) / scale.detach()  # the path derivative of log q(z_0 | x)
        log_q = -(error.square() / 2 + scale.detach().log() + log_2pi / 2).sum()

        v_T = self.noise[T].square()
        kl_T = (self.root_alpha_bar[T].square() * z_0.square() + v_T - 1 - v_T.log()).sum() / 2

        z_t = self.root_alpha_bar[t] * z_0 + self.noise[t] * eps_t
        difference = self.a[t] * z_t + self.b[t] * z_0 - self.reverse_mean(z_t, t)
        kl = (difference.square() / (2 * self.beta[t])).sum(-1)
        kls = (kl / (self.k * self.probs[t - 2])).sum()

        z_1 = self.root_alpha_bar[1] * z_0 + self.noise[1] * eps_1
        error = (z_0 - self.reverse_mean(z_1, 1)) / self.sigma[1]
        first = (error.square() / 2 + self.sigma[1].log() + log_2pi / 2).sum()

        likelihood = self.likelihood
        sigma = bounded_scale(likelihood.gain * likelihood.raw_sigma, likelihood.floor)
        error = (x - decoder.maps(z_0)) / sigma
        reconstruction = error.square().sum() / 2 + x.numel() * (sigma.log() + log_2pi / 2)

        terms = reconstruction + log_q + kl_T + kls + first
        return terms / len(x) + self.constant


def check_equal(vae: VAE, x: Tensor, k: int = 8) -> None:
    r"""Raises unless both losses, and all their gradients, are the same for the same noise."""
    vae, x = copy.deepcopy(vae).double(), x.double()
    # A denoiser that starts at zero would hide the gradients of its other layers.
    nn.init.normal_(vae.prior.get_parameter("denoiser.backbone.outputs.weight"), std=0.1)
    by_hand, parameters = ByHand(vae, k), list(vae.parameters())
    elbo = Timestep_ELBO(k=k)

    with pyro.get_param_store().scope():
        ((model, guide),) = elbo._get_traces(per_datum(vae.model), per_datum(vae.guide), (x,), {})
        svi_loss = reduce(add, (term.value.sum() for term in elbo.site_terms(model, guide)))
    drawn = (sites(guide)[name] for name in ("z_0", "z_1", "z_t"))
    eps_0, eps_1, eps_t = (((s["value"] - s["fn"].mean) / s["fn"].stddev).detach() for s in drawn)
    loss = by_hand.loss(x, eps_0, eps_1, eps_t, sites(guide)["t"]["value"])

    gradients = [torch.autograd.grad(value, parameters) for value in (svi_loss, loss)]
    # Relative to the largest one: biases in front of a norm have a gradient of zero.
    size = max(gradient.norm() for gradient in gradients[0])
    errors = {"loss": (svi_loss - loss) / svi_loss}
    for (name, _), one, other in zip(vae.named_parameters(), *gradients, strict=True):
        errors[f"gradient of {name}"] = (one - other).norm() / size
    for name, error in errors.items():
        if not error.abs() < 1e-10:
            raise RuntimeError(f"SVI and the loop by hand differ in the {name}, by {error:.1e}")

    proposal = Timesteps(by_hand.probs, 2, low_discrepancy=True).expand((k // 2, len(x)))
    torch.manual_seed(0)
    timesteps = proposal.sample().repeat(2, 1)
    torch.manual_seed(0)
    if not torch.equal(timesteps, by_hand.draw_timesteps(len(x))):
        raise RuntimeError("SVI and the loop by hand draw other timesteps")
