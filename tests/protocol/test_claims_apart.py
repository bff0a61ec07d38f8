"""Workers that look at the same moment choose apart: a claim that is lost costs two commits."""

from __future__ import annotations

import optuna
import pytest

from hq_optuna.protocol import claims
from hq_optuna.protocol.step_log import StepLog
from tests.samplers.tables import fill_step, new_study, open_ticket, ours, sampler, update


@pytest.fixture
def study() -> optuna.Study:
    return new_study(sampler(12, n_candidates=8))


@pytest.fixture
def log(study: optuna.Study) -> StepLog:
    """The record of a search whose open step has eight candidates."""
    found = ours(study).log(study)
    fill_step(study, found)
    trial = ours(study).ask(study)
    trial.finish(optuna.trial.TrialState.COMPLETE, 0.0)
    update(study, found)
    assert len(found.open.states) == 8
    return found


def choices(log: StepLog, workers: int, busy: int = 0, waited_s: float = 0.0) -> list[int | None]:
    """Return the slots that idle workers would claim, all with the same view."""
    names = [f"elsewhere/1/{i:02}/1" for i in range(workers)]
    log.owners._last_number = dict.fromkeys(names, 99)
    log.owners.running = {
        n: open_ticket(log, 0, worker=name) for n, name in enumerate(names[:busy])
    }
    found = []
    for name in names[busy:]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(claims.worker_identity, "worker_id", lambda name=name: name)
            ticket = claims._choose(log, "", waited_s)
        found.append(None if ticket is None else ticket.slot)
    return found


@pytest.mark.parametrize("workers", [2, 3, 5, 8])
def test_nobody_reaches_for_the_same_slot(log, workers):
    found = choices(log, workers)
    assert len(set(found)) == workers and None not in found


def test_a_worker_alone_takes_them_in_order(log):
    assert choices(log, 1) == [0]


def test_whoever_is_too_many_leaves_the_slots_to_others(log):
    found = choices(log, 12)
    assert sorted(slot for slot in found if slot is not None) == list(range(8))
    assert found.count(None) == 4


def test_whoever_is_done_with_its_own_helps_others_that_are_busy(log):
    log.open.done |= dict.fromkeys((1, 3, 5, 7), 1)  # all of the second of two
    assert choices(log, 2, busy=1) == [4]  # not what the first reaches for next
    log.open.done |= dict.fromkeys((0, 2, 4), 2)
    assert choices(log, 2) == [6, None]  # the first is idle, and will take its own


def test_whoever_waited_long_takes_what_there_is(log):
    assert None not in choices(log, 12, waited_s=claims.PATIENCE_S)


def test_a_step_is_recorded_by_who_comes_from_work_or_waited_long(study, log):
    fill_step(study, log)
    assert log.open.complete
    assert choices(log, 2) != [None, None]
    assert choices(log, 2, waited_s=0.1) == [None, None]
    assert choices(log, 2, waited_s=1.0) != [None, None]
