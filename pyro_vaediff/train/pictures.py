r"""The pictures that a model is judged by at a glance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .. import plotting
from ..likelihoods import PixelSpace
from ..priors import DiffusionPrior, HierarchicalPrior, Prior
from ..sampling import guided, point, reconstruct, sample, trajectory
from ..vae import VAE, call
from .splits import one_hot

__all__ = ["Missing", "pixel_space", "save_pictures"]


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
    guidance: float = 0.0,
    draw: Callable[..., Tensor] = sample,
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
        guidance: The weight of the guidance of samples that are not the model's, 0 for none.
        draw: The sampler, called as ``draw(prior, num_samples, c)``.
    """
    with missing.unless("pictures"):
        space = pixel_space(vae)

        def to_unit(z: Tensor, c: Tensor | None) -> Tensor:
            return space.to_unit(point(call(vae.decoder, z, c)))

        with missing.unless("samples.png"):
            given = None
            if classes is not None:  # a row of eight for each class
                given = one_hot(torch.arange(classes).repeat_interleave(8), classes).to(x)
            z = draw(vae.prior, 64 if given is None else len(given), given)
            plotting.save_image_grid(to_unit(z, given), out / "samples.png", columns=8)
            if guidance and given is not None:
                z = draw(guided(vae.prior, guidance), len(given), given)
                plotting.save_image_grid(to_unit(z, given), out / "guided.png", columns=8)
        with missing.unless("reconstructions.png"):
            few = None if c is None else c[:16]
            plotting.save_reconstructions(
                test[:16].to(x.device).double() / (space.levels - 1),
                space.to_unit(reconstruct(vae, x[:16], few)),
                out / "reconstructions.png",
            )
        top: Prior = vae.prior
        if isinstance(top, HierarchicalPrior):
            top = next(top.steps())[1]
            with missing.unless("groups.png"):
                save_groups(vae, x[:8], out / "groups.png")
        if not isinstance(top, DiffusionPrior):
            return
        with missing.unless("denoising.png"):
            given = None if c is None else c[:6]
            count = 6 if given is None else len(given)
            times, z = trajectory(top, num_samples=count, num_frames=9, c=given)
            frames = torch.stack([to_unit(below(vae, frame), given) for frame in z], dim=1)
            labels = [f"t = {t}" for t in times.tolist()]
            plotting.save_strip(frames, out / "denoising.png", labels)


def save_groups(vae: VAE, x: Tensor, path: Path) -> None:
    r"""Writes images and what the top groups of a hierarchy keep of them, the others being drawn.

    Arguments:
        vae: The VAE, whose prior is a hierarchy.
        x: The images in x-space, with shape :math:`(B, C, H, W)`.
        path: The path of the picture.
    """
    assert isinstance(vae.prior, HierarchicalPrior)
    space, count = pixel_space(vae), len(vae.prior.groups)
    columns = [x, *(reconstruct(vae, x, num_groups=n) for n in range(1, count + 1))]
    labels = ["x", *(f"1 to {n}" if n > 1 else "group 1" for n in range(1, count + 1))]
    frames = torch.stack([space.to_unit(column) for column in columns], dim=1)
    title = "What the groups of latents keep of an image"
    plotting.save_strip(frames, path, labels, title)


def below(vae: VAE, z: Tensor) -> Tensor:
    r"""Returns the decoder's input for latents of the top group, with the other groups drawn."""
    if not isinstance(vae.prior, HierarchicalPrior):
        return z
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same for all frames, of which only the top differs
        return vae.prior.reconstruct(lambda *_: dist.Delta(z).to_event(z.ndim - 1), 1)
