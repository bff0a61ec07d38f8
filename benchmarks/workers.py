"""How much several workers get done, against one.

Two questions, each answered within one run:

- ``sleep``: many workers on one PostgreSQL (a server of the benchmark's own), scoring replaced by a
  sleep. Ideal are as many candidates a second as workers sleep in turn; what is missing went to the
  storage, to waiting at the ends of steps, and to the processor, which 32 processes share. Seconds
  of the processor per candidate, workers and server together, are measured too: on few cores they
  are the bound. Once with a launcher's coordinator, which claims for all, and once with workers
  that each claim for themselves (``direct``), as those of ``hq-optuna worker`` do.
- ``scoring``: a network scored for real by ``hq-optuna launch`` with one and with two workers of
  one thread each: digits, and ResNet-20 with ``--data`` and ``--checkpoint``. Pairs of runs follow
  each other; the median of the ratios counts. On a busy machine two processes do not get two
  cores, so what two processes of plain arithmetic get done is measured right before and right after
  each pair, and pairs are repeated, up to four times as often as asked, until ``--repeat`` of them
  had two cores (1.9 to 2.1 times one process, before and after). ``pairs_…`` says how many had; the
  others are in the details, and count where none had.

    python -m benchmarks.workers [--parts sleep scoring] [--studies digits resnet20]
        [--data DIR --checkpoint FILE]
        [--workers 32] [--candidates 64] [--seconds 0.2] [--steps 6] [--repeat 3] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna

from benchmarks.servers import OwnPostgreSQL, own_postgresql
from benchmarks.table_search import Search
from hq_optuna.protocol.claims import write_facts
from hq_optuna.protocol.history import read_history
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.storages import open_storage, sqlite_url
from hq_optuna.workers.coordinator import Coordinator
from hq_optuna.workers.loop import work
from hq_optuna.workers.process import WorkerProcess
from tests.fake_search import fake_score, fake_table

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def sleeper(
    url: str, name: str, search: Search, seconds: float, limit: int, start: Any, spent: Any
) -> None:
    """Work on a study whose candidates take a sleep each; put the processor's seconds there."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = search.sampler()
    study = optuna.load_study(study_name=name, storage=open_storage(url), sampler=sampler)
    table = fake_table(sampler.space)

    def objective(trial: optuna.Trial) -> float:
        ticket = sampler.ticket(study, trial)
        assert ticket is not None
        if ticket.kind == "candidate":
            time.sleep(seconds)
        weights, activations = fake_score(table, sampler.space.config(ticket.bits))
        write_facts(trial, {"score_weights": weights, "score_activations": activations})
        return weights + activations

    sampler.log(study)
    start.wait()
    used = resource.getrusage(resource.RUSAGE_SELF)
    work(study, objective)
    now = resource.getrusage(resource.RUSAGE_SELF)
    spent.put(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)


def machine_seconds() -> float:
    """Return the seconds all processors of the machine were busy, since it was started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _wait, *rest = (int(field) for field in fields)
    return (user + nice + system + sum(rest[:2])) / os.sysconf("SC_CLK_TCK")


def led(
    url: str, n_workers: int, search: Search, seconds: float, limit: int, name: str
) -> tuple[float, float]:
    """Run a study with a coordinator; return seconds of the processor: its own, and of all."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = search.sampler()
    study = optuna.load_study(study_name=name, storage=open_storage(url), sampler=sampler)
    coordinator = Coordinator(study)
    command = [sys.executable, "-m", "benchmarks.sleeping_worker", str(seconds), str(search.layers)]
    workers = [WorkerProcess(command, os.environ, coordinator.receive) for _ in range(n_workers)]
    while len(coordinator.dispatcher) < n_workers:  # as the barrier of the others
        time.sleep(0.05)
    used, busy = resource.getrusage(resource.RUSAGE_SELF), machine_seconds()
    while coordinator.poll(0.2):
        pass
    now = resource.getrusage(resource.RUSAGE_SELF)
    mine = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    busy = machine_seconds() - busy
    for worker in workers:
        worker.close()
    return mine, busy


