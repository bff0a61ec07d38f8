"""Reading trials on any storage; on databases with as few statements as there can be.

Optuna's own `get_all_trials` builds every trial with all its parameters and attributes: 4 seconds
for a new process at 5,000 trials of 20 layers. The step protocol needs five facts per trial, and
asks for them in one query.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.optuna_internals import database_of, models, trial_id_of
from hq_optuna.storages.retrying import tried_again


@dataclass(frozen=True, slots=True)
class TrialRow:
    """What the step protocol and reports want to know of a trial."""

    number: int
    trial_id: int
    state: TrialState
    value: float | None  # where it has exactly one
    ticket: Ticket | None  # if it has one of this protocol
    signed: bool = False  # this package's objective wrote what it found
    heartbeat: Any = None  # what its owner keeps changing while it runs long
    started: datetime | None = None  # by its creator's clock; `None` while it waits
    ended: datetime | None = None  # by the clock of the host that ended it; `None` while it runs
    rises: tuple[float, ...] = ()  # of a finalist, by blocks of samples
    user_attrs: Mapping[str, Any] = field(default_factory=dict)  # those that were asked for

    @property
    def seconds(self) -> float | None:
        """From its creation to its end; ``None`` while it runs."""
        if self.started is None or self.ended is None:
            return None
        return (self.ended - self.started).total_seconds()


@dataclass
class Cursor:
    """How far trials of a study were read."""

    n: int = 0  # trials seen: the number of the next one
    last_id: int = -1  # the largest one seen
    unfinished: dict[int, int] = field(default_factory=dict)  # number → id, when last seen

    def move(self, rows: Iterable[TrialRow]) -> None:
        """Take in what was read."""
        for row in rows:
            self.n = max(self.n, row.number + 1)
            self.last_id = max(self.last_id, row.trial_id)
            if row.state.is_finished():
                self.unfinished.pop(row.number, None)
            else:
                self.unfinished[row.number] = row.trial_id


@tried_again
def read_rows(storage: BaseStorage, study_id: int, cursor: Cursor) -> list[TrialRow]:
    """Return the trials that are new or were unfinished, by number."""
    database = database_of(storage)
    if database is not None:
        return list(map(_row, select(database.engine, _row_query(study_id, cursor))))
    trials = storage.get_all_trials(study_id, deepcopy=False)
    look = [n for n in cursor.unfinished if n < cursor.n] + list(range(cursor.n, len(trials)))
    return [row_of(trials[number]) for number in sorted(look)]


def row_of(trial: FrozenTrial) -> TrialRow:
    """Return the row of a trial that Optuna read."""
    values = trial.values
    return TrialRow(
        trial.number,
        trial_id_of(trial),
        trial.state,
        values[0] if values is not None and len(values) == 1 else None,
        Ticket.read(trial.system_attrs),
        attributes.SCORE_WEIGHTS in trial.user_attrs,
        trial.system_attrs.get(attributes.HEARTBEAT),
        # Optuna hands out naive local times.
        trial.datetime_start and trial.datetime_start.astimezone(UTC),
        trial.datetime_complete and trial.datetime_complete.astimezone(UTC),
        _rises(trial.user_attrs.get(attributes.RISES)),
    )


@tried_again
def read_facts(storage: BaseStorage, study_id: int, keys: Sequence[str]) -> list[TrialRow]:
    """Return all trials of a study by number, with some of their user attributes."""
    database = database_of(storage)
    found: dict[int, dict[str, Any]] = {}
    if database is None:
        trials = storage.get_all_trials(study_id, deepcopy=False)
        rows = [row_of(trial) for trial in trials]
        for trial in trials:
            some = {key: trial.user_attrs[key] for key in keys if key in trial.user_attrs}
            found[trial_id_of(trial)] = some
    else:
        # Trials first: what ended until the attributes are read has more than its row says.
        rows = [
            _row(columns) for columns in select(database.engine, _row_query(study_id, Cursor()))
        ]
        table, given = models.TrialModel.__table__, models.TrialUserAttributeModel.__table__
        query = (
            sqlalchemy.select(given.c.trial_id, given.c.key, given.c.value_json)
            .join(table, table.c.trial_id == given.c.trial_id)
            .where(table.c.study_id == study_id, given.c.key.in_(keys))
        )
        for trial_id, key, value in select(database.engine, query):
            found.setdefault(trial_id, {})[key] = json.loads(value)
    return [replace(row, user_attrs=found.get(row.trial_id, {})) for row in rows]


def _row_query(study_id: int, cursor: Cursor) -> sqlalchemy.Select[Any]:
    trials = models.TrialModel.__table__
    new = trials.c.trial_id > cursor.last_id
    if cursor.unfinished:
        new = new | trials.c.trial_id.in_(cursor.unfinished.values())
    return _rows_of_all().where(trials.c.study_id == study_id, new)


@functools.cache  # making it takes longer than asking it
def _rows_of_all() -> sqlalchemy.Select[Any]:
    trials, values = models.TrialModel.__table__, models.TrialValueModel.__table__
    ticket, heartbeat = (models.TrialSystemAttributeModel.__table__.alias(n) for n in ("t", "h"))
    signature, rises = (models.TrialUserAttributeModel.__table__.alias(n) for n in ("s", "r"))
    its_id, beats = trials.c.trial_id, trials.c.state == TrialState.RUNNING
    is_heartbeat = (heartbeat.c.key == attributes.HEARTBEAT) & beats
    is_signature = signature.c.key == attributes.SCORE_WEIGHTS
    joined = (
        trials.outerjoin(values, (values.c.trial_id == its_id) & (values.c.objective == 0))
        .outerjoin(ticket, (ticket.c.trial_id == its_id) & (ticket.c.key == attributes.TICKET))
        .outerjoin(heartbeat, (heartbeat.c.trial_id == its_id) & is_heartbeat)
        .outerjoin(signature, (signature.c.trial_id == its_id) & is_signature)
        .outerjoin(rises, (rises.c.trial_id == its_id) & (rises.c.key == attributes.RISES))
    )
    told = (("ticket", ticket.c), ("heartbeat", heartbeat.c), ("rises", rises.c))
    said = [c.value_json.label(n) for n, c in told]
    known = [trials.c[n] for n in ("number", "state", "datetime_start", "datetime_complete")]
    known += [values.c.value, values.c.value_type, *said, signature.c.key.label("signature")]
    return sqlalchemy.select(its_id, *known).select_from(joined).order_by(its_id)


def _row(columns: sqlalchemy.Row[Any]) -> TrialRow:
    value = None
    if columns.value_type is not None:
        value = models.TrialValueModel.stored_repr_to_value(columns.value, columns.value_type)
    ticket = None if columns.ticket is None else Ticket.from_json(json.loads(columns.ticket))
    return TrialRow(
        columns.number,
        columns.trial_id,
        columns.state,
        value,
        ticket,
        columns.signature is not None,
        columns.heartbeat,
        columns.datetime_start and columns.datetime_start.replace(tzinfo=UTC),
        columns.datetime_complete and columns.datetime_complete.replace(tzinfo=UTC),
        _rises(None if columns.rises is None else json.loads(columns.rises)),
    )


def _rises(stored: Any) -> tuple[float, ...]:
    """Return the rises of a finalist; what is none of numbers is none."""
    if not isinstance(stored, list) or not all(isinstance(one, (int, float)) for one in stored):
        return ()
    return tuple(map(float, stored))


def select(engine: sqlalchemy.Engine, query: sqlalchemy.Select[Any]) -> list[Any]:
    """Return the rows of a query, with errors as Optuna's storages raise them."""
    try:
        with engine.connect() as connection:
            return list(connection.execute(query))
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise StorageInternalError("The database cannot be read.") from error
