"""`Database`: Optuna's database storage with few statements per trial.

Optuna writes each parameter and each attribute in a transaction of its own, and asks the database
before each one whether it may. A candidate of twenty layers costs it some hundred statements and
thirty commits; here it is created in one transaction and finished in another, in about ten
statements. What stands in the tables afterwards is the same, so every other program that reads the
study (optuna-dashboard, a worker with plain Optuna) notices nothing, and where a storage is not of
this class the same calls are made one by one (`hq_optuna.storages.trials`).
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
import sqlalchemy.orm
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import mysql, postgresql, sqlite

from hq_optuna import attributes

_as_json = functools.lru_cache(maxsize=4096)(distribution_to_json)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a trial ended.

    Attributes:
        trial_id: Its id in the storage.
        state: A finished state.
        value: Its value, where it is complete.
        user_attrs: Attributes it has not got yet.
        seconds: How long it ran, where it was created before it began; ``None``: since then.
    """

    trial_id: int
    state: TrialState
    value: float | None = None
    user_attrs: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None


class Database(RDBStorage):
    """An `optuna.storages.RDBStorage` that writes trials of this package in few statements."""

    def _get_prepared_new_trial(
        self,
        study_id: int,
        template_trial: FrozenTrial | None,
        session: sqlalchemy.orm.Session,
    ) -> models.TrialModel:
        # Called by Optuna within the transaction that holds the study's row, so that numbers are
        # handed out one after the other. Only trials with a ticket take the short way: their
        # parameters come from the study's own space, and need not be compared with earlier ones.
        if (
            template_trial is None
            or template_trial.values is not None
            or attributes.TICKET not in template_trial.system_attrs
        ):
            return super()._get_prepared_new_trial(study_id, template_trial, session)
        trial = models.TrialModel(
            study_id=study_id,
            number=None,
            state=template_trial.state,
            datetime_start=template_trial.datetime_start,
        )
        session.add(trial)
        session.flush()
        trial_id: int = trial.trial_id  # type: ignore[assignment]
        user, system = template_trial.user_attrs, template_trial.system_attrs
        for model, rows in (
            (models.TrialParamModel, _parameters(trial_id, template_trial)),
            (models.TrialUserAttributeModel, _attributes(trial_id, user)),
            (models.TrialSystemAttributeModel, _attributes(trial_id, system)),
        ):
            if rows:
                session.execute(sqlalchemy.insert(model.__table__).values(rows))
        trial.number = trial.count_past_trials(session)
        return trial

    def add_user_attrs(self, trial_id: int, user_attrs: Mapping[str, Any]) -> None:
        """Write attributes that a running trial has not got yet, in one transaction.

        Raises:
            UpdateFinishedTrialError: The trial is finished.
        """
        with self._transaction() as connection:
            trials = models.TrialModel.__table__
            found = sqlalchemy.select(trials.c.state).where(trials.c.trial_id == trial_id)
            if connection.execute(found.with_for_update()).scalar_one() != TrialState.RUNNING:
                raise UpdateFinishedTrialError(f"Trial {trial_id} is finished.")
            _insert_user_attrs(connection, trial_id, user_attrs)

    def create_trials(
        self, study_id: int, templates: Sequence[FrozenTrial]
    ) -> list[tuple[int, int]]:
        """Create trials with tickets, running or complete, at once, with numbers in a row.

        Returns:
            Number and id of each.
        """
        trials, studies = models.TrialModel.__table__, models.StudyModel.__table__
        study = studies.c.study_id == study_id
        with self._transaction() as connection:
            # Whoever holds the study's row hands out the next numbers, as in Optuna's own way. On
            # SQLite nothing but a write takes the lock.
            if connection.dialect.name == "sqlite":
                same = sqlalchemy.update(studies).where(study)
                connection.execute(same.values(study_name=studies.c.study_name))
            else:
                locked = sqlalchemy.select(studies.c.study_id).where(study).with_for_update()
                connection.execute(locked)
            count = sqlalchemy.select(sqlalchemy.func.count()).select_from(trials)
            first = connection.execute(count.where(trials.c.study_id == study_id)).scalar_one()
            rows = [
                {
                    "number": first + place,
                    "study_id": study_id,
                    "state": template.state,
                    "datetime_start": _utc(template.datetime_start),
                    "datetime_complete": _utc(template.datetime_complete),
                }
                for place, template in enumerate(templates)
            ]
            ids = _insert_for_ids(connection, trials, rows)
            for table, made in (
                (models.TrialParamModel.__table__, _parameters),
                (models.TrialValueModel.__table__, _values),
                (models.TrialUserAttributeModel.__table__, _user_attributes),
                (models.TrialSystemAttributeModel.__table__, _system_attributes),
            ):
                more = [
                    row
                    for trial_id, template in zip(ids, templates, strict=True)
                    for row in made(trial_id, template)
                ]
                if more:
                    connection.execute(sqlalchemy.insert(table), more)
        return [(first + place, trial_id) for place, trial_id in enumerate(ids)]

    def finish_trial(
        self,
        trial_id: int,
        state: TrialState,
        value: float | None,
        user_attrs: Mapping[str, Any],
    ) -> None:
        """End a running trial with its value and attributes it has not got yet, in one transaction.

        Of two that end the same trial exactly one succeeds, on every database.

        Raises:
            UpdateFinishedTrialError: The trial is finished already.
        """
        if not self.finish_trials([Ended(trial_id, state, value, user_attrs)]):
            raise UpdateFinishedTrialError(f"Trial {trial_id} is finished.")

    def finish_trials(self, ended: Sequence[Ended]) -> list[int]:
        """End running trials in one transaction.

        Returns:
            Ids of those that were running; what somebody else ended stays as it is.
        """
        now = datetime.now(UTC).replace(tzinfo=None)  # as Optuna stores it
        with self._transaction() as connection:
            running = _end(connection, ended, now)
            done = [one for one in ended if one.trial_id in running]
            values = [_value(one.trial_id, one.value) for one in done if one.value is not None]
            if values:
                connection.execute(sqlalchemy.insert(models.TrialValueModel.__table__), values)
            told = [row for one in done for row in _attributes(one.trial_id, one.user_attrs)]
            if told:
                table = models.TrialUserAttributeModel.__table__
                connection.execute(sqlalchemy.insert(table), told)
        return [one.trial_id for one in done]

    def beat(self, trial_ids: Sequence[int], count: int) -> None:
        """Set the sign of life of the trials that still run, in one transaction."""
        trials, table = models.TrialModel.__table__, models.TrialSystemAttributeModel.__table__
        with self._transaction() as connection:
            running = sqlalchemy.select(trials.c.trial_id).where(
                trials.c.trial_id.in_(trial_ids), trials.c.state == TrialState.RUNNING
            )
            found = sorted(connection.execute(running).scalars())
            connection.execute(
                sqlalchemy.delete(table).where(
                    table.c.trial_id.in_(found), table.c.key == attributes.BEAT
                )
            )
            if found:
                rows = [r for i in found for r in _attributes(i, {attributes.BEAT: count})]
                connection.execute(sqlalchemy.insert(table), rows)

    def set_study_system_attrs(self, study_id: int, system_attrs: Mapping[str, Any]) -> None:
        """Write attributes of a study in one transaction: readers see all of them or none.

        What two processes write at the same moment is what one of them wrote, never a mixture.
        """
        # In the order of keys, so that two writers never wait for each other.
        rows = [
            {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
            for key, value in sorted(system_attrs.items())
        ]
        if rows:
            with self._transaction() as connection:
                connection.execute(_upsert_study_attrs(self.engine.name), rows)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlalchemy.Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise StorageInternalError("An exception is raised during the commit.") from error


def _parameters(trial_id: int, trial: FrozenTrial) -> list[dict[str, Any]]:
    return [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": _internal(trial.distributions[name], value),
            "distribution_json": _as_json(trial.distributions[name]),
        }
        for name, value in trial.params.items()
    ]


