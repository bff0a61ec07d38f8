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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from hq_optuna.errors import SettingError, SpaceError
from hq_optuna.space.budget import Budget, parse_budget
from hq_optuna.space.layers import FLOAT_BITS

ScorerName = Literal["gauss_newton", "loss", "diagonal", "trace", "fisher", "hutchinson"]
Rule = Literal["min", "ratio"]
Rounding = Literal["compensated", "nearest"]
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
OTHER_BITS: Kind = (
    "'same', a whole number, a sequence of these, or None",
    (Integral, Iterable, NoneType),
)
PIN: Kind = ("a whole number or None", (Integral, str, tuple, list, NoneType))
BY_LAYER: Kind = (
    "a dict from layer names or globs to bits, {'head.*': 8}",
    (Mapping, NoneType),
)
QUANTIZERS: Kind = (
    "a dict from layer names or globs to quantizers, {'layer3.*': 'midrise'}",
    (Mapping, list, tuple, NoneType),
)
GROUPS: Kind = ("a sequence of groups of layer names, [('q', 'k')]", (list, tuple, set))
FURTHER: Kind = ("a dict of settings of training, {'learning_rate': 1e-3}", (Mapping,))
BUDGET: Kind = ("text, '0.25 bops', a number or a Budget", (str, int, float, Budget))


@dataclass(frozen=True)
class Setting:
    """One choice, as it is shown everywhere.

    Attributes:
        name: Name of the field.
        type: Its annotation, as text.
        default: Its default value.
        help: The sentence that explains it.
        unit: Unit of a number, or ``""``.
        kind: What it may be.
        option: The option on the command line, ``--n-candidates``; ``""`` where it has none.
        shown_default: The default in words.
        choices: Words that it may be.
        least: Smallest number that it may be.
        repeats: Whether the option may be given again, for more of the same.
        metavar: What the option's value is called in ``--help``.
        differs: What a study is told to differ in where this differs; ``""`` where a search may go
            on with another value.
        example: A value as a study file has it.
        group: What it is about.
        read: From a value, or text, to the value as it is kept.
    """

    name: str
    type: str
    default: Any
    help: str
    unit: str
    kind: Kind
    option: str
    shown_default: str
    choices: tuple[str, ...]
    least: float | None
    repeats: bool
    metavar: str
    differs: str
    example: str
    group: Group
    read: Callable[[Any], Any]

    def check(self, value: Any) -> None:
        """Refuse a value of another kind.

        Raises:
            SettingError: Says what it may be.
        """
        words, kinds = self.kind
        # A bool is an integer to Python.
        wrong_bool = isinstance(value, bool) and bool not in kinds
        absent = value is None and self.default is None
        if not absent and (wrong_bool or not isinstance(value, kinds)):
            raise SettingError(f"{self.name} is {words}; got {value!r:.80}.")
        if self.choices and value is not None and value not in self.choices:
            raise SettingError(
                f"{self.name} is one of {', '.join(self.choices)}; got {value!r:.80}."
            )


def setting(
    default: Any,
    help: str,
    kind: Kind,
    *,
    unit: str = "",
    choices: Any = (),
    least: float | None = None,
    option: str | None = None,
    shown_default: str = "",
    repeats: bool = False,
    metavar: str = "",
    differs: str = "",
    example: str = "",
    group: Group = "run",
    read: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Return a field of a class of settings; arguments as for `Setting`."""
    made = {
        **{"help": help, "kind": kind, "unit": unit, "choices": get_args(choices), "least": least},
        **{"option": option, "shown_default": shown_default, "repeats": repeats},
        **{"metavar": metavar, "differs": differs, "example": example},
        **{"group": group, "read": read},
    }
    return field(default=default, metadata=made)


def settings_of(owner: type) -> dict[str, Setting]:
    """Return the settings of a class by name, in the order of its fields.

    Example:
        >>> settings_of(SearchSettings)["seed"].help
        'Seed of the draws.'
    """
    found = {}
    for each in fields(owner):
        made = dict(each.metadata)
        option = made.pop("option")
        if option is None:
            option = "--" + each.name.replace("_", "-")
        shown = made.pop("shown_default") or str(each.default)
        text = str(each.type)
        found[each.name] = Setting(
            name=each.name, type=text, default=each.default, option=option, shown_default=shown,
            **made,
        )  # fmt: skip
    return found


class _Settings:
    """What all classes of settings can do."""

    def __post_init__(self) -> None:
        for name, one in settings_of(type(self)).items():
            value = getattr(self, name)
            one.check(value)
            object.__setattr__(self, name, one.read(value))

    def replace(self, **changes: Any) -> Any:
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
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that are not at their defaults, by name."""
        default = type(self)()
        values = ((each.name, getattr(self, each.name)) for each in fields(self))  # type: ignore[arg-type]
        return {name: value for name, value in values if value != getattr(default, name)}

    def to_json(self) -> dict[str, Any]:
        """Return all settings as JSON data."""
        values = ((each.name, getattr(self, each.name)) for each in fields(self))  # type: ignore[arg-type]
        return {name: _plain(value) for name, value in values}


def _plain(value: Any) -> Any:
    if isinstance(value, Budget):
        return value.text
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list, set)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


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


