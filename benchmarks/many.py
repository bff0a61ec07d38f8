"""The same history with 1, 2, 4, 8 and 16 workers on every storage, scored from a table.

PostgreSQL is a server of the benchmark's own, and the gRPC proxy stands before it; MariaDB or MySQL
is used where ``--mysql`` names a server, in a database that is made and dropped.

    python -m benchmarks.many [--mysql URL] [--workers 1 2 4 8 16] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna

from benchmarks.servers import own_postgresql
from benchmarks.table_search import Search, run_worker
from hq_optuna.storages import open_storage, sqlite_url
from tests.servers import database, proxy

KINDS = ("sqlite", "postgresql", "mysql", "journal", "grpc")


@contextlib.contextmanager
def place(kind: str, mysql: str | None) -> Iterator[str]:
    """Give the URL of a storage."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if kind == "sqlite":
            yield sqlite_url(folder / "many.db")
        elif kind == "journal":
            yield f"journal:///{(folder / 'many.log').as_posix()}"
        elif kind == "mysql":
            assert mysql is not None
            yield stack.enter_context(database(mysql))
        else:
            url = stack.enter_context(own_postgresql()).url
            yield url if kind == "postgresql" else stack.enter_context(proxy(url))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mysql", help="URL of a server")
    parser.add_argument("--storages", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.01, help="time of a candidate")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    search, workers = Search(layers=options.layers), options.workers
    if options.quick:
        search, workers = Search(layers=5, n_candidates=4), [2]
    alone = search.alone()
    from benchmarks.outcome import Outcome

    outcome = Outcome("many")
    # Forked from a process that has imported everything: a new worker is there at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.many", "benchmarks.table_search"])
    for kind in options.storages:
        if kind == "mysql" and options.mysql is None:
            print("mysql: skipped, give --mysql URL")
            continue
        same, again = 1, 0
        with place(kind, options.mysql) as url:
            for n in workers:
                name, started = f"many-{n}", time.perf_counter()
                search.make(open_storage(url), name)
                arguments = (url, name, search, options.seconds)
                processes = [context.Process(target=run_worker, args=arguments) for _ in range(n)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
                told = search.told(optuna.load_study(study_name=name, storage=open_storage(url)))
                found = {
                    "same_history": int(told.text.encode() == alone.text.encode()),
                    "evaluated_again": told.again,
                    "ended_well": sum(process.exitcode == 0 for process in processes),
                    "seconds": round(time.perf_counter() - started, 1),
                }
                same &= found["same_history"] and int(found["ended_well"] == n)
                again += told.again
                outcome.details[f"{kind}_{n}"] = found
                print(f"{kind}, {n} workers: {found}", flush=True)
        outcome.figures[f"same_history_{kind}"] = same
        outcome.figures[f"evaluated_again_{kind}"] = again
    outcome.finish(options.out)


if __name__ == "__main__":
    main()
