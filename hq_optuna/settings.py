"""Every choice of a search, once: name, type, default, unit, and the sentence that explains it.

`SearchSettings` says what is searched and how, and is part of what tells one search from another.
`RunSettings` says where a run happens and how long it may take; who goes on with a search may give
other ones. Keywords of `hq_optuna.BitSearch`, options of the command line, keys of a study file's
SETTINGS, the fingerprint, the description stored in a study, the template that ``hq-optuna init``
writes, and the tables in the report and in the docs all come from these fields.

Example:
    >>> SearchSettings(bits="2-4").bits
    (2, 3, 4)
    >>> SearchSettings(n_candidates=4).changed
    {'n_candidates': 4}
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from hq_optuna.errors import SettingError, SpaceError
from hq_optuna.space.budget import Budget, parse_budget
from hq_optuna.space.layers import FLOAT_BITS

ScorerName = Literal[
    "gauss_newton", "loss", "hessian_trace", "diagonal", "trace", "fisher", "hutchinson"
]
Method = Literal["default", "patent"]
Rule = Literal["min", "ratio"]
Rounding = Literal["compensated", "in_order", "nearest"]
Observer = Literal["squared_error", "min_max", "percentile"]
Precision = Literal["float32", "bfloat16"]
Encoding = Literal["layers", "compact"]
Group = Literal["space", "scoring", "steps", "training", "run"]
"""What settings are about."""

Kind = tuple[str, tuple[type, ...]]
"""What a value is, in words, and the types that it may have."""

WHOLE: Kind = ("a whole number", (Integral,))
NUMBER: Kind = ("a number", (Real,))
SWITCH: Kind = ("True or False", (bool,))
WORD: Kind = ("a word", (str,))
PATH: Kind = ("a path", (str, Path))
BITS: Kind = ("a sequence of whole numbers, (8, 4), or text, '2-8'", (Iterable,))
INPUT_BITS = (
    "'same', a whole number, a sequence of these, or None",
    (Integral, Iterable, NoneType),
)
PIN: Kind = ("a whole number or None", (Integral, str, tuple, list, NoneType))
BY_LAYER = ("a dict from layer names or globs to bits, {'head.*': 8}", (Mapping, NoneType))
QUANTIZERS: Kind = (
    "a dict from layer names or globs to quantizers, {'layer3.*': 'midrise'}",
    (Mapping, list, tuple, NoneType),
)
GROUPS: Kind = ("a sequence of groups of layer names, [('q', 'k')]", (list, tuple, set))
FURTHER: Kind = ("a dict of settings of training, {'learning_rate': 1e-3}", (Mapping,))
BUDGET: Kind = (
    "text, '0.25 bops', a number, a Budget, or several of them",
    (str, int, float, Budget, list, tuple),
)

_KINDS: dict[Any, Kind] = {int: WHOLE, float: NUMBER, bool: SWITCH, str: WORD, Path: PATH}
"""Kinds of settings that their annotation tells."""


@dataclass(frozen=True)
class Setting:
    """One choice, as it is shown everywhere.

    Attributes:
        name: Name of the field.
        type: Its annotation, as text.
        default: Its default value.
        help: The sentence that explains it.
        kind: What it may be.
        choices: Words that it may be.
        group: What it is about.
        unit: Unit of a number, or ``""``.
        option: The option on the command line, ``--n-candidates``; ``""`` where it has none.
        shown_default: The default in words.
        least: Smallest number that it may be.
        repeats: Whether the option may be given again, for more of the same.
        metavar: What the option's value is called in ``--help``.
        differs: What a study is told to differ in where this differs; ``""`` where a search may go
            on with another value.
        example: A value as a study file has it.
        read: From a value, or text, to the value as it is kept.
    """

    name: str
    type: str
    default: Any
    help: str
    kind: Kind
    choices: tuple[str, ...] = ()
    group: Group = "run"
    unit: str = ""
    option: str = ""
    shown_default: str = ""
    least: float | None = None
    repeats: bool = False
    metavar: str = ""
    differs: str = ""
    example: str = ""
    read: Callable[[Any], Any] | None = None

    def check(self, value: Any) -> None:
        """Refuse a value of another kind, one that is no choice, or a number that is too small.

        Raises:
            SettingError: Says what it may be.
        """
        words, kinds = self.kind
        if value is None and self.default is None:
            return
        # A bool is an integer to Python.
        wrong_bool = isinstance(value, bool) and bool not in kinds
        if wrong_bool or not isinstance(value, kinds):
            raise SettingError(f"{self.name} is {words}; got {value!r:.80}.")
        number: Any = value
        if self.least is not None and number < self.least:
            raise SettingError(f"{self.name} is at least {self.least:g}; got {value!r}.")
        if self.choices and value not in self.choices:
            raise SettingError(
                f"{self.name} is one of {', '.join(self.choices)}; got {value!r:.80}."
            )


def setting(default: Any, help: str, **more: Any) -> Any:
    """Return a field of a class of settings, with its default as a user may give it.

    `more` are attributes of its `Setting`. Where they are not given, kind and choices follow from
    the annotation; option, default in words and example follow from name and default.
    """
    return field(default=default, metadata={"help": help, **more})


def settings_of(owner: type) -> dict[str, Setting]:
    """Return the settings of a class by name, in the order of its fields.

    Example:
        >>> settings_of(SearchSettings)["seed"].help
        'Seed of the draws.'
    """
    hints, found = get_type_hints(owner), dict[str, Setting]()
    for each in dataclasses.fields(owner):
        name, default = each.name, each.default
        told = [t for t in (get_args(hints[name]) or (hints[name],)) if t is not NoneType]
        words = get_args(told[0]) if get_origin(told[0]) is Literal else told
        choices = tuple(word for word in words if isinstance(word, str))
        kind = WORD if choices else _KINDS.get(told[0])
        option = "--" + name.replace("_", "-")
        made: dict[str, Any] = {
            **{"kind": kind, "choices": choices if kind is WORD else (), "option": option},
            "shown_default": option[2:] if kind is SWITCH and default else str(default),
            "example": json.dumps(default) if isinstance(default, str) else repr(default),
            **each.metadata,
        }
        found[name] = Setting(name=name, type=str(each.type), default=default, **made)
    return found


class _Settings:
    """What all classes of settings can do."""

    def __post_init__(self) -> None:
        for name, one in settings_of(type(self)).items():
            value = getattr(self, name)
            one.check(value)
            value = _plain_numbers(value if one.read is None else one.read(value))
            object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> Self:
        """Return these settings with some changed.

        Raises:
            TypeError: A setting is not known; names the nearest one.
            SettingError: A value is of another kind.
        """
        known = settings_of(type(self))
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                guess = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(
                    f"There is no setting {name!r}.{guess} There are {', '.join(known)}."
                )
        return type(self)(**{**vars(self), **changes})

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that are not at their defaults, by name."""
        default = vars(type(self)())
        return {name: value for name, value in vars(self).items() if value != default[name]}

    def to_json(self) -> dict[str, Any]:
        """Return all settings as JSON data."""
        found: dict[str, Any] = json.loads(json.dumps(vars(self), default=_plain))
        return found