def _internal(distribution: BaseDistribution, value: Any) -> float:
    return float(distribution.to_internal_repr(value))


def _values(trial_id: int, trial: FrozenTrial) -> list[dict[str, Any]]:
    return [_value(trial_id, value) for value in trial.values or ()]


def _value(trial_id: int, value: float) -> dict[str, Any]:
    stored, kind = models.TrialValueModel.value_to_stored_repr(value)
    return {"trial_id": trial_id, "objective": 0, "value": stored, "value_type": kind}


def _user_attributes(trial_id: int, trial: FrozenTrial) -> list[dict[str, Any]]:
    return _attributes(trial_id, trial.user_attrs)


def _system_attributes(trial_id: int, trial: FrozenTrial) -> list[dict[str, Any]]:
    return _attributes(trial_id, trial.system_attrs)


def _utc(time: datetime | None) -> datetime | None:
    return None if time is None else time.astimezone(UTC).replace(tzinfo=None)


def _end(connection: sqlalchemy.Connection, ended: Sequence[Ended], now: datetime) -> set[int]:
    """Set the state of those trials that run, and return their ids."""
    trials, found = models.TrialModel.__table__, set[int]()
    for state in sorted({one.state for one in ended}):
        ids = sorted(one.trial_id for one in ended if one.state == state)  # all lock in one order
        change = sqlalchemy.update(trials).where(trials.c.state == TrialState.RUNNING)
        change = change.values(state=state, datetime_complete=now)
        if connection.dialect.update_returning:
            change = change.where(trials.c.trial_id.in_(ids)).returning(trials.c.trial_id)
            found |= set(connection.execute(change).scalars())
            continue
        for trial_id in ids:  # MySQL and MariaDB
            if connection.execute(change.where(trials.c.trial_id == trial_id)).rowcount == 1:
                found.add(trial_id)
    began = [
        {"id": one.trial_id, "began": now - timedelta(seconds=one.seconds)}
        for one in ended
        if one.seconds is not None and one.trial_id in found
    ]
    if began:
        change = sqlalchemy.update(trials).where(trials.c.trial_id == sqlalchemy.bindparam("id"))
        connection.execute(change.values(datetime_start=sqlalchemy.bindparam("began")), began)
    return found


