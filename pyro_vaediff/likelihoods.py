r"""Likelihoods :math:`p_\theta(x \mid z_0)`, eq. (15): from the decoder's maps to a distribution.

A likelihood fixes three things together, because they only make sense together: which maps the
decoder has to output, which distribution over images they parameterise, and in which space
(`x`-space) those images live. `preprocess` takes 8-bit images there, `to_unit` takes them back.

========================  ==================  ===================================================
likelihood                maps per channel    x-space, for pixel values u = 0 .. levels - 1
========================  ==================  ===================================================
Gaussian                  1 (2 if per pixel)  [-1, 1], 2 (u + U[0, 1)) / levels - 1 (a density)
Bernoulli                 1                   {0, 1}, drawn with probability u / (levels - 1)
discretized logistic      2                   grid on [-1, 1], 2 u / (levels - 1) - 1
categorical               levels              grid on [-1, 1], 2 u / (levels - 1) - 1
========================  ==================  ===================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from .nn.scale import bounded_scale, upcast

__all__ = [
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "DiscretizedLogistic",
    "DiscretizedLogisticLikelihood",
    "GaussianLikelihood",
    "GridCategorical",
    "Likelihood",
    "check_range",
    "make_likelihood",
]


# --- Distributions over a grid of pixel values --------------------------------------------------


def _to_grid(index: Tensor, levels: int) -> Tensor:
    return 2 * index / (levels - 1) - 1


def _to_index(x: Tensor, levels: int) -> Tensor:
    return ((x + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1)


class _Grid(constraints.Constraint):
    r"""The `levels` equally spaced points from -1 to 1."""

    is_discrete = True

    def __init__(self, levels: int):
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        # A hundredth of a level is far above float32 rounding and far below a real mistake, such
        # as dequantised images.
        off_grid = (value - _to_grid(_to_index(value, self.levels), self.levels)).abs()
        return off_grid * (self.levels - 1) / 2 < 0.01

    def __repr__(self) -> str:
        return f"grid of {self.levels} levels on [-1, 1]"


class _GridDistribution(TorchDistribution):
    r"""A univariate distribution over the `levels` grid points; its parameters broadcast."""

    has_rsample = False
    levels: int

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return _Grid(self.levels)

    def expand(self, batch_shape: torch.Size, _instance: TorchDistribution | None = None):
        new = self._get_checked_instance(type(self), _instance)
        new.levels = self.levels
        batch_shape = torch.Size(batch_shape)
        for name, constraint in self.arg_constraints.items():
            value = getattr(self, name)
            event_shape = value.shape[value.dim() - constraint.event_dim :]
            setattr(new, name, value.expand(batch_shape + event_shape))
        super(_GridDistribution, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


class DiscretizedLogistic(_GridDistribution):
    r"""A logistic variable rounded to a grid of `levels` points on [-1, 1].

    .. math:: p(x) = F(x + h) - F(x - h), \qquad F(y) = \sigma((y - \mathrm{loc}) / \mathrm{scale})

    with the half bin width :math:`h = 1 / (\mathrm{levels} - 1)`. The bins of -1 and 1 are open
    to the outside, so the probabilities sum to one.

    Arguments:
        loc: The location of the logistic variable, in x-space; broadcasts with `scale`.
        scale: The scale of the logistic variable, in x-space; positive.
        levels: The number of grid points.
        validate_args: Whether parameters and values are checked; `None` takes Pyro's setting.

    References:
        | PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other
          Modifications (Salimans et al., 2017)
        | https://arxiv.org/abs/1701.05517

    Example:
        >>> x = torch.linspace(-1.0, 1.0, 5)
        >>> DiscretizedLogistic(torch.tensor(0.0), torch.tensor(0.5), levels=5).log_prob(x).exp()
        tensor([0.1824, 0.1951, 0.2449, 0.1951, 0.1824])
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None
    ):
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half = 1 / (self.levels - 1)
        # With a < b the standardised edges of the bin, sigma(b) - sigma(a) equals
        # sigma(b) sigma(-a) (1 - exp(a - b)): a product of terms whose logarithms are all stable.
        log_below_upper = F.logsigmoid((value - self.loc + half) / self.scale)
        log_above_lower = F.logsigmoid((self.loc - value + half) / self.scale)
        log_width = (-torch.expm1(-2 * half / self.scale)).log().expand_as(log_below_upper)
        # An open edge has sigma = 0 or 1, which removes its factor and the width.
        first, last = value < half - 1, value > 1 - half
        return (
            log_below_upper.masked_fill(last, 0.0)
            + log_above_lower.masked_fill(first, 0.0)
            + log_width.masked_fill(first | last, 0.0)
        )

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        # torch.rand can return 0, whose logit is -inf; _to_index then clamps it to the first bin.
        return _to_grid(_to_index(self.loc + self.scale * u.logit(), self.levels), self.levels)

    @property
    def mean(self) -> Tensor:
        # E[x] = 1 - (2 / (levels - 1)) sum_k F(edge_k), by summation by parts. The loop keeps the
        # memory at one image, where a broadcast would need `levels` of them.
        half = 1 / (self.levels - 1)
        total = torch.zeros_like(self.loc)
        for k in range(self.levels - 1):
            total = total + torch.sigmoid(((2 * k + 1) * half - 1 - self.loc) / self.scale)
        return 1 - 2 * half * total


