"""Trials as work: who did which one, from when to when."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.protocol import worker_identity
from hq_optuna.storages.trials import TrialFacts


@dataclass(frozen=True, slots=True)
class Run:
    """What one trial was as work.

    Times are those of the storage: the start by the clock of the host that created the trial, the
    end by the clock of the host that ended it. Another worker ends the trial of one that died, when
    it finds out. MySQL keeps whole seconds.

    Attributes:
        number: Trial number.
        worker: Who ran it, see `worker_identity.worker_id`; ``host:pid`` or empty where its ticket
            does not say. Until it ended well, who claimed it.
        kind: What its ticket was for, see `Ticket`; ``"free"`` also for trials without one.
        step: Its step, -1 where it has none.
        slot: Its place among the candidates of the step, -1 where it has none.
        state: Where it stands.
        started: UTC.
        ended: UTC; ``None`` while it runs.
        seconds: What its objective took, where that was recorded.
        counted: Whether the search took its result.
        handed: Whether somebody else claimed it and handed it out, as a launcher does, so that it
            may have waited for its worker after its start.
        trains: Whether it records a step whose winner it trains.
    """

    number: int
    worker: str
    kind: Literal["candidate", "incumbent", "surplus", "free"]
    step: int
    slot: int
    state: TrialState
    started: datetime
    ended: datetime | None
    seconds: float | None
    counted: bool
    handed: bool = False
    trains: bool = False


def read_runs(trials: Collection[TrialFacts], counted: Collection[int]) -> tuple[Run, ...]:
    """Return the trials that somebody ran, by number.

    Args:
        trials: With the user attributes `SECONDS` and `WORKER`.
        counted: Numbers of those whose results the search took.
    """
    found = []
    for trial in trials:
        row, ticket, user = trial.row, trial.row.ticket, trial.user_attrs
        if trial.started is None or row.state == TrialState.WAITING:
            continue
        claimed, scored = ticket.worker if ticket else "", user.get(attributes.WORKER, "")
        handed = bool(claimed and scored) and scored != worker_identity.short_name(claimed)
        found.append(
            Run(
                number=row.number,
                worker=scored if handed else claimed or scored,
                kind="free" if ticket is None else ticket.kind,
                step=-1 if ticket is None else ticket.step,
                slot=-1 if ticket is None else ticket.slot,
                state=row.state,
                started=trial.started,
                ended=trial.ended,
                seconds=user.get(attributes.SECONDS),
                counted=row.number in counted,
                handed=handed,
                trains=ticket is not None and ticket.trains,
            )
        )
    return tuple(found)
