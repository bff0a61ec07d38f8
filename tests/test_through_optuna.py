"""A search's parts in the hands of those who call Optuna themselves."""

from __future__ import annotations

import optuna
import pytest

import hq_optuna as hq
from hq_optuna.errors import SpaceError
from hq_optuna.space.assignment import BitConfig
from hq_optuna.storages import open_storage, sqlite_url
from tests.searches import search


def test_a_study_that_optuna_loaded_lacks_the_sampler_and_says_so(tmp_path):
    mine, url = search(), sqlite_url(tmp_path / "s.db")
    mine.open(url, "s")
    with pytest.raises(TypeError, match=r"optuna.load_study does not know the search's"):
        mine.work(optuna.load_study(study_name="s", storage=open_storage(url)))


def test_trials_of_other_samplers_have_an_assignment_too(tmp_path):
    mine = search()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(mine.objective, n_trials=2)
    for trial in study.trials:
        found = hq.assignment(trial, study)
        assert dict(found) == dict(
            mine.space.config([trial.params[v.name] for v in mine.space.variables])
        )


def test_an_assignment_without_all_layers_is_refused():
    mine = search()
    mine.objective.prepare()
    with pytest.raises(SpaceError, match="needs all layers'"):
        mine.objective.quantized(BitConfig({}))
