"""Trainings inside a search: one history, whoever trains and whoever dies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.optuna_internals import id_of, storage_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.history import read_history
from hq_optuna.search import Limits
from hq_optuna.storages import sqlite_url
from hq_optuna.workers.coordinator import Coordinator
from tests.searches import data
from tests.training_searches import log_of, plan, said, search


class Interrupt(Exception):
    pass


def test_killed_in_training_it_goes_on_from_its_last_epoch(alone, tmp_path, monkeypatch):
    """The first life ends after one of two epochs; nobody trains that epoch again."""
    from hq_optuna.objective import training_steps

    folder = tmp_path
    epochs: list[int] = []
    trainer = training_steps.Trainer

    class Counted(trainer):  # type: ignore[misc, valid-type]
        def _epoch(self) -> Any:
            found = super()._epoch()
            epochs.append(found.epoch)
            return found

    monkeypatch.setattr(training_steps, "Trainer", Counted)

    def start() -> optuna.Study:
        again = search(training=plan(), validation=data(30, 2))
        options = {} if epochs else {"progress": stop}
        url = sqlite_url(folder / "s.db")
        return again.optimize(url, "s", artifacts=folder / "artifacts", **options)

    def stop(what: str, done: int, of: int) -> None:
        if what == "training" and len(epochs) >= 2:  # in the second epoch's wake
            raise Interrupt

    original = training_steps.TrainedSteps.train

    def dies(self: Any, *arguments: Any, **options: Any) -> Any:
        def needed() -> bool:
            if len(epochs) == 1:
                raise Interrupt
            return True

        return original(self, *arguments[:4], needed, **options)

    monkeypatch.setattr(training_steps.TrainedSteps, "train", dies)
    with pytest.raises(Interrupt):
        start()
    monkeypatch.setattr(training_steps.TrainedSteps, "train", original)
    assert epochs == [1]
    study = start()
    assert epochs[:2] == [1, 2]  # and not 1 again
    assert said(study) == said(alone[1])
    n_trained = sum(r.training is not None for r in read_history(study).records)
    assert len(epochs) == 2 * n_trained
    # Checkpoints are gone when they are not needed any more.
    kept = {
        record.training[name]["id"]
        for record in read_history(study).records
        if record.trained is not None
        for name in ("weights", "sensitivity")
    }
    kept |= {meta.artifact_id for meta in optuna.artifacts.get_all_artifact_meta(study)}
    system = storage_of(study).get_study_system_attrs(id_of(study))
    pieces = [told for key, told in system.items() if key.startswith(f"{attributes.PIECE}:")]
    kept |= {told["result"]["id"] for told in pieces}
    assert {path.name for path in (folder / "artifacts").iterdir()} == kept


TORCH = threading.Lock()
"""`torch.fx` traces one network at a time in a process; real workers are processes of their own."""


class RemoteWorker(threading.Thread):
    """A coordinator's worker, as a thread with an objective of its own."""

    def __init__(self, coordinator: Coordinator, folder: Path, every: int) -> None:
        super().__init__(daemon=True)
        self.coordinator, self.folder, self.every = coordinator, folder, every
        self.orders: list[Mapping[str, Any]] = []
        self.news = threading.Semaphore(0)
        self.did: list[str] = []
        self.error: BaseException | None = None
        self.start()

    def send(self, order: Mapping[str, Any]) -> None:
        if "cancel" not in order:
            self.orders.append(json.loads(json.dumps(order)))
            self.news.release()

    def run(self) -> None:
        try:
            with TORCH:
                mine = search(training=plan(every=self.every), validation=data(30, 2))
                url = sqlite_url(self.folder / "s.db")
                study = mine.open(url, "s", artifacts=self.folder / "artifacts")
            self.coordinator.receive(self, {"event": "ready"})
            while True:
                self.news.acquire()
                order = self.orders.pop(0)
                if order.get("end"):
                    return
                self.did.append("trained" if "train" in order else "scored")
                with TORCH:
                    value, facts = mine.objective.obey(study, order, lambda: True)
                event = {"event": "scored", "claim": order["claim"], "value": value}
                self.coordinator.receive(self, json.loads(json.dumps({**event, "facts": facts})))
        except BaseException as error:
            self.error = error
            self.coordinator.receive(self, None)


@pytest.mark.parametrize("every", [0, 1, 2])  # 0: the answer alone
def test_a_coordinators_workers_train_once_and_the_history_is_the_same(every, tmp_path):
    alone = search(training=plan(every=every), validation=data(30, 2))
    expected = said(alone.optimize(artifacts=tmp_path / "alone"))
    leader = search(training=plan(every=every), validation=data(30, 2))
    study = leader.open(sqlite_url(tmp_path / "s.db"), "s", artifacts=tmp_path / "artifacts")
    coordinator = Coordinator(study)
    workers = [RemoteWorker(coordinator, tmp_path, every) for _ in range(2)]
    deadline = time.monotonic() + 120
    while coordinator.poll(0.05):
        assert time.monotonic() < deadline
        assert [worker.error for worker in workers] == [None, None]
    assert said(study) == expected
    n_trained = sum(r.training is not None for r in read_history(study).records)
    assert sum(worker.did.count("trained") for worker in workers) == n_trained
    assert {t.state for t in study.get_trials()} == {TrialState.COMPLETE}


def test_another_worker_takes_the_training_over(alone, tmp_path, monkeypatch):
    """A dead worker's checkpoint is of use to a worker of another name."""
    from hq_optuna.objective import training_steps

    first = search(training=plan(), validation=data(30, 2))
    url, store = sqlite_url(tmp_path / "s.db"), tmp_path / "artifacts"
    original = training_steps.TrainedSteps.train

    def dies(self: Any, *arguments: Any, **options: Any) -> Any:
        def needed() -> bool:
            raise SystemExit  # the trial is given back; its checkpoint stays

        return original(self, *arguments[:4], needed, **options)

    monkeypatch.setattr(training_steps.TrainedSteps, "train", dies)
    with pytest.raises(SystemExit):
        first.optimize(url, "s", artifacts=store)
    monkeypatch.setattr(training_steps.TrainedSteps, "train", original)
    monkeypatch.setattr(worker_identity, "worker_id", lambda: "elsewhere/1/2/3")
    study = search(training=plan(), validation=data(30, 2)).optimize(url, "s", artifacts=store)
    assert said(study) == said(alone[1])


def test_a_limit_ends_a_training_after_its_epoch_and_a_raised_one_goes_on(alone, tmp_path):
    url, store = sqlite_url(tmp_path / "s.db"), tmp_path / "artifacts"
    limited = search(training=plan(), validation=data(30, 2))
    seen: list[int] = []

    def progress(what: str, done: int, of: int) -> None:
        if what == "training" and not seen:
            seen.append(done)
            spent = Limits(max_seconds=log_of(study).seconds / 2)  # by the first training
            study.set_user_attr(attributes.LIMITS, spent.to_json())
            log_of(study).limit(spent)

    study = limited.open(url, "s", artifacts=store, progress=progress)
    limited.work(study)
    assert "--max-seconds" in log_of(study).stopped_by
    (ended,) = [t for t in study.get_trials() if t.state == TrialState.PRUNED]
    assert attributes.CHECKPOINT in ended.system_attrs  # of its first epoch; the second never began
    assert TrialState.RUNNING not in {t.state for t in study.get_trials()}
    again = search(training=plan(), validation=data(30, 2))
    study = again.optimize(url, "s", artifacts=store, limits=Limits(max_seconds=1e6))
    assert said(study) == said(alone[1])
