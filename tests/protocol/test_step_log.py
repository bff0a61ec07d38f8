"""The record of a search, replayed from trials that were crafted by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from datetime import timedelta
from typing import Any

import optuna
import pytest
from optuna.study import Study
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.protocol import owners, worker_identity
from hq_optuna.protocol.step_log import StepLog
from tests.samplers.tables import (
    STORAGES,
    add,
    assigned,
    expected,
    fill_step,
    history,
    new_study,
    open_ticket,
    ours,
    record_ticket,
    sampler,
    total,
    update,
)


@pytest.fixture
def study() -> Study:
    return new_study()


@pytest.fixture
def log(study: Study) -> StepLog:
    """A record with step 0 closed (trials 0 and 1) and step 1 open, with three slots."""
    log = StepLog(ours(study).log(study).search)
    fill_step(study, log)
    add(study, record_ticket(log), 0.0)
    return update(study, log)


def fresh(study: Study, log: StepLog) -> StepLog:
    return update(study, StepLog(log.search))


def view(log: StepLog) -> Any:
    """Return everything that decides how a search goes on."""
    step = log.open
    return (
        [closed.incumbent for closed in log.closed],
        dict(log.results),
        None if step is None else (step.step, step.parent, step.states, sorted(step.done)),
    )


def test_a_search_opens_with_one_slot_which_is_the_start(study):
    step = ours(study).log(study).open
    assert (step.step, step.states, step.free) == (0, (ours(study).space.top,), [0])


def test_a_step_with_all_results_stays_open_until_it_is_recorded(study, log):
    fill_step(study, log, shuffle=0)
    assert log.open.complete
    assert len(log.closed) == 1
    add(study, record_ticket(log), -1.0)
    update(study, log)
    assert len(log.closed) == 2
    assert log.open.step == 2


def test_a_step_leaves_the_score_of_its_candidate_and_not_the_value_of_its_record(study, log):
    fill_step(study, log)
    incumbent, winner = log.close_open_step()
    number = add(study, record_ticket(log), -123.0)
    update(study, log)
    assert log.closed[-1].incumbent == incumbent
    assert log.closed[-1].incumbent.score > 0
    assert (log.closed[-1].number, log.closed[-1].winner) == (number, winner)


def test_the_first_complete_result_of_a_slot_counts_by_number(study, log):
    early = study.ask()  # slot 0, slow
    ticket = attributes.Ticket.read(study._storage.get_trial(early._trial_id).system_attrs)
    late = add(study, open_ticket(log, ticket.slot), 7.0)
    assert update(study, log).open.done == {ticket.slot: late}
    study.tell(early, 5.0)
    assert update(study, log).open.done == {ticket.slot: early.number}
    assert log.results[1, ticket.slot].score == 5.0
    assert view(fresh(study, log)) == view(log)


def test_a_late_duplicate_with_another_score_changes_nothing(study, log):
    fill_step(study, log)
    duplicates = [open_ticket(log, slot) for slot in range(3)]
    add(study, record_ticket(log), 0.0)
    update(study, log)
    before = view(log)
    for ticket in duplicates:
        add(study, ticket, -99.0)
    assert view(update(study, log)) == before
    assert view(fresh(study, log)) == before


def test_a_duplicate_that_scored_other_bits_than_its_slot_is_ignored(study, log):
    other = log.open.states[1]
    add(study, open_ticket(log, 0, bits=other), 1.0)
    assert update(study, log).open.free == [0, 1, 2]


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_ticket_for_a_slot_the_step_has_not_is_ignored(study, log, slot):
    add(study, replace(open_ticket(log, 0), slot=slot), 1.0)
    assert update(study, log).open.done == {}


def test_candidates_and_records_with_another_parent_are_ignored(study, log):
    fill_step(study, log)
    before = view(log)
    add(study, open_ticket(log, 0, parent="0" * 12), -99.0)
    add(study, record_ticket(log, parent="0" * 12), -99.0)
    assert view(update(study, log)) == before
    assert view(fresh(study, log)) == before


def test_candidates_of_a_later_step_with_the_parent_of_this_one_are_ignored(study, log):
    before = view(log)
    add(study, open_ticket(log, 0, step=2), 1.0)
    assert view(update(study, log)) == before


def test_of_two_records_of_a_step_the_one_with_the_lower_number_counts(study, log):
    winners = fill_step(study, log)
    first = record_ticket(log)
    other = next(slot for slot in range(3) if winners[slot] != first.origin)
    second = replace(first, origin=winners[other], bits=log.open.states[other])
    number = add(study, first, 0.0)
    add(study, second, 0.0)
    update(study, log)
    assert log.closed[-1].number == number
    assert log.closed[-1].winner == first.origin
    assert view(fresh(study, log)) == view(log)


@pytest.mark.parametrize(
    "wrong", [{"origin": 10_000}, {"origin": None}, {"origin": 1}, {"bits": (2, 2, 2, 2)}]
)
def test_a_record_that_names_no_candidate_does_not_stop_the_search(study, log, wrong):
    fill_step(study, log)
    add(study, record_ticket(log, **wrong), 0.0)
    assert update(study, log).open.step == 1
    right = add(study, record_ticket(log), 0.0)
    update(study, log)
    assert (log.open.step, log.closed[-1].number) == (2, right)


def test_a_record_may_name_a_duplicate_that_came_after_its_step_was_closed(study, log):
    """A worker that reads the study afresh takes the duplicate with the lower number."""
    early = study.ask()
    slot = attributes.Ticket.read(study._storage.get_trial(early._trial_id).system_attrs).slot
    score = total(log.search.space, log.open.states[slot])
    fill_step(study, log)
    add(study, record_ticket(log), 0.0)
    update(study, log)
    study.tell(early, score)
    update(study, log)
    fill_step(study, log)
    add(study, record_ticket(log, origin=early.number, bits=log.results[1, slot].state), 0.0)
    update(study, log)
    assert log.closed[-1].incumbent.origin == (1, slot)
    assert view(fresh(study, log)) == view(log)


def test_a_slot_is_free_unless_it_is_done_or_its_worker_may_live(study, log):
    host, namespace, _, start = worker_identity.worker_id().split("/")
    alive = worker_identity.worker_id()
    dead = f"{host}/{namespace}/{2**22 + 1}/{start}"  # above Linux's largest process id
    away = f"another-host/{namespace}/{2**22 + 1}/{start}"
    add(study, open_ticket(log, 0, worker=dead))
    assert update(study, log).open.free == [0, 1, 2]
    running = [add(study, open_ticket(log, 0, worker=worker)) for worker in (alive, away)]
    assert update(study, log).open.free == [1, 2]
    assert log.open.running == {0: running}
    add(study, open_ticket(log, 1), 1.0)
    assert update(study, log).open.free == [2]


def test_trials_that_wait_or_failed_or_were_pruned_leave_their_slot_free(study, log):
    for state in (TrialState.WAITING, TrialState.FAIL, TrialState.PRUNED):
        ticket = open_ticket(log, 0, worker=worker_identity.worker_id()).to_json()
        study.add_trial(optuna.create_trial(state=state, system_attrs={attributes.TICKET: ticket}))
    assert update(study, log).open.free == [0, 1, 2]


def test_running_records_are_told_apart_from_running_candidates(study, log):
    fill_step(study, log)
    number = add(study, record_ticket(log, worker=worker_identity.worker_id()))
    add(study, record_ticket(log, worker=worker_identity.worker_id(), parent="0" * 12))
    assert update(study, log).open.recording == [number]
    assert log.open.running == {}


def test_untagged_trials_are_counted_below_a_number_and_only_for_a_while(study, log, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(owners.time, "monotonic", lambda: now[0])
    for _ in range(2):
        study._storage.create_new_trial(study._study_id)
    update(study, log)
    assert [log.untagged_before(n) for n in (2, 3, 4, 99)] == [0, 1, 2, 2]
    now[0] += owners.UNTAGGED_GRACE_S - 1
    study._storage.create_new_trial(study._study_id)
    assert update(study, log).untagged_before(99) == 3
    now[0] += 2  # by now the first two have lost their workers
    assert update(study, log).untagged_before(99) == 1


@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize("hours", [-5, 0, 5])
def test_the_clock_of_whoever_made_a_trial_does_not_matter(tmp_path, kind, hours, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(owners.time, "monotonic", lambda: now[0])
    study = new_study(storage=STORAGES[kind](tmp_path))
    begin(study, 3600 * hours)
    assert ours(study).log(study).untagged_before(99) == 1
    now[0] = owners.UNTAGGED_GRACE_S + 0.1
    log = ours(study).log(study)
    assert log.untagged_before(99) == 0


def begin(study: Study, seconds: float) -> None:
    """Add a running trial without a ticket that began some seconds ago."""
    trial = optuna.create_trial(state=TrialState.RUNNING)
    trial.datetime_start -= timedelta(seconds=seconds)
    study._storage.create_new_trial(study._study_id, template_trial=trial)


def test_what_is_left_is_told_for_a_number(study, log):
    assert log.anything_left()
    begin(study, 0)  # number 2
    update(study, log)
    assert log.anything_left(99)
    for slot in (0, 1):
        add(study, open_ticket(log, slot, worker=worker_identity.worker_id()))
    update(study, log)
    assert [log.anything_left(number) for number in (2, 3, 99)] == [True, False, False]
    fill_step(study, log)
    assert [log.anything_left(number) for number in (2, 3)] == [True, False]
    add(study, record_ticket(log, worker=worker_identity.worker_id()))
    assert not update(study, log).anything_left(2)


@pytest.mark.parametrize(
    "ticket",
    ["text", {}, {"v": 2, "kind": "candidate"}, {"v": 1}, {"v": 1, "bits": 5}, None, []],
)
def test_damaged_tickets_and_those_of_another_protocol_are_ignored(study, log, ticket):
    before = view(log)
    study.add_trial(optuna.create_trial(value=1.0, system_attrs={attributes.TICKET: ticket}))
    assert view(update(study, log)) == before


def test_the_record_is_that_of_the_plain_search_closed_by_hand_in_any_order():
    """Slots completed in random order, with duplicates between them: history of `run`."""
    for seed in range(3):
        study = new_study(sampler(7, seed=seed), None)
        log = ours(study).log(study)
        while log.open is not None:
            fill_step(study, log, shuffle=seed)
            add(study, open_ticket(log, 0), 99.0)  # a duplicate with a higher number
            add(study, record_ticket(log), -99.0)
            update(study, log)
        assert history(study) == expected(study) == [closed.incumbent for closed in log.closed]
        assert len(log.closed) > 4


@pytest.mark.parametrize("seed", range(12))
def test_looking_often_and_looking_once_give_the_same_record(seed):
    """Trials finish in any order after they began; a log is fed after some of the changes."""
    rng = random.Random(seed)
    study = new_study(sampler(6, n_candidates=1 + seed % 4))
    looking = StepLog(ours(study).log(study).search)
    asked: list[optuna.Trial] = []
    while not ours(study).finished(study):
        if len(asked) < 3 and rng.random() < 0.6:
            asked.append(study.ask())
        elif asked:
            trial = asked.pop(rng.randrange(len(asked)))
            if rng.random() < 0.15:
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, assigned(trial))
        if rng.random() < 0.5:
            update(study, looking)
    assert view(update(study, looking)) == view(fresh(study, looking))
    assert [closed.incumbent for closed in looking.closed] == expected(study)


def test_a_running_trial_with_other_bits_than_its_slot_has_does_not_hold_the_slot(study, log):
    fill_step(study, log)
    add(study, record_ticket(log), 1.0)
    update(study, log)
    bottom = log.search.space.bottom
    add(study, open_ticket(log, 0, worker=worker_identity.worker_id(), bits=bottom))
    update(study, log)
    assert log.open.free == list(range(len(log.open.states)))


def test_a_training_goes_on_from_attempts_at_the_same_bits_alone(study, log):
    fill_step(study, log)
    ticket = record_ticket(log, trains=True, worker=worker_identity.worker_id())
    numbers = [add(study, ticket), add(study, replace(ticket, bits=log.search.space.bottom))]
    update(study, log)
    (attempt,) = log.attempts(ticket)
    assert study._storage.get_trial(attempt).number == numbers[0]


def test_settings_name_everything_the_history_depends_on():
    search = sampler()._search(None)
    base = search.to_json()
    for name, value in {
        "n_candidates": 4,
        "rule": "min",
        "seed": 9,
        "limit": 1.0,
        "refine": not search.refine,
    }.items():
        changed = replace(search, **{name: value})
        assert [k for k in base if changed.to_json()[k] != base[k]] == [name]
        other = changed.to_json()
        assert attributes.digest(other) != attributes.digest(base)
    unlimited = replace(search, limit=-math.inf)
    assert unlimited.to_json()["limit"] is None  # JSON has no infinity
