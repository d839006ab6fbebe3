r"""Ladders: encoders of several groups of latents that share the generative path.

The groups are ordered from the top, which is the smallest. The generative path turns what was drawn
so far into a state of ``width`` channels, at the resolution of the next group; the encoder reads
the image bottom-up, and joins its features of a group's resolution to the state.

References:
    | Ladder Variational Autoencoders (Sønderby et al., 2016)
    | https://arxiv.org/abs/1602.02282

    | NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat & Kautz, 2020)
    | https://arxiv.org/abs/2007.03898
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import as_shape, check_ends
from .resnet import ResidualBlock2d, make_ladder
from .scale import bounded_scale, upcast
from .vectors import gaussian

__all__ = ["LadderEncoder", "LadderPosterior", "LadderStep", "check_latent_groups", "ladder_path"]


def check_latent_groups(
    groups: Sequence[Sequence[int]], image_shape: Sequence[int]
) -> list[tuple[int, int]]:
    r"""Returns the height and width of each group; a vector has those of the group below it.

    Arguments:
        groups: The shapes of the groups, from the top: :math:`(C, h, w)`, or :math:`(D,)` for the
            first.
        image_shape: The shape :math:`(C, H, W)` of an image.

    Raises:
        ValueError: If they are not such shapes, or are not ordered from small to large.
    """
    if not groups:
        raise ValueError("latent_groups must have one shape or more, got none")
    sides = [make_ladder(image_shape, shape, 1).sides for shape in groups]
    if len(groups[0]) == 1 and len(groups) > 1:
        sides[0] = sides[1]
    if any(len(shape) == 1 for shape in groups[1:]):
        raise ValueError(f"latent_groups: only the first group may be a vector, got {groups}")
    if any(above > below for above, below in pairwise(sides)):
        raise ValueError(
            f"latent_groups must be ordered from the top, the smallest first, got {groups}"
        )
    return sides


class LadderStep(nn.Module):
    r"""A step of the generative path: from a state and the latents of a group to the next state.

    Arguments:
        event_shape: The shape of the group's latents.
        width: The number of channels of a state.
        sides: The height and width of the group's state.
        next_sides: Those of the next one.
        num_blocks: The number of residual blocks.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int,
        sides: tuple[int, int],
        next_sides: tuple[int, int],
        num_blocks: int = 1,
    ):
        super().__init__()
        self.event_shape, self.width, self.sides = tuple(event_shape), width, sides
        self.next_sides = next_sides
        if len(self.event_shape) == 1:
            linear = nn.Linear(self.event_shape[0], width * math.prod(sides))
            self.inputs = nn.Sequential(linear, nn.Unflatten(-1, (width, *sides)))
        else:
            self.inputs = nn.Sequential(nn.Conv2d(self.event_shape[0], width, 3, padding=1))
        self.blocks = nn.Sequential(*(ResidualBlock2d(width) for _ in range(num_blocks)))
        self.outputs = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor | None, z: Tensor) -> Tensor:
        r"""Returns the next state, with shape :math:`(*, W, h', w')`.

        Arguments:
            h: The state, with shape :math:`(*, W, h, w)`, or ``None`` for the first step.
            z: The latents, with shape :math:`(*, \dots)`.
        """
        batch = z.shape[: z.ndim - len(self.event_shape)]
        told = self.inputs(z.reshape(-1, *self.event_shape))
        state = told if h is None else told + h.reshape(-1, *h.shape[-3:])
        state = self.blocks(state)
        if self.next_sides != self.sides:
            state = F.interpolate(state, size=self.next_sides)
        return self.outputs(F.silu(state)).reshape(*batch, self.width, *self.next_sides)


def ladder_path(
    groups: Sequence[Sequence[int]],
    image_shape: Sequence[int],
    width: int = 32,
    num_blocks: int = 1,
) -> list[LadderStep]:
    r"""Returns the generative path of groups of latents, a step for each.

    Arguments:
        groups: The shapes of the groups, from the top.
        image_shape: The shape :math:`(C, H, W)` of an image.
        width: The number of channels of a state.
        num_blocks: The number of residual blocks of a step.
    """
    sides = check_latent_groups(groups, image_shape)
    ends = [*sides[1:], sides[-1]]
    return [
        LadderStep(shape, width, here, there, num_blocks)
        for shape, here, there in zip(groups, sides, ends, strict=True)
    ]


