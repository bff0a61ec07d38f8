"""Where a search stands, read from the storage alone."""

from __future__ import annotations

import json

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna import workers
from hq_optuna.attrs import LIMITS
from hq_optuna.samplers.log import StepLog
from hq_optuna.standing import Watch, read_standing
from tests.elsewhere import AWAY, DEAD, HOST
from tests.fake_search import fake_study
from tests.samplers.tables import add, fill_step, open_ticket, ours, record_ticket, total


def begun(n_trials: int = 7) -> tuple[optuna.Study, StepLog]:
    study = fake_study(6, n_trials=n_trials)
    return study, ours(study).log(study)


def test_a_finished_search_says_why_it_ended():
    study = fake_study(6)
    standing = read_standing(study)
    log = ours(study).log(study)
    assert (standing.state, standing.reason) == ("finished", "the budget is met")
    assert (standing.steps, standing.candidates) == (len(log.closed), len(log.results))
    assert (standing.share, standing.per_minute, standing.left_s) == (1.0, 0.0, None)
    assert standing.seconds > 0


def test_a_search_stopped_by_a_limit_says_which():
    study, _ = begun(2)
    study.set_user_attr(LIMITS, {"max_evaluations": 3})
    standing = read_standing(study)
    assert standing.state == "stopped"
    assert standing.reason == "at most 3 evaluations (--max-evaluations)"
    assert standing.share < 1


def test_a_search_whose_workers_still_end_their_step_runs():
    study, _ = begun(2)
    number = study.ask().number
    study.set_user_attr(LIMITS, {"max_evaluations": 3})
    standing = read_standing(study)
    assert (standing.state, standing.reason) == ("running", "")
    study.tell(number, state=TrialState.FAIL)
    assert read_standing(study).state == "stopped"


def test_a_study_without_sensitivities_is_being_prepared():
    assert read_standing(optuna.create_study()).state == "preparing"


def test_a_search_that_nobody_works_on_is_idle():
    standing = read_standing(begun()[0])
    assert (standing.state, standing.reason, standing.of) == ("idle", "", 4)
    assert standing.left_s is None


def test_workers_are_told_by_what_they_do():
    study, log = begun()
    add(study, open_ticket(log, 1, worker=workers.worker_id()))
    add(study, open_ticket(log, 2, worker=DEAD))
    add(study, open_ticket(log, 3, worker=AWAY))
    add(study, open_ticket(log, 0, worker=AWAY), total(log.search.space, log.open.states[0]))
    standing = read_standing(study)
    step = standing.steps
    mine = workers.short_name(workers.worker_id())
    found = {worker.name: worker for worker in standing.workers}
    assert found[mine].alive is True
    assert found[mine].doing == f"step {step}, candidate 2"
    assert found[f"{HOST}:{2**22 + 1}"].alive is False
    assert found[f"{HOST}:{2**22 + 1}"].doing == ""
    assert (found["elsewhere:1"].alive, found["elsewhere:1"].candidates) == (None, 1)
    assert found["elsewhere:1"].doing == f"step {step}, candidate 4"
    assert standing.state == "running"
    assert standing.per_minute > 0


@pytest.mark.parametrize(("trains", "doing"), [(False, "record"), (True, "training")])
def test_a_worker_that_closes_a_step_says_whether_it_trains(trains, doing):
    study, log = begun(2)
    fill_step(study, log)
    step, mine = log.open.step, workers.worker_id()
    add(study, record_ticket(log, worker=mine, trains=trains))
    (worker,) = (w for w in read_standing(study).workers if w.name == workers.short_name(mine))
    assert worker.doing == f"step {step}, {doing}"


def test_rate_and_time_left_follow_from_the_latest_candidates():
    study, log = begun(13)
    add(study, open_ticket(log, len(log.open.states) - 1, worker=AWAY))
    watch = Watch(study)
    watch.look()
    watch._latest = [2.0, 4.0]
    standing = watch.look()
    assert standing.per_minute == pytest.approx(20)
    lowered = standing.share / (standing.steps - 1)
    steps_left = (1 - standing.share) / lowered
    open_left = 3 * (standing.of - standing.done)
    assert standing.left_s == pytest.approx((steps_left - 1) * 4 * 3 + open_left)


def test_each_look_reads_what_is_new():
    study, log = begun(2)
    watch = Watch(study)
    before = watch.look()
    fill_step(study, log)
    after = watch.look()
    assert (before.done, after.done) == (0, after.of)
    assert after.candidates == before.candidates + after.of
    assert after == read_standing(study)
    assert json.loads(json.dumps(after.to_json()))["done"] == after.done
