"""Whether the time left that a search shows is right, from its preparation to the last finalist.

A search is run as `hq-optuna run` does, and its remaining time noted at each sign of progress.
``within_third_NETWORK``: of the time from the first tenth of a search to its last, the share in
which what was shown is within a third of what it really took. ``median_error_NETWORK``: the median
of how much it is off, as a share.

    python -m benchmarks.progress [--networks digits resnet20] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from benchmarks.outcome import Outcome
from benchmarks.zoo import ZOO, Trained, data_folder, load_trained
from hq_optuna import BitSearch
from hq_optuna.cli.progress import SearchProgress
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.storages import sqlite_url


class Look(NamedTuple):
    """What was shown: seconds since the beginning, and seconds left."""

    at: float
    left: float


def looks(trained: Trained, folder: Path) -> tuple[list[Look], float]:
    """Run a search, and return what it showed, and how long it took."""
    search = BitSearch(trained.network, trained.calibration, activation_bits=range(2, 9))
    found: list[Look] = []
    quiet = Console(file=io.StringIO())
    began = time.monotonic()
    progress = SearchProgress(
        quiet, search.space, search.budget, by_table=search.objective.verifies
    )

    def note() -> None:
        if progress.pace.left_s is not None:
            found.append(Look(time.monotonic() - began, progress.pace.left_s))

    def phase(what: str, done: int, of: int) -> None:
        progress.phase(what, done, of)
        note()

    def steps(log: StepLog) -> None:
        progress.search(log)
        note()

    study = search.open(
        sqlite_url(folder / "s.db"), "s", artifacts=folder / "files", progress=phase
    )
    search.work(study, on_progress=steps, pages=False)
    return found, time.monotonic() - began


def judged(found: Sequence[Look], whole_s: float) -> tuple[float, float]:
    """Return the share of the time in which the time left is within a third, and its median error.

    Example:
        >>> judged([Look(1.0, 9.0), Look(5.0, 10.0)], 10.0)  # from 1 s to 9 s, at hundred moments
        (0.5, 0.5)
    """
    errors = []
    for i in range(100):
        now = whole_s * (0.1 + 0.8 * i / 100)
        seen = [look for look in found if look.at <= now]
        left = max(seen[-1].left - (now - seen[-1].at), 0.0) if seen else 0.0
        errors.append(abs(left / (whole_s - now) - 1))
    within = sum(error <= 1 / 3 for error in errors) / len(errors)
    return within, statistics.median(errors)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(ZOO), default=["digits", "resnet20"])
    parser.add_argument("--data", type=Path, default=data_folder(), help="the shared data")
    parser.add_argument("--quick", action="store_true", help="the digits alone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    outcome = Outcome("progress")
    for name in ["digits"] if arguments.quick else arguments.networks:
        with tempfile.TemporaryDirectory() as folder:
            found, whole_s = looks(load_trained(name, arguments.data), Path(folder))
        within, error = judged(found, whole_s)
        outcome.figures[f"within_third_{name}"] = round(within, 3)
        outcome.figures[f"median_error_{name}"] = round(error, 3)
        outcome.details[name] = {"seconds": whole_s, "looks": [list(look) for look in found[:400]]}
        print(f"{name}: {whole_s:.1f} s, within a third {within:.0%}, median error {error:.0%}")
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
