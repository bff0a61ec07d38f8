"""Workers that die, fall silent or are taken for dead, and who goes on with their trials."""

from __future__ import annotations

import functools
import threading
import time

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.protocol import owners, worker_identity
from hq_optuna.protocol.heartbeat import heartbeat
from hq_optuna.storages.writing import write_heartbeats
from hq_optuna.workers import loop
from hq_optuna.workers.loop import fail_dead_trials, work
from tests.elsewhere import AWAY, DEAD
from tests.samplers.tables import (
    add,
    assigned,
    expected,
    history,
    open_ticket,
    ours,
    record_ticket,
    states,
    total,
)


def test_trials_of_dead_workers_are_marked_failed_and_others_are_not(study):
    log = ours(study).log(study)
    numbers = {
        name: add(study, open_ticket(log, 0, worker=name)) for name in (DEAD, AWAY, "", "odd")
    }
    numbers["mine"] = add(study, open_ticket(log, 0, worker=worker_identity.worker_id()))
    untagged = study._storage.create_new_trial(study._study_id)
    assert fail_dead_trials(study) == 1
    assert states(study)[numbers.pop(DEAD)] == TrialState.FAIL
    assert {states(study)[n] for n in numbers.values()} == {TrialState.RUNNING}
    assert study._storage.get_trial(untagged).state == TrialState.RUNNING
    assert fail_dead_trials(study) == 0


def begun(study: optuna.Study, **facts: object) -> int:
    trial = optuna.create_trial(state=TrialState.RUNNING, **facts)
    return study._storage.create_new_trial(study._study_id, template_trial=trial)


def test_a_trial_that_gets_no_ticket_is_waited_for_for_a_moment_and_left_alone(study, clock):
    running = [begun(study), begun(study, user_attrs={"by": "another sampler"})]
    work(study, assigned)
    assert all(study._storage.get_trial(n).state == TrialState.RUNNING for n in running)
    assert history(study) == expected(study)
    assert sum(clock.slept) < 2 * owners.UNTAGGED_GRACE_S


def test_a_trial_has_ticket_parameters_and_facts_from_its_first_moment(study, monkeypatch):
    """A worker that is killed right after it made a trial leaves one that tells whose it is."""
    storage, create = study._storage, study._storage.create_new_trial

    def made(*arguments: object, **options: object) -> int:
        trial_id = create(*arguments, **options)
        trial = storage.get_trial(trial_id)
        ticket = attributes.Ticket.read(trial.system_attrs)
        assert ticket.worker == worker_identity.worker_id()
        assert trial.user_attrs[attributes.KIND] == ticket.kind
        assert trial.user_attrs[attributes.COST] == ours(study).view(study).log.search.cost_of(
            ticket.bits
        )
        assert trial.system_attrs[attributes.OLD_CONSTRAINTS] == [trial.constraints["bops"]]
        shown = ours(study).parameters(ticket)
        assert trial.params == {name: value for name, (value, _) in shown.items()}
        return trial_id

    monkeypatch.setattr(storage, "create_new_trial", made)
    work(study, assigned)
    assert history(study) == expected(study)


def test_a_worker_that_was_taken_for_dead_goes_on_with_another_trial(study):
    """Paused within its trial, it finds the trial failed."""

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 2:
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return assigned(trial)

    work(study, objective)
    assert states(study).count(TrialState.FAIL) == 1
    assert history(study) == expected(study)


def test_a_trial_that_another_worker_ended_meanwhile_is_left_as_it_is(study, monkeypatch):
    add(study, open_ticket(ours(study).log(study), 0, worker=DEAD))

    def late(*_: object, **__: object) -> None:
        raise optuna.exceptions.UpdateFinishedTrialError

    monkeypatch.setattr(study._storage, "set_trial_state_values", late)
    assert fail_dead_trials(study) == 0


def test_the_slot_of_a_dead_worker_is_filled_at_once(study, clock):
    add(study, open_ticket(ours(study).log(study), 0, worker=DEAD))
    work(study, assigned)
    assert history(study) == expected(study)
    assert clock.slept == []
    assert states(study)[0] == TrialState.FAIL


@pytest.mark.parametrize("kind", ["candidate", "incumbent"])
def test_what_a_silent_worker_elsewhere_had_is_taken_over_after_the_grace_period(
    study, clock, kind
):
    """Nobody here can know whether it is dead: it is waited for, and its work is then repeated."""
    log = ours(study).log(study)
    if kind == "incumbent":
        add(study, open_ticket(log, 0), total(log.search.space, log.search.space.top))
        log = ours(study).log(study)
    ticket = record_ticket(log, worker=AWAY) if kind == "incumbent" else None
    number = add(study, ticket or open_ticket(log, 0, worker=AWAY))
    work(study, assigned)
    assert history(study) == expected(study)
    assert owners.GRACE_S <= sum(clock.slept) < owners.GRACE_S + 2 * loop.LONGEST_WAIT_S
    assert max(clock.slept) <= loop.LONGEST_WAIT_S
    assert states(study)[number] == TrialState.FAIL
    log = ours(study).log(study)
    assert len(study.trials) == 1 + len(log.results) + len(log.closed)


def test_a_worker_elsewhere_that_gives_signs_of_life_is_waited_for(study, clock):
    log = ours(study).log(study)
    number = add(study, open_ticket(log, 0, worker=AWAY))
    trial_id = study.get_trials(deepcopy=False)[number]._trial_id
    beats = iter(range(1000))

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if len(clock.slept) == 300:
            top = log.search.space.top
            value = total(log.search.space, top)
            study._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
        elif len(clock.slept) < 300:
            study._storage.set_trial_system_attr(trial_id, attributes.HEARTBEAT, next(beats))

    loop.time.sleep = sleep
    work(study, assigned)
    # The record of its step is left to it for a moment: it may be about to make it.
    assert 300 <= len(clock.slept) <= 305
    assert sum(clock.slept) > 5 * owners.GRACE_S
    assert history(study) == expected(study)
    assert TrialState.FAIL not in states(study)


def test_a_trial_that_runs_long_gives_signs_of_life_and_a_short_one_costs_nothing(study):
    storage = study._storage
    trial_id = storage.create_new_trial(study._study_id)
    beat = functools.partial(write_heartbeats, storage, [trial_id])
    with heartbeat(storage, beat, every_s=60):
        pass
    assert attributes.HEARTBEAT not in storage.get_trial(trial_id).system_attrs
    with heartbeat(storage, beat, every_s=0.01):
        deadline = time.monotonic() + 120
        while storage.get_trial(trial_id).system_attrs.get(attributes.HEARTBEAT, 0) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    for thread in threading.enumerate():
        if thread.name == "heartbeat":  # may be at its last beat
            thread.join(60)
            assert not thread.is_alive()
    last = storage.get_trial(trial_id).system_attrs[attributes.HEARTBEAT]
    time.sleep(0.05)
    assert storage.get_trial(trial_id).system_attrs[attributes.HEARTBEAT] == last


def test_signs_of_life_that_cannot_be_written_disturb_nothing(study, monkeypatch):
    tries: list[object] = []

    def away(*arguments: object) -> None:
        tries.append(arguments)
        raise OSError("no route to host")

    trial_id = study._storage.create_new_trial(study._study_id)
    monkeypatch.setattr(study._storage, "set_trial_system_attr", away)
    beat = functools.partial(write_heartbeats, study._storage, [trial_id])
    with heartbeat(study._storage, beat, every_s=0.005):
        deadline = time.monotonic() + 120
        while len(tries) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert len(tries) >= 3
