"""Searches whose scores come from a table, for benchmarks of storages and workers: no PyTorch.

The history of such a search is a function of its settings, so any run is held against one worker
alone in memory, as text, byte for byte.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import Study
from optuna.trial import TrialState

from hq_optuna.protocol.claims import ClaimedTrial, write_facts
from hq_optuna.protocol.history import read_history
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.space.budget import Budget
from hq_optuna.storages import open_storage
from hq_optuna.workers.loop import work
from tests.fake_search import fake_score, fake_space, fake_study, fake_table

BUDGET = Budget.fraction(bops=0.25)
BITS = (8, 7, 6, 5, 4, 3, 2)


@dataclass(frozen=True)
class Search:
    """What a table search depends on.

    Attributes:
        layers: Layers of the network that is not there.
        n_candidates: Candidates a step.
        seed: Seed of the draws.
        encoding: Of the sampler.
    """

    layers: int = 12
    n_candidates: int = 8
    seed: int = 0
    encoding: Any = "layers"

    def sampler(self) -> ProgressiveBitSampler:
        """Return the sampler of this search."""
        return ProgressiveBitSampler(
            fake_space(self.layers, bits=BITS),
            budget=BUDGET,
            n_candidates=self.n_candidates,
            seed=self.seed,
            encoding=self.encoding,
        )

    def make(self, storage: BaseStorage, name: str) -> Study:
        """Create its study, without trials."""
        return fake_study(
            fake_space(self.layers, bits=BITS),
            budget=BUDGET,
            n_candidates=self.n_candidates,
            seed=self.seed,
            encoding=self.encoding,
            storage=storage,
            name=name,
            n_trials=0,
        )

    def told(self, study: Study) -> Told:
        """Return what a study of it says."""
        return tell(study)

    def alone(self) -> Told:
        """Return what one worker does alone in memory."""
        study = self.make(InMemoryStorage(), "alone")
        sampler = self.sampler()
        table = fake_table(sampler.space)
        study.sampler = sampler

        def objective(trial: optuna.Trial) -> float:
            ticket = sampler.ticket(study, trial)
            assert ticket is not None
            return sum(fake_score(table, sampler.space.config(ticket.bits)))

        work(study, objective)
        return tell(study)


@dataclass(frozen=True)
class Deaths:
    """Where a worker kills itself, as probabilities: places that a signal from outside rarely hits.

    Attributes:
        created: A trial was created and nothing done with it.
        scored: A candidate was scored, and not yet told.
        opening: All of a step is done; its record was created, which opens the next step.
        holding: In the middle of the step owner's work.
        recorded: The step's record was told, and nobody was told.
    """

    created: float = 0.0
    scored: float = 0.0
    opening: float = 0.0
    holding: float = 0.0
    recorded: float = 0.0


def run_worker(
    url: str, name: str, search: Search, seconds: float = 0.0, deaths: Deaths | None = None
) -> None:
    """Work on a study until it is over. A candidate and a record take about ``seconds`` each."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chance = random.Random(os.urandom(8))
    deaths = deaths or Deaths()

    def die(probability: float) -> None:
        if chance.random() < probability:
            os.kill(os.getpid(), signal.SIGKILL)

    sampler = search.sampler()
    study = optuna.load_study(study_name=name, storage=open_storage(url), sampler=sampler)
    table = fake_table(sampler.space)
    kinds: dict[int, str] = {}

    def objective(trial: optuna.Trial) -> float:
        ticket = sampler.ticket(study, trial)
        assert ticket is not None
        kinds[trial._trial_id] = ticket.kind
        record = ticket.kind == "incumbent"
        die(deaths.opening if record else deaths.created)
        time.sleep(seconds * chance.uniform(0.25, 0.75))
        die(deaths.holding if record else 0.0)
        time.sleep(seconds * chance.uniform(0.25, 0.75))
        weights, activations = fake_score(table, sampler.space.config(ticket.bits))
        facts = {"score_weights": weights, "score_activations": activations}
        write_facts(trial, {**facts, "calibration_loss": 0.5, "seconds": seconds})
        die(deaths.scored)
        return weights + activations

    finish = ClaimedTrial.finish

    def told(trial: ClaimedTrial, state: TrialState, value: float | None = None) -> None:
        finish(trial, state, value)
        die(deaths.recorded if kinds.pop(trial._trial_id, "") == "incumbent" else 0.0)

    ClaimedTrial.finish = told  # type: ignore[method-assign]
    work(study, objective)


@dataclass(frozen=True)
class Told:
    """What a study says of its search.

    Attributes:
        text: Steps and the answer, every number exactly.
        places: Candidates that count, as ``(step, slot)``.
        doubled: Candidates that count more than once.
        again: Candidates that were scored more than once, of which one counts.
        running: Trials that show as running.
    """

    text: str
    places: frozenset[tuple[int, int]]
    doubled: int
    again: int
    running: int


def tell(study: Study) -> Told:
    """Read a study as reports do."""
    history = read_history(study)
    counted = Counter((c.step, c.slot) for c in history.candidates if c.counted)
    steps = [
        {
            "step": record.step,
            "bits": {name: list(bits) for name, bits in record.config.items()},
            "score": record.winner.score.hex(),
            "cost": record.winner.cost,
            "candidates": [
                [c.slot, c.variable, list(c.state), c.score.hex()]
                for c in history.step(record.step)
            ],
            "winner": [record.winner.step, record.winner.slot],
        }
        for record in history.records
    ]
    return Told(
        json.dumps(steps, indent=0),
        frozenset(counted),
        sum(n - 1 for n in counted.values()),
        len(history.candidates) - len(counted),
        history.n_running,
    )