@dataclass(frozen=True, kw_only=True)
class SearchSettings(_Settings):
    """What is searched, how candidates are scored and chosen, and when networks are trained.

    Values may be given as on the command line (``bits="2-8"``, ``budget="0.25 bops"``).

    Raises:
        SettingError: A value is of another kind than its setting.
        SpaceError: Bits that cannot be read.
    """

    budget: Budget = setting(
        "0.25 bops",
        "Most that the answer may cost: a share of the all-8-bit cost ('0.25 bops', "
        "'40% size_bytes') or an amount ('24 GBOPs', '64 KiB').",
        BUDGET,
        unit="BOPs or bytes",
        differs="the budget",
        example='"0.25 bops"',
        read=parse_budget,
        group="steps",
    )
    bits: tuple[int, ...] = setting(
        tuple(range(2, 9)),
        "Bits that a layer may have: '2-8' or '8,4,2', each 1 to 16.",
        BITS,
        unit="bits",
        shown_default="2-8",
        example="range(2, 9)",
        read=read_bits,
        group="space",
    )
    activation_bits: Literal["same"] | int | tuple[int, ...] | None = setting(
        "same",
        "Bits of a layer's input: 'same' as its weights, 'float', a number, or bits that are "
        "searched apart ('4,8').",
        OTHER_BITS,
        unit="bits",
        example='"same"',
        read=_activation_bits,
        group="space",
    )
    pin_first_last: int | None = setting(
        8,
        "Bits of the first and the last layer, or 'none' to search them too.",
        PIN,
        unit="bits",
        example="8",
        read=_pin,
        group="space",
    )
    pins: Mapping[str, int | tuple[int, int]] = setting(
        None,
        "Fixed bits of some layers, by name or glob.",
        BY_LAYER,
        unit="bits",
        option="",
        shown_default="none",
        example='{"head.*": 8}',
        read=_mapping,
        group="space",
    )
    allowed: Mapping[str, Iterable[int]] = setting(
        None,
        "Bits that some layers may have, by name or glob.",
        BY_LAYER,
        unit="bits",
        option="",
        shown_default="none",
        example='{"stem": (8, 6)}',
        read=_mapping,
        group="space",
    )
    tied: tuple[tuple[str, ...], ...] = setting(
        (),
        "Groups of layers that share their bits.",
        GROUPS,
        option="",
        shown_default="none",
        example='[("q", "k")]',
        read=_groups,
        group="space",
    )
    scorer: ScorerName | None = setting(
        None,
        "What ranks candidates: the rise that their outputs tell (gauss_newton), the measured "
        "loss, or a sum over layers (diagonal, trace, fisher, hutchinson).",
        WORD,
        choices=ScorerName,
        shown_default="gauss_newton, for losses it knows",
        differs="the scorer",
        example='"gauss_newton"',
        group="scoring",
    )
    rounding: Rounding = setting(
        "compensated",
        "How weights are rounded: compensated (errors make up for each other) or nearest.",
        WORD,
        choices=Rounding,
        differs="how weights are rounded",
        example='"compensated"',
        group="scoring",
    )
    correction: bool = setting(
        True,
        "Correct batch-norm statistics and biases for the bits.",
        SWITCH,
        shown_default="correction",
        differs="whether statistics are corrected",
        example="True",
        group="scoring",
    )
    observer: Observer = setting(
        "squared_error",
        "How the range of a layer's input is found: squared_error, min_max or percentile.",
        WORD,
        choices=Observer,
        differs="the observer of activation ranges",
        example='"squared_error"',
        group="scoring",
    )
    quantizers: Mapping[str, str] = setting(
        None,
        "How weights of some layers are rounded, by name or glob: uniform, binary (1 bit), "
        "ternary (2 bits), midrise or dorefa.",
        QUANTIZERS,
        option="--quantizer",
        repeats=True,
        metavar="GLOB=NAME",
        shown_default="uniform",
        example='{"layer3.*": "midrise"}',
        read=read_quantizers,
        group="scoring",
    )
    precision: Precision = setting(
        "float32",
        "Number format of candidates' forward passes: float32 or bfloat16.",
        WORD,
        choices=Precision,
        differs="the precision of candidates' forward passes",
        example='"float32"',
        group="scoring",
    )
    n_candidates: int = setting(
        8,
        "Candidates a step.",
        WHOLE,
        unit="candidates",
        option="--candidates",
        differs="the number of candidates a step",
        example="8",
        group="steps",
    )
    rule: Rule = setting(
        "ratio",
        "Which candidate wins: the smallest rise per cost saved (ratio) or the smallest score "
        "(min, the patent's).",
        WORD,
        choices=Rule,
        differs="the winner rule",
        example='"ratio"',
        group="steps",
    )
    seed: int = setting(
        0, "Seed of the draws.", WHOLE, differs="the seed", example="0", group="steps"
    )
    refine: bool = setting(
        True,
        "Refine the answer by swaps once the budget is met.",
        SWITCH,
        shown_default="refine",
        differs="whether swaps refine the answer",
        example="True",
        group="steps",
    )
    encoding: Encoding | None = setting(
        None,
        "How a candidate's bits are stored: as the parameters of all layers, which dashboards "
        "draw, or compact.",
        WORD,
        choices=Encoding,
        shown_default="layers, up to 30 of them",
        differs="the encoding of candidates",
        example='"layers"',
        group="steps",
    )
    train_every: int = setting(
        0,
        "Steps after which their winner is trained: 1 as in the patent, 0 for never.",
        WHOLE,
        unit="steps",
        least=0,
        shown_default="never",
        differs="how often winners are trained",
        example="4",
        group="steps",
    )
    train_epochs: int | None = setting(
        None,
        "Epochs in which a step's winner is trained.",
        WHOLE,
        unit="epochs",
        least=1,
        shown_default="2",
        example="2",
        group="training",
    )
    final_epochs: int | None = setting(
        None,
        "Epochs in which the answer is trained; 0 for none.",
        WHOLE,
        unit="epochs",
        least=0,
        shown_default="20 with --train-every, else 0",
        example="20",
        group="training",
    )
    training: Mapping[str, Any] = setting(
        None,
        "Further settings of training, see TrainingSettings.",
        FURTHER,
        option="",
        shown_default="none",
        example='{"learning_rate": 1e-3}',
        read=_mapping,
        group="training",
    )
    final_training: Mapping[str, Any] = setting(
        None,
        "Those that are others for the training of the answer.",
        FURTHER,
        option="",
        shown_default="none",
        example='{"blend": 0.5, "teacher_views": 6}',
        read=_mapping,
        group="training",
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings(_Settings):
    """Where a run happens and what it may spend; no part of what a search is."""

    storage: str | None = setting(
        None,
        "Storage URL.",
        WORD,
        shown_default="SQLite in the run's folder",
    )
    name: str | None = setting(None, "Name of the study.", WORD, shown_default="the file's name")
    folder: Path | None = setting(
        None,
        "The run's folder.",
        PATH,
        shown_default="hq-optuna-runs/NAME",
        read=lambda value: None if value is None else Path(value),
    )
    artifacts: str | None = setting(
        None,
        "Folder or s3://bucket/prefix for files of the study.",
        PATH,
        shown_default="artifacts in the run's folder",
    )
    threads: int | None = setting(
        None,
        "Threads of PyTorch.",
        WHOLE,
        unit="threads",
        least=1,
        shown_default="what the network keeps busy",
    )
    device: str | None = setting(
        None,
        "Where the network runs: cpu, cuda, cuda:1.",
        WORD,
        shown_default="where network() puts it",
    )
    retry_for: float = setting(
        300.0,
        "Seconds to try again when the storage does not answer, or its disk is full.",
        NUMBER,
        unit="seconds",
        least=0,
    )
    max_trials: int | None = setting(
        None,
        "Trials (candidates and step records) at most.",
        WHOLE,
        unit="trials",
        least=1,
        shown_default="no limit",
    )
    max_evaluations: int | None = setting(
        None,
        "Candidates scored at most.",
        WHOLE,
        unit="candidates",
        least=1,
        shown_default="no limit",
    )
    max_seconds: float | None = setting(
        None,
        "Seconds of work of all workers together at most; where that ends depends on the machine.",
        NUMBER,
        unit="seconds",
        least=0.001,
        shown_default="no limit",
    )


def differing(names: Sequence[str]) -> list[str]:
    """Return what differs, in words, from the names of settings that differ."""
    known = settings_of(SearchSettings)
    return [known[name].differs if name in known else name for name in names]
