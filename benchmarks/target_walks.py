"""How to walk down the optima of a table towards a target: tests, cost, and how often it holds.

    python -m benchmarks.target_walks [--data DIR] [--quick] [--out FILE]

All optima of the row that `hq_optuna.answer.target` walks down are run on all unseen samples once.
Then each way of walking is tried on 200 splits of them, half for validation and half for test: how
many optima it tests, what its answers cost (geometric mean, of all-8-bit), and in how many splits
they are within the target on the test half.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray

from benchmarks.costs import Targets
from benchmarks.outcome import Outcome
from benchmarks.zoo import data_folder
from hq_optuna.answer.intervals import paired
from hq_optuna.answer.target import N_POINTS

SPLITS = 200
ALLOWED = 0.02, 0.03

Holds = Callable[[int], bool]
"""From a place in the row: whether a test says that it is within the target."""

Way = Callable[[Holds, int], int | None]
"""From tests and the length of the row to the answer's place; ``None`` where nothing holds."""


def walks(*strides: int) -> Way:
    """Return walks with ever shorter strides, each from where the one before it ended."""

    def way(holds: Holds, n: int) -> int | None:
        at, end = 0, n
        if not holds(at):
            return None
        for stride in strides:
            while at + stride < end and holds(at + stride):
                at += stride
            end = min(at + stride, end)
        return at

    return way


def bisection(holds: Holds, n: int) -> int | None:
    """Halve the row."""
    low, high = -1, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low if low >= 0 else None


WAYS: dict[str, tuple[Way, float]] = {
    "walks 8, 1": (walks(8, 1), 0.05 / 2),
    "walks 32, 8, 2": (walks(32, 8, 2), 0.05 / 3),
    "walks 32, 8, 2, 1": (walks(32, 8, 2, 1), 0.05 / 4),
    "walks 20, 5, 1": (walks(20, 5, 1), 0.05 / 3),
    "walks 20, 4": (walks(20, 4), 0.05 / 2),
    "bisection": (bisection, 0.05 / 2),
    "bisection, corrected for 7 tests": (bisection, 0.05 / 7),
}
"""Ways with the one-sided error of each of their tests."""


class Row:
    """Which unseen samples each optimum of a network's row loses and gains, the dearest first."""

    def __init__(self, name: str, data: Path) -> None:
        targets = Targets(name, data)
        points = targets.sums.frontier(n=N_POINTS)[::-1]
        right = torch.stack([targets.right(point.config) for point in points]).numpy()
        before = targets.float_right.numpy()
        self.costs = [point.cost / targets.sums.model.int8 for point in points]
        self.lost: NDArray[Any] = before & ~right
        self.gained: NDArray[Any] = ~before & right

    def counts(self, place: int, samples: Sequence[int]) -> tuple[int, int]:
        """Return how many samples an optimum loses and gains."""
        return int(self.lost[place, samples].sum()), int(self.gained[place, samples].sum())

    def tried(self, way: Way, error: float, allowed: float, splits: int) -> dict[str, Any]:
        """Try a way on splits."""
        tests, costs, held = [], [], 0
        for seed in range(splits):
            order = np.random.default_rng(seed).permutation(self.lost.shape[1]).tolist()
            validation, test = order[: len(order) // 2], order[len(order) // 2 :]
            tested = set()

            def holds(place: int, validation: Any = validation, tested: Any = tested) -> bool:
                tested.add(place)
                counts = self.counts(place, validation)
                return -paired(*counts, len(validation), 1 - 2 * error).low <= allowed

            place = way(holds, len(self.costs))
            if place is None:
                continue
            lost, gained = self.counts(place, test)
            held += (lost - gained) / len(test) <= allowed
            tests.append(len(tested))
            costs.append(self.costs[place])
        return {
            "met": len(costs),
            "tests": math.fsum(tests) / max(len(tests), 1),
            "cost": statistics.geometric_mean(costs) if costs else math.nan,
            "held": held / max(len(costs), 1),
        }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--quick", action="store_true", help="the digits alone")
    parser.add_argument("--out", type=Path, help="file for everything")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcome, told = Outcome("target_walks"), []
    for name in ["digits"] if arguments.quick else ["digits", "resnet20"]:
        row = Row(name, arguments.data)
        for allowed in ALLOWED:
            for said, (way, error) in WAYS.items():
                found = {"network": name, "allowed": allowed, "way": said}
                found |= row.tried(way, error, allowed, SPLITS)
                print(found, flush=True)
                told.append(found)
    outcome.details["rows"] = told
    chosen = [one for one in told if one["way"] == "walks 32, 8, 2"]
    outcome.figures["walk_tests"] = max(one["tests"] for one in chosen)
    outcome.figures["walk_held"] = min(one["held"] for one in chosen)
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