class LadderEncoder(nn.Module):
    r"""The encoder of a hierarchy, which returns a :class:`LadderPosterior`.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of an image.
        groups: The shapes of the groups, from the top.
        width: The number of channels of the bottom-up features, and of the path's states.
        num_blocks: The number of residual blocks per resolution.
        min_scale: The lower bound of the posterior's scales; of a residual posterior, in units of
            the prior's.
        max_scale: Their upper bound.

    Example:
        >>> encoder = LadderEncoder((3, 32, 32), [(16,), (4, 8, 8)], width=8)
        >>> posterior = encoder(torch.zeros(5, 3, 32, 32))
        >>> posterior(1, None, None).event_shape
        torch.Size([16])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        groups: Sequence[int | Sequence[int]],
        width: int = 32,
        num_blocks: int = 1,
        min_scale: float = 1e-3,
        max_scale: float = 1e2,
    ):
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.groups = [as_shape("latent_groups", shape) for shape in groups]
        self.sides = check_latent_groups(self.groups, self.image_shape)
        self.min_scale, self.max_scale = min_scale, max_scale
        ladder = make_ladder(self.image_shape, (1, *min(self.sides)), width)
        self.trunk, self.heads = nn.ModuleList(), nn.ModuleList()
        before = self.image_shape[0]
        for _ in ladder.channels:
            conv = nn.Conv2d(before, width, 4, stride=2, padding=1)
            blocks = (ResidualBlock2d(width) for _ in range(num_blocks))
            self.trunk.append(nn.Sequential(conv, *blocks))
            before = width
        for number, (shape, sides) in enumerate(zip(self.groups, self.sides, strict=True)):
            if len(shape) == 1:
                size = width * math.prod(sides)
                head = nn.Sequential(nn.SiLU(), nn.Flatten(), nn.Linear(size, 2 * shape[0]))
            else:
                inputs = width * (2 if number else 1)
                head = nn.Sequential(
                    nn.Conv2d(inputs, width, 3, padding=1),
                    ResidualBlock2d(width),
                    nn.SiLU(),
                    nn.Conv2d(width, 2 * shape[0], 3, padding=1),
                )
            self.heads.append(head)

    def forward(self, x: Tensor) -> LadderPosterior:
        r"""Returns the posterior of images, which is asked for one group after the other.

        Arguments:
            x: Images in x-space, with shape :math:`(*, C, H, W)`.
        """
        check_ends("x", x, self.image_shape)
        h = x.reshape(-1, *self.image_shape)
        by_sides: dict[tuple[int, ...], Tensor] = {}
        for level in self.trunk:
            h = level(F.pad(h, (0, h.shape[-1] % 2, 0, h.shape[-2] % 2)))
            by_sides[tuple(h.shape[-2:])] = h
        features = [by_sides[sides] for sides in self.sides]
        return LadderPosterior(self, features, x.shape[:-3])


class LadderPosterior:
    r"""The posterior :math:`q(z^l | z^{<l}, x)` of images, one group after the other.

    If the prior of a group is a Gaussian :math:`\mathcal{N}(m_p, s_p^2)` given the state, the
    posterior is parameterized by how it differs, :math:`\mathcal{N}(m_p + s_p \Delta, (s_p r)^2)`:
    where the image has nothing to say, nothing has to be learned.

    Arguments:
        encoder: The encoder.
        features: The bottom-up features of each group, with shape :math:`(N, W, h, w)`.
        batch: The batch shape of the images, with :math:`N` of them in all.
    """

    def __init__(self, encoder: LadderEncoder, features: list[Tensor], batch: torch.Size):
        self.encoder, self.features, self.batch = encoder, features, batch

    def __call__(
        self, group: int, h: Tensor | None, p: torch.distributions.Normal | None
    ) -> dist.TorchDistribution:
        r"""Returns the posterior of a group.

        Arguments:
            group: The number of the group, from 1.
            h: The state of the generative path, with shape :math:`(*, W, h, w)`, or ``None``.
            p: The normals of the group's prior if it is a Gaussian given the state, or ``None``.
        """
        encoder, features = self.encoder, self.features[group - 1]
        batch, shape = self.batch, encoder.groups[group - 1]
        if h is not None and len(shape) > 1:
            batch = torch.broadcast_shapes(h.shape[:-3], batch)
            features = features.reshape(*self.batch, *features.shape[1:])
            pair = (x.expand(*batch, *x.shape[-3:]) for x in (features, h))
            features = torch.cat(list(pair), -3).flatten(0, -4)
        outputs = encoder.heads[group - 1](features)
        outputs = outputs.reshape(*batch, *outputs.shape[1:])
        limits = encoder.min_scale, encoder.max_scale
        if p is None:
            return gaussian(outputs, *limits, len(shape))
        shift, raw = upcast(outputs).chunk(2, dim=-len(shape))
        scale = p.scale * bounded_scale(raw, *limits)
        return dist.Normal(p.loc + p.scale * shift, scale).to_event(len(shape))
