"""`Database`: Optuna's database storage with few statements per trial.

Optuna writes each parameter and each attribute in a transaction of its own, and asks the database
before each one whether it may. A candidate of twenty layers costs it some hundred statements and
thirty commits; here it is created in one transaction and finished in another, in about ten
statements. The tables hold the same afterwards, so every other program that reads the study
(optuna-dashboard, a worker with plain Optuna) notices nothing. Storages of other classes get the
same calls one by one (`hq_optuna.storages.writing`).
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy
from optuna.distributions import distribution_to_json
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import mysql, postgresql, sqlite

from hq_optuna import attributes
from hq_optuna.optuna_internals import HookedRDBStorage, models

BULK = ("sqlite", "postgresql", "mysql", "mariadb")
"""Databases that `Database` speaks to in its own way; others are spoken to as Optuna does."""

_as_json = functools.lru_cache(maxsize=4096)(distribution_to_json)

_STUDIES = models.StudyModel.__table__
_TRIALS = models.TrialModel.__table__
_VALUES = models.TrialValueModel.__table__
_PARAMETERS = models.TrialParamModel.__table__
_USER_ATTRS = models.TrialUserAttributeModel.__table__
_SYSTEM_ATTRS = models.TrialSystemAttributeModel.__table__
_STUDY_SYSTEM_ATTRS = models.StudySystemAttributeModel.__table__

_Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a trial ended."""

    trial_id: int
    state: TrialState  # a finished one
    value: float | None = None  # where it is complete
    user_attrs: Mapping[str, Any] = field(default_factory=dict)  # new ones
    seconds: float | None = None  # how long it ran; `None`: since it was created