class GridCategorical(_GridDistribution):
    r"""A categorical variable whose outcomes are the grid points on [-1, 1] instead of indices.

    Arguments:
        logits: The unnormalised log-probabilities, with shape :math:`(*, \mathrm{levels})`.
        validate_args: Whether parameters and values are checked; `None` takes Pyro's setting.
    """

    arg_constraints: ClassVar = {"logits": constraints.real_vector}

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        self.logits = logits
        self.levels = logits.shape[-1]
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        index = _to_index(value, self.levels).long().unsqueeze(-1)
        index, log_probs = torch.broadcast_tensors(index, self.logits.log_softmax(-1))
        return log_probs.gather(-1, index[..., :1]).squeeze(-1)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        # The Gumbel-max trick: -log of an exponential variable is a Gumbel variable.
        shape = (*self._extended_shape(sample_shape), self.levels)
        gumbel = -self.logits.new_empty(shape).exponential_().log()
        index = (self.logits + gumbel).argmax(-1)
        return _to_grid(index.to(self.logits.dtype), self.levels)

    @property
    def mean(self) -> Tensor:
        index = torch.arange(self.levels, dtype=self.logits.dtype, device=self.logits.device)
        # Not a matrix product, which autocast would compute in half precision.
        return (self.logits.softmax(-1) * _to_grid(index, self.levels)).sum(-1)


# --- Likelihoods --------------------------------------------------------------------------------


class Likelihood(nn.Module):
    r"""The contract: maps of the decoder in, a distribution over images out.

    A subclass defines `_distribution`, `_preprocess` and `to_unit`, and `log_bin_width` if x-space
    is continuous.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        maps_per_channel: The number of decoder maps per image channel.

    Attributes:
        num_maps: The number of channels that the decoder has to output.
        discrete: Whether `log_prob` is a log-probability (in nats) rather than a log-density.
        mean_only: Whether the maps are the mean image in [-1, 1], and nothing else.
    """

    discrete: bool
    mean_only: bool = False

    def __init__(self, image_shape: tuple[int, int, int], maps_per_channel: int):
        super().__init__()
        image_shape = tuple(image_shape)
        if len(image_shape) != 3 or any(not isinstance(n, int) or n < 1 for n in image_shape):
            raise ValueError(
                f"image_shape must be three positive ints (C, H, W), got {image_shape}"
            )
        self.image_shape = image_shape
        self.num_maps = maps_per_channel * image_shape[0]

    def forward(self, params: Tensor) -> TorchDistribution:
        r"""Returns :math:`p_\theta(x \mid z_0)`.

        Arguments:
            params: The decoder's maps, with shape :math:`(*, \mathrm{num\_maps}, H, W)`.

        Returns:
            A distribution with batch shape :math:`(*)` and event shape :math:`(C, H, W)`.

        Raises:
            ValueError: If the last three dimensions of `params` are not as above.
        """
        expected = (self.num_maps, *self.image_shape[1:])
        if params.shape[-3:] != expected:
            raise ValueError(f"params must end in shape {expected}, got {tuple(params.shape)}")
        return self._distribution(upcast(params)).to_event(3)

    def preprocess(self, images: Tensor, levels: int = 256) -> Tensor:
        r"""Takes 8-bit images to x-space, drawing noise afresh where the likelihood needs it.

        The values are not looked at, because that would synchronise the device in every training
        step; call `check_range` once where the data are loaded.

        Arguments:
            images: uint8 images with values 0 .. levels - 1 and shape :math:`(*, C, H, W)`.
            levels: The number of levels that a pixel can take, at most 256.

        Returns:
            The images in x-space, in the default dtype and with the shape of `images`.

        Raises:
            ValueError: If dtype, shape or `levels` are not as above.
        """
        _check_levels(levels)
        if images.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8 with values 0..{levels - 1}, got {images.dtype}"
            )
        if images.shape[-3:] != self.image_shape:
            raise ValueError(
                f"images must end in shape {self.image_shape}, got {tuple(images.shape)}"
            )
        return self._preprocess(images.to(torch.get_default_dtype()), levels)

    def to_unit(self, x: Tensor, levels: int = 256) -> Tensor:
        r"""Takes images from x-space to [0, 1], where u becomes u / (levels - 1).

        Arguments:
            x: Images in x-space, of any shape: data, samples or means.
            levels: The number of levels that a pixel can take.

        Returns:
            The images in [0, 1], clamped, with the shape of `x`.
        """
        raise NotImplementedError

    def log_bin_width(self, levels: int = 256) -> float:
        r"""Returns the log of the volume of one pixel value in x-space, in nats (0 if discrete).

        Adding it to the log-density per dimension gives a lower bound on the log-probability.
        """
        return 0.0

    def _distribution(self, params: Tensor) -> TorchDistribution:
        raise NotImplementedError

    def _preprocess(self, u: Tensor, levels: int) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"image_shape={self.image_shape}, num_maps={self.num_maps}"


