r"""Options from dataclasses: a field is an option of the command line, its help and its check.

A thin layer over ``argparse``. Larger libraries parse nested configurations as dotted names
(``--prior.num_timesteps``); here the names are flat, as they are in the TOML presets.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from ..arguments import check_choice, check_whole, folder

__all__ = [
    "Checked",
    "add_options",
    "check",
    "check_use",
    "choice",
    "number",
    "option",
    "pick",
    "positive",
    "whole",
]

T = TypeVar("T")
Check = Callable[[str, Any], None]


def option(
    default: Any,
    help: str,
    check: Check | None = None,
    metavar: str | None = None,
    of: Mapping[str, tuple[str, ...]] | None = None,
) -> Any:
    r"""Returns a field of a dataclass that is an option.

    Arguments:
        default: Its default.
        help: The help text. The default and the choices are appended.
        check: A function of its name and value that raises a ``ValueError``. ``None`` is let
            through if the annotation has it.
        metavar: The name of its value in the help.
        of: The values of other options that have a use for it, such as ``{"prior": ("flow",)}``.
    """
    metadata = {"help": help, "check": check, "metavar": metavar, "of": of or {}}
    return dataclasses.field(default=default, metadata=metadata)


def whole(least: int = 1, word: str | None = None) -> Check:
    r"""Returns a check of whole numbers, in whose place a word may stand."""
    why = f" or {word!r}" if word else ""

    def check(name: str, value: Any) -> None:
        if word is None or value != word:
            check_whole(name, value, least, why)

    return check


def number(what: str, valid: Callable[[Any], bool]) -> Check:
    r"""Returns a check of real numbers: ``what`` they must be, and whether one is ``valid``."""

    def check(name: str, value: Any) -> None:
        if not (isinstance(value, Real) and valid(value)):
            raise ValueError(f"{name} must be {what}, got {value!r}")

    return check


positive = number("positive and finite", lambda x: 0 < x < math.inf)


def choice(choices: Iterable[str], what: str | None = None) -> Check:
    r"""Returns a check of names, of a registry or a list."""

    def check(name: str, value: Any) -> None:
        check_choice(what or name, value, choices)

    check.choices = choices  # type: ignore[attr-defined]  # functions have any attribute
    return check


class Checked:
    r"""A dataclass whose fields are checked when it is made."""

    def __post_init__(self) -> None:
        check(self)


def check(config: Any) -> None:
    r"""Raises a ``ValueError`` that names the first field of a dataclass that is not valid."""
    for field in dataclasses.fields(config):
        value, test = getattr(config, field.name), field.metadata.get("check")
        if test is not None and not (value is None and "None" in str(field.type)):
            test(field.name, value)


def check_use(config: type, given: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    r"""Raises a ``ValueError`` if an option was given that nobody has a use for.

    Arguments:
        config: The dataclass.
        given: The options that were given.
        chosen: The values of other options, such as ``{"prior": "flow"}``.
    """
    for field in dataclasses.fields(config):
        if field.name not in given or given[field.name] == field.default:
            continue
        for name, users in field.metadata.get("of", {}).items():
            if chosen[name] not in users:
                raise ValueError(
                    f"{name}={chosen[name]!r} has no use for {field.name}, which is for "
                    f"{', '.join(users)}: leave it out"
                )


def add_options(parser: Any, config: type) -> None:
    r"""Adds the fields of a dataclass to a parser, or to a group of one, without their defaults.

    Options that were not given are not in the namespace.

    Arguments:
        parser: The parser, or a group of one.
        config: The dataclass.
    """
    for field in dataclasses.fields(config):
        metadata = field.metadata
        if "help" not in metadata:
            continue
        choices = getattr(metadata["check"], "choices", None)
        help = metadata["help"] + ("" if choices is None else f": {', '.join(choices)}")
        if field.default not in (None, False, ()) or field.default == 0.0:
            help += "" if field.default is False else f" ({field.default})"
        words: dict[str, Any] = {"help": help.replace("%", "%%"), "default": argparse.SUPPRESS}
        kind, many = parse_type(typing.get_type_hints(config)[field.name])
        if kind is bool:
            words["action"] = "store_true"
        else:
            words |= {"type": folder if kind is Path else kind, "metavar": metadata["metavar"]}
            words |= {"nargs": "*"} if many else {}
        parser.add_argument("--" + field.name.replace("_", "-"), **words)


def number_or_word(text: str) -> int | str:
    r"""Returns the meaning of a text: a whole number, or a word."""
    try:
        return int(text)
    except ValueError:
        return text


def parse_type(hint: Any) -> tuple[Callable[[str], Any], bool]:
    r"""Returns the type of an annotation, and whether there are many of it."""
    if hint == int | str:  # a number or a word
        return number_or_word, False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def pick(config: type[T], values: Mapping[str, Any]) -> T:
    r"""Returns a dataclass whose fields are those of a mapping, as far as it has them."""
    fields = dataclasses.fields(config)  # type: ignore[arg-type]  # T is that of a dataclass
    names = [field.name for field in fields]
    return config(**{name: values[name] for name in names if name in values})
