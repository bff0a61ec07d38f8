"""Kind G: studies and trials that the product did not make are ignored or used, and brick nothing.

The oracle is the search that nobody disturbed; costs are counted by hand.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from torch import nn

import hq_optuna as hq
from hq_optuna.optuna_internals import place_of
from hq_optuna.protocol import owners
from hq_optuna.workers import loop
from tests.reported import product

MACS = {"0": 8 * 16, "2": 16 * 16, "4": 16 * 3}
BITS = (8, 4, 2)
search = product.search


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(64, 8), torch.randint(0, 3, (64,))


def share(bits: dict[str, tuple[int, int]]) -> float:
    """Return the BOPs of bits by layer as a part of those of all 8 bits, by hand."""
    return sum(MACS[n] * w * a for n, (w, a) in bits.items()) / (64 * sum(MACS.values()))


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/study.db"


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[int, int]]:
    """The answer of the search that nobody disturbs."""
    return search(network(), data()).bits


def other(storage: Any, sampler: Any = None) -> optuna.Study:
    """Return the study as Optuna loads it: with a sampler and a pruner of its own."""
    return optuna.load_study(study_name="x", storage=storage, sampler=sampler)


def add(study: optuna.Study) -> None:
    """A finished trial of one's own, with parameters that nobody knows."""
    one = {"q": 0.5}, {"q": FloatDistribution(0, 1)}
    study.add_trial(optuna.create_trial(params=one[0], distributions=one[1], value=-5.0))


def add_ours(study: optuna.Study) -> None:
    """One whose parameters have the names of layers, and other choices; databases refuse it."""
    kinds = {"0": FloatDistribution(0, 9), "2": CategoricalDistribution((16, 1))}
    bits = {"0": 0.5, "2": 16}
    with contextlib.suppress(ValueError):
        study.add_trial(optuna.create_trial(params=bits, distributions=kinds, value=-9.0))


def tell_asked(study: optuna.Study) -> None:
    study.tell(study.ask(), -7.0)


def tell_many(study: optuna.Study) -> None:
    for _ in range(8):
        study.tell(study.ask(), -7.0)


def tell_failed(study: optuna.Study) -> None:
    study.tell(study.ask(), state=TrialState.FAIL)


def tell_running(state: TrialState, value: float | None) -> Callable[[optuna.Study], None]:
    def tell(study: optuna.Study) -> None:
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, value, state=state)

    return tell


def enqueue(**bits: Any) -> Callable[[optuna.Study], None]:
    return lambda study: study.enqueue_trial({name.strip("_"): b for name, b in bits.items()})


def copies(study: optuna.Study) -> None:
    """Trials of the search once more, as who joins two studies of it adds them."""
    study.add_trials([t for t in study.trials if t.state.is_finished()])


WAYS = {
    "add_trial": add,
    "add_trial with names of layers": add_ours,
    "add_trials of its own": copies,
    "enqueue_trial": enqueue(_0=4, _2=4, _4=4),
    "enqueue_trial of one layer": enqueue(_0=4),
    "enqueue_trial of other bits": enqueue(_0=99, _2="x"),
    "enqueue_trial of other names": enqueue(temperature=1.0),
    "ask, tell": tell_asked,
    "ask, tell again and again": tell_many,
    "ask, tell failed": tell_failed,
    "ask, never tell": lambda study: study.ask(),
    "tell a running trial": tell_running(TrialState.COMPLETE, -3.0),
    "tell a running trial that it failed": tell_running(TrialState.FAIL, None),
    "tell a running trial that it is pruned": tell_running(TrialState.PRUNED, None),
}


IN_A_FILE = ("ask, tell", "tell a running trial")


