"""SETTINGS of a study file: which keys there are, and what kind of value each has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from types import NoneType
from typing import Any

from hq_optuna.errors import StudyFileError
from hq_optuna.space.budget import Budget
from hq_optuna.space.budget_text import parse_budget

_Kind = tuple[str, tuple[type, ...]]

_WHOLE: _Kind = ("a whole number", (Integral,))
_SWITCH: _Kind = ("True or False", (bool,))
_WORD: _Kind = ("a word", (str,))
_GROUPS: _Kind = ("a sequence of groups of layer names, [('q', 'k')]", (list, tuple, set))
_FURTHER: _Kind = ("a dict of settings of training, {'learning_rate': 1e-3}", (Mapping,))

_KINDS: dict[str, _Kind] = {
    "bits": ("a sequence of whole numbers, (8, 4), or text, '2-8'", (Iterable,)),
    "activation_bits": (
        "'same', a whole number, a sequence of these, or None",
        (Integral, Iterable, NoneType),
    ),
    "pin_first_last": ("a whole number or None", (Integral, str, tuple, list, NoneType)),
    "pins": ("a dict from layer names or globs to bits, {'head.*': 8}", (Mapping, NoneType)),
    "allowed": ("a dict from layer names or globs to bits, {'stem': (8, 6)}", (Mapping, NoneType)),
    "tied": _GROUPS,
    "budget": ("text, '0.25 bops', a number or a Budget", (str, int, float, Budget)),
    "n_candidates": _WHOLE,
    "rule": _WORD,
    "scorer": _WORD,
    "rounding": _WORD,
    "correction": _SWITCH,
    "seed": _WHOLE,
    "refine": _SWITCH,
    "precision": _WORD,
    "quantizers": (
        "a dict from layer names or globs to quantizers, {'layer3.*': 'midrise'}",
        (Mapping, list, tuple, NoneType),
    ),
    "train_every": _WHOLE,
    "train_epochs": _WHOLE,
    "final_epochs": _WHOLE,
    "training": _FURTHER,
    "final_training": _FURTHER,
}

SETTINGS_KEYS = tuple(_KINDS)
"""What a study file's SETTINGS may set."""


def check_settings(settings: Any, path: Path) -> None:
    """Refuse SETTINGS with unknown keys, or values of another kind than the key has.

    Args:
        settings: As written in the study file.
        path: The study file, for messages.

    Raises:
        StudyFileError: Names the file, the key and what it takes.
    """
    if not isinstance(settings, Mapping):
        raise StudyFileError(f"{path}: SETTINGS must be a dict; got {type(settings).__name__}.")
    for key, value in settings.items():
        if key not in SETTINGS_KEYS:
            raise StudyFileError(
                f"{path}: SETTINGS has the unknown key {key!r}. It may set: "
                f"{', '.join(SETTINGS_KEYS)}."
            )
        words, kinds = _KINDS[key]
        # A bool is an integer to Python, and None a scorer that is to be chosen.
        wrong_bool = isinstance(value, bool) and bool not in kinds
        if wrong_bool or not (isinstance(value, kinds) or (key == "scorer" and value is None)):
            raise StudyFileError(f"{path}: SETTINGS[{key!r}] is {words}; got {value!r:.80}.")
    if "budget" in settings:
        try:
            parse_budget(settings["budget"])
        except StudyFileError as error:
            raise StudyFileError(f"{path}: SETTINGS['budget']: {error}") from None
