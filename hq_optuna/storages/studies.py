"""Writing several attributes of a study, at once where the storage can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.storages import BaseStorage

from hq_optuna.storages.database import Database
from hq_optuna.storages.retrying import RetryingStorage
from hq_optuna.storages.trials import database_of

BULK = ("sqlite", "postgresql", "mysql", "mariadb")
"""Databases that write many rows, whether they are there or not, in one statement."""


def set_study_system_attrs(
    storage: BaseStorage, study_id: int, system_attrs: Mapping[str, Any]
) -> None:
    """Write system attributes of a study.

    On databases in one transaction, so that nobody reads half of them; elsewhere one by one, in
    their order.
    """
    if isinstance(storage, RetryingStorage):
        wrapped = storage.wrapped
        storage.retry(lambda: set_study_system_attrs(wrapped, study_id, system_attrs))
        return
    database = database_of(storage)
    if isinstance(database, Database) and database.engine.name in BULK:
        database.set_study_system_attrs(study_id, system_attrs)
        return
    for key, value in system_attrs.items():
        storage.set_study_system_attr(study_id, key, value)
