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
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy
import sqlalchemy.orm
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

from hq_optuna import attrs

_as_json = functools.lru_cache(maxsize=4096)(distribution_to_json)


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
            or attrs.TICKET not in template_trial.system_attrs
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
        trials, values = models.TrialModel.__table__, models.TrialValueModel.__table__
        now = datetime.now(UTC).replace(tzinfo=None)  # as Optuna stores it
        with self._transaction() as connection:
            ended = connection.execute(
                sqlalchemy.update(trials)
                .where(trials.c.trial_id == trial_id, trials.c.state == TrialState.RUNNING)
                .values(state=state, datetime_complete=now)
            )
            if ended.rowcount != 1:
                raise UpdateFinishedTrialError(f"Trial {trial_id} is finished.")
            if value is not None:
                stored, kind = models.TrialValueModel.value_to_stored_repr(value)
                row = {"trial_id": trial_id, "objective": 0, "value": stored, "value_type": kind}
                connection.execute(sqlalchemy.insert(values).values(row))
            _insert_user_attrs(connection, trial_id, user_attrs)

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
