"""What a candidate costs beside its scoring: ask and tell, held against Optuna's RandomSampler.

RandomSampler has one parameter per layer (20 and 60 layers) and runs in `optuna.Study.optimize`;
ours runs as workers run it (`ProgressiveBitSampler.ask`, four measured facts, `finish`) with the
encoding ``layers`` for 20 and ``compact`` for 60. Three studies take turns in one process on one
database (SQLite in WAL mode): ours with 100 trials, ours with 5,000 (scored in memory and written
in bulk), and RandomSampler's. Medians are compared; our trials that close steps are among ours.
Statements and commits say where the time goes; ``join_seconds`` is what a new worker takes from an
open storage to its first trial in the study of 5,000.

    python -m benchmarks.overhead [--postgresql URL] [--trials 5000] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import TrialState

from benchmarks.bulk import write_trials
from benchmarks.outcome import Outcome
from benchmarks.servers import own_postgresql
from hq_optuna.optuna_internals import database_of
from hq_optuna.protocol.claims import write_facts
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.storages import open_storage, sqlite_url
from tests.fake_search import fake_score, fake_space, fake_table

BITS = tuple(range(16, 0, -1))  # so that there are 5,000 candidates to try
ENCODINGS: dict[int, Any] = {20: "layers", 60: "compact"}
N_CANDIDATES = 64


class Counter:
    """Counts statements and commits of an engine."""

    def __init__(self, engine: sqlalchemy.Engine) -> None:
        self.statements = self.commits = 0
        sqlalchemy.event.listen(engine, "before_cursor_execute", self._statement)
        sqlalchemy.event.listen(engine, "commit", self._commit)

    def _statement(self, *_: Any) -> None:
        self.statements += 1

    def _commit(self, *_: Any) -> None:
        self.commits += 1


def ours(url: str | None, name: str, layers: int) -> tuple[optuna.Study, Callable[[], None]]:
    """Return a study and what runs one candidate of it."""
    space = fake_space(layers, bits=BITS, pin_first_last=None)
    table = fake_table(space)
    sampler = ProgressiveBitSampler(
        space, n_candidates=N_CANDIDATES, refine=False, encoding=ENCODINGS[layers]
    )
    study = optuna.create_study(study_name=name, storage=open_storage(url), sampler=sampler)

    def once() -> None:
        trial = sampler.ask(study)
        if trial is None:
            raise RuntimeError("the search is over: give it more candidates")
        ticket = sampler.ticket(study, trial)
        assert ticket is not None
        weights, activations = fake_score(table, space.config(ticket.bits))
        facts = {"score_weights": weights, "score_activations": activations}
        write_facts(trial, {**facts, "calibration_loss": 0.5, "seconds": 0.1})
        trial.finish(TrialState.COMPLETE, weights + activations)

    return study, once


def random(url: str, name: str, layers: int) -> tuple[optuna.Study, Callable[[], None]]:
    """Return a study of RandomSampler and what runs one trial of it."""
    study = optuna.create_study(
        study_name=name, storage=open_storage(url), sampler=optuna.samplers.RandomSampler(seed=0)
    )

    def objective(trial: optuna.Trial) -> float:
        return float(sum(trial.suggest_categorical(f"l{i}", BITS) for i in range(layers)))

    return study, lambda: study.optimize(objective, n_trials=1)


def measure(
    runs: dict[str, tuple[optuna.Study, Callable[[], None]]], repeats: int
) -> dict[str, dict[str, float]]:
    """Return milliseconds (median), statements and commits per trial; the two take turns."""
    counters = {}
    for name, (study, _) in runs.items():
        database = database_of(study._storage)
        assert database is not None
        counters[name] = Counter(database.engine)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (_, once) in runs.items():
            started = time.perf_counter()
            once()
            taken[name].append(time.perf_counter() - started)
    return {
        name: {
            "ms": round(1000 * statistics.median(taken[name]), 2),
            "statements": round(counters[name].statements / repeats, 1),
            "commits": round(counters[name].commits / repeats, 1),
        }
        for name in runs
    }


def fill(study: optuna.Study, layers: int, upto: int) -> None:
    """Continue our study to so many trials: scored in memory, written in bulk, untimed.

    What stands in the tables is what the trials one by one would have left there.
    """
    twin, once = ours(None, "twin", layers)
    for _ in range(upto):
        once()
    there = len(study.get_trials(deepcopy=False))
    write_trials(study, twin.get_trials(deepcopy=False)[there:])


def join(url: str, name: str, layers: int) -> float:
    """Return the seconds from an open storage to a worker's first trial in an existing study."""
    storage = open_storage(url)
    started = time.perf_counter()
    space = fake_space(layers, bits=BITS, pin_first_last=None)
    sampler = ProgressiveBitSampler(
        space, n_candidates=N_CANDIDATES, refine=False, encoding=ENCODINGS[layers]
    )
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    trial = sampler.ask(study)
    taken = time.perf_counter() - started
    if trial is not None:
        trial.finish(TrialState.FAIL)
    return taken


@contextlib.contextmanager
def place(kind: str, postgresql: str | None) -> Iterator[str]:
    """Give the URL of a database."""
    with contextlib.ExitStack() as stack:
        if kind == "sqlite":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            yield sqlite_url(Path(folder) / "overhead.db")
        else:
            yield postgresql or stack.enter_context(own_postgresql()).url


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgresql", help="URL; a server of its own is started without")
    parser.add_argument("--storages", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--layers", nargs="+", type=int, default=[20, 60])
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    first, last, repeats = 100, options.trials, options.repeats
    if options.quick:
        first, last, repeats = 5, 20, 5
    outcome = Outcome("overhead")
    growth = []
    for kind in options.storages:
        with place(kind, options.postgresql) as url:
            for layers in options.layers:
                names = {who: f"{who}-{layers}" for who in ("early", "late", "random")}
                early, late = (ours(url, names[who], layers) for who in ("early", "late"))
                fill(early[0], layers, first)
                fill(late[0], layers, last)
                # RandomSampler's cost does not grow with its study (and 5,000 trials of 60
                # parameters take long), so its study stays small: that is in its favour.
                runs = {
                    "early": early,
                    "late": late,
                    "random": random(url, names["random"], layers),
                }
                for _, once in runs.values():
                    once()  # reads what is there
                found = measure(runs, repeats)
                print(f"{kind}, {layers} layers: {found}", flush=True)
                ms = {who: found[who]["ms"] for who in runs}
                growth.append(ms["late"] / ms["early"])
                ratio = max(ms["early"], ms["late"]) / ms["random"]
                outcome.figures[f"ratio_to_random_{kind}_{layers}"] = round(ratio, 3)
                seconds = min(join(url, names["late"], layers) for _ in range(3))
                outcome.figures[f"join_seconds_{kind}_{layers}"] = round(seconds, 3)
                outcome.details[f"{kind}_{layers}"] = {**found, "growth": growth[-1]}
    outcome.figures["growth_5000_over_100"] = round(max(growth), 3)
    outcome.finish(options.out)


if __name__ == "__main__":
    main()
