"""Workers that are killed again and again have the history of one that was left alone.

Four workers score from a table. A driver kills random ones with SIGKILL at random moments; others
kill themselves where that is hard to hit from outside: between the trial and its work, between the
score and its end, when a step's record was just created, within the step owner's work, and after
it. Whoever is dead is started again. When a study is over before the kills are, the next one
follows, with another seed. PostgreSQL is a server of the benchmark's own, and is stopped hard and
started again once in the middle.

Then, or with ``--whole`` only, the same of whole searches of a small network, whose workers are
killed while they prepare, in steps, and at the measured end: ``whole_kills_STORAGE``,
``whole_same_history_STORAGE`` (the table's bytes and what finalists were measured at included), and
in the details how many kills struck in which phase.

    python -m benchmarks.chaos [--kills 200] [--storages sqlite postgresql] [--quick] [--out FILE]
    python -m benchmarks.chaos --whole [--kills 100]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError

from benchmarks.servers import own_postgresql
from benchmarks.table_search import Deaths, Search, Told, run_worker
from benchmarks.whole_workers import WholeSearch, phase_of, progress_of, run_whole_worker
from hq_optuna.storages import open_storage, sqlite_url

DEATHS = Deaths(created=0.01, scored=0.01, opening=0.05, holding=0.05, recorded=0.05)
N_WORKERS = 4


class Driver:
    """Keeps workers running on a study, and kills them.

    Attributes:
        kills: How many died by SIGKILL, from outside or by their own hand.
        errors: How many ended with an error, as when their server was restarted.
        phases: Kills by the phase of the search that they struck in, where a search has phases.
    """

    def __init__(self, rng: random.Random, seconds: float) -> None:
        self.kills = self.errors = 0
        self.phases = Counter[str]()
        self._rng, self._seconds = rng, seconds
        # Forked from a process that has imported everything: a new worker is there at once.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.chaos", "benchmarks.table_search"])

    def run(self, url: str, name: str, search: Any, until: int, event: Callable[[], None]) -> None:
        """Run a study to its end; call ``event`` once, some kills later."""
        self._url, self._name, self._search = url, name, search
        self._storage, self._n_trials = open_storage(url), 0
        self._study_id = self._storage.get_study_id_from_name(name)
        workers = [self._start() for _ in range(N_WORKERS)]
        after: int | None = self.kills + max(3, (until - self.kills) // 3)
        while workers:
            workers = [new for worker in workers if (new := self._look_after(worker)) is not None]
            if after is not None and self.kills >= after:
                event()
                after = None
            if workers and self.kills < until:
                self._wait_for_progress(workers)
                time.sleep(self._rng.expovariate(1 / self._seconds))
                victim = self._rng.choice(workers)
                if victim.is_alive() and self._may_kill(until):
                    victim.kill()
            else:
                time.sleep(0.02)

    def _may_kill(self, until: int) -> bool:
        """Return whether a kill is of use now, of so many in all."""
        return True

    def _wait_for_progress(self, workers: list[Any]) -> None:
        """Wait until somebody claimed something: a death before any work shows little."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and all(worker.is_alive() for worker in workers):
            with contextlib.suppress(OptunaError):  # while the server starts again
                n = self._storage.get_n_trials(self._study_id)
                if n > self._n_trials:
                    self._n_trials = n
                    return
            time.sleep(0.02)

    def _start(self) -> Any:
        deaths = DEATHS if self._rng.random() < 0.5 else None
        arguments = (self._url, self._name, self._search, self._seconds, deaths)
        worker = self._context.Process(target=run_worker, args=arguments)
        worker.start()
        return worker

    def _look_after(self, worker: Any) -> Any:
        """Return a worker, a new one in its place, or ``None`` when it found the search over."""
        if worker.is_alive():
            return worker
        worker.join()
        if worker.exitcode == 0:
            return None
        if worker.exitcode == -signal.SIGKILL:
            self.kills += 1
        else:
            self.errors += 1
            time.sleep(0.2)
        return self._start()


