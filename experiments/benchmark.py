r"""Measures what a step of SVI costs, against the same loss written by hand.

    python experiments/benchmark.py

times whole training steps (loss, gradient, clipping, Adam) and prints the ratios of their medians:

    overhead   a step of SVI with Timestep_ELBO, over a step of a loop in plain PyTorch. Both have
               the same networks, the same timesteps per datum from the same proposal with the same
               weights, and the same constants; the loop has no distribution and no effect handler.
    timesteps  a step with T = 4000, over a step with T = 10.

each with the configurations

    cifar10    3 x 32 x 32, batch 100, 100 latents, width 64: convolutions take the time
    digits     1 x  8 x  8, batch 100,   8 latents, width 32: Python takes the time

Before anything is timed, both losses and all their gradients are compared in float64, for the same
noise: the script stops if they are not equal to ten digits.

The two steps of a ratio take turns in one process (A B, B A, A B, ...), such that other work on the
machine slows down both. A ratio is that of the medians; the quartiles are those of the ratios of
the pairs. Absolute times mean little on a busy machine. Nothing is asserted about time.

The table is printed, and written to ``--out`` as ``benchmark.md`` and ``benchmark.csv``. A whole
run takes a few minutes on two CPU cores, and ``--quick`` a few seconds, with small networks whose
ratios have no meaning.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

from pyro_vaediff.build import ModelConfig, make_vae
from pyro_vaediff.checkpoint import write_atomically, write_csv
from pyro_vaediff.infer import Importance, Timestep_ELBO, Timesteps
from pyro_vaediff.nn import bounded_scale
from pyro_vaediff.svi import SVI, TorchOptim, per_datum
from pyro_vaediff.vae import VAE

CONFIGS = {
    "cifar10": ModelConfig(latent_dim=100, image_shape=(3, 32, 32), width=64),
    "digits": ModelConfig(latent_dim=8, image_shape=(1, 8, 8), width=32),
}
# The ratios that the library aims at: (measurement, configuration) -> at most.
TARGETS = {
    ("overhead", "cifar10"): 1.05,
    ("overhead", "digits"): 1.5,
    ("timesteps", "cifar10"): 1.1,
    ("timesteps", "digits"): 1.1,
}
BATCH_SIZE, K, LR, CLIP_NORM = 100, 8, 5e-4, 100.0


# The same loss, by hand ---------------------------------------------------------------------------


class ByHand:
    r"""The loss of ``Timestep_ELBO(k=K)`` for a Gaussian likelihood, with tensors only."""

    def __init__(self, vae: VAE):
        self.vae, prior = vae, vae.prior
        like = next(vae.parameters())
        beta = prior.schedule.original("betas")
        alpha_bar = (1 - beta).cumprod(0)
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
        self.probs = Importance()(prior, "z_0", 2)
        cdf = self.probs.double().cumsum(0)
        self.cdf = cdf / cdf[-1]

    def draw_timesteps(self, batch_size: int) -> Tensor:
        n = K * batch_size
        u = torch.arange(n, dtype=torch.float64, device=self.cdf.device) / n
        u = (u + torch.rand((), dtype=torch.float64, device=self.cdf.device)) % 1
        index = torch.searchsorted(self.cdf, u.reshape(K, batch_size), right=True)
        return 2 + index.clamp(max=len(self.cdf) - 1)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Draws the noise of z_0, of z_1 and of the z_t, and the timesteps t."""
        shape = (len(x), self.vae.prior.latent_dim)
        eps_0, eps_1, eps_t = (x.new_empty(s).normal_() for s in (shape, shape, (K, *shape)))
        return eps_0, eps_1, eps_t, self.draw_timesteps(len(x))

    def reverse_mean(self, z: Tensor, t: int | Tensor) -> Tensor:
        return self.root_alpha[t] * z - self.gain[t] * self.vae.prior.denoiser(z, t)

    def loss(self, x: Tensor, eps_0: Tensor, eps_1: Tensor, eps_t: Tensor, t: Tensor) -> Tensor:
        encoder, decoder = self.vae.encoder, self.vae.decoder
        T, log_2pi = self.vae.prior.num_timesteps, math.log(2 * math.pi)

        loc, raw = encoder.head(encoder.features(x)).chunk(2, dim=-1)
        scale = bounded_scale(raw, encoder.min_scale, encoder.max_scale)
        z_0 = loc + scale * eps_0
        negative_entropy = -(scale.log() + (1 + log_2pi) / 2).sum()

        v_T = self.noise[T].square()
        kl_T = (self.root_alpha_bar[T].square() * z_0.square() + v_T - 1 - v_T.log()).sum() / 2

        z_t = self.root_alpha_bar[t] * z_0 + self.noise[t] * eps_t
        difference = self.a[t] * z_t + self.b[t] * z_0 - self.reverse_mean(z_t, t)
        kl = (difference.square() / (2 * self.beta[t])).sum(-1)
        kls = (kl / (K * self.probs[t - 2])).sum()

        z_1 = self.root_alpha_bar[1] * z_0 + self.noise[1] * eps_1
        error = (z_0 - self.reverse_mean(z_1, 1)) / self.sigma[1]
        first = (error.square() / 2 + self.sigma[1].log() + log_2pi / 2).sum()

        sigma = bounded_scale(decoder.likelihood.raw_sigma, decoder.likelihood.floor)
        error = (x - decoder.maps(z_0)) / sigma
        reconstruction = error.square().sum() / 2 + x.numel() * (sigma.log() + log_2pi / 2)

        terms = reconstruction + negative_entropy + kl_T + kls + first
        return terms / len(x) + self.constant