def _insert_for_ids(
    connection: sqlalchemy.Connection, table: sqlalchemy.Table, rows: list[dict[str, Any]]
) -> list[int]:
    """Insert rows and return their ids, in the order of the rows."""
    if connection.dialect.insert_executemany_returning_sort_by_parameter_order:
        insert = sqlalchemy.insert(table).returning(table.c.trial_id, sort_by_parameter_order=True)
        return [int(trial_id) for trial_id in connection.execute(insert, rows).scalars()]
    ids = []
    for row in rows:  # MySQL
        key = connection.execute(sqlalchemy.insert(table), row).inserted_primary_key
        assert key is not None
        ids.append(int(key[0]))
    return ids


def _attributes(trial_id: int, attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for key, value in attributes.items()
    ]


def _insert_user_attrs(
    connection: sqlalchemy.Connection, trial_id: int, user_attrs: Mapping[str, Any]
) -> None:
    rows = _attributes(trial_id, user_attrs)
    if rows:
        table = models.TrialUserAttributeModel.__table__
        connection.execute(sqlalchemy.insert(table).values(rows))


def _upsert_study_attrs(dialect: str) -> sqlalchemy.Insert:
    table = models.StudySystemAttributeModel.__table__
    if dialect in ("mysql", "mariadb"):
        theirs = mysql.insert(table)
        return theirs.on_duplicate_key_update(value_json=theirs.inserted.value_json)
    ours = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    return ours.on_conflict_do_update(
        index_elements=["study_id", "key"], set_={"value_json": ours.excluded.value_json}
    )
