"""Steps whose candidates are looked up: written finished, whole, by one of the workers."""

import threading
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.protocol.history import read_history
from hq_optuna.protocol.table_steps import is_looked_up, stored_look_up, write_step
from hq_optuna.search import Limits
from hq_optuna.storages import writing
from hq_optuna.workers.loop import work
from tests.searches import facts, search


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    return facts(search().optimize())


def test_the_candidates_of_a_step_are_one_call_and_its_record_another(monkeypatch, alone):
    calls: list[list[optuna.trial.FrozenTrial]] = []
    create = writing.create_trials

    def noted(storage: Any, study_id: int, templates: Any) -> Any:
        calls.append(list(templates))
        return create(storage, study_id, templates)

    for module in ("table_steps", "claims"):
        monkeypatch.setattr(f"hq_optuna.protocol.{module}.create_trials", noted)
    study = search().optimize("sqlite://", "s")
    assert facts(study) == alone
    steps = [r for r in read_history(study).records if not r.winner.rises]
    assert len(calls) == 2 * len(steps)
    assert all(template.state == TrialState.COMPLETE for one in calls for template in one)
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)


def test_a_look_up_in_the_study_says_what_the_objective_says():
    searched = search()
    study = searched.optimize()
    log = study.sampler.log(study)
    here, stored = searched.objective.look_up(study, None), stored_look_up(study, log)
    assert here is not None and stored is not None
    parts = attributes.SCORE_WEIGHTS, attributes.SCORE_ACTIVATIONS
    for c in read_history(study).candidates:
        config = searched.space.config(c.state)
        assert [here(config)[name] for name in parts] == [stored(config)[name] for name in parts]


@pytest.mark.parametrize("options", [{"scorer": "gauss_newton"}, {"measure_candidates": True}])
def test_candidates_with_a_forward_pass_are_not_looked_up(options):
    searched = search(**options)
    study = searched.open()
    assert searched.objective.look_up(study, None) is None
    assert stored_look_up(study, study.sampler.log(study)) is None


def test_two_workers_leave_the_history_of_one(tmp_path, alone):
    url = f"sqlite:///{tmp_path / 's.db'}"
    searches = [search() for _ in range(2)]
    studies = [each.open(url, "s") for each in searches]
    errors: list[BaseException] = []

    def run(place: int) -> None:
        try:
            work(studies[place], searches[place].objective)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert facts(studies[0]) == alone


def test_steps_that_two_workers_write_at_once_count_once(tmp_path, alone):
    url = f"sqlite:///{tmp_path / 's.db'}"
    first, second = search(), search()
    mine, others = first.open(url, "s"), second.open(url, "s")
    for study, searched in ((mine, first), (others, second)) * 3:  # neither reads what is new
        look_up = searched.objective.look_up(study, None)
        study.sampler.log(study)
        assert look_up is not None
        write_step(study.sampler.view(study), study, look_up)
        write_step(study.sampler.view(study), study, look_up)  # again, from the same view
    first.work(mine)
    assert facts(mine) == alone
    assert len(mine.trials) > sum(len(part) for part in alone)
    assert mine.best_trial.user_attrs[attributes.KIND] == "incumbent"


def test_a_worker_takes_over_where_the_one_that_leads_falls_silent(monkeypatch, alone):
    searched = search()
    study = searched.open()
    owners = type(study.sampler.view(study).log.owners)
    monkeypatch.setattr(owners, "at_work", lambda self, worker, last: ["another", worker])
    waits: list[str] = []
    work(study, searched.objective, on_doing=lambda doing: waits.append(doing))
    assert waits[0] == "waiting"
    assert "scoring" in waits
    assert facts(study) == alone


def test_a_limit_ends_a_search_by_look_ups_before_the_step_that_it_forbids():
    searched = search()
    study = searched.open(limits=Limits(max_trials=5))
    searched.work(study)
    assert len(study.trials) <= 5
    assert not is_looked_up(study.sampler.log(study))
