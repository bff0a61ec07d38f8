"""Names and format of everything this package writes into an Optuna study.

One module knows the format on disk. Optuna parameters hold bits; user attributes are what people
read in the dashboard and in `study.trials_dataframe()`; system attributes are what the step
protocol reads back (DESIGN: tickets and step records).

A *ticket* is the single small attribute that says what a trial is for. It is written once, in one
statement, by the sampler before the trial runs:

    {"v": 1, "kind": "candidate", "step": 3, "slot": 5, "parent": "6f1c…", "search": "09ab…",
     "bits": [8, 7, …], …}

``bits`` are those of the variables of the space, in its order, so a ticket alone rebuilds the
assignment. ``parent`` names the state of the search the ticket was written for; a ticket with
another parent is ignored by everyone, so a stale view can waste an evaluation and nothing else.
``search`` names settings, network and data; the ticket with the lowest number says whose study
this is, which is the one fact that all workers of a new study agree on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

# System attributes of a trial.
TICKET = "hq:ticket"
HEARTBEAT = "hq:heartbeat"  # a count that the owner of a long trial keeps changing
CHECKPOINT = "hq:checkpoint"  # of a step record in training: the last epoch's artifact
OLD_CONSTRAINTS = "constraints"  # read by optuna-dashboard up to 0.21 instead of Optuna 5's own

# System attributes of a study.
SPACE = "hq:space"  # `SearchSpace.to_json()` in parts, `hq:space:0` and so on, see `split`
SETTINGS = "hq:settings"  # the sampler's settings, written by the first worker
SENSITIVITY = "hq:sensitivity"  # in parts: {layer: {"weights": {bits: nats}, "activations": …}}
PIECES = "hq:pieces"  # in parts: what is done before the first trial, `hq_optuna.protocol.pieces`
PIECE = "hq:piece"  # prefix `hq:piece:SEARCH:NAME`: who is at a piece, or what came of it
ARTIFACT = "hq:artifact"  # prefix `hq:artifact:NAME`: {"id", "sha256", "bytes"}

# User attributes of a study.
FINGERPRINT = "hq:fingerprint"  # what the search depends on, by name (network, data, space, …)
LIMITS = "hq:limits"  # what the search may spend on itself, `hq_optuna.search.Limits`
EXPORTED = "hq:exported"  # files of the answer and what their checks found, one JSON object each
STARTED = "hq:started"  # what was given on the command line that started the search
INFO = "hq:info"  # `StudyInfo`, what people and reports want to know of the search
REPORT = "hq:report"  # prefix `hq:report:…`: facts measured at the end (accuracy, skipped)

# User attributes of a trial.
KIND = "kind"  # "candidate", "finalist" or "incumbent"
STEP = "step"
SLOT = "slot"  # place among the step's candidates
PARENT = "parent"  # number of the trial that recorded the incumbent the step started from
WINNER = "winner"  # of a step record: number of the trial it took
LAYER = "layer"  # the variable that was changed; of a swap all changes, in words
FROM_BITS = "from_bits"
TO_BITS = "to_bits"
SCORE_WEIGHTS = "score_weights"  # nats
SCORE_ACTIVATIONS = "score_activations"  # nats
CALIBRATION_LOSS = "calibration_loss"
COST = "cost"  # in the unit of the first limit's metric; `cost:METRIC` for those beside it
RISES = "rises"
"""Of a finalist: mean smooth rises of blocks of set-aside samples, nats, the same for all."""

SECONDS = "seconds"
WORKER = "worker"
TRAINING = "training"
"""Of a step record whose bits were trained: what that gave, and where the weights and the
sensitivities at them are (`hq_optuna.objective.training_steps`)."""

COMPARED = "compared"
"""The fact that holds what the answer was compared with: JSON objects, each with ``"method"``,
``"bits"``, ``"cost"`` and ``"measured"``, see `hq_optuna.answer.comparison.rows`."""

LAYER_ERRORS = "layer_errors"
"""The fact that holds each layer's signal-to-noise ratios, see `hq_optuna.answer.layer_errors`."""

ANSWER, UNIFORM, EIGHT = "answer", "uniform", "8 bits"  # methods of those rows
VENDOR = "vendor's default"  # another

PROTOCOL = 1  # version of the tickets
PART_CHARACTERS = 30_000  # longest attribute we write: a MySQL TEXT column ends at 65,535 bytes
Kind = Literal["candidate", "incumbent", "surplus", "free"]
"""A candidate, a step's record, nothing to do, or somebody's own enqueued trial."""


def split(key: str, data: Any) -> dict[str, str]:
    """Return JSON data as attributes ``key:0``, ``key:1``, … short enough for every storage.

    Example:
        >>> split("hq:space", {"a": 1})
        {'hq:space:0': '{"a":1}'}
    """
    text = json.dumps(data, separators=(",", ":"))
    starts = range(0, len(text), PART_CHARACTERS)
    return {f"{key}:{i}": text[s : s + PART_CHARACTERS] for i, s in enumerate(starts)}


