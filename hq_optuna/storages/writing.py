"""Creating and ending trials on any storage; on databases in as few transactions as can be."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from hq_optuna import attributes
from hq_optuna.storages.database import Database, Ended
from hq_optuna.storages.retrying import RetryingStorage
from hq_optuna.storages.trials import database_of


def add_user_attrs(storage: BaseStorage, trial_id: int, user_attrs: Mapping[str, Any]) -> None:
    """Write attributes that a running trial has not got yet; at once where the storage can.

    Raises:
        UpdateFinishedTrialError: The trial is finished.
    """
    if isinstance(storage, RetryingStorage):
        wrapped = storage.wrapped

        def one_by_one() -> None:  # one transaction may have been committed, and cannot be twice
            for key, value in user_attrs.items():
                wrapped.set_trial_user_attr(trial_id, key, value)

        storage.retry(lambda: add_user_attrs(wrapped, trial_id, user_attrs), one_by_one)
        return
    database = database_of(storage)
    if isinstance(database, Database):
        database.add_user_attrs(trial_id, user_attrs)
        return
    for key, value in user_attrs.items():
        storage.set_trial_user_attr(trial_id, key, value)


def finish_trial(
    storage: BaseStorage,
    trial_id: int,
    state: TrialState,
    value: float | None,
    user_attrs: Mapping[str, Any],
) -> None:
    """End a running trial with its value and attributes it has not got yet.

    Raises:
        UpdateFinishedTrialError: The trial is finished already.
    """
    if isinstance(storage, RetryingStorage):
        wrapped = storage.wrapped
        storage.end_trial(
            lambda: finish_trial(wrapped, trial_id, state, value, user_attrs),
            None,
            trial_id,
            state,
            None if value is None else [value],
        )
        return
    database = database_of(storage)
    if isinstance(database, Database):
        database.finish_trial(trial_id, state, value, user_attrs)
        return
    for key, attribute in user_attrs.items():
        storage.set_trial_user_attr(trial_id, key, attribute)
    storage.set_trial_state_values(trial_id, state, None if value is None else [value])


def writes_together(storage: BaseStorage) -> bool:
    """Return whether many trials are one transaction here, and may say when they really began."""
    inner = storage.wrapped if isinstance(storage, RetryingStorage) else storage
    return isinstance(database_of(inner), Database)


def create_trials(
    storage: BaseStorage, study_id: int, templates: Sequence[FrozenTrial]
) -> list[tuple[int, int]]:
    """Create trials with tickets; in one transaction where the storage can.

    Returns:
        Number and id of each, in the order of the templates; numbers rise.
    """
    if isinstance(storage, RetryingStorage):
        wrapped = storage.wrapped
        return storage.retry(lambda: create_trials(wrapped, study_id, templates))
    database = database_of(storage)
    if isinstance(database, Database):
        return database.create_trials(study_id, templates)
    ids = [storage.create_new_trial(study_id, template) for template in templates]
    return [(storage.get_trial_number_from_id(trial_id), trial_id) for trial_id in ids]


def finish_trials(storage: BaseStorage, ended: Sequence[Ended]) -> None:
    """End running trials; in one transaction where the storage can.

    What somebody else ended, who took this worker for dead, stays as it is.
    """
    inner = storage.wrapped if isinstance(storage, RetryingStorage) else storage
    database = database_of(inner)
    if isinstance(database, Database):
        if isinstance(storage, RetryingStorage):  # the same again ends nothing twice
            storage.retry(lambda: database.finish_trials(ended))
        else:
            database.finish_trials(ended)
        return
    for one in ended:
        with contextlib.suppress(UpdateFinishedTrialError):
            finish_trial(storage, one.trial_id, one.state, one.value, one.user_attrs)


def beat(storage: BaseStorage, trial_ids: Sequence[int], count: int) -> None:
    """Show that the owner of running trials lives: set their sign of life to ``count``."""
    if isinstance(storage, RetryingStorage):
        storage = storage.wrapped  # a late beat is worth nothing
    database = database_of(storage)
    if isinstance(database, Database):
        database.beat(trial_ids, count)
        return
    for trial_id in trial_ids:
        with contextlib.suppress(UpdateFinishedTrialError):
            storage.set_trial_system_attr(trial_id, attributes.BEAT, count)