class GaussianLikelihood(Likelihood):
    r"""A factorised Gaussian density of uniformly dequantised images in [-1, 1].

    .. math:: p_\theta(x \mid z_0) = \mathcal{N}(x \mid \mu_\theta(z_0), \sigma^2 I)

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        sigma: `"shared"` for one learned number, `"pixel"` for a map predicted by the decoder per
            pixel and channel, or a positive number for a fixed standard deviation, in x-space.
            Learned ones are bounded below by 1e-3.

    References:
        | Simple and Effective VAE Training with Calibrated Decoders (Rybkin et al., 2021)
        | https://arxiv.org/abs/2006.13202
    """

    discrete = False
    floor = 1e-3

    def __init__(self, image_shape: tuple[int, int, int], sigma: str | float = "shared"):
        super().__init__(image_shape, maps_per_channel=2 if sigma == "pixel" else 1)
        fixed = isinstance(sigma, int | float) and 0 < sigma < math.inf
        if not fixed and sigma not in ("shared", "pixel"):
            raise ValueError(f"sigma must be 'shared', 'pixel' or a positive number, got {sigma!r}")
        self.mean_only = sigma != "pixel"
        self.fixed_sigma = float(sigma) if fixed else None
        if sigma == "shared":
            # sigma starts at 0.49, about the spread of natural images on [-1, 1].
            self.raw_sigma = nn.Parameter(torch.tensor(-1.0))

    def _distribution(self, params: Tensor) -> TorchDistribution:
        if not self.mean_only:
            loc, raw = params.chunk(2, dim=-3)
            return dist.Normal(loc, bounded_scale(raw, self.floor))
        if self.fixed_sigma is not None:
            return dist.Normal(params, torch.full_like(params, self.fixed_sigma))
        return dist.Normal(params, bounded_scale(upcast(self.raw_sigma), self.floor))

    def _preprocess(self, u: Tensor, levels: int) -> Tensor:
        return 2 * (u + torch.rand_like(u)) / levels - 1

    def to_unit(self, x: Tensor, levels: int = 256) -> Tensor:
        # The centre of the bin of u is 2 (u + 1/2) / levels - 1.
        return (((x + 1) * (levels / 2) - 0.5) / (levels - 1)).clamp(0, 1)

    def log_bin_width(self, levels: int = 256) -> float:
        return math.log(2 / levels)


class BernoulliLikelihood(Likelihood):
    r"""Independent Bernoulli variables for stochastically binarised images in {0, 1}.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
    """

    discrete = True

    def __init__(self, image_shape: tuple[int, int, int]):
        super().__init__(image_shape, maps_per_channel=1)

    def _distribution(self, params: Tensor) -> TorchDistribution:
        return dist.Bernoulli(logits=params)

    def _preprocess(self, u: Tensor, levels: int) -> Tensor:
        return (torch.rand_like(u) < u / (levels - 1)).to(u.dtype)

    def to_unit(self, x: Tensor, levels: int = 256) -> Tensor:
        return x.clamp(0, 1)