def sleeping(
    server: OwnPostgreSQL,
    n_workers: int,
    search: Search,
    seconds: float,
    n_steps: int,
    name: str,
    coordinator: bool,
) -> dict[str, float]:
    """Run some steps and return what was reached.

    The first step has one candidate, whatever the number of workers, and does not count.
    """
    limit = 1 + n_steps * search.n_candidates
    study = search.make(open_storage(server.url), name)
    study.set_user_attr("hq:limits", {"max_evaluations": limit})
    if coordinator:
        used, busy = led(server.url, n_workers, search, seconds, limit, name)
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.table_search"])
        start, spent = context.Barrier(n_workers + 1), context.Queue()
        arguments = (server.url, name, search, seconds, limit, start, spent)
        processes = [context.Process(target=sleeper, args=arguments) for _ in range(n_workers)]
        for process in processes:
            process.start()
        start.wait()
        busy = machine_seconds()
        for process in processes:
            process.join()
        busy = machine_seconds() - busy
        used = sum(spent.get() for _ in processes)
    trials = [t for t in study.get_trials(deepcopy=False) if t.datetime_complete is not None]
    ended = sorted(t.datetime_complete for t in trials if t.datetime_complete is not None)
    first = trials[1].datetime_complete  # the record of the start
    assert first is not None
    taken = (ended[-1] - first).total_seconds()
    sampler = study.sampler
    assert isinstance(sampler, ProgressiveBitSampler)
    log = sampler.log(study)
    n = len(log.results) - 1
    sizes = [sum(1 for step, _ in log.results if step == s) for s in range(1, len(log.closed))]
    ideal = sum(-(-size // n_workers) for size in sizes) * seconds
    return {
        "efficiency": ideal / taken,
        "candidates": n,
        "steps": len(sizes),
        "seconds": taken,
        "ideal_seconds": ideal,
        "worker_processor_ms": 1000 * used / n,
        "machine_processor_ms": 1000 * busy / n,
        "trials_not_needed": sum(t.state != optuna.trial.TrialState.COMPLETE for t in trials),
    }


def arithmetic(seconds: float, counted: Any) -> None:
    """Count what one process of plain arithmetic gets done."""
    until, n = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        sum(range(10_000))
        n += 1
    counted.put(n)


def cores_reached(seconds: float) -> float:
    """Return how much more two processes of plain arithmetic get done than one, right now."""
    context = multiprocessing.get_context("forkserver")
    counts = []
    for n in (1, 2):
        counted = context.Queue()
        processes = [context.Process(target=arithmetic, args=(seconds, counted)) for _ in range(n)]
        for process in processes:
            process.start()
        counts.append(sum(counted.get() for _ in processes))
        for process in processes:
            process.join()
    return counts[1] / counts[0]


def launched(n_workers: int, n_evaluations: int, study: list[str], folder: Path) -> float:
    """Return candidates a second of ``hq-optuna launch``, once every worker is at work."""
    with tempfile.TemporaryDirectory() as place:
        url = sqlite_url(Path(place) / "workers.db")
        subprocess.run(
            [
                *(sys.executable, "-m", "hq_optuna", "launch", *study, "--name", "s"),
                *("--workers", str(n_workers), "--threads", "1", "--candidates", "32", "--json"),
                *("--storage", url, "--folder", str(folder), "--artifacts", place),
                *("--max-evaluations", str(n_evaluations)),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        history = read_history(optuna.load_study(study_name="s", storage=url))
        ended: dict[str, list[float]] = {}
        for run in history.runs:
            if run.ended is not None and run.counted and run.kind == "candidate":
                ended.setdefault(run.worker, []).append(run.ended.timestamp())
        since = max(min(times) for times in ended.values())
        later = [t for times in ended.values() for t in times if t > since]
        assert len(ended) == n_workers
        return len(later) / (max(later) - since)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--parts", nargs="+", default=["sleep", "scoring"])
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--studies", nargs="+", default=["digits", "resnet20"], help="for scoring")
    parser.add_argument("--data", type=Path, help="CIFAR-10, for the ResNet-20")
    parser.add_argument("--checkpoint", type=Path, help="of the ResNet-20")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.workers, options.candidates, options.seconds = 2, 4, 0.05
        options.steps, options.repeat = 2, 1
    for name in THREADS:  # before any process is started
        os.environ[name] = "1"
    from benchmarks.outcome import Outcome

    outcome = Outcome("workers")
    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    if "sleep" in options.parts:
        # More layers than candidates: a step has no more candidates than there are moves.
        layers = options.candidates + options.candidates // 4 + 2
        search = Search(layers=layers, n_candidates=options.candidates, encoding="compact")
        with own_postgresql() as server:
            for repeat in range(options.repeat):
                for kind in ("coordinator", "direct"):
                    arguments = (options.workers, search, options.seconds, options.steps)
                    name = f"{kind}_{repeat}"
                    found = sleeping(server, *arguments, name, kind == "coordinator")
                    details[name] = found
                    print(f"{options.workers} workers, {kind}: {found}", flush=True)
        for kind, suffix in (("coordinator", ""), ("direct", "_direct")):
            runs = [details[f"{kind}_{repeat}"] for repeat in range(options.repeat)]
            for key, what in (
                (f"efficiency_{options.workers}", "efficiency"),
                ("machine_processor_ms", "machine_processor_ms"),
            ):
                figures[key + suffix] = statistics.median(run[what] for run in runs)
    if "scoring" in options.parts:
        studies, seconds = {"digits": (["digits"], 320)}, 0.5 if options.quick else 3
        if options.data is not None:
            data = ["--data", str(options.data.absolute())]
            data += ["--checkpoint", str(options.checkpoint.absolute())]
            studies["resnet20"] = (["cifar10_resnet20", *data], 160)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(Path(__file__).parents[1]):
            for study, (arguments, n) in studies.items():
                if study not in options.studies:
                    continue
                ratios, disturbed = [], []
                before = cores_reached(seconds)
                for repeat in range(1 if options.quick else 4 * options.repeat):
                    limit = 33 if options.quick else n + 1
                    one, two = (launched(k, limit, arguments, Path(folder)) for k in (1, 2))
                    cores = (before, after := cores_reached(seconds))
                    before = after
                    quiet = all(abs(reached - 2) <= 0.1 for reached in cores)
                    (ratios if quiet else disturbed).append(two / one)
                    details[f"{study}_{repeat}"] = {"one": one, "two": two, "cores": cores}
                    print(
                        f"{study}: candidates a second: {one:.2f} by one worker, {two:.2f} by two "
                        f"({two / one:.2f} times); plain arithmetic {cores[0]:.2f} times before, "
                        f"{cores[1]:.2f} after",
                        flush=True,
                    )
                    if len(ratios) == options.repeat:
                        break
                figures[f"speedup_2_{study}"] = statistics.median(ratios or disturbed)
                figures[f"pairs_{study}"] = len(ratios)
    outcome.figures, outcome.details = figures, details
    outcome.finish(options.out)


if __name__ == "__main__":
    main()
