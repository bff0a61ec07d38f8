"""Limits as part of the record: the same end for everybody, raised by whoever goes on."""

from __future__ import annotations

import time

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.errors import ResumeError
from hq_optuna.protocol import step_log as log_module
from hq_optuna.protocol.study_view import refuse_lower_limits, stored_limits
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.search import Limits
from hq_optuna.workers.loop import work
from tests.fake_search import fake_space
from tests.samplers.tables import BUDGET, STORAGES, assigned, expected, history, ours, sampler


def limited(limits: Limits | None = None, storage: object = None) -> optuna.Study:
    space = fake_space(6)
    return optuna.create_study(
        study_name="table",
        storage=storage,
        sampler=sampler(space, encoding="compact"),
        pruner=CostBudgetPruner(space, BUDGET, limits),
        load_if_exists=True,
    )


@pytest.mark.parametrize("kind", list(STORAGES))
@pytest.mark.parametrize(
    ("limits", "steps", "candidates"),
    [
        (Limits(max_evaluations=1), 1, 1),
        (Limits(max_evaluations=9), 3, 7),  # the start, and twice three candidates
        (Limits(max_evaluations=10), 4, 10),
        (Limits(max_trials=10), 3, 7),
        (Limits(max_trials=13), 3, 7),
        (Limits(max_trials=14), 4, 10),
    ],
)
def test_a_limited_search_is_the_beginning_of_the_whole_one(
    tmp_path, kind, limits, steps, candidates
):
    study = limited(limits, STORAGES[kind](tmp_path))
    work(study, assigned)
    log = ours(study).log(study)
    assert (len(log.closed), len(log.results)) == (steps, candidates)
    assert log.open is None
    assert log.stopped_by is not None
    assert len(study.trials) == steps + candidates
    assert history(study) == expected(study)[:steps]


def test_a_search_that_ends_by_itself_is_stopped_by_nothing():
    study = limited(Limits(max_evaluations=10**6, max_trials=10**6, max_seconds=1e6))
    work(study, assigned)
    assert ours(study).log(study).stopped_by is None
    assert history(study) == expected(study)


def test_who_goes_on_may_raise_the_limits_and_the_others_notice(tmp_path):
    storage = STORAGES["sqlite"](tmp_path)
    work(limited(Limits(max_evaluations=4), storage), assigned)
    waiting = limited(None, STORAGES["sqlite"](tmp_path))
    assert ours(waiting).log(waiting).stopped_by == "at most 4 evaluations (--max-evaluations)"
    work(waiting, assigned)  # has nothing to do
    assert len(waiting.trials) == 6
    work(limited(Limits(max_evaluations=8), storage), assigned)
    assert stored_limits(waiting) == Limits(max_evaluations=8)
    assert len(ours(waiting).log(waiting).results) == 7
    work(limited(Limits(max_evaluations=10**6), storage), assigned)
    assert ours(waiting).log(waiting).stopped_by is None
    assert history(waiting) == expected(waiting)


@pytest.mark.parametrize("kind", list(STORAGES))
def test_a_limit_that_comes_later_holds_for_workers_that_run_already(tmp_path, kind):
    storage = STORAGES[kind](tmp_path)
    running = limited(None, storage)
    trial = ours(running).ask(running)
    trial.finish(TrialState.COMPLETE, assigned(trial))
    log = ours(running).log(running)
    work(limited(Limits(max_evaluations=5), storage), assigned)
    assert stored_limits(running) == Limits(max_evaluations=5)
    work(running, assigned)
    assert log.stopped_by == "at most 5 evaluations (--max-evaluations)"
    assert len(log.results) == 4
    assert history(running) == expected(running)[:2]


@pytest.mark.parametrize("run", [work, optuna.Study.optimize])
def test_a_limit_that_comes_within_a_step_holds_once_it_is_closed(run):
    running = limited()

    def objective(trial: optuna.Trial) -> float:
        if len(ours(running).log(running).results) == 2:
            other = limited(Limits(max_evaluations=2), running._storage)
            ours(other).ask(other)
        return assigned(trial)

    run(running, objective)
    log = ours(running).log(running)
    assert (len(log.closed), len(log.results)) == (2, 4)
    assert history(running) == expected(running)[:2]


def test_who_is_refused_leaves_no_limit():
    study = limited()
    work(study, assigned)
    other = limited(Limits(max_evaluations=2), study._storage)
    other.sampler = sampler(fake_space(6), seed=1)
    with pytest.raises(ResumeError, match="made with another sampler"):
        ours(other).ask(other)
    assert stored_limits(study) == Limits()


def test_lower_limits_than_the_studys_are_refused_in_words():
    study = limited(Limits(max_evaluations=8, max_seconds=60))
    work(study, assigned)
    with pytest.raises(ResumeError) as raised:
        refuse_lower_limits(study, Limits(max_evaluations=7, max_trials=1))
    assert "max_evaluations (study: 8, now: 7)" in str(raised.value)
    assert raised.value.changed == ("max_evaluations",)
    refuse_lower_limits(study, Limits(max_evaluations=8))


def test_limits_stand_in_the_study_and_other_text_there_is_no_limit():
    study = limited(Limits(max_evaluations=4))
    work(study, assigned)
    assert study.user_attrs[attributes.LIMITS] == {"max_evaluations": 4}
    study.set_user_attr(attributes.LIMITS, "odd")
    assert stored_limits(study) == Limits()


def test_seconds_of_all_workers_together_end_the_search(monkeypatch):
    study = limited(Limits(max_seconds=0.35))

    def slow(trial: optuna.Trial) -> float:
        time.sleep(0.1)
        return assigned(trial)

    work(study, slow)
    log = ours(study).log(study)
    assert log.stopped_by == "at most 0.35 s of work (--max-seconds)"
    assert log.seconds >= 0.35
    assert 1 <= len(log.results) <= 4
    assert history(study) == expected(study)[: len(log.closed)]
    work(limited(Limits(max_seconds=1e6), study._storage), assigned)
    assert history(study) == expected(study)


def test_running_candidates_count_and_are_told_to_stop(monkeypatch):
    study = limited(Limits(max_seconds=100))
    asked = []
    now = [time.monotonic()]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])

    def objective(trial: optuna.Trial) -> float:
        asked.append(trial.should_prune())
        now[0] += 101
        asked.append(trial.should_prune())
        raise KeyboardInterrupt  # the clock of the storage did not move

    with pytest.raises(KeyboardInterrupt):
        work(study, objective)
    assert asked == [False, True]
