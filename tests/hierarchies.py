r"""Linear-Gaussian hierarchies, whose bound :func:`~pyro_vaediff.testing.exact_elbo` knows."""

from __future__ import annotations

import torch
from torch import nn

from pyro_vaediff import VAE, DiffusionPrior, GaussianPrior
from pyro_vaediff.nn import TimeAdapter
from pyro_vaediff.priors import ConditionalGaussianPrior, HierarchicalPrior
from pyro_vaediff.schedules import Schedule
from pyro_vaediff.testing import LinearDenoiser, LinearGaussian


class Join(nn.Module):
    def forward(self, h, z):
        if h is None:
            return z
        return torch.cat([h.expand(*z.shape[:-1], -1), z], -1)


class Moments(nn.Module):
    r"""A mean that is affine in the context, and a scale that is constant."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.net = LinearGaussian(inputs, outputs, log_scale=0.0)

    def forward(self, c):
        mean = self.net(c).mean
        return torch.cat([mean, self.net.log_scale.expand_as(mean)], -1)


class Told(nn.Module):
    r"""A linear denoiser that adds an affine function of the context."""

    any_batch = True

    def __init__(self, features, context, num_timesteps):
        super().__init__()
        self.net = LinearDenoiser(features, num_timesteps)
        self.context = LinearGaussian(context, features, log_scale=0.0)

    def forward(self, z, t, c):
        return self.net(z, t) + self.context(c).mean


class Lazy(nn.Module):
    r"""A posterior whose mean is affine in the data and in the state above."""

    def __init__(self, num_features, sizes):
        super().__init__()
        states = [sum(sizes[:i]) for i in range(len(sizes))]
        self.nets = nn.ModuleList(
            LinearGaussian(num_features + state, size, log_scale=-0.5)
            for state, size in zip(states, sizes, strict=True)
        )

    def forward(self, x):
        def posterior(group, h, p):
            assert (p is None) == (group == 1 or not self.residual)
            h = x if h is None else torch.cat([x.expand(*h.shape[:-1], -1), h], -1)
            return self.nets[group - 1](h)

        return posterior


def chain(features, context, num_timesteps):
    r"""A diffusion prior that is linear and Gaussian, with or without a context."""
    schedule = Schedule(torch.linspace(0.3, 0.6, num_timesteps, dtype=torch.float64))
    if context:
        net = Told(features, context, num_timesteps)
    else:
        net = LinearDenoiser(features, num_timesteps)
    backbone = TimeAdapter(net, schedule, "index")
    return DiffusionPrior(
        features, num_timesteps, schedule, backbone, order="posterior", context_features=context
    )


def linear_hierarchy(kind):
    r"""Two or three groups: a diffusion on top, on each, or below a Gaussian one."""
    torch.manual_seed(0)
    sizes = {"top": (2, 1), "every": (1, 2), "below": (2, 1), "three": (1, 1, 1)}[kind]
    states = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = []
    for i, (size, state) in enumerate(zip(sizes, states, strict=True)):
        if kind == "every" or (i == 0 and kind != "below") or (i == 1 and kind == "below"):
            groups.append(chain(size, state, 3 - i))
        else:
            groups.append(
                ConditionalGaussianPrior(size, Moments(state, size)) if i else GaussianPrior(size)
            )
    prior = HierarchicalPrior(groups, [Join() for _ in groups], sum(sizes))
    encoder = Lazy(3, sizes)
    encoder.residual = isinstance(groups[-1], ConditionalGaussianPrior)
    return VAE(encoder, LinearGaussian(sum(sizes), 3, log_scale=0.0), prior).double()
