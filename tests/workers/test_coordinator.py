"""A coordinator's workers never touch the storage; the history is that of the sequential search."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from hq_optuna.attributes import Ticket
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.owners import Owners
from hq_optuna.search import Limits
from hq_optuna.storages import open_storage
from hq_optuna.storages.writing import writes_together
from hq_optuna.workers.coordinator import Coordinator
from hq_optuna.workers.dispatcher import Dispatcher, Order
from hq_optuna.workers.loop import work
from tests.fake_search import fake_score, fake_table
from tests.samplers.tables import (
    add,
    assigned,
    expected,
    history,
    new_study,
    ours,
    sampler,
    states,
    tickets,
)
from tests.servers import KINDS, place


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with place(request.param, tmp_path_factory.mktemp(request.param)) as url:
        yield url


@pytest.fixture
def storage(url: str) -> Iterator[BaseStorage]:
    opened = open_storage(url)
    yield opened
    opened.remove_session()


class Scorer(threading.Thread):
    """A worker as a thread; dies silently after ``lives`` candidates."""

    def __init__(
        self,
        coordinator: Coordinator,
        space: Any,
        seconds: float = 0.0,
        lives: int = 10**9,
        takes: float = 0.0,
    ):
        super().__init__(daemon=True)
        self.coordinator, self.space, self.seconds, self.lives = coordinator, space, seconds, lives
        self.takes = takes
        self.table = fake_table(space)
        self.news = threading.Semaphore(0)
        self.orders: list[dict[str, Any]] = []
        self.had: list[dict[str, Any]] = []
        self.cancelled: list[int] = []
        self.gone = False
        self.scored = 0
        self.start()

    def send(self, order: Mapping[str, Any]) -> None:
        if self.gone:
            raise BrokenPipeError
        if "cancel" in order:
            self.cancelled.append(order["cancel"])
            return
        self.orders.append(dict(order))
        if not order.get("end"):
            self.had.append(dict(order))
        self.news.release()

    def score(self, bits: list[int]) -> float:
        return sum(fake_score(self.table, self.space.config(bits)))

    def run(self) -> None:
        self.coordinator.receive(self, {"event": "ready"})
        while True:
            self.news.acquire()
            order = self.orders.pop(0)
            if order.get("end"):
                return
            if self.scored >= self.lives:
                self.gone = True
                self.coordinator.receive(self, None)
                return
            time.sleep(self.takes + random.uniform(0, self.seconds))
            self.scored += 1
            said = {"event": "scored", "claim": order["claim"], "value": self.score(order["bits"])}
            self.coordinator.receive(self, {**said, "facts": {"seconds": 3.0, "worker": "box:1"}})


def wait_until(true: Callable[[], bool], until_s: float = 120.0) -> None:
    deadline = time.monotonic() + until_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def lead(coordinator: Coordinator, until_s: float = 120.0) -> None:
    deadline = time.monotonic() + until_s
    while coordinator.poll(0.05):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("encoding", ["layers", "compact"])
def test_the_history_is_that_of_the_sequential_search(storage, encoding):
    study = new_study(sampler(6, encoding=encoding), storage)
    coordinator = Coordinator(study)
    scorers = [Scorer(coordinator, ours(study).space) for _ in range(3)]
    lead(coordinator)
    assert history(study) == expected(study)
    log = ours(study).log(study)
    # Every candidate once, a record a step, and nothing else.
    assert set(states(study)) == {TrialState.COMPLETE}
    assert len(study.trials) == len(log.results) + len(log.closed)
    assert sum(scorer.scored for scorer in scorers) == len(log.results)
    for scorer in scorers:
        scorer.join(timeout=60)
        assert not scorer.is_alive()  # told that it is over
    candidate = study.trials[2]
    assert candidate.user_attrs["worker"] == "box:1"
    if writes_together(storage):  # MariaDB keeps whole seconds
        assert 2 <= candidate.duration.total_seconds() <= 4
    assert study.best_trial.user_attrs["kind"] == "incumbent"


def test_workers_that_die_cost_their_candidates_and_no_more(storage):
    study = new_study(sampler(8, n_candidates=4, encoding="compact"), storage)
    coordinator = Coordinator(study)
    space = ours(study).space
    for lives in (2, 5, 0, 10**9):
        Scorer(coordinator, space, 0.01, lives)
    lead(coordinator)
    assert history(study) == expected(study)
    assert states(study).count(TrialState.FAIL) <= 3
    assert TrialState.RUNNING not in states(study)


@pytest.mark.parametrize("direct", [False, True], ids=["two coordinators", "one and a worker"])
def test_others_on_the_same_study_change_nothing(url, storage, direct, monkeypatch):
    mine = new_study(sampler(8, n_candidates=4, encoding="compact"), storage)
    errors: list[BaseException] = []
    me, other = worker_identity.worker_id(), f"{worker_identity.worker_id()}9"
    names = threading.local()
    monkeypatch.setattr(worker_identity, "worker_id", lambda: getattr(names, "name", me))
    monkeypatch.setattr(worker_identity, "is_dead", lambda name: False)

    def run() -> None:
        names.name = other
        try:
            by = sampler(8, n_candidates=4, encoding="compact")
            theirs = optuna.load_study(study_name="table", storage=open_storage(url), sampler=by)
            if direct:
                work(theirs, lambda trial: (time.sleep(0.005), assigned(trial))[1])
                return
            coordinator = Coordinator(theirs)
            [Scorer(coordinator, by.space, 0.01) for _ in range(2)]
            lead(coordinator)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    coordinator = Coordinator(mine)
    [Scorer(coordinator, ours(mine).space, 0.01) for _ in range(2)]
    lead(coordinator)
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert errors == []
    assert history(mine) == expected(mine)
    assert TrialState.RUNNING not in states(mine)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "two at work"])
def test_a_claim_between_two_of_its_own_is_noticed(monkeypatch, alone):
    """Storages that create trials one by one let somebody else's number come in between."""
    study = new_study(sampler(6))
    coordinator = Coordinator(study)
    told = [Told() for _ in range(3)]
    for worker in told:
        coordinator.receive(worker, {"event": "ready"})
    coordinator.poll(0.01)  # claims step 0
    if not alone:
        seen = ours(study).log(study).owners.at_work
        monkeypatch.setattr(
            Owners, "at_work", lambda _, worker, last: [*seen(worker, last), "zz/1/2/3"]
        )
    create, created = study._storage.create_new_trial, [0]

    def create_new_trial(study_id: int, template_trial: Any = None) -> int:
        ticket = Ticket.read(template_trial.system_attrs)
        created[0] += ticket.kind == "candidate"
        if created == [2]:  # the other claims what the coordinator is about to
            add(study, replace(ticket, worker="elsewhere/1/2/3", claim=1))
        return create(study_id, template_trial)

    order = next(worker for worker in told if worker.orders).orders[0]
    said = {"event": "scored", "claim": order["claim"], "value": 1.0, "facts": {}}
    monkeypatch.setattr(study._storage, "create_new_trial", create_new_trial)
    coordinator.receive(next(worker for worker in told if worker.orders), said)
    for _ in range(3):
        coordinator.poll(0.01)
    theirs = next(t for t in tickets(study) if t.worker == "elsewhere/1/2/3")
    same = [
        trial.state
        for trial, t in zip(study.get_trials(), tickets(study), strict=True)
        if (t.step, t.slot) == (theirs.step, theirs.slot)
    ]
    assert same == [TrialState.RUNNING, TrialState.PRUNED]  # of two the lower number has it