class _GridLikelihood(Likelihood):
    r"""What the likelihoods on the grid of pixel values share: their x-space."""

    discrete = True

    def __init__(self, image_shape: tuple[int, int, int], maps_per_channel: int, levels: int):
        super().__init__(image_shape, maps_per_channel)
        _check_levels(levels)
        self.levels = levels

    def _preprocess(self, u: Tensor, levels: int) -> Tensor:
        if levels != self.levels:
            raise ValueError(f"levels={levels}, but the likelihood was made for {self.levels}")
        return _to_grid(u, levels)

    def to_unit(self, x: Tensor, levels: int = 256) -> Tensor:
        return ((x + 1) / 2).clamp(0, 1)


class DiscretizedLogisticLikelihood(_GridLikelihood):
    r"""A discretized logistic per pixel and channel; the decoder outputs location and scale.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        levels: The number of levels that a pixel can take, at most 256.
    """

    def __init__(self, image_shape: tuple[int, int, int], levels: int = 256):
        super().__init__(image_shape, maps_per_channel=2, levels=levels)
        # With a scale of a tenth of half a bin, a bin holds up to 0.9999 of the mass. Below it
        # the likelihood has nothing to gain, and the gradients grow without bound.
        self.floor = 0.1 / (levels - 1)

    def _distribution(self, params: Tensor) -> TorchDistribution:
        loc, raw = params.chunk(2, dim=-3)
        return DiscretizedLogistic(loc, bounded_scale(raw, self.floor), self.levels)


class CategoricalLikelihood(_GridLikelihood):
    r"""A categorical per pixel and channel; the decoder outputs one map per channel and level.

    Arguments:
        image_shape: The shape :math:`(C, H, W)` of one image.
        levels: The number of levels that a pixel can take, at most 256.
    """

    def __init__(self, image_shape: tuple[int, int, int], levels: int = 256):
        super().__init__(image_shape, maps_per_channel=levels, levels=levels)

    def _distribution(self, params: Tensor) -> TorchDistribution:
        logits = params.unflatten(-3, (self.image_shape[0], self.levels))
        return GridCategorical(logits.movedim(-3, -1))


# --- Checks and the factory ---------------------------------------------------------------------


def _check_levels(levels: int) -> None:
    if not isinstance(levels, int) or not 2 <= levels <= 256:
        raise ValueError(f"levels must be an int from 2 to 256 (images are uint8), got {levels}")


def check_range(images: Tensor, levels: int) -> None:
    r"""Checks once, where the data are loaded, that no pixel is beyond `levels`.

    Arguments:
        images: uint8 images of any shape.
        levels: The number of levels that a pixel can take, at most 256.

    Raises:
        ValueError: If the largest value is not below `levels`.
    """
    _check_levels(levels)
    if images.numel() > 0 and (largest := int(images.max())) >= levels:
        raise ValueError(
            f"images has the value {largest}, beyond levels={levels}: pass more levels"
        )


_LIKELIHOODS: dict[str, Callable[[tuple[int, int, int], int], Likelihood]] = {
    "gaussian": lambda shape, levels: GaussianLikelihood(shape, "shared"),
    "gaussian-pixel": lambda shape, levels: GaussianLikelihood(shape, "pixel"),
    # The 2021 code's likelihood. "N(., 1/2)" is the variance: its floor of
    # log2(sqrt(2 pi / 2)) + log2(256 / 2) = 7.83 bits/dim is reached with x = mean, while a
    # standard deviation of 1/2 would have 7.33.
    "gaussian-fixed": lambda shape, levels: GaussianLikelihood(shape, math.sqrt(0.5)),
    "bernoulli": lambda shape, levels: BernoulliLikelihood(shape),
    "discretized-logistic": DiscretizedLogisticLikelihood,
    "categorical": CategoricalLikelihood,
}


def make_likelihood(name: str, image_shape: tuple[int, int, int], levels: int = 256) -> Likelihood:
    r"""Makes a likelihood by its name.

    Arguments:
        name: One of `"gaussian"` (learned shared sigma), `"gaussian-pixel"` (sigma per pixel and
            channel), `"gaussian-fixed"` (variance 1/2, which cannot go below 7.83 bits/dim at 256
            levels), `"bernoulli"`, `"discretized-logistic"` and `"categorical"`.
        image_shape: The shape :math:`(C, H, W)` of one image.
        levels: The number of levels that a pixel can take, at most 256.

    Returns:
        The likelihood.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> make_likelihood("categorical", (1, 8, 8), levels=17)
        CategoricalLikelihood(image_shape=(1, 8, 8), num_maps=17)
    """
    if name not in _LIKELIHOODS:
        raise ValueError(f"name must be one of {', '.join(_LIKELIHOODS)}, got {name!r}")
    _check_levels(levels)
    return _LIKELIHOODS[name](image_shape, levels)
