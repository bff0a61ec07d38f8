"""Every private name of Optuna that this package uses, each with its reason.

Optuna's public names serve objectives and readers of studies. A sampler or a storage that does not
come with Optuna needs a few more, as those on OptunaHub do. They are why pyproject.toml asks for
``optuna>=5,<6``; `tests/test_optuna_internals.py` says what a new version no longer has, and finds
private names used anywhere else.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts._upload import ARTIFACTS_ATTR_PREFIX as ARTIFACTS_ATTR_PREFIX
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models as models
from optuna.study import Study
from optuna.study._frozen import FrozenStudy as FrozenStudy
from optuna.trial import FrozenTrial, Trial

# ARTIFACTS_ATTR_PREFIX: where Optuna and its dashboard look for artifacts.
# FrozenStudy: what `BaseStorage.get_all_studies` returns, for annotations.
# models: the tables, so that one query reads what the step protocol wants to know of all trials.

FIXED_PARAMS = "fixed_params"
"""System attribute of a trial that `Study.enqueue_trial` made; nothing else tells such a trial."""


def storage_of(study: Study) -> BaseStorage:
    """Return a study's storage: system attributes have no other way in, since Optuna 5."""
    return study._storage


def id_of(study: Study | FrozenStudy) -> int:
    """Return a study's id: methods of storages take no names."""
    return study._study_id


def place_of(study: Study) -> tuple[BaseStorage, int]:
    """Return a study's storage and its id there."""
    return study._storage, study._study_id


def trial_id_of(trial: Trial | FrozenTrial) -> int:
    """Return a trial's id: methods of storages take no numbers."""
    return trial._trial_id


def pop_waiting(study: Study) -> int | None:
    """Return the id of a trial somebody enqueued, running now: `Study.ask` would create one too."""
    return study._pop_waiting_trial_id()


def loop_of(study: Study) -> Study | None:
    """Return the study whose `optimize` this thread is in, as ``stop`` raises anywhere else.

    With `HyperbandPruner` samplers are handed a study made for one bracket, which knows nothing of
    the loop and holds the study that does.
    """
    whole: Study = getattr(study, "_study", study)
    return whole if getattr(whole._thread_local, "in_optimize_loop", False) else None


def cached_trial(trial: Trial) -> FrozenTrial:
    """Return what a trial knows of itself, to tell it what was written past it."""
    return trial._cached_frozen_trial


def refuse_several_objectives(sampler: BaseSampler, study: Study) -> None:
    """Raise Optuna's own error for a sampler that takes one objective.

    Raises:
        ValueError: The study has several.
    """
    sampler._raise_error_if_multi_objective(study)


def database_of(storage: BaseStorage) -> RDBStorage | None:
    """Return the database behind Optuna's cache, to query it; ``None`` where there is none."""
    found: Any = storage
    while found is not None and not isinstance(found, RDBStorage):
        found = getattr(found, "_backend", None)
    return found


def artifact_path(store: FileSystemArtifactStore, artifact_id: str) -> Path:
    """Return the path of an artifact within its store, to write it atomically."""
    return store._get_filepath(artifact_id)


class HookedRDBStorage(RDBStorage):
    """A database whose subclass may create trials its own way, Optuna's cache before it or not."""

    def create_whole(self, study_id: int, template: FrozenTrial) -> tuple[int, int] | None:
        """Create a trial and return number and id, or ``None`` to leave it to Optuna."""
        raise NotImplementedError

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        created = None if template_trial is None else self.create_whole(study_id, template_trial)
        if template_trial is None or created is None:
            return super()._create_new_trial(study_id, template_trial)
        trial = copy.copy(template_trial)
        trial.number, trial._trial_id = created
        return trial
