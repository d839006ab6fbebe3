r"""Imports inside of the package point one way: from the programs to the mathematics."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pyro_vaediff

ROOT = Path(pyro_vaediff.__file__).parent

# A module may import from the layers above its own in this list, and from its own package.
LAYERS = (
    {"arguments"},
    {"schedules", "register", "files"},
    {"diffusion"},
    {"nn"},
    {"denoise"},
    {"likelihoods"},
    {"priors"},
    {"vae"},
    {"infer", "data", "plotting"},
    {"sampling", "testing"},
    {"evaluate"},
    {"train"},
    {"bench", "__main__"},
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported_names(source, package):
    r"""Yields the first names below ``pyro_vaediff`` that a module imports at run time.

    Arguments:
        source: The source of the module.
        package: The package of the module, as parts, with ``"pyro_vaediff"`` first.
    """
    nodes = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        # Imports for type annotations only do not run.
        nodes += node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            paths = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (path[1] for path in paths if path[0] == "pyro_vaediff" and len(path) > 1)


def test_the_parser_sees_every_form_of_import():
    source = """
import torch, pyro_vaediff.vae
from pyro_vaediff import priors, schedules
from pyro_vaediff.nn.mlp import mlp
from . import weightings
from .. import samplers
from ..data.files import to_array
if TYPE_CHECKING:
    from ..likelihoods import Likelihood
def f():
    from ..training import fit
"""
    names = sorted(imported_names(source, ("pyro_vaediff", "infer")))
    assert names == sorted(
        ["vae", "priors", "schedules", "nn", "infer", "samplers", "data", "training"]
    )


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts == ("__init__",):
        return  # the package exports everything
    assert parts[0] in LAYER, f"{parts[0]} has no layer yet: where does it belong?"
    for name in imported_names(path.read_text(), ("pyro_vaediff", *parts[:-1])):
        assert name == parts[0] or LAYER[name] < LAYER[parts[0]], f"{parts[0]} imports {name}"


def test_every_layer_exists():
    assert {p.stem for p in ROOT.iterdir() if p.stem in LAYER} == set(LAYER)