@pytest.mark.parametrize(
    ("way", "place"), [*((way, "memory") for way in WAYS), *((way, "sqlite") for way in IN_A_FILE)]
)
def test_what_others_do_to_a_running_search_changes_no_answer(
    way, place, tmp_path, alone, monkeypatch
):
    """In memory through the search's own study, whose sampler gives a trial asked for a place in
    the search; in a file through another handle, and afterwards the same command goes on."""
    monkeypatch.setattr(owners, "UNTAGGED_GRACE_S", 0.2)
    monkeypatch.setattr(owners.Owners.__init__, "__defaults__", (0.4,))
    storage = optuna.storages.InMemoryStorage() if place == "memory" else url(tmp_path)

    def during(study: optuna.Study) -> None:
        WAYS[way](study if place == "memory" else other(storage))

    found = search(network(), data(), during=during, storage=storage, name="x")
    assert found.bits == alone
    history = hq.read_history(found.study)
    assert all(math.isfinite(c.score_weights) and c.score > -1 for c in history.candidates)
    if place == "sqlite":
        assert search(network(), data(), storage=storage, name="x").bits == alone


def test_others_that_never_pause_do_not_hold_a_search_up(alone):
    """A loop of somebody's own ends one trial after the other and always has one running."""
    over, storage = threading.Event(), optuna.storages.InMemoryStorage()

    def busy() -> None:
        while not over.is_set():
            other(storage).optimize(lambda trial: over.wait(0.1) or 1.0, n_trials=1)

    thread = threading.Thread(target=busy)
    try:
        start = lambda study: thread.start()  # noqa: E731
        found = search(network(), data(), during=start, storage=storage, name="x")
    finally:
        over.set()
        thread.join()
    assert found.bits == alone
    assert {t.value for t in found.study.trials} >= {1.0}


def parts(budget: float = 0.3) -> product.Parts:
    return product.parts(network(), data(), budget, BITS)


def study_of(by: product.Parts, storage: Any) -> optuna.Study:
    return optuna.create_study(
        study_name="x", storage=storage, sampler=by.sampler, pruner=by.pruner,
        load_if_exists=True,
    )  # fmt: skip


def answer(study: optuna.Study) -> dict[str, tuple[int, int]]:
    return product.best(study, network(), data())[0]


@pytest.mark.parametrize("sampler", [None, optuna.samplers.RandomSampler(seed=3)])
def test_a_study_loaded_without_its_sampler_knows_its_budget(sampler):
    """Optuna takes its own sampler then; our objective reads the budget in the study."""
    by, where = parts(), optuna.storages.InMemoryStorage()
    study_of(by, where).optimize(by.objective, n_trials=4)
    foreign = other(where, sampler)
    foreign.optimize(by.objective, n_trials=10)
    drawn = foreign.trials[4:]
    assert all(t.constraints["bops"] == t.user_attrs["cost"] / (0.3 * 64 * 432) - 1 for t in drawn)
    again = parts()
    study = study_of(again, where)
    study.optimize(again.objective)
    assert share(answer(study)) <= 0.3
    undisturbed = study_of(parts(), None)
    undisturbed.optimize(again.objective)
    assert product.history(undisturbed)[0] in product.history(study)
    assert hq.read_history(study).incumbent.config == hq.read_history(undisturbed).incumbent.config


def test_asked_through_our_sampler_and_told_by_others_is_never_the_best_over_the_budget():
    """The first trial is of all 8 bits: whatever it is told, it costs more than three tenths."""
    by, where = parts(), optuna.storages.InMemoryStorage()
    study = study_of(by, where)
    asked = study.ask()
    other(where).tell(asked.number, -7.0)
    study.optimize(by.objective)
    assert study.trials[0].value == -7.0
    assert study.trials[0].constraints["bops"] == pytest.approx(1 / 0.3 - 1)
    assert share(answer(study)) <= 0.3


