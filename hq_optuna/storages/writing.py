"""Writing on any storage; on databases in as few transactions as can be."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from hq_optuna import attributes
from hq_optuna.optuna_internals import database_of
from hq_optuna.storages.database import BULK, Database, Ended
from hq_optuna.storages.retrying import RetryingStorage, tried_again


def _bulk(storage: BaseStorage) -> Database | None:
    database = database_of(storage)
    return database if isinstance(database, Database) and database.engine.name in BULK else None


def writes_together(storage: BaseStorage) -> bool:
    """Return whether many trials are one transaction here, and may say when they really began."""
    return _bulk(storage.wrapped if isinstance(storage, RetryingStorage) else storage) is not None


@tried_again
def set_study_system_attrs(
    storage: BaseStorage, study_id: int, system_attrs: Mapping[str, Any]
) -> None:
    """Write system attributes of a study.

    On databases in one transaction, so that nobody reads half of them; elsewhere one by one, in
    their order.
    """
    if (database := _bulk(storage)) is not None:
        database.set_study_system_attrs(study_id, system_attrs)
        return
    for key, value in system_attrs.items():
        storage.set_study_system_attr(study_id, key, value)


@tried_again
def swap_study_system_attr(
    storage: BaseStorage, study_id: int, key: str, before: Any, after: Any
) -> bool:
    """Write a system attribute of a study if it is ``before``; return whether it is ``after`` now.

    ``None`` stands for no attribute. On databases one of several that swap at the same moment
    succeeds; elsewhere two may, and what was written last stands.
    """
    if (database := _bulk(storage)) is not None:
        return database.swap_study_system_attr(study_id, key, before, after)
    now = storage.get_study_system_attrs(study_id).get(key)
    if now == before:
        storage.set_study_system_attr(study_id, key, after)
        now = storage.get_study_system_attrs(study_id).get(key)
    return bool(now == after)


@tried_again
def set_trial_attrs(
    storage: BaseStorage, trial_id: int, attrs: Mapping[str, Any], *, system: bool = False
) -> None:
    """Write attributes of a running trial; at once where the storage can, or in their order."""
    if (database := _bulk(storage)) is not None:
        if not database.set_trial_attrs([trial_id], attrs, system=system):
            raise UpdateFinishedTrialError(f"Trial {trial_id} is finished.")
        return
    write = storage.set_trial_system_attr if system else storage.set_trial_user_attr
    for key, value in attrs.items():
        write(trial_id, key, value)


@tried_again
def create_trials(
    storage: BaseStorage, study_id: int, templates: Sequence[FrozenTrial]
) -> list[tuple[int, int]]:
    """Create trials with tickets, and return number and id of each; numbers rise.

    In one transaction where the storage can.
    """
    if (database := _bulk(storage)) is not None:
        return database.create_trials(study_id, templates)
    ids = [storage.create_new_trial(study_id, template) for template in templates]
    return [(storage.get_trial_number_from_id(trial_id), trial_id) for trial_id in ids]


def finish_trial(
    storage: BaseStorage,
    trial_id: int,
    state: TrialState,
    value: float | None,
    user_attrs: Mapping[str, Any],
) -> None:
    """End a running trial with its value and attributes it has not got yet.

    Raises `UpdateFinishedTrialError` where somebody else ended it.
    """
    values = None if value is None else [value]
    if isinstance(storage, RetryingStorage):
        wrapped = storage.wrapped
        end = functools.partial(finish_trial, wrapped, trial_id, state, value, user_attrs)
        storage.end_trial(end, None, trial_id, state, values)
    elif (database := _bulk(storage)) is not None:
        if not database.finish_trials([Ended(trial_id, state, value, user_attrs)]):
            raise UpdateFinishedTrialError(f"Trial {trial_id} is finished.")
    else:
        for key, attribute in user_attrs.items():
            storage.set_trial_user_attr(trial_id, key, attribute)
        storage.set_trial_state_values(trial_id, state, values)


@tried_again
def finish_trials(storage: BaseStorage, ended: Sequence[Ended]) -> None:
    """End running trials; in one transaction where the storage can.

    What somebody else ended, who took this worker for dead, stays as it is.
    """
    if (database := _bulk(storage)) is not None:
        database.finish_trials(ended)
        return
    for one in ended:
        with contextlib.suppress(UpdateFinishedTrialError):
            finish_trial(storage, one.trial_id, one.state, one.value, one.user_attrs)


def write_heartbeats(storage: BaseStorage, trial_ids: Sequence[int], count: int) -> None:
    """Show that the owner of running trials lives: set their sign of life to ``count``."""
    if isinstance(storage, RetryingStorage):
        storage = storage.wrapped  # a late heartbeat is worth nothing
    if (database := _bulk(storage)) is not None:
        database.set_trial_attrs(trial_ids, {attributes.HEARTBEAT: count}, system=True)
        return
    for trial_id in trial_ids:
        with contextlib.suppress(UpdateFinishedTrialError):
            storage.set_trial_system_attr(trial_id, attributes.HEARTBEAT, count)
