r"""Checks of when an estimator is valid for a pair of programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from pyro.infer.inspect import get_dependencies

__all__ = ["check_mean_field"]


def check_mean_field(
    model: Callable, guide: Callable, *args: Any, **kwargs: Any
) -> dict[str, set[str]]:
    r"""Names the latent sites for which a closed-form KL divergence is wrong.

    :class:`pyro.infer.TraceMeanField_ELBO` replaces :math:`\log q(z | \cdot) - \log p(z | \cdot)`
    by its expectation over :math:`z` at every site, as if :math:`p(z | \cdot)` stayed the same when
    :math:`z` changes. That holds iff the parents of :math:`z` in the model contain no descendant of
    :math:`z` in the guide. Pyro itself compares only the order of the sites, and only warns.

    The programs run once each, with provenance tracking: use a chain of a few steps.

    Arguments:
        model: The model.
        guide: The guide.
        args: The arguments of the model and the guide.
        kwargs: The keyword arguments of the model and the guide.

    Returns:
        The invalid sites, each with the parents that make it so. It is empty iff
        :class:`~pyro.infer.TraceMeanField_ELBO` is valid.

    Example:
        >>> import pyro, torch
        >>> from pyro.distributions import Normal
        >>> def model():
        ...     b = pyro.sample("b", Normal(0.0, 1.0))
        ...     a = pyro.sample("a", Normal(b, 1.0))
        >>> def guide():
        ...     a = pyro.sample("a", Normal(0.0, 1.0))
        ...     b = pyro.sample("b", Normal(a, 1.0))
        >>> check_mean_field(model, guide)
        {'a': {'b'}}
    """
    parents = direct_parents(model, args, kwargs)
    guide_parents = direct_parents(guide, args, kwargs)

    descendants: dict[str, set[str]] = {name: set() for name in guide_parents}
    for name in reversed(guide_parents):  # in the order of the program, children come last
        for parent in guide_parents[name]:
            descendants[parent] |= descendants[name] | {name}

    invalid = {name: parents[name] & descendants[name] for name in guide_parents if name in parents}
    return {name: sites for name, sites in invalid.items() if sites}


def direct_parents(program: Callable, args: tuple, kwargs: dict) -> dict[str, set[str]]:
    dependencies = get_dependencies(program, args, kwargs)["prior_dependencies"]
    known = cast("dict[str, dict[str, set[str]]]", dependencies)  # as Pyro documents it
    return {name: set(upstream) - {name} for name, upstream in known.items()}
