"""Whole searches of a small network, for benchmarks of workers: preparation, steps, measured end.

A worker may be made slow, so that a signal finds it in the middle of a piece, a step or a finalist,
and may kill itself there. What a study then says is held against one worker that was left alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import optuna
import torch
from optuna.storages import BaseStorage
from optuna.study import Study
from torch import nn

from benchmarks.table_search import Told, tell
from hq_optuna import BitSearch, attributes
from hq_optuna.objective.preparation import Preparation
from hq_optuna.protocol.history import read_history
from hq_optuna.protocol.pieces import read_pieces
from hq_optuna.scoring import Scorer
from hq_optuna.storages import open_storage
from hq_optuna.workers import loop

Phase = Literal["preparation", "steps", "end"]


@dataclass(frozen=True)
class WholeSearch:
    """A search whose network, data and draws follow from a seed."""

    seed: int = 0
    samples: int = 128

    def search(self) -> BitSearch:
        """Return it, ready to open a study."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = nn.Sequential(
                *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
                *(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ReLU()),
                *(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)),
            ).eval()
        images = torch.randn(self.samples, 2, 6, 6, generator=generator)
        data = images, torch.arange(self.samples) % 5
        options = {"activation_bits": range(2, 9), "batch_size": 8, "pin_first_last": None}
        return BitSearch(network, data, budget="0.3 bops", seed=self.seed, **options)

    def make(self, storage: BaseStorage, name: str) -> Study:
        """Create its study, with nothing in it."""
        return optuna.create_study(storage=storage, study_name=name)

    def told(self, study: Study) -> Told:
        """Return what a study says, with the table's bytes and what finalists were measured at."""
        found = tell(study)
        stored = study._storage.get_study_system_attrs(study._study_id)
        table = attributes.join(attributes.SENSITIVITY, stored)
        measured = [(c.step, c.slot, c.rises) for c in read_history(study).candidates if c.counted]
        text = json.dumps([found.text, table, sorted(measured)])
        return Told(text, found.places, found.doubled, found.again, found.running)

    def alone(self) -> Told:
        """Return what one worker does alone in memory."""
        search = self.search()
        study = search.open()
        search.work(study)
        return self.told(study)


def phase_of(storage: BaseStorage, study_id: int) -> Phase:
    """Return where a search stands."""
    if attributes.INFO not in storage.get_study_user_attrs(study_id):
        return "preparation"
    trials = storage.get_all_trials(study_id, deepcopy=False)
    last = attributes.Ticket.read(trials[-1].system_attrs) if trials else None
    return "end" if last is not None and last.measures else "steps"


def progress_of(storage: BaseStorage, study_id: int) -> int:
    """Return a number that grows whenever somebody claims a piece or a trial, or ends one."""
    pieces = read_pieces(storage.get_study_system_attrs(study_id))
    return storage.get_n_trials(study_id) + sum(bool(p.worker) + p.done for p in pieces)


def run_whole_worker(
    url: str, name: str, search: WholeSearch, folder: str, seconds: float = 0.0, dies: float = 0.0
) -> None:
    """Work on a study until it is over; a piece, a step and a finalist take ``seconds`` more.

    With probability ``dies`` the worker kills itself within one of them.
    """
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chance = random.Random(os.urandom(8))

    def slow(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds * chance.uniform(0.25, 0.75))
            if chance.random() < dies:
                os.kill(os.getpid(), signal.SIGKILL)
            found = function(*args, **kwargs)
            time.sleep(seconds * chance.uniform(0.25, 0.75))
            if chance.random() < dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return run

    mine = search.search()
    with (
        mock.patch.object(Preparation, "_compute", slow(Preparation._compute)),
        mock.patch.object(loop, "write_step", slow(loop.write_step)),
        mock.patch.object(Scorer, "measured", slow(Scorer.measured)),
    ):
        study = mine.open(open_storage(url), name, artifacts=Path(folder))
        mine.work(study, pages=False)
