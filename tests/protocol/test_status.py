"""Where a search stands, read from the storage alone."""

from __future__ import annotations

import json

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna.attributes import LIMITS
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.status import StatusReader, read_status
from hq_optuna.protocol.step_log import StepLog
from tests.elsewhere import AWAY, DEAD, HOST
from tests.fake_search import fake_study
from tests.samplers.tables import add, fill_step, open_ticket, ours, record_ticket, total


def begun(n_trials: int = 7) -> tuple[optuna.Study, StepLog]:
    study = fake_study(6, n_trials=n_trials)
    return study, ours(study).log(study)


def test_a_finished_search_says_why_it_ended():
    study = fake_study(6)
    current = read_status(study)
    log = ours(study).log(study)
    assert (current.state, current.reason) == ("finished", "the budget is met")
    assert (current.steps, current.candidates) == (len(log.closed), len(log.results))
    assert (current.share, current.per_minute, current.left_s) == (1.0, 0.0, None)
    assert current.seconds > 0


def test_a_search_stopped_by_a_limit_says_which():
    study, _ = begun(2)
    study.set_user_attr(LIMITS, {"max_evaluations": 3})
    current = read_status(study)
    assert current.state == "stopped"
    assert current.reason == "at most 3 evaluations (--max-evaluations)"
    assert current.share < 1


def test_a_search_whose_workers_still_end_their_step_runs():
    study, _ = begun(2)
    number = study.ask().number
    study.set_user_attr(LIMITS, {"max_evaluations": 3})
    current = read_status(study)
    assert (current.state, current.reason) == ("running", "")
    study.tell(number, state=TrialState.FAIL)
    assert read_status(study).state == "stopped"


def test_a_study_without_sensitivities_is_being_prepared():
    assert read_status(optuna.create_study()).state == "preparing"


def test_a_search_that_nobody_works_on_is_idle():
    current = read_status(begun()[0])
    assert (current.state, current.reason, current.of) == ("idle", "", 4)
    assert current.left_s is None


def test_workers_are_told_by_what_they_do():
    study, log = begun()
    add(study, open_ticket(log, 1, worker=worker_identity.worker_id()))
    add(study, open_ticket(log, 2, worker=DEAD))
    add(study, open_ticket(log, 3, worker=AWAY))
    add(study, open_ticket(log, 0, worker=AWAY), total(log.search.space, log.open.states[0]))
    current = read_status(study)
    step = current.steps
    mine = worker_identity.short_name(worker_identity.worker_id())
    found = {worker.name: worker for worker in current.workers}
    assert found[mine].alive is True
    assert found[mine].doing == f"step {step}, candidate 2"
    assert found[f"{HOST}:{2**22 + 1}"].alive is False
    assert found[f"{HOST}:{2**22 + 1}"].doing == ""
    assert (found["elsewhere:1"].alive, found["elsewhere:1"].candidates) == (None, 1)
    assert found["elsewhere:1"].doing == f"step {step}, candidate 4"
    assert current.state == "running"
    assert current.per_minute > 0


@pytest.mark.parametrize(("trains", "doing"), [(False, "record"), (True, "training")])
def test_a_worker_that_closes_a_step_says_whether_it_trains(trains, doing):
    study, log = begun(2)
    fill_step(study, log)
    step, mine = log.open.step, worker_identity.worker_id()
    add(study, record_ticket(log, worker=mine, trains=trains))
    (worker,) = (
        w for w in read_status(study).workers if w.name == worker_identity.short_name(mine)
    )
    assert worker.doing == f"step {step}, {doing}"


def test_rate_and_time_left_follow_from_the_latest_candidates():
    study, log = begun(13)
    add(study, open_ticket(log, len(log.open.states) - 1, worker=AWAY))
    watch = StatusReader(study)
    watch.read()
    watch._latest = [2.0, 4.0]
    current = watch.read()
    assert current.per_minute == pytest.approx(20)
    lowered = current.share / (current.steps - 1)
    steps_left = (1 - current.share) / lowered
    open_left = 3 * (current.of - current.done)
    assert current.left_s == pytest.approx((steps_left - 1) * 4 * 3 + open_left)


def test_each_look_reads_what_is_new():
    study, log = begun(2)
    watch = StatusReader(study)
    before = watch.read()
    fill_step(study, log)
    after = watch.read()
    assert (before.done, after.done) == (0, after.of)
    assert after.candidates == before.candidates + after.of
    assert after == read_status(study)
    assert json.loads(json.dumps(after.to_json()))["done"] == after.done