def join(key: str, attributes: Mapping[str, Any]) -> Any | None:
    """Return the data that `split` wrote among ``attributes``, or ``None``."""
    parts: list[str] = []
    while f"{key}:{len(parts)}" in attributes:
        parts.append(attributes[f"{key}:{len(parts)}"])
    return json.loads("".join(parts)) if parts else None


def digest(data: Any) -> str:
    """Return twelve hexadecimal digits that name JSON data."""
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def same_search(one: str, other: str) -> bool:
    """Return whether two tickets may be of one search, from what they say of theirs.

    A search is named by two digests, ``settings/rest``. The rest (network, data) is missing where a
    ticket was written before the objective was called.

    Example:
        >>> same_search("aa/01", "aa"), same_search("aa/01", "aa/02"), same_search("aa", "bb")
        (True, False, False)
    """
    (mine, _, rest), (settings, _, more) = one.partition("/"), other.partition("/")
    return mine == settings and (rest == more or not (rest and more))


@dataclass(frozen=True, slots=True)
class Beside:
    """A limit beside the first one."""

    metric: Any  # of `hq_optuna.space.METRICS`
    limit: float  # in its unit
    budget: str  # in words
    int8: float  # cost with 8 bits everywhere


@dataclass(frozen=True, slots=True)
class StudyInfo:
    """What a search is about, for people and reports."""

    metric: Any  # of `hq_optuna.space.METRICS`
    limit: float  # the budget in that unit
    budget: str  # in words
    int8: float  # cost with 8 bits everywhere
    float32: float | None  # cost without quantization, where it is known
    settings: Mapping[str, Any]  # all `hq_optuna.settings.SearchSettings`
    quantizers: Mapping[str, str] = field(default_factory=dict)  # by layer; not "uniform"
    training: Mapping[str, Any] | None = None  # see `hq_optuna.training.plan`
    skipped: tuple[tuple[str, str, str], ...] = ()  # name, kind, reason of modules
    warnings: tuple[str, ...] = ()  # sentences that a reader of the results must know
    beside: tuple[Beside, ...] = ()  # further limits, which hold too

    @property
    def scores_by_table(self) -> bool:
        """Whether candidates are scored by a table of rises, without a forward pass."""
        by_passes = self.settings.get("measure_candidates", False)
        return self.settings.get("scorer") not in ("gauss_newton", "loss") and not by_passes

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StudyInfo:
        """Rebuild from ``dataclasses.asdict`` after a round trip through JSON."""
        skipped = tuple((name, kind, reason) for name, kind, reason in data["skipped"])
        beside = tuple(Beside(**each) for each in data["beside"])
        lists = {"skipped": skipped, "warnings": tuple(data["warnings"]), "beside": beside}
        return cls(**{**data, **lists})


def quantizers_text(quantizers: Mapping[str, str], most: int = 6) -> str:
    """Return which layers have which quantizer of weights, at most so many by name.

    Example:
        >>> quantizers_text({"a": "midrise", "b": "midrise"}), quantizers_text({})
        ('midrise: a, b; all others uniform', 'uniform')
    """
    layers: dict[str, list[str]] = {}
    for layer, name in quantizers.items():
        layers.setdefault(name, []).append(layer)
    said = []
    for name, found in layers.items():
        more = f" and {len(found) - most} more" if len(found) > most else ""
        said.append(f"{name}: {', '.join(found[:most])}{more}")
    return "; ".join([*said, "all others uniform"]) if said else "uniform"


@dataclass(frozen=True, slots=True)
class Ticket:
    """What one trial is for."""

    kind: Kind
    step: int
    slot: int  # its place among the candidates; of a record, the winner's
    parent: str  # digest of the state of the search it was written for
    bits: tuple[int, ...]  # of each variable of the space
    origin: int | None = None  # a record's: the trial it takes; a candidate's: the record before it
    variable: str | None = None  # that was changed; of a swap all changes, in words
    from_bits: int | None = None  # before the change; `None` for a swap
    worker: str = ""  # who runs the trial, see `worker_id`
    search: str = ""  # what the search depends on, see `same_search`
    claim: int = 0  # number among its worker's claims, from 1; 0 where the trial was there before
    trains: bool = False  # of a record: its bits are trained, and its value is the score after it
    measures: bool = False  # of a candidate: a finalist, whose rise is measured

    def to_json(self) -> dict[str, Any]:
        """Return the attribute's value."""
        return {"v": PROTOCOL, **asdict(self), "bits": list(self.bits)}

    @classmethod
    def read(cls, system_attrs: Mapping[str, Any]) -> Ticket | None:
        """Return the ticket among a trial's system attributes, or ``None``."""
        return cls.from_json(system_attrs.get(TICKET))

    @classmethod
    def from_json(cls, data: Any) -> Ticket | None:
        """Return the ticket that is an attribute's value, or ``None``.

        A ticket of another protocol version, or a damaged one, is treated as absent.
        """
        if not isinstance(data, dict) or data.get("v") != PROTOCOL:
            return None
        try:
            known = {field.name: data[field.name] for field in fields(cls)}
            return cls(**{**known, "bits": tuple(known["bits"])})
        except (KeyError, TypeError):
            return None
