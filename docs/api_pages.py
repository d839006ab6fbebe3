r"""Writes the pages of the API reference: one per module, with every public name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PACKAGE = "pyro_vaediff"


def write_api_pages(folder: Path) -> None:
    r"""Writes one page per module of the package; a subpackage has its modules on its page."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{module.__name__}.rst": page(module) for module in submodules(PACKAGE)}
    for stale in folder.glob("*.rst"):
        if stale.name not in pages:
            stale.unlink()
    for name, text in pages.items():
        # A page that did not change keeps its date, so that Sphinx need not read it again.
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def submodules(package: str) -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not info.name.startswith("_"):
            yield importlib.import_module(f"{package}.{info.name}")


def page(module: ModuleType) -> str:
    parts = submodules(module.__name__) if hasattr(module, "__path__") else ()
    names = {part: public_names(part) for part in parts}
    homes = {part.__name__ for part in names}
    for part in names:  # a name is listed where it comes from
        origin = {name: getattr(getattr(part, name), "__module__", None) for name in names[part]}
        names[part] = [n for n in names[part] if origin[n] not in homes - {part.__name__}]
    of_parts = {name for listed in names.values() for name in listed}
    own = [name for name in public_names(module) if name not in of_parts]
    sections = [section(module, own, "=")]
    sections += [section(part, listed, "-") for part, listed in names.items() if listed]
    return "\n".join(sections)


def public_names(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", ())
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


def section(module: ModuleType, names: list[str], underline: str) -> str:
    title = module.__name__
    lines = [title, underline * len(title), "", f".. automodule:: {title}", "   :no-members:", ""]
    for name in names:
        lines += [*directive(module, name), ""]
    return "\n".join(lines)


def directive(module: ModuleType, name: str) -> list[str]:
    obj = getattr(module, name)
    if not (inspect.isclass(obj) or inspect.isroutine(obj)):
        # Only the module that defines a variable has its `#:` comment.
        no_value = ["   :no-value:"] if isinstance(obj, dict) else []
        return [f".. autodata:: {module.__name__}.{name}", *no_value]
    kind = "autoclass" if inspect.isclass(obj) else "autofunction"
    return [f".. {kind}:: {public_path(module, name)}"]


def public_path(module: ModuleType, name: str) -> str:
    r"""Returns the path to import a name from: the parent package if that exports it."""
    parent = importlib.import_module(module.__name__.rpartition(".")[0])
    exported = getattr(parent, name, None) is getattr(module, name)
    # `pyro_vaediff.register` is a function and the module that defines it.
    is_module = importlib.util.find_spec(f"{parent.__name__}.{name}") is not None
    return f"{(module if is_module or not exported else parent).__name__}.{name}"