def test_the_next_step_is_handed_out_before_the_last_result_is_stored(monkeypatch):
    from hq_optuna.workers import coordinator as module

    study = new_study(sampler(6))
    coordinator = Coordinator(study)
    scorer = Scorer(coordinator, ours(study).space)
    scored_by_then: list[int] = []
    stored = module.finish_trials

    def store(storage: BaseStorage, ended: list[Any]) -> None:
        if not scored_by_then:  # the worker is quicker than the storage
            wait_until(lambda: scorer.scored >= 2)
        scored_by_then.append(scorer.scored)
        stored(storage, ended)

    monkeypatch.setattr(module, "finish_trials", store)
    lead(coordinator)
    assert history(study) == expected(study)
    log = ours(study).log(study)
    # Step 0 has one candidate; its successor's are under way when its result is stored.
    assert scored_by_then[0] >= 2
    assert scorer.scored == len(log.results)


def test_a_limit_ends_it_though_more_was_handed_out(storage):
    study = new_study(sampler(6), storage)
    ours(study).view(study).log.limit(Limits(max_evaluations=4))
    study.set_user_attr("hq:limits", {"max_evaluations": 4})
    coordinator = Coordinator(study)
    Scorer(coordinator, ours(study).space, 0.02)
    lead(coordinator)
    log = ours(study).log(study)
    assert log.stopped_by
    assert len(log.results) == 4
    coordinator.give_back()
    assert TrialState.RUNNING not in states(study)