def _plain_numbers(value: Any) -> Any:
    """Return the value with Python's own numbers for NumPy's, which no storage can hold."""
    if type(value) is tuple:
        return tuple(map(_plain_numbers, value))
    if type(value) is dict:
        return {key: _plain_numbers(each) for key, each in value.items()}
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _plain(value: Any) -> Any:
    """Return JSON data for what is none."""
    if isinstance(value, Budget):
        return value.text
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    return int(value) if isinstance(value, Integral) else list(value)


def read_bits(text: Any) -> tuple[int, ...]:
    """Return bits, also those written as ``'2-8'`` or ``'8,4,2'``; ``float`` stands for 32.

    Raises:
        SpaceError: The text names no bits.

    Example:
        >>> read_bits("2-4"), read_bits("8,4"), read_bits(range(2, 4))
        ((2, 3, 4), (8, 4), (2, 3))
    """
    if not isinstance(text, str):
        return tuple(text)
    bits: list[int] = []
    for part in text.replace(" ", "").split(","):
        low, dash, high = part.partition("-")
        try:
            if part == "float":
                found = [FLOAT_BITS]
            else:
                found = list(range(int(low), int(high) + 1)) if dash else [int(low)]
        except ValueError:
            found = []
        if not found:
            raise SpaceError(
                f"{text!r} are no bits. Write 2-8, or 8,4,2; float, same and none, where an "
                "option takes them, in small letters."
            )
        bits += found
    return tuple(bits)