@pytest.mark.parametrize("encoding", ["layers", "compact"])
def test_ones_own_objective_with_our_sampler_and_pruner(encoding):
    """It writes no cost and no constraint; the sum of bits stands for a loss."""
    by, where = parts(), optuna.storages.InMemoryStorage()
    space = by.sampler.space
    sampler = hq.samplers.ProgressiveBitSampler(
        space, budget=by.sampler.budget, n_candidates=4, seed=0, encoding=encoding
    )

    def loss(trial: optuna.Trial) -> float:
        return sum(2.0 ** -sum(bits) for _, bits in hq.assignment(trial).items())

    study = optuna.create_study(
        study_name="x", storage=where, sampler=sampler, pruner=by.pruner, load_if_exists=True
    )
    study.enqueue_trial({"0": 8, "2": 8, "4": 8, "layer": "0", "bits": 8})
    study.enqueue_trial({"temperature": 0.5})
    study.optimize(lambda trial: -1.0, n_trials=2)  # of any value, and all or no layers known
    study.optimize(loss)
    assert [t.constraints["bops"] > 0 for t in study.trials[:3]] == [True] * 3
    assert share(answer(study)) <= 0.3
    assert sampler.finished(study)


def test_another_objective_in_a_study_of_ours_is_refused_and_not_run_for_ever(alone):
    """Its values are none of the search's, and the search's own objective goes on afterwards."""
    by = product.opened(network(), data(), budget="0.25 bops")
    study = by.open(None, "x", seed=0, n_candidates=3)
    with pytest.raises(RuntimeError, match="this study's HessianObjective did not compute"):
        study.optimize(lambda trial: -1.0)
    with pytest.raises(ValueError, match="which this objective did not call"):
        loop.work(study, lambda trial: -1.0)
    by.work(study)
    assert dict(by.result(study).config) == alone


def test_a_copied_study_goes_on_where_it_was_copied(tmp_path, alone):
    """`optuna.copy_study` while a candidate runs: in the copy nobody runs it."""
    copied = f"sqlite:///{tmp_path}/copy.db"

    def during(study: optuna.Study) -> None:
        storage, study_id = place_of(study)
        running = optuna.create_trial(
            state=TrialState.RUNNING, system_attrs=dict(study.trials[-1].system_attrs)
        )
        ticket = running.system_attrs["hq:ticket"]
        ticket |= {"worker": hq.protocol.worker_identity.worker_id(), "claim": 10**6}
        number = storage.create_new_trial(study_id, running)
        optuna.copy_study(
            from_study_name="x", from_storage=url(tmp_path), to_storage=copied, to_study_name="y"
        )
        storage.set_trial_state_values(number, TrialState.FAIL)

    search(network(), data(), storage=url(tmp_path), name="x", during=during)
    found = search(network(), data(), storage=copied, name="y")
    assert found.bits == alone
    assert TrialState.RUNNING not in [t.state for t in found.study.trials]


def test_trials_of_another_network_with_the_same_settings_do_not_count(tmp_path, alone):
    """Somebody joins two studies: same layers and settings, and other weights."""
    torch.manual_seed(7)
    other = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    theirs = search(other, data())
    rest = theirs.study.trials
    assert theirs.bits != alone
    found = search(
        network(), data(), storage=url(tmp_path), name="x", during=lambda s: s.add_trials(rest)
    )
    assert found.bits == alone


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_that_optunas_heartbeat_failed_is_retried(tmp_path, alone):
    """Its worker died; Optuna enqueues it again with the ticket, the bits and the constraint."""
    retry = RetryHeartbeatStaleTrialCallback(max_retry=1)
    storage = RDBStorage(
        url(tmp_path), heartbeat_interval=1, grace_period=1, heartbeat_stale_trial_callback=retry
    )
    by = parts()
    study = study_of(by, storage)
    study.optimize(by.objective, n_trials=6)
    asked = study.ask()
    study.tell(asked, state=TrialState.FAIL)
    retry(study, study.trials[asked.number])
    assert study.trials[-1].state == TrialState.WAITING
    study.optimize(by.objective)
    retried = study.trials[asked.number + 1]
    assert retried.state == TrialState.COMPLETE
    assert "bops" in retried.constraints
    assert share(answer(study)) <= 0.3