def test_a_limit_takes_back_what_workers_are_at(monkeypatch):
    study = new_study(sampler(6))
    study.set_user_attr("hq:limits", {"max_seconds": 0.2})
    coordinator = Coordinator(study)
    over = threading.Event()
    scorers = [Scorer(coordinator, ours(study).space) for _ in range(2)]
    for scorer in scorers:  # nobody ends before the search is over
        scorer.score = lambda bits: float(over.wait(120))  # type: ignore[method-assign]
    lead(coordinator)
    over.set()
    assert ours(study).log(study).stopped_by
    assert [len(scorer.cancelled) for scorer in scorers].count(1) == 1  # of step 0
    assert TrialState.RUNNING not in states(study)


def test_what_was_claimed_is_given_back(storage):
    study = new_study(sampler(6), storage)
    coordinator = Coordinator(study)
    scorer = Scorer(coordinator, ours(study).space, lives=2)
    while scorer.is_alive():
        coordinator.poll(0.02)
    second = Scorer(coordinator, ours(study).space, lives=10**9)
    second.seconds = 1e6  # never ends
    deadline = time.monotonic() + 120
    while states(study).count(TrialState.RUNNING) == 0 and time.monotonic() < deadline:
        coordinator.poll(0.02)
    assert TrialState.RUNNING in states(study)
    coordinator.give_back()
    assert TrialState.RUNNING not in states(study)
    work(study, assigned)
    assert history(study) == expected(study)


def test_a_score_that_is_no_number_is_refused():
    study = new_study(sampler(6))
    coordinator = Coordinator(study)
    scorer = Scorer(coordinator, ours(study).space)
    scorer.score = lambda bits: float("nan")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="returned NaN"):
        lead(coordinator)


def test_long_candidates_show_that_their_owner_lives(monkeypatch, storage):
    from hq_optuna import attributes
    from hq_optuna.workers import coordinator as module

    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    study = new_study(sampler(6), storage)
    coordinator = Coordinator(study)
    Scorer(coordinator, ours(study).space, seconds=1e6)
    seen: set[Any] = set()
    deadline = time.monotonic() + 120
    while len(seen - {None}) < 2 and time.monotonic() < deadline:
        coordinator.poll(0.02)
        seen |= {trial.system_attrs.get(attributes.HEARTBEAT) for trial in study.get_trials()}
    assert len(seen - {None}) >= 2


class Told:
    """A worker that is only told things."""

    def __init__(self) -> None:
        self.orders: list[Mapping[str, Any]] = []

    def send(self, order: Mapping[str, Any]) -> None:
        self.orders.append(order)


def test_json_that_is_no_answer_is_none():
    """A study file may print what looks like an event."""
    dispatcher, worker = Dispatcher(), Told()
    dispatcher.receive(worker, {"event": "ready"})
    dispatcher.receive(worker, {"event": "ready"})
    assert len(dispatcher) == 1
    dispatcher.submit([Order(7, (8, 4), 0.0)])
    for said in ({}, {"claim": 7}, {"claim": 6, "value": 1.0, "facts": {}}):
        dispatcher.receive(worker, {"event": "scored", **said})
    assert dispatcher.collect() == ([], [])
    dispatcher.receive(worker, {"event": "scored", "claim": 7, "value": 1.0, "facts": {}})
    ((order, _),), _ = dispatcher.collect()
    assert order.claim == 7


def test_an_order_that_its_worker_lost_is_for_anybody():
    dispatcher, first, second = Dispatcher(), Told(), Told()
    dispatcher.receive(first, {"event": "ready"})
    dispatcher.submit([Order(claim, (8, claim), 0.0) for claim in (1, 2)])
    dispatcher.receive(first, {"event": "scored", "claim": 1, "value": 1.0, "facts": {}})
    dispatcher.receive(first, None)
    dispatcher.receive(second, {"event": "ready"})
    dispatcher.submit(dispatcher.collect()[1])  # as a coordinator does before the step is open
    assert second.orders == [{"claim": 2, "bits": [8, 2]}]