def _activation_bits(value: Any) -> Any:
    if not isinstance(value, str):
        return value if value is None or isinstance(value, Integral) else tuple(value)
    if value == "same":
        return value
    if value in ("float", "none"):
        return None
    return int(value) if value.isdigit() else read_bits(value)


def _pin(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value == "none":
        return None
    bits = read_bits(value)
    if len(bits) != 1:
        raise SpaceError(f"--pin-first-last is one number of bits, or none; got {value!r}.")
    return bits[0]


def read_quantizers(given: Any) -> Any:
    """Return ``{glob: quantizer}``, also of what is written as ``'layer3.*=midrise'``.

    Raises:
        SpaceError: A text is no such pair.

    Example:
        >>> read_quantizers(["layer3.*=midrise", "head=uniform"])
        {'layer3.*': 'midrise', 'head': 'uniform'}
    """
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    found = {}
    for text in given:
        glob, equals, name = (part.strip() for part in str(text).rpartition("="))
        if not (equals and glob and name):
            raise SpaceError(f"{text!r} names no quantizer of a layer. Write 'layer3.*=midrise'.")
        found[glob] = name
    return found


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value or {})


def _groups(value: Any) -> tuple[tuple[str, ...], ...]:
    return tuple(group if isinstance(group, str) else tuple(group) for group in value)  # type: ignore[misc]


_space = functools.partial(setting, group="space")
_scoring = functools.partial(setting, group="scoring")
_steps = functools.partial(setting, group="steps")
_training = functools.partial(setting, group="training")
_by_layer = functools.partial(
    _space, None, kind=BY_LAYER, unit="bits", option="", shown_default="none", read=_mapping
)
_further = functools.partial(
    _training, None, kind=FURTHER, option="", shown_default="none", read=_mapping
)
_limit = functools.partial(setting, None, shown_default="no limit")


