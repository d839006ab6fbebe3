r"""A check of priors whose density is known, in plates of data and of particles."""

from __future__ import annotations

import pyro
import torch


def check_sites_in_plates(prior, c):
    r"""Asserts that four data have their densities in their contexts; returns model and draw."""

    def model():
        with pyro.plate("particles", 5, dim=-2), pyro.plate("data", 4, dim=-1):
            return prior.model(c)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    z = trace.nodes["z_0"]["value"]
    for i in range(4):  # each datum by itself, in its own context
        expected = prior.log_prob(z[:, i], None if c is None else c[i])
        torch.testing.assert_close(trace.nodes["z_0"]["log_prob"][:, i], expected)
    return model, z