class Database(HookedRDBStorage):
    """An `optuna.storages.RDBStorage` that writes trials of this package in few statements."""

    def create_whole(self, study_id: int, template: FrozenTrial) -> tuple[int, int] | None:
        """Create a trial with a ticket. Its parameters are of the study's own space."""
        if attributes.TICKET not in template.system_attrs or self.engine.name not in BULK:
            return None
        [created] = self.create_trials(study_id, [template])
        return created

    def create_trials(
        self, study_id: int, templates: Sequence[FrozenTrial]
    ) -> list[tuple[int, int]]:
        """Create trials with tickets, running or complete, at once; return number and id of each.

        The numbers are in a row.
        """
        with self._transaction() as connection:
            # Whoever holds the study's row hands out the next numbers, as Optuna does.
            _lock_study(connection, study_id)
            count = sqlalchemy.select(sqlalchemy.func.count()).select_from(_TRIALS)
            first = connection.execute(count.where(_TRIALS.c.study_id == study_id)).scalar_one()
            rows: _Rows = [
                {
                    "number": first + place,
                    "study_id": study_id,
                    "state": template.state,
                    "datetime_start": _utc(template.datetime_start),
                    "datetime_complete": _utc(template.datetime_complete),
                }
                for place, template in enumerate(templates)
            ]
            ids = _insert_for_ids(connection, _TRIALS, rows)
            created = list(zip(ids, templates, strict=True))
            for table, more in (
                (_PARAMETERS, [row for i, t in created for row in _parameters(i, t)]),
                (_VALUES, [_value(i, value) for i, t in created for value in t.values or ()]),
                (_USER_ATTRS, [row for i, t in created for row in _attributes(i, t.user_attrs)]),
                (_SYSTEM_ATTRS, [r for i, t in created for r in _attributes(i, t.system_attrs)]),
            ):
                if more:
                    connection.execute(sqlalchemy.insert(table), more)
        return [(first + place, trial_id) for place, trial_id in enumerate(ids)]

    def set_trial_attrs(
        self, trial_ids: Sequence[int], attrs: Mapping[str, Any], *, system: bool = False
    ) -> bool:
        """Write attributes of those trials that run in one transaction; return if there are any."""
        with self._transaction() as connection:
            running = _running(connection, trial_ids)
            rows = [row for trial_id in running for row in _attributes(trial_id, attrs)]
            self._upsert(connection, _SYSTEM_ATTRS if system else _USER_ATTRS, rows)
        return bool(running)

    def finish_trials(self, ended: Sequence[Ended]) -> list[int]:
        """End running trials with values and attributes, in one transaction; return their ids.

        What somebody else ended stays as it is: of two exactly one succeeds, on every database.
        """
        with self._transaction() as connection:
            running = _end(connection, ended)
            done = [one for one in ended if one.trial_id in running]
            for table, rows in (
                (_VALUES, [_value(o.trial_id, o.value) for o in done if o.value is not None]),
                (_USER_ATTRS, [r for o in done for r in _attributes(o.trial_id, o.user_attrs)]),
            ):
                if rows:
                    connection.execute(sqlalchemy.insert(table), rows)
        return [one.trial_id for one in done]

    def set_study_system_attrs(self, study_id: int, system_attrs: Mapping[str, Any]) -> None:
        """Write attributes of a study in one transaction: readers see all of them or none.

        What two processes write at the same moment is what one of them wrote, never a mixture.
        """
        rows: _Rows = [
            {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
            for key, value in sorted(system_attrs.items())  # writers in one order never deadlock
        ]
        with self._transaction() as connection:
            self._upsert(connection, _STUDY_SYSTEM_ATTRS, rows)

    def swap_study_system_attr(self, study_id: int, key: str, before: Any, after: Any) -> bool:
        """Write an attribute of a study if it is ``before``; return whether it is ``after`` now.

        ``None`` stands for no attribute. Of several that swap at the same moment one succeeds.
        """
        table = _STUDY_SYSTEM_ATTRS
        query = sqlalchemy.select(table.c.value_json)
        with self._transaction() as connection:
            _lock_study(connection, study_id)
            stored = connection.execute(
                query.where(table.c.study_id == study_id, table.c.key == key)
            ).scalar_one_or_none()
            now = None if stored is None else json.loads(stored)
            if now == before:
                row = {"study_id": study_id, "key": key, "value_json": json.dumps(after)}
                self._upsert(connection, table, [row])
            return now in (before, after)

    def _upsert(
        self, connection: sqlalchemy.Connection, table: sqlalchemy.Table, rows: _Rows
    ) -> None:
        """Write attributes of a study or of trials, whether they are there or not."""
        if not rows:
            return
        if self.engine.name in ("mysql", "mariadb"):
            theirs = mysql.insert(table)
            update = theirs.on_duplicate_key_update(value_json=theirs.inserted.value_json)
            connection.execute(update, rows)
            return
        ours = (postgresql if self.engine.name == "postgresql" else sqlite).insert(table)
        owner = "study_id" if "study_id" in table.c else "trial_id"
        connection.execute(
            ours.on_conflict_do_update(
                index_elements=[owner, "key"], set_={"value_json": ours.excluded.value_json}
            ),
            rows,
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlalchemy.Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise StorageInternalError("An exception is raised during the commit.") from error


def _lock_study(connection: sqlalchemy.Connection, study_id: int) -> None:
    """Hold a study's row until the transaction ends. On SQLite only a write takes the lock."""
    study = _STUDIES.c.study_id == study_id
    if connection.dialect.name == "sqlite":
        same = sqlalchemy.update(_STUDIES).where(study)
        same = same.values(study_name=_STUDIES.c.study_name)
        there = connection.execute(same).rowcount == 1
    else:
        locked = sqlalchemy.select(_STUDIES.c.study_id).where(study).with_for_update()
        there = connection.execute(locked).first() is not None
    if not there:  # SQLite does not ask whether the study of a trial exists
        raise KeyError(f"There is no study {study_id}.")


def _parameters(trial_id: int, trial: FrozenTrial) -> _Rows:
    return [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": float(trial.distributions[name].to_internal_repr(value)),
            "distribution_json": _as_json(trial.distributions[name]),
        }
        for name, value in trial.params.items()
    ]


def _value(trial_id: int, value: float) -> dict[str, Any]:
    stored, kind = models.TrialValueModel.value_to_stored_repr(value)
    return {"trial_id": trial_id, "objective": 0, "value": stored, "value_type": kind}


def _attributes(trial_id: int, attributes: Mapping[str, Any]) -> _Rows:
    return [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for key, value in attributes.items()
    ]


def _utc(time: datetime | None) -> datetime | None:
    """Return a time as Optuna stores it."""
    return None if time is None else time.astimezone(UTC).replace(tzinfo=None)


def _running(connection: sqlalchemy.Connection, trial_ids: Sequence[int]) -> list[int]:
    """Return those of the trials that run, and keep them from being ended until the commit."""
    running = sqlalchemy.select(_TRIALS.c.trial_id).where(
        _TRIALS.c.trial_id.in_(trial_ids), _TRIALS.c.state == TrialState.RUNNING
    )
    locked = running.order_by(_TRIALS.c.trial_id).with_for_update()
    return list(connection.execute(locked).scalars())


def _end(connection: sqlalchemy.Connection, ended: Sequence[Ended]) -> set[int]:
    """Set the state of those trials that run, and return their ids."""
    now, found = datetime.now(UTC).replace(tzinfo=None), set[int]()
    for state in sorted({one.state for one in ended}):
        ids = sorted(one.trial_id for one in ended if one.state == state)  # all lock in one order
        change = sqlalchemy.update(_TRIALS).where(_TRIALS.c.state == TrialState.RUNNING)
        change = change.values(state=state, datetime_complete=now)
        if connection.dialect.update_returning:
            change = change.where(_TRIALS.c.trial_id.in_(ids)).returning(_TRIALS.c.trial_id)
            found |= set(connection.execute(change).scalars())
            continue
        for trial_id in ids:  # MySQL and MariaDB
            if connection.execute(change.where(_TRIALS.c.trial_id == trial_id)).rowcount == 1:
                found.add(trial_id)
    began = [
        {"id": one.trial_id, "began": now - timedelta(seconds=one.seconds)}
        for one in ended
        if one.seconds is not None and one.trial_id in found
    ]
    if began:
        change = sqlalchemy.update(_TRIALS).where(_TRIALS.c.trial_id == sqlalchemy.bindparam("id"))
        connection.execute(change.values(datetime_start=sqlalchemy.bindparam("began")), began)
    return found


def _insert_for_ids(
    connection: sqlalchemy.Connection, table: sqlalchemy.Table, rows: _Rows
) -> list[int]:
    """Insert rows and return their ids, in the order of the rows."""
    if connection.dialect.insert_executemany_returning_sort_by_parameter_order:
        insert = sqlalchemy.insert(table).returning(table.c.trial_id, sort_by_parameter_order=True)
        return [int(trial_id) for trial_id in connection.execute(insert, rows).scalars()]
    keys = [connection.execute(sqlalchemy.insert(table), row).inserted_primary_key for row in rows]
    return [int(key[0]) for key in keys if key is not None]  # MySQL
