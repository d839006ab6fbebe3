r"""An encoder and a decoder of vectors, with latents that are images."""

from __future__ import annotations

import pyro.distributions as dist
from torch import nn

EVENT = (2, 4, 4)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 32)

    def forward(self, x):
        return dist.Normal(self.net(x).unflatten(-1, EVENT), 0.5).to_event(3)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(32, 3)

    def forward(self, z):
        return dist.Normal(self.net(z.flatten(-3)), 1.0).to_event(1)