class WholeDriver(Driver):
    """Keeps workers of whole searches running, and kills them."""

    def __init__(self, rng: random.Random, seconds: float, folder: Path) -> None:
        super().__init__(rng, seconds)
        self._folder = folder
        self._context.set_forkserver_preload(["benchmarks.whole_workers"])

    def _wait_for_progress(self, workers: list[Any]) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and all(worker.is_alive() for worker in workers):
            with contextlib.suppress(OptunaError):
                n = progress_of(self._storage, self._study_id)
                if n != self._n_trials:
                    self._n_trials = n
                    return
            time.sleep(0.02)

    def _may_kill(self, until: int) -> bool:
        """Kill about as often in each phase: a search that never gets on shows one of them only."""
        with contextlib.suppress(OptunaError):
            return self.phases[phase_of(self._storage, self._study_id)] < until / 3
        return True

    def _start(self) -> Any:
        dies = 0.05 if self._rng.random() < 0.5 else 0.0
        arguments = (self._url, self._name, self._search, str(self._folder), self._seconds, dies)
        worker = self._context.Process(target=run_whole_worker, args=arguments)
        worker.start()
        return worker

    def _look_after(self, worker: Any) -> Any:
        before = self.kills
        found = super()._look_after(worker)
        if self.kills > before:
            with contextlib.suppress(OptunaError):
                self.phases[phase_of(self._storage, self._study_id)] += 1
        return found


@contextlib.contextmanager
def place(kind: str, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Give a storage, and what happens to it in the middle."""
    if kind == "sqlite":
        yield sqlite_url(folder / "chaos.db"), lambda: None
    else:
        with own_postgresql() as server:
            yield server.url, server.restart


def differences(mine: Told, alone: Told) -> dict[str, int]:
    """Return what was lost, what counts twice, and whether the history is the same."""
    return {
        "lost": len(alone.places - mine.places),
        "doubled": mine.doubled + len(mine.places - alone.places),
        "same_history": int(mine.text.encode() == alone.text.encode()),
    }


def torment(
    kind: str,
    kills: int,
    driver_in: Callable[[Path], Driver],
    search_of: Callable[[int], Search | WholeSearch],
) -> dict[str, Any]:
    """Run studies on one storage until enough workers were killed; return the figures.

    Args:
        kind: Which storage.
        kills: How many workers are to die.
        driver_in: Makes the driver, given a folder for files.
        search_of: Makes the search of a study, given its number.
    """
    total: dict[str, Any] = {"lost": 0, "doubled": 0, "same_history": 1, "again": 0, "running": 0}
    studies = restarts = 0
    with tempfile.TemporaryDirectory() as folder, place(kind, Path(folder)) as (url, restart):
        driver = driver_in(Path(folder))
        while driver.kills < kills:
            search, name = search_of(studies), f"chaos-{studies}"
            search.make(open_storage(url), name)

            def event() -> None:
                nonlocal restarts
                if restarts == 0:
                    restarts += 1
                    restart()

            driver.run(url, name, search, kills, event)
            told = search.told(optuna.load_study(study_name=name, storage=open_storage(url)))
            found = differences(told, search.alone())
            for key in ("lost", "doubled"):
                total[key] += found[key]
            total["same_history"] &= found["same_history"]
            total["again"] += told.again
            total["running"] += told.running
            studies += 1
            print(f"{kind} {name}: {driver.kills} kills, {found}", flush=True)
    counts = {"kills": driver.kills, "studies": studies, "errors": driver.errors}
    return {**total, **counts, **driver.phases}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--storages", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--seconds", type=float, default=0.1, help="time of a candidate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", action="store_true", help="whole searches only")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from benchmarks.outcome import Outcome

    outcome = Outcome("chaos")
    kills, seconds, layers = options.kills, options.seconds, 12
    if options.quick:
        kills, seconds, layers = min(kills, 6), 0.03, 6

    def report(kind: str, found: dict[str, Any], prefix: str = "") -> None:
        for figure in ("kills", "lost", "doubled", "same_history"):
            outcome.figures[f"{prefix}{figure}_{kind}"] = found[figure]
        outcome.details[f"{prefix}{kind}"] = found
        print(f"{prefix}{kind}: {found}", flush=True)

    def rng() -> random.Random:
        return random.Random(options.seed)

    for kind in [] if options.whole else options.storages:
        found = torment(
            kind,
            kills,
            lambda _: Driver(rng(), seconds),
            lambda n: Search(layers=layers, seed=options.seed + n),
        )
        report(kind, found)
    for kind in options.storages:
        found = torment(
            kind,
            min(kills, 2) if options.quick else kills,
            lambda folder: WholeDriver(rng(), 3 * seconds, folder / "files"),
            lambda n: WholeSearch(options.seed + n),
        )
        report(kind, found, "whole_")
    outcome.finish(options.out)


if __name__ == "__main__":
    main()
