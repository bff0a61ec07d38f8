"""Searches that are not run from one end to the other by `BitSearch.optimize`."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import torch

from hq_optuna.errors import ResumeError
from hq_optuna.optuna_internals import database_of
from hq_optuna.protocol.history import read_history
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.search import Limits
from hq_optuna.storages import load_study, sqlite_url
from tests.searches import data, facts, search
from tests.training_searches import plan
from tests.training_searches import search as training_search


def test_threads_of_one_process_score_as_one():
    alone, several = search(bits=range(2, 9)), search(bits=range(2, 9))
    studies = []
    for by, n_jobs in ((alone, 1), (several, 4)):
        study = by.open(n_candidates=4)
        study.optimize(by.objective, n_jobs=n_jobs)
        studies.append(study)
    assert facts(studies[0]) == facts(studies[1])


def test_a_trained_answer_comes_from_a_study_opened_by_any_sampler(alone):
    found, study = alone
    url = sqlite_url(Path(database_of(study._storage.wrapped).engine.url.database))
    loaded = load_study(url, study.study_name)
    assert not isinstance(loaded.sampler, ProgressiveBitSampler)
    again = training_search(training=plan(), validation=data(30, 2))
    artifacts = found.objective.training.artifacts
    x = data()[0]
    with torch.no_grad():
        expected = found.result(study).network(x)
        assert torch.equal(again.result(loaded, artifacts=artifacts).network(x), expected)
    with pytest.raises(ResumeError, match="the training"):
        training_search(validation=data(30, 2)).result(loaded)


def test_an_enqueued_trial_over_the_budget_is_not_the_best():
    by = search()
    study = by.open(None, "a")
    study.enqueue_trial({"first": 8, "middle": 8, "last": 8})
    by.work(study)
    queued = study.trials[0]
    assert queued.state == optuna.trial.TrialState.COMPLETE
    assert queued.constraints["bops"] > 0
    assert study.best_trial.number == read_history(study).records[-1].number


def test_figures_of_an_answer_that_is_no_more_are_measured_again(tmp_path):
    url, reads = sqlite_url(tmp_path / "s.db"), []
    options = {"bits": range(2, 9), "activation_bits": range(2, 9), "scorer": "diagonal"}

    def test_data():
        reads.append(1)
        return data(200, seed=3)

    def run(limit: int):
        by = search(**options, validation=data(100, 2))
        study = by.optimize(url, "s", n_candidates=2, limits=Limits(max_evaluations=limit))
        return by, study, by.result(study, test=test_data)

    whole = read_history(search(**options).optimize(n_candidates=2))
    met = next(r for r in whole.records if r.winner.cost <= whole.info.limit)
    until = sum(c.counted and c.step <= met.step for c in whole.candidates)
    _, _, first = run(until)
    assert first.met and len(reads) == 1
    run(until)
    assert len(reads) == 1  # the same answer: once
    _, study, last = run(1000)
    assert last.config != first.config and len(reads) == 2
    history = read_history(study)
    right = (last.network(data(200, 3)[0]).argmax(1) == data(200, 3)[1]).float().mean()
    assert history.facts["test_accuracy_after"] == pytest.approx(float(right))
    assert "test_of" not in last.facts
