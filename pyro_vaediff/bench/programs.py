r"""Two programs and their parameters by group: all that the bench has to know of a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ..infer import Estimator
from ..priors import DiffusionPrior
from ..vae import VAE

__all__ = ["Programs", "diffusion_priors", "find_programs", "programs_of"]

Groups = Mapping[str, "nn.Module | Iterable[Tensor]"]
Data = Any  # a tensor, or the tuple of the programs' arguments


@dataclass(frozen=True)
class Programs:
    r"""A model, a guide, and their parameters by group.

    Arguments:
        model: The model.
        guide: The guide.
        groups: The unconstrained parameters of each group, whose gradients are looked at.
    """

    model: Callable
    guide: Callable
    groups: dict[str, list[Tensor]]

    @property
    def parameters(self) -> list[Tensor]:
        r"""The parameters of all groups."""
        return list(itertools.chain.from_iterable(self.groups.values()))


def programs_of(vae: VAE | Programs) -> Programs:
    r"""Returns the programs of a VAE, whose groups are its networks, or the given ones."""
    if isinstance(vae, Programs):
        return vae
    groups: dict[str, list[Tensor]]
    groups = {name: [*module.parameters()] for name, module in vae.named_children()}
    return Programs(vae.model, vae.guide, groups)


def diffusion_priors(vae: VAE) -> list[DiffusionPrior]:
    r"""Returns the diffusion priors of a VAE: its prior, or those of the groups of a hierarchy.

    Raises:
        ValueError: If there is none.
    """
    found = [module for module in vae.prior.modules() if isinstance(module, DiffusionPrior)]
    if not found:
        raise ValueError(
            f"prior must be a DiffusionPrior or hold one, got {type(vae.prior).__name__}: the "
            "others have no timesteps to choose"
        )
    return found


def find_programs(
    model: Callable, guide: Callable, data: Data, elbo: Estimator, groups: Groups | None = None
) -> Programs:
    r"""Returns any two programs with the parameters that an evaluation of their loss asks for.

    Arguments:
        model: The model.
        guide: The guide.
        data: The argument of both, or a tuple of arguments.
        elbo: The estimator that is evaluated, in whose way the programs run.
        groups: The groups, modules or parameters by name; what is in none of them is in a group
            named ``"other"``. By default, there are the groups ``"model"`` and ``"guide"``, where
            parameters of both belong to the model.

    Raises:
        ValueError: If neither of the programs has a parameter.
    """
    found: dict[str, dict[int, Tensor]] = {"model": {}, "guide": {}}

    def recorded(name: str, program: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with poutine.trace(param_only=True) as capture:
                result = program(*args, **kwargs)
            for site in capture.trace.nodes.values():
                value: Any = site["value"]
                parameter = value.unconstrained()
                found[name][id(parameter)] = parameter
            return result

        return run

    # With a gradient, as a parameter of the guide need not be asked for without one.
    with torch.enable_grad():
        elbo.loss(recorded("model", model), recorded("guide", guide), *arguments(data))
    every = found["guide"] | found["model"]
    if not every:
        raise ValueError(
            "model and guide must have a parameter: register networks by pyro.module or "
            "pyro_vaediff.register, or use pyro.param"
        )
    if groups is None:
        found["guide"] = {key: p for key, p in found["guide"].items() if key not in found["model"]}
        by_name = {name: list(part.values()) for name, part in found.items()}
    else:
        by_name = {
            name: list(part.parameters() if isinstance(part, nn.Module) else part)
            for name, part in groups.items()
        }
        known = {id(parameter) for part in by_name.values() for parameter in part}
        by_name["other"] = [p for key, p in every.items() if key not in known]
    return Programs(model, guide, {name: part for name, part in by_name.items() if part})


def arguments(data: Data) -> tuple:
    r"""Returns the arguments of the programs."""
    return data if isinstance(data, tuple) else (data,)


def num_data(data: Data) -> int:
    r"""Returns the number of data: the length of the first argument, or 1 without any."""
    args = arguments(data)
    return len(args[0]) if args else 1


def own_store() -> AbstractContextManager:
    r"""A context which begins with Pyro's parameter store as it is, and leaves it so."""
    store = pyro.get_param_store()
    return store.scope(store.get_state())
