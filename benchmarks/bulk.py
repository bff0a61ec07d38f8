"""Large studies in seconds: trials written into a database in bulk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial

from hq_optuna.optuna_internals import database_of
from hq_optuna.storages.trials import row_of

TABLES = (
    models.TrialModel,
    models.TrialValueModel,
    models.TrialParamModel,
    models.TrialUserAttributeModel,
    models.TrialSystemAttributeModel,
)
ID = models.TrialModel.__table__.c.trial_id
FINITE = models.TrialValueModel.TrialValueType.FINITE


def write_trials(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Write finished trials of another study into this one, numbers and all.

    What stands in the tables is what the trials one by one would have left there.
    """
    database = database_of(study._storage)
    assert database is not None
    rows_of = [row_of(trial) for trial in trials]
    with database.engine.begin() as connection:
        first = 1 + (connection.execute(sqlalchemy.func.max(ID).select()).scalar() or 0)
        rows: dict[Any, list[dict[str, Any]]] = {model: [] for model in TABLES}
        for trial_id, (row, trial) in enumerate(zip(rows_of, trials, strict=True), first):
            known = {"trial_id": trial_id}
            made = {"datetime_start": trial.datetime_start, "state": row.state}
            made |= {"datetime_complete": trial.datetime_complete, "number": row.number}
            rows[models.TrialModel].append({**known, **made, "study_id": study._study_id})
            value = {"objective": 0, "value": row.value, "value_type": FINITE}
            rows[models.TrialValueModel].append({**known, **value})
            for name, bits in trial.params.items():
                distribution = trial.distributions[name]
                inner = float(distribution.to_internal_repr(bits))
                text = distribution_to_json(distribution)
                shown = {"param_name": name, "param_value": inner, "distribution_json": text}
                rows[models.TrialParamModel].append({**known, **shown})
            for model, attributes in (
                (models.TrialUserAttributeModel, trial.user_attrs),
                (models.TrialSystemAttributeModel, trial.system_attrs),
            ):
                for key, attribute in attributes.items():
                    rows[model].append({**known, "key": key, "value_json": json.dumps(attribute)})
        for model, written in rows.items():
            if written:
                connection.execute(sqlalchemy.insert(model.__table__), written)
        if database.engine.name == "postgresql":
            last = first + len(trials) - 1
            connection.exec_driver_sql(f"select setval('trials_trial_id_seq', {last})")
    if database.engine.name == "postgresql":  # as its own housekeeping would, minutes later
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as now:
            now.exec_driver_sql("analyze")