def check_equal(vae: VAE, x: Tensor) -> None:
    r"""Raises unless both losses, and all their gradients, are the same for the same noise."""
    vae, x = copy.deepcopy(vae).double(), x.double()
    # A denoiser that starts at zero would hide the gradients of its other layers.
    nn.init.normal_(vae.prior.denoiser.net[-1].weight, std=0.1)
    by_hand, parameters = ByHand(vae), list(vae.parameters())
    elbo = Timestep_ELBO(k=K)

    with pyro.get_param_store().scope():
        ((model, guide),) = elbo._get_traces(per_datum(vae.model), per_datum(vae.guide), (x,), {})
        svi_loss = sum(term.sum() for _, term in elbo.site_terms(model, guide))
    sites = [guide.nodes[name] for name in ("z_0", "z_1", "z_t")]
    noise = [((s["value"] - s["fn"].mean) / s["fn"].stddev).detach() for s in sites]
    loss = by_hand.loss(x, *noise, guide.nodes["t"]["value"])

    pairs = [("loss", svi_loss, loss)]
    gradients = (torch.autograd.grad(value, parameters) for value in (svi_loss, loss))
    names = [f"gradient of {name}" for name, _ in vae.named_parameters()]
    pairs += zip(names, *gradients, strict=True)
    for name, one, other in pairs:
        error = ((one - other).norm() / one.norm()).item()
        if not error < 1e-10:
            raise RuntimeError(f"SVI and the loop by hand differ in the {name}, by {error:.1e}")

    states = []
    for draw in (
        Timesteps(by_hand.probs, 2, low_discrepancy=True).expand((K, len(x))).sample,
        lambda: by_hand.draw_timesteps(len(x)),
    ):
        torch.manual_seed(0)
        states.append(draw())
    if not torch.equal(*states):
        raise RuntimeError("SVI and the loop by hand draw other timesteps")


# Steps --------------------------------------------------------------------------------------------


def svi_step(vae: VAE) -> Callable[[Tensor], object]:
    optim = TorchOptim(torch.optim.Adam(vae.parameters(), lr=LR), CLIP_NORM)
    svi = SVI(per_datum(vae.model), per_datum(vae.guide), optim, loss=Timestep_ELBO(k=K))
    return svi.step