PATENT: Mapping[str, Any] = {
    "scorer": "diagonal",
    "measure_candidates": True,
    "rule": "min",
    "refine": False,
    "verify": 0,
}
"""Settings of the method of patent CN112183742B; each winner is trained too."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings(_Settings):
    """What is searched, how candidates are scored and chosen, and when networks are trained.

    Values may be given as on the command line (``bits="2-8"``, ``budget="0.25 bops"``).

    Raises:
        SettingError: A value is of another kind than its setting.
        SpaceError: Bits that cannot be read.
    """

    budget: Budget = _steps(
        "0.25 bops",
        "Most that the answer may cost: a share of the all-8-bit cost ('0.25 bops', "
        "'40% size_bytes') or an amount ('24 GBOPs', '64 KiB', '8 ms', '128 KiB activations'). "
        "Several limits hold at once.",
        **{"kind": BUDGET, "unit": "BOPs, bytes or seconds", "differs": "the budget"},
        **{"read": parse_budget, "repeats": True, "metavar": "TEXT"},
    )
    hardware: str | Path = _space(
        "any",
        "What the answer is to run on: a name ('cmsis-nn') or a YAML file, which says which pairs "
        "of weight and activation bits each kind of layer has. Bits below narrow them down.",
        **{"kind": ("a name or the path of a file", (str, Path)), "metavar": "NAME_OR_FILE"},
        choices=(),
    )
    bits: tuple[int, ...] = _space(
        tuple(range(2, 9)),
        "Bits that a layer may have: '2-8' or '8,4,2', each 1 to 16.",
        **{"kind": BITS, "unit": "bits", "shown_default": "2-8", "example": "range(2, 9)"},
        read=read_bits,
    )
    activation_bits: Literal["same"] | int | tuple[int, ...] | None = _space(
        "same",
        "Bits of a layer's input: 'same' as its weights, 'float', a number, or bits that are "
        "searched apart ('4,8').",
        **{"kind": INPUT_BITS, "choices": (), "unit": "bits", "read": _activation_bits},
    )
    pin_first_last: int | None = _space(
        8,
        "Bits of the first and the last layer, or 'none' to search them too.",
        **{"kind": PIN, "unit": "bits", "read": _pin},
    )
    pins: Mapping[str, int | tuple[int, int]] = _by_layer(
        "Fixed bits of some layers, by name or glob.", example='{"head.*": 8}'
    )
    allowed: Mapping[str, Iterable[int]] = _by_layer(
        "Bits that some layers may have, by name or glob.", example='{"stem": (8, 6)}'
    )
    tied: tuple[tuple[str, ...], ...] = _space(
        (),
        "Groups of layers that share their bits.",
        **{"kind": GROUPS, "option": "", "shown_default": "none"},
        **{"example": '[("q", "k")]', "read": _groups},
    )
    latency: Path | None = _space(
        None,
        "CSV or JSON file of how long each layer takes at each of its bits, for budgets such as "
        "'8 ms'; `hq-optuna profile` writes one.",
        **{"kind": PATH, "metavar": "FILE", "shown_default": "none", "example": '"latency.csv"'},
        read=lambda value: None if value is None else Path(value),
    )
    tie_inputs: bool = _space(
        True,
        "Layers of one module that read the same tensor, as queries, keys and values do, share the "
        "bits of their input.",
    )
    products: bool = _space(
        False,
        "Products of activations, attention's queries times keys and the like, are layers too: "
        "both factors are rounded, to bits that are chosen as those of activations are.",
    )
    scorer: ScorerName | None = _scoring(
        None,
        "What ranks candidates: a sum over layers, which needs no forward pass (hessian_trace, "
        "diagonal, trace, fisher, hutchinson), the rise that their outputs tell (gauss_newton), or "
        "the measured loss.",
        shown_default="hessian_trace, for losses it knows; gauss_newton where winners are trained",
        **{"differs": "the scorer", "example": '"hessian_trace"'},
    )
    measure_candidates: bool = _scoring(
        False,
        "Measure each candidate's loss too, by a forward pass over the calibration set.",
        differs="whether candidates' losses are measured",
    )
    rounding: Rounding = _scoring(
        "compensated",
        "How weights are rounded: compensated (errors make up for each other), in_order (finalists "
        "and the answer also make up for their quantized inputs, layer by layer) or nearest.",
        differs="how weights are rounded",
    )
    correction: bool = _scoring(
        True,
        "Correct batch-norm statistics and biases for the bits.",
        differs="whether statistics are corrected",
    )
    observer: Observer = _scoring(
        "squared_error",
        "How the range of a layer's input is found: squared_error, min_max or percentile.",
        differs="the observer of activation ranges",
    )
    output_bits: int | None = _scoring(
        None,
        "Bits that residual additions, concatenations, pools and what is read by other than a "
        "layer are rounded to; 8 lets a whole network run in integers. None: they stay in float.",
        **{"unit": "bits", "least": 2, "shown_default": "none", "example": "8"},
        differs="the bits of outputs",
    )
    quantizers: Mapping[str, str] = _scoring(
        None,
        "How weights of some layers are rounded, by name or glob: uniform, binary (1 bit), "
        "ternary (2 bits), midrise or dorefa.",
        **{"kind": QUANTIZERS, "option": "--quantizer", "repeats": True, "metavar": "GLOB=NAME"},
        **{"shown_default": "uniform", "example": '{"layer3.*": "midrise"}'},
        read=read_quantizers,
    )
    precision: Precision = _scoring(
        "float32",
        "Number format of candidates' forward passes: float32 or bfloat16.",
        differs="the precision of candidates' forward passes",
    )
    n_candidates: int = _steps(
        8,
        "Candidates a step.",
        **{"unit": "candidates", "least": 1, "option": "--candidates"},
        differs="the number of candidates a step",
    )
    rule: Rule = _steps(
        "ratio",
        "Which candidate wins: the smallest rise per cost saved (ratio) or the smallest score "
        "(min, the patent's).",
        differs="the winner rule",
    )
    seed: int = _steps(0, "Seed of the draws.", differs="the seed")
    refine: bool = _steps(
        True,
        "Refine the answer by swaps once the budget is met.",
        differs="whether swaps refine the answer",
    )
    verify: int = _steps(
        8,
        "Assignments within the budget that are measured in the end, where a sum over layers chose "
        "until then; 0 for none.",
        **{"unit": "assignments", "least": 0},
        differs="how many assignments are measured in the end",
    )
    encoding: Encoding | None = _steps(
        None,
        "How a candidate's bits are stored: as the parameters of all layers, which dashboards "
        "draw, or compact.",
        **{"shown_default": "layers, up to 30 of them", "example": '"layers"'},
        differs="the encoding of candidates",
    )
    method: Method = _steps(
        "default",
        "'patent' does what the patent's text says: the scorer diagonal, a forward pass per "
        "candidate, the rule min, each winner trained, no swaps and nothing measured in the end.",
    )
    train_every: int = _steps(
        0,
        "Steps after which their winner is trained: 1 as in the patent, 0 for never.",
        **{"unit": "steps", "least": 0, "shown_default": "never", "example": "4"},
        differs="how often winners are trained",
    )
    train_epochs: int | None = _training(
        None,
        "Epochs in which a step's winner is trained.",
        **{"unit": "epochs", "least": 1, "shown_default": "2", "example": "2"},
    )
    final_epochs: int | None = _training(
        None,
        "Epochs in which the answer is trained; 0 for none.",
        **{"unit": "epochs", "least": 0, "example": "20"},
        shown_default="20 with --train-every, else 0",
    )
    training: Mapping[str, Any] = _further(
        "Further settings of training, see TrainingSettings.", example='{"learning_rate": 1e-3}'
    )
    final_training: Mapping[str, Any] = _further(
        "Those that are others for the training of the answer.",
        example='{"blend": 0.5, "teacher_views": 6}',
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "patent":
            return
        for name, value in PATENT.items():
            given, default = getattr(self, name), settings_of(type(self))[name].default
            if given not in (default, value):
                raise SettingError(
                    f"The method 'patent' has {name} {value!r}; got {given!r}. Leave {name} out, "
                    "or the method."
                )
            object.__setattr__(self, name, value)
        if not self.train_every:
            object.__setattr__(self, "train_every", 1)


@dataclass(frozen=True, kw_only=True)
class RunSettings(_Settings):
    """Where a run happens and what it may spend; no part of what a search is."""

    storage: str | None = setting(None, "Storage URL.", shown_default="SQLite in the run's folder")
    name: str | None = setting(None, "Name of the study.", shown_default="the file's name")
    folder: Path | None = setting(
        None,
        "The run's folder.",
        shown_default="hq-optuna-runs/NAME",
        read=lambda value: None if value is None else Path(value),
    )
    artifacts: str | None = setting(
        None,
        "Folder or s3://bucket/prefix for files of the study.",
        **{"kind": PATH, "shown_default": "artifacts in the run's folder"},
    )
    threads: int | None = setting(
        None,
        "Threads of PyTorch.",
        **{"unit": "threads", "least": 1, "shown_default": "what the network keeps busy"},
    )
    device: str | None = setting(
        None,
        "Where the network runs: cpu, cuda, cuda:1.",
        shown_default="where network() puts it",
    )
    retry_for: float = setting(
        300.0,
        "Seconds to try again when the storage does not answer, or its disk is full.",
        **{"unit": "seconds", "least": 0},
    )
    target: str | None = setting(
        None,
        "In place of a search: how much worse than float a metric may be on validation data, "
        "'accuracy -0.5' (points), 'kl 0.01', or the study's own. The answer costs the least that "
        "surely is within it; a budget beside it holds too, and its first limit says which cost.",
        metavar="TEXT",
        shown_default="none",
    )
    layer_errors: bool = setting(
        False,
        "Measure the signal-to-noise ratio of each layer of the answer, alone and among the "
        "others; two passes a layer over some samples.",
    )
    max_trials: int | None = _limit(
        "Trials (candidates and step records) at most.", **{"unit": "trials", "least": 1}
    )
    max_evaluations: int | None = _limit(
        "Candidates scored at most.", **{"unit": "candidates", "least": 1}
    )
    max_seconds: float | None = _limit(
        "Seconds of work of all workers together at most; where that ends depends on the machine.",
        **{"unit": "seconds", "least": 0.001},
    )
