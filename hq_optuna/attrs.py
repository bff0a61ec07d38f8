"""Names and format of everything this package writes into an Optuna study.

One module knows the format on disk. Optuna parameters hold bits; user attributes are what people
read in the dashboard and in `study.trials_dataframe()`; system attributes are what the step
protocol reads back (DESIGN: tickets and step records).

A *ticket* is the single small attribute that says what a trial is for. It is written once, in one
statement, by the sampler before the trial runs:

    {"v": 1, "kind": "candidate", "step": 3, "slot": 5, "parent": "6f1c…", "bits": [8, 7, …]}

``bits`` are those of the variables of the space, in its order, so a ticket alone rebuilds the
assignment. ``parent`` names the state of the search the ticket was written for; a ticket with
another parent is ignored by everyone, so a stale view can waste an evaluation and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TICKET = "hq:ticket"
"""Trial system attribute: the ticket."""

SPACE = "hq:space"
"""Study system attribute: `SearchSpace.to_json()`, in parts (see `chunk`)."""

SETTINGS = "hq:settings"
"""Study system attribute: the sampler's settings, written by the first worker."""

FINGERPRINT = "hq:fingerprint"
"""Study user attribute: what the search depends on, by name (network, data, space, …)."""

OLD_CONSTRAINTS = "constraints"
"""Trial system attribute read by optuna-dashboard up to 0.21 instead of Optuna 5's own."""

# User attributes of a trial.
KIND = "kind"  # "candidate" or "incumbent"
STEP = "step"
SLOT = "slot"  # place among the step's candidates
PARENT = "parent"  # number of the trial that recorded the incumbent the step started from
WINNER = "winner"  # of a step record: number of the trial it took
LAYER = "layer"  # the variable that was lowered
FROM_BITS = "from_bits"
TO_BITS = "to_bits"
SCORE = "score"  # nats
SCORE_WEIGHTS = "score_weights"  # nats
SCORE_ACTIVATIONS = "score_activations"  # nats
CALIBRATION_LOSS = "calibration_loss"
COST = "cost"  # in the unit of the budget's metric
SECONDS = "seconds"
WORKER = "worker"

# User attributes of a study.
STUDY_INFO = "hq:study"
"""Study user attribute: metric, limit, all-8-bit and float cost, budget text, layer facts."""

SENSITIVITY = "hq:sensitivity"
"""Study user attribute prefix, one per layer: bits → predicted loss rise (nats)."""

Kind = Literal["candidate", "incumbent", "surplus"]
PROTOCOL = 1


@dataclass(frozen=True, slots=True)
class Ticket:
    """What one trial is for.

    Attributes:
        kind: ``"candidate"``, ``"incumbent"`` (a step record) or ``"surplus"`` (nothing to do).
        step: Number of the step.
        slot: Place among the candidates; for a step record, the winner's place.
        parent: Digest of the state of the search the ticket was written for.
        bits: Bits of each variable of the space.
        origin: For a step record, the number of the trial it takes; for a candidate, the number
            of the record its step started from (``None`` in step 0).
        variable: Name of the lowered variable (``None`` in step 0 and in step records).
        from_bits: Its bits before.
        worker: Who runs the trial, see `worker_id`.
    """

    kind: Kind
    step: int
    slot: int
    parent: str
    bits: tuple[int, ...]
    origin: int | None = None
    variable: str | None = None
    from_bits: int | None = None
    worker: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the attribute's value."""
        return {
            "v": PROTOCOL,
            "kind": self.kind,
            "step": self.step,
            "slot": self.slot,
            "parent": self.parent,
            "bits": list(self.bits),
            "origin": self.origin,
            "variable": self.variable,
            "from": self.from_bits,
            "worker": self.worker,
        }

    @classmethod
    def read(cls, system_attrs: Mapping[str, Any]) -> Ticket | None:
        """Return the ticket among a trial's system attributes, or ``None``.

        A ticket of another protocol version is treated as absent.
        """
        data = system_attrs.get(TICKET)
        if not isinstance(data, dict) or data.get("v") != PROTOCOL:
            return None
        return cls(
            kind=data["kind"],
            step=data["step"],
            slot=data["slot"],
            parent=data["parent"],
            bits=tuple(data["bits"]),
            origin=data["origin"],
            variable=data["variable"],
            from_bits=data["from"],
            worker=data["worker"],
        )