def step_by_hand(vae: VAE) -> Callable[[Tensor], object]:
    by_hand, parameters = ByHand(vae), list(vae.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LR)

    def step(x: Tensor) -> Tensor:
        loss = by_hand.loss(x, *by_hand.draw(x))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def milliseconds(step: Callable[[Tensor], object], x: Tensor) -> float:
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    step(x)
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def interleave(
    steps: tuple[Callable[[Tensor], object], ...], x: Tensor, repeats: int, warmup: int
) -> list[list[float]]:
    r"""Returns the times of each of the steps in milliseconds, measured in turns."""
    times: list[list[float]] = [[], []]
    for i in range(warmup + repeats):
        for j in (0, 1) if i % 2 == 0 else (1, 0):
            elapsed = milliseconds(steps[j], x)
            if i >= warmup:
                times[j].append(elapsed)
    return times


def measure(
    name: str, config: ModelConfig, batch_size: int, device: torch.device, repeats: int
) -> list[dict[str, object]]:
    r"""Returns a record for each measurement with a configuration."""

    def make(num_timesteps: int) -> VAE:
        torch.manual_seed(0)
        return make_vae(replace(config, num_timesteps=num_timesteps)).to(device)

    vae = make(1000)
    x = torch.rand(batch_size, *config.image_shape, device=device) * 2 - 1
    check_equal(vae, x[:4])
    print(f"{name}: the losses and their gradients are equal", flush=True)

    measurements = {
        "overhead": (svi_step(copy.deepcopy(vae)), step_by_hand(vae)),
        "timesteps": (svi_step(make(4000)), svi_step(make(10))),
    }
    records = []
    for what, steps in measurements.items():
        times = interleave(steps, x, repeats, warmup=max(2, repeats // 6))
        medians = [statistics.median(column) for column in times]
        ratios = [a / b for a, b in zip(*times, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        records.append(
            {
                "measurement": what,
                "configuration": name,
                "median_ms": round(medians[0], 3),
                "reference_ms": round(medians[1], 3),
                "ratio": round(medians[0] / medians[1], 3),
                "lower_quartile": round(low, 3),
                "upper_quartile": round(high, 3),
                "target": TARGETS[what, name],
            }
        )
    return records


# The table ----------------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def markdown(records: list[dict[str, object]], caption: str) -> str:
    lines = [
        caption,
        "",
        "| measurement | configuration | step (ms) | reference (ms) | ratio | quartiles | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        lines.append(
            f"| {r['measurement']} | {r['configuration']} | {r['median_ms']:.2f} "
            f"| {r['reference_ms']:.2f} | {r['ratio']:.3f} "
            f"| {r['lower_quartile']:.2f} to {r['upper_quartile']:.2f} | ≤ {r['target']} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (%(default)s)")
    parser.add_argument(
        "--configurations", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="(all)"
    )
    parser.add_argument("--repeats", type=int, default=60, help="steps per median (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small networks, few repeats")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")

    # Checks of arguments are for tests and for learning, not for long runs.
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)

    records = []
    for name in args.configurations:
        config, batch_size, repeats = CONFIGS[name], BATCH_SIZE, args.repeats
        if args.quick:
            config, batch_size, repeats = replace(config, width=4, latent_dim=3), 8, 3
        records += measure(name, config, batch_size, device, repeats)

    caption = (
        f"Medians of {repeats} steps, batch {batch_size}, k = {K}, on {machine(device)}; torch "
        f"{torch.__version__}, pyro {pyro.__version__}, {datetime.date.today()}"
        f"{' (--quick: small networks, ratios without meaning)' if args.quick else ''}."
    )
    table = markdown(records, caption)
    print(f"\n{table}")
    write_csv(args.out / "benchmark.csv", records)
    write_atomically(args.out / "benchmark.md", lambda file: file.write(table.encode()))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
