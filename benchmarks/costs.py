"""Costs of hardware: peak memory, latencies in onnxruntime, and targets in place of budgets.

    python -m benchmarks.costs [--data DIR] [--quick] [--only PART] [--out FILE]

- *Memory*: torchvision's networks with weights that were drawn at random, on four samples, so that
  what oneDNN copies of weights is less than the tensors between layers. What liveness says that
  PyTorch allocates, without its caller's input, against what PyTorch's allocator gives out while
  a traced copy drops each value after its last use; and 2,000 random maps against a count by hand.
- *Latency*: `hq-optuna profile` of networks of the zoo, in which the table predicts ten drawn
  mixed assignments that are timed as whole files in the same turns, and is fitted to 20 others.
- *Target*: the least cost within a target of accuracy, for 20 splits of the unseen samples into
  validation and test, against bisection over budgets with a full search for each, by a single test
  each and without a correction for their number. The price is processor time of `BitSearch.meet`,
  the table included, over that of one full search.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import hq_optuna as hq
from benchmarks.outcome import Outcome
from benchmarks.zoo import data_folder, load_trained
from hq_optuna.answer.intervals import CONFIDENCE, paired, quantile
from hq_optuna.answer.resolve import sums_of
from hq_optuna.answer.target import TEST_CONFIDENCE, Met, Target, least_cost, parse_target
from hq_optuna.errors import TargetError
from hq_optuna.network.operators.liveness import Recorder, memory_map
from hq_optuna.protocol.history import read_history
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.memory import LiveTensor, MemoryMap
from tests.reference.allocations import Forgetful, peak_allocated

SPLITS = 20
MIXED = 10
"""Assignments that are timed as whole files."""

FITTED = 20
"""Further ones that the table is fitted to."""

TARGETS = {"digits": "accuracy -2", "resnet20": "accuracy -2"}


def allocations(quick: bool) -> list[dict[str, Any]]:
    """Compare liveness with what PyTorch allocates; channels last, where oneDNN copies nothing."""
    from torchvision import models

    names = ["resnet18", "mobilenet_v2", "googlenet", "densenet121", "vgg11", "shufflenet_v2_x0_5"]
    rows = []
    for name in names[:2] if quick else [*names, "efficientnet_b0"]:
        options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        network: nn.Module = getattr(models, name)(**options).eval()
        network = network.to(memory_format=torch.channels_last)
        example = torch.randn(4, 3, 224, 224).to(memory_format=torch.channels_last)
        record = Recorder(network, example, 1)
        with torch.no_grad():
            record.run(network, example)
        found = memory_map(record, {}, merge=False)
        inner = MemoryMap(found.moments, tuple(t for t in found.tensors if t.name != "input"))
        run = Forgetful(network)
        with torch.no_grad():
            run.run(example)
        call = functools.partial(run.run, example)
        _, measured = peak_allocated(call), peak_allocated(call)  # the profiler's first holds more
        row = {"network": name, "told": inner.peak({}), "measured": measured}
        rows.append({**row, "ratio": row["told"] / measured})
        print(rows[-1], flush=True)
    return rows


def unequal_maps(n: int) -> int:
    """Return in how many random maps the peak is not what a count moment by moment finds."""
    chance, unequal = random.Random(0), 0
    for _ in range(n):
        moments, layers = chance.randint(1, 8), "abcde"
        tensors = []
        for _ in range(chance.randint(1, 12)):
            first = chance.randrange(moments)
            readers = tuple(chance.sample(layers, chance.randint(0, 3)))
            last = chance.randrange(first, moments)
            tensors.append(LiveTensor("t", chance.randint(1, 10**6), first, last, readers))
        config = BitConfig({name: (8, chance.randint(1, 16)) for name in layers})
        by_hand = 0
        for moment in range(moments):
            alive = [t for t in tensors if t.first <= moment <= t.last]
            bits = [max([config[r].activation_bits for r in t.readers] or [32]) for t in alive]
            by_hand = max(by_hand, sum(t.n_elements * b for t, b in zip(alive, bits, strict=True)))
        found = MemoryMap(tuple("m" * moments), tuple(tensors))
        rows = [r.fixed + sum(r.layer_cost(n, b) for n, b in config.items()) for r in found.rows]
        unequal += not found.peak(config) == by_hand / 8 == max(rows)
    return unequal


def latencies(name: str, data: Path, quick: bool) -> dict[str, Any]:
    """Profile a network, and compare what the table predicts with whole files."""
    from hq_optuna.export.profiling import drawn, profile

    case = load_trained(name, data, n_calibration=64)
    bits = (8, 4) if quick else (8, 6, 4, 2)
    search = hq.BitSearch(case.network, case.calibration, bits=bits, budget="0.5 bops")
    n, n_fit = (3, 2) if quick else (MIXED, FITTED)
    every = drawn(search.space, n + n_fit)
    mixed = every[:n]
    given = search.space, search.quantized, search.objective.data
    found = profile(*given, turns=100 if quick else 200, fit=every[n:], check=mixed)
    told, took = zip(*found.checked, strict=True)
    spreads = sorted(found.spreads.values())
    row = {
        "network": name,
        "pieces": found.pieces,
        "error_max": found.error,
        "error_mean": math.fsum(abs(a / b - 1) for a, b in found.checked) / len(mixed),
        "rank": float(spearmanr(told, took).statistic),
        "spread_median": spreads[len(spreads) // 2],
        "seconds": [[a, b] for a, b in found.checked],
    }
    print(row, flush=True)
    return row


class Targets:
    """Targets on one network: its table, and which samples each assignment gets right."""

    def __init__(self, name: str, data: Path) -> None:
        case = load_trained(name, data, n_calibration=256)
        self.network, self.calibration = case.network, case.calibration
        self.x, self.y = case.unseen
        self.target: Target = parse_target(TARGETS[name])
        self.search = hq.BitSearch(self.network, self.calibration)
        study = self.search.open()
        self.sums = sums_of(read_history(study))
        self._right: dict[str, Tensor] = {}
        self.searches: dict[float, BitConfig] = {}
        self.float_right = self.right_of(self.network)

    @torch.no_grad()
    def right_of(self, network: nn.Module) -> Tensor:
        """Return which unseen samples a network gets right."""
        network = network.eval()
        return torch.cat([network(x).argmax(1) for x in self.x.split(256)]) == self.y

    def right(self, config: BitConfig) -> Tensor:
        """Return which unseen samples an assignment gets right."""
        if config.digest not in self._right:
            self._right[config.digest] = self.right_of(self.search.quantized(config))
        return self._right[config.digest]

    def compared(self, config: BitConfig, places: Tensor) -> tuple[float, float, float]:
        """Compare an assignment with float on some samples."""
        before, after = self.float_right[places], self.right(config)[places]
        n, lost, gained = len(places), int((before & ~after).sum()), int((after & ~before).sum())
        worse = (lost - gained) / n
        most = -paired(lost, gained, n, TEST_CONFIDENCE).low
        return worse, most, (lost + gained + 2) / (n + 2) - worse**2

    def met(self, places: Tensor) -> Met:
        """Return the least cost within the target on some samples."""
        compare: Callable[[BitConfig], Any] = lambda c: self.compared(c, places)  # noqa: E731
        return least_cost(self.sums, self.target, compare, len(places))

    def split(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return places of validation and test samples, half and half."""
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed))
        return order[: len(order) // 2], order[len(order) // 2 :]

    def held(self, splits: int) -> list[dict[str, Any]]:
        """Meet the target on each split's validation samples, and look at its test samples."""
        rows = []
        for seed in range(splits):
            validation, test = self.split(seed)
            try:
                found = self.met(validation)
            except TargetError as error:
                rows.append({"seed": seed, "refused": str(error)})
                continue
            worse = self.compared(found.config, test)[0]
            share = found.cost / self.sums.model.int8
            row = {"seed": seed, "of_int8": share, "tested": len(found.tested)}
            rows.append({**row, "worse_test": worse, "held": worse <= self.target.worse})
        return rows

    def price(self) -> dict[str, float]:
        """Return processor seconds of a target and of one full search, tables included."""
        validation, _ = self.split(0)
        given = self.network, self.calibration
        data = self.x[validation], self.y[validation]
        started = time.process_time()
        search = hq.BitSearch(*given, validation=data)
        search.meet(search.open(), self.target)
        target_s = time.process_time() - started
        started = time.process_time()
        search = hq.BitSearch(*given, validation=data, budget="0.25 bops")
        search.result(search.optimize())
        return {"target_s": target_s, "search_s": time.process_time() - started}

    def searched_within(self, limit: float) -> BitConfig:
        """Return the answer of a full search within so many bit operations."""
        if limit not in self.searches:
            budget = hq.Budget.absolute(bops=limit)
            search = hq.BitSearch(self.network, self.calibration, budget=budget)
            self.searches[limit] = search.result(search.optimize()).config
        return self.searches[limit]

    def bisected(self, seed: int, steps: int) -> float:
        """Return the cost that bisection over full searches finds on a split, of all-8-bit.

        The cost of a search is that of its answer.
        """
        validation, _ = self.split(seed)
        low, high = (self.sums.cost(self.search.space.config(s)) for s in
                     (self.search.space.bottom, self.search.space.top))  # fmt: skip
        best = high
        for _ in range(steps):
            middle = math.sqrt(low * high)
            config = self.searched_within(middle)
            worse, _, variance = self.compared(config, validation)
            most = worse + (variance / len(validation)) ** 0.5 * quantile(CONFIDENCE)
            if most <= self.target.worse:
                high, best = middle, min(best, self.sums.cost(config))
            else:
                low = middle
        return best / self.sums.model.int8


def targets(name: str, data: Path, quick: bool) -> dict[str, Any]:
    """Return the figures of targets on one network."""
    one = Targets(name, data)
    rows = one.held(3 if quick else SPLITS)
    row: dict[str, Any] = {"network": name, "target": one.target.text, "splits": rows}
    row |= {"samples": len(one.y) // 2, "held": sum(r.get("held", False) for r in rows)}
    row |= one.price()
    found = [
        (r["of_int8"], one.bisected(r["seed"], 2 if quick else 7)) for r in rows if "held" in r
    ]
    row |= {"searches": len(one.searches), "of_bisection": [a / b for a, b in found]}
    row["over_bisection"] = statistics.geometric_mean(row["of_bisection"]) - 1
    print(row, flush=True)
    return row


def main(given: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--quick", action="store_true", help="the digits alone, and fewer of all")
    parser.add_argument("--networks", nargs="+", help="of the zoo, for latency and target")
    parser.add_argument("--only", choices=("memory", "latency", "target"))
    parser.add_argument("--out", type=Path, help="file for everything")
    arguments = parser.parse_args(given)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcome, only, quick = Outcome("costs"), arguments.only, arguments.quick
    figures = outcome.figures
    if only in (None, "memory"):
        outcome.details["memory"] = rows = allocations(quick)
        figures["memory_unequal"] = unequal_maps(200 if quick else 2000)
        figures["memory_error_max"] = max(abs(row["ratio"] - 1) for row in rows)
    if only in (None, "latency"):
        names = arguments.networks or (["digits"] if quick else ["digits", "kws", "resnet20"])
        outcome.details["latency"] = rows = [latencies(n, arguments.data, quick) for n in names]
        figures["latency_error_max"] = max(row["error_max"] for row in rows)
        figures["latency_rank_min"] = min(row["rank"] for row in rows)
    if only in (None, "target"):
        names = arguments.networks or (["digits"] if quick else list(TARGETS))
        outcome.details["target"] = rows = [targets(n, arguments.data, quick) for n in names]
        figures["target_held"] = min(row["held"] for row in rows)
        figures["target_price"] = max(row["target_s"] / row["search_s"] for row in rows)
        figures["target_over_bisection_max"] = max(row["over_bisection"] for row in rows)
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
