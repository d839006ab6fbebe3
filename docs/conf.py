r"""Configuration of Sphinx: ``sphinx-build -W -b html docs docs/_build/html``."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

from docutils.parsers.rst import roles
from sphinx.application import Sphinx

import pyro_vaediff

sys.path.insert(0, str(Path(__file__).parent))
from api_pages import write_api_pages

project = "pyro_vaediff"
author = "the pyro_vaediff authors"
copyright = f"2026 {author}"
version = release = pyro_vaediff.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
    "myst_nb",
    "notebooks",
]
exclude_patterns = ["_build", "jupyter_execute"]

# Notebooks and pages with code cells are run at every build: a page that fails, fails the build.
# `-D nb_execution_mode=off` skips that.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
suppress_warnings = ["myst-nb.lexer"]  # the language of pages that are not run is not known
# The pages compute with small tensors, for which threads cost more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars, and that they lack widgets
nb_mime_priority_overrides = [("html", "image/gif", 5)]  # animations
nb_code_prompt_show, nb_code_prompt_hide = "Show the {type}", "Hide the {type}"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings write code as `code` and equations as :math:`equations`.
default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

# Every reference must have a target, except for those to other packages: finding their targets
# would take internet access.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:class", r"Outputs|Record|Times|Start|Data|Groups|Check|Reweighting"),  # aliases of types
    (r"py:.*", r"(argparse|collections|matplotlib|np|numpy|pathlib|PIL|pyro|torch|typing)\..*"),
    (r"py:.*", r"(F|dist|nn|zuko)\..*|Size|Tensor|TorchDistribution|Trace|Callable|Iterator|Path"),
    (r"py:.*", r".*TypeVar.*|optional|bool|int|float|str|tuple|list|dict|type|None|Any"),
]

html_theme = "furo"
html_title = f"pyro_vaediff {version}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#00629d", "color-brand-content": "#00629d"},
    "dark_css_variables": {"color-brand-primary": "#6ab7e8", "color-brand-content": "#6ab7e8"},
}


def skip_foreign(app: Sphinx, what: str, name: str, obj: object, skip: bool, options) -> bool:
    r"""Leaves out the members whose docstring is inherited from another package."""
    function = getattr(obj, "fget", obj)  # of a property
    owner = sys.modules.get(getattr(function, "__module__", None) or "")
    for part in getattr(function, "__qualname__", "").split(".")[:-1]:
        owner = getattr(owner, part, None)
    if not inspect.isclass(owner):
        return skip
    documented = (c for c in owner.__mro__ if getattr(vars(c).get(name), "__doc__", None))
    first = next(documented, owner)
    return skip or not first.__module__.startswith("pyro_vaediff")


def describe_data(app: Sphinx, what: str, name: str, obj: object, options, lines: list) -> None:
    r"""Says what a variable holds, in place of the docstring of the class of its value."""
    if what == "data" and "\n".join(lines).strip() == inspect.getdoc(type(obj)).strip():
        lines[:] = [f"Its keys: {', '.join(f'``{key!r}``' for key in obj)}."] * isinstance(
            obj, dict
        )


def resolve_short(app: Sphinx, env, node, contnode):
    r"""Finds `Timestep_ELBO` from any module, and not only from its own."""
    if node.get("refdomain") != "py":
        return None
    node["refspecific"] = True
    target, domain = node["reftarget"], env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], target, node, contnode
    )


def setup(app: Sphinx) -> None:
    roles.register_local_role("py", roles.code_role)
    app.connect("builder-inited", lambda app: write_api_pages(Path(app.srcdir, "api/generated")))
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("autodoc-process-docstring", describe_data)
    app.connect("missing-reference", resolve_short)
