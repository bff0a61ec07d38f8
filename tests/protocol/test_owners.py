"""Who is dead, judged by signs and by the observer's clock alone."""

from __future__ import annotations

import pytest
from optuna.trial import TrialState

from hq_optuna.attributes import Ticket
from hq_optuna.protocol import owners, worker_identity
from hq_optuna.protocol.owners import GRACE_S, HELD, UNTAGGED_GRACE_S, Owners
from hq_optuna.storages.trials import TrialRow
from tests.elsewhere import AWAY, DEAD, HOST, NAMESPACE


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(owners.time, "monotonic", lambda: now[0])
    return now


def row(number: int, worker: str | None, beat: object = None, **changes: object) -> TrialRow:
    ticket = None
    if worker is not None:
        ticket = Ticket("candidate", 0, 0, "", (8,), worker=worker, claim=changes.pop("claim", 0))
    facts = {"state": TrialState.RUNNING, "value": None, "ticket": ticket, "heartbeat": beat}
    return TrialRow(number, 100 + number, **{**facts, **changes})


def test_an_owner_elsewhere_that_keeps_changing_its_attribute_lives(now):
    seen = Owners()
    for beat in range(20):
        seen.update([row(0, AWAY, beat)])
        assert list(seen.running) == [0]
        now[0] += GRACE_S - 0.1


def test_an_owner_elsewhere_that_is_silent_for_the_grace_period_is_dead(now):
    seen = Owners()
    seen.update([row(0, AWAY, 3)])
    now[0] += GRACE_S - 0.1
    seen.update([row(0, AWAY, 3)])
    assert list(seen.running) == [0]
    now[0] += 0.2
    seen.update([row(0, AWAY, 3)])
    assert seen.dead == {0: 100}
    seen.update([row(0, AWAY, 4)])  # it only slept
    assert list(seen.running) == [0]


def test_an_observer_that_was_away_itself_gives_the_whole_period_from_its_first_look(now):
    early, late = Owners(), Owners()
    early.update([row(0, AWAY)])
    now[0] += 10 * GRACE_S
    late.update([row(0, AWAY)])
    early.update([row(0, AWAY)])
    assert list(late.running) == [0]
    assert list(early.dead) == [0]


def test_a_process_of_this_host_is_dead_at_once_or_trusted(now):
    seen, alive = Owners(), f"{HOST}/{NAMESPACE}/1/"  # the first process of every system
    rows = [row(0, DEAD), row(1, alive)]
    seen.update(rows)
    assert (list(seen.dead), list(seen.running)) == ([0], [1])
    now[0] += 10 * GRACE_S
    seen.update(rows)  # a loop that never beats is not taken for dead, but its slot is free
    assert (list(seen.dead), list(seen.running)) == ([0], [])


def test_what_a_living_worker_claimed_and_does_not_beat_for_is_of_a_copied_study(now):
    seen, alive = Owners(), f"{HOST}/{NAMESPACE}/1/"
    seen.update([row(0, alive, claim=3)])
    now[0] += GRACE_S
    seen.update([row(0, alive, claim=3)])
    assert list(seen.dead) == [0]


def test_a_process_of_this_host_that_stopped_beating_hangs(now):
    seen, alive = Owners(), f"{HOST}/{NAMESPACE}/1/"
    seen.update([row(0, alive, 1)])
    now[0] += GRACE_S
    seen.update([row(0, alive, 1)])
    assert list(seen.dead) == [0]


def test_a_trial_without_a_ticket_is_waited_for_for_a_moment(now):
    seen = Owners()
    seen.update([row(0, None)])
    assert seen.untagged == [0]
    now[0] += UNTAGGED_GRACE_S
    seen.update([row(0, None)])
    assert (seen.untagged, seen.dead) == ([], {})
    seen.update([row(0, AWAY)])
    assert (list(seen.running), seen.dead) == ([0], {})


def test_where_others_end_trials_without_tickets_none_is_waited_for(now):
    seen = Owners()
    seen.update([row(0, None, state=TrialState.COMPLETE), row(1, None)])
    assert (seen.untagged, seen.dead) == ([], {})


def test_a_trial_that_was_created_twice_is_nobodys(now):
    """The first try was committed and its answer lost; the second one is the worker's trial."""
    mine, seen = worker_identity.worker_id(), Owners()
    HELD[77] = 101
    try:
        seen.update([row(0, mine, claim=77), row(1, mine, claim=77)])
        assert (list(seen.dead), list(seen.running)) == ([0], [1])
        HELD[77] = None  # between creating it and knowing its id
        seen.update([row(0, mine, claim=77)])
        assert list(seen.running) == [0]
    finally:
        del HELD[77]
    seen.update([row(1, mine, claim=77)])  # given up, but the storage could not be told
    assert list(seen.dead) == [1]


def test_finished_and_enqueued_trials_have_no_owner(now):
    seen = Owners()
    seen.update([row(0, AWAY, state=TrialState.COMPLETE), row(1, None, state=TrialState.WAITING)])
    assert (seen.running, seen.dead, seen.untagged, seen.waiting) == ({}, {}, [], True)
    seen.update([])
    assert not seen.waiting


def test_workers_that_were_seen_lately_have_places_of_their_own(now):
    seen = Owners()
    seen.update([row(n, f"w{n % 3}", state=TrialState.COMPLETE) for n in range(9)])
    assert seen.at_work("w1", last=8) == ["w0", "w1", "w2"]
    assert seen.at_work("a new one", last=8) == ["a new one", "w0", "w1", "w2"]
    seen.update([row(n, "w2", state=TrialState.COMPLETE) for n in range(9, 30)])
    assert seen.at_work("w2", last=8) == ["w2"]  # the others left


def test_the_idle_stand_in_line(now):
    seen = Owners()
    seen.update([row(0, "w0/a/1/b"), row(1, "w2/a/1/b")])
    workers = ["w0/a/1/b", "w1/a/1/b", "w2/a/1/b", "w3/a/1/b"]
    assert [seen.idle_before(name, workers) for name in workers] == [0, 0, 1, 1]
