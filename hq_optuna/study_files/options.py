"""Options of a study file: read from the signatures of its functions and from a command line."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

from hq_optuna.errors import StudyFileError

FOLDER = "folder"
"""The parameter that receives the run's folder and is no option."""

_TYPES: tuple[type, ...] = (str, int, float, bool, Path)


@dataclass(frozen=True)
class Option:
    """One option of a study file: a parameter of its functions.

    `type` is ``str``, ``int``, ``float``, ``bool`` or ``pathlib.Path``; `default` is ``None`` where
    it is required; `help` is its line in the docstring's ``Args``, if there is one.
    """

    name: str
    type: type
    default: Any
    required: bool
    help: str | None = field(default=None, compare=False)

    @property
    def flag(self) -> str:
        """The option as it is typed: ``--n-calibration``."""
        return "--" + self.name.replace("_", "-")

    def __str__(self) -> str:
        if self.type is bool:
            return f"{self.flag}/--no-{self.flag[2:]}"
        return f"{self.flag} {self.type.__name__.upper()}" + " (required)" * self.required

    def parse(self, text: str) -> Any:
        """Read a value as typed.

        Raises:
            argparse.ArgumentTypeError: The text is no such value.
        """
        try:
            if self.type is not Path:
                return self.type(text)
            if not text:
                raise ValueError("an empty path")
            return Path(text).expanduser()
        except (ValueError, RuntimeError):
            raise argparse.ArgumentTypeError(
                f"takes a value of type {self.type.__name__}; got {text!r}"
            ) from None


def read_options(functions: Mapping[str, Callable[..., Any]], path: Path) -> dict[str, Option]:
    """Collect the options of a study's functions; the same name must mean the same in all.

    Raises:
        StudyFileError: A parameter cannot be an option, or two functions disagree about one.
    """
    found: dict[str, tuple[Option, str]] = {}
    for name, function in functions.items():
        for option in _options_of(function, f"{path}: {name}()"):
            first, owner = found.setdefault(option.name, (option, name))
            if option != first:
                raise StudyFileError(
                    f"{path}: {owner}() and {name}() take {option.name!r} with different types or "
                    "defaults. One option has one type and one default; make them equal or rename "
                    "one."
                )
            if first.help is None:
                found[option.name] = (option, owner)
    return {name: option for name, (option, _) in found.items()}


def parse(
    options: Mapping[str, Option],
    arguments: Sequence[str],
    study: str,
    beside: Collection[str] = (),
) -> dict[str, Any]:
    """Return what was given on a command line, by parameter name; without defaults.

    `arguments` are what was typed and is no option of the command itself. Messages name the file
    `study`, and guess which option was meant, also of the command's own (`beside`).

    Raises:
        StudyFileError: Unknown option, or a bad or missing value.
    """
    parser = _Parser(study, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option in options.values():
        switch = {"action": argparse.BooleanOptionalAction}
        how: dict[str, Any] = switch if option.type is bool else {"type": option.parse}
        parser.add_argument(option.flag, dest=option.name, **how)
    values, unknown = parser.parse_known_args(list(_negative_joined(arguments)))
    if unknown:
        flag = unknown[0].partition("=")[0]
        flags = [option.flag for option in options.values()]
        if flag in beside:
            raise StudyFileError(
                f"{study} has no option {flag!r}, which is one of hq-optuna run; this command does "
                "not take it."
            )
        meant = difflib.get_close_matches(flag, [*flags, *beside], n=1)
        guess = f"Did you mean {meant[0]}? " if meant else ""
        raise StudyFileError(f"{study} has no option {flag!r}. {guess}{_listed(options)}")
    return vars(values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what `argparse` would print."""
        raise StudyFileError(f"{self.prog}: {message.removeprefix('argument ')}.")


def _negative_joined(arguments: Sequence[str]) -> Iterator[str]:
    """Yield arguments, negative numbers such as -1e-3 joined to their option by =."""
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if flag.startswith("--") and rest and re.fullmatch(r"-[\d.]+(e[+-]?\d+)?", rest[0], re.I):
            flag = f"{flag}={rest.pop(0)}"
        yield flag


def complete(options: Mapping[str, Option], given: Mapping[str, Any], study: str) -> dict[str, Any]:
    """Return a value for every option, defaults filled in.

    Raises:
        StudyFileError: An option is unknown, or a required one is missing.
    """
    for name in given:
        if name not in options:
            raise StudyFileError(f"{study} has no option {name!r}. {_listed(options)}")
    for option in options.values():
        if option.required and option.name not in given:
            raise StudyFileError(f"{study} needs {option.flag}. {_listed(options)}")
    return {name: given.get(name, option.default) for name, option in options.items()}


def _listed(options: Mapping[str, Option]) -> str:
    own = "Those of hq-optuna run itself: hq-optuna run --help."
    if not options:
        return f"It has none. {own}"
    lines = [f"  {option}  {option.help or ''}".rstrip() for option in options.values()]
    return "\n".join(["Its options:", *lines, own])


def _options_of(function: Callable[..., Any], where: str) -> Iterator[Option]:
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception as error:
        raise StudyFileError(
            f"{where}: an annotation cannot be read: {type(error).__name__}: {error}."
        ) from error
    for parameter in signature.parameters.values():
        if parameter.name == FOLDER:
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise StudyFileError(
                f"{where} takes {parameter}; an option is an ordinary named parameter."
            )
        kinds = {parameter.annotation}
        if get_origin(parameter.annotation) in (Union, UnionType):
            kinds = set(get_args(parameter.annotation)) - {NoneType}
        if len(kinds) != 1 or not kinds <= set(_TYPES):
            raise StudyFileError(
                f"{where}: annotate {parameter.name!r} as one of "
                f"{', '.join(kind.__name__ for kind in _TYPES)} (or that | None), so that it can "
                "be an option."
            )
        required = parameter.default is parameter.empty
        yield Option(
            parameter.name,
            kinds.pop(),
            None if required else parameter.default,
            required,
            _help(function, parameter.name),
        )


def _help(function: Callable[..., Any], name: str) -> str | None:
    """Return the parameter's text in a Google-style docstring."""
    text = inspect.getdoc(function) or ""
    match = re.search(rf"^( +){name}(?: \([^)]*\))?: *(.*(?:\n\1 +\S.*)*)", text, re.M)
    return " ".join(match[2].split()) if match else None
