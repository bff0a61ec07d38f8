"""What tells the latency of mixed networks in onnxruntime from their parts: several fits.

    python -m benchmarks.latency_fits [--data DIR] [--networks …] [--out FILE]

Pieces and whole files of `hq_optuna.export.profiling` are timed in the same turns: those of its
designs, 40 drawn mixed assignments to fit to, and 12 others to predict. Each way of predicting is
the sum of pieces, or what is made of it. The last way knows the runtime: a depthwise convolution
with W8A8 is quick where the next layer's input has other bits, as it is not fused then.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from scipy.stats import spearmanr

import hq_optuna as hq
from benchmarks.outcome import Outcome
from benchmarks.zoo import data_folder, load_trained
from hq_optuna.export import profiling
from hq_optuna.export.check import session
from hq_optuna.export.profiling import Timed
from hq_optuna.space.assignment import BitConfig, LayerBits

N_FIT, N_CHECK, TURNS = 40, 12, 100
EIGHT = LayerBits(8, 8)
Predict = Callable[[BitConfig], float]


class Measured:
    """Pieces and whole files of one network, timed in the same turns."""

    def __init__(self, name: str, data: Path) -> None:
        case = load_trained(name, data, n_calibration=64)
        search = hq.BitSearch(case.network, case.calibration, bits=(8, 6, 4, 2), budget="0.5 bops")
        space, batches = search.space, search.objective.data
        self.pairs = {n: sorted({EIGHT, *of}, reverse=True) for n, of in space.pairs.items()}
        self.depthwise = {
            layer.name
            for layer in space.layers
            if layer.kind.startswith("Conv") and layer.weight_shape[1] == 1
        }
        self.pieces: dict[str, Timed] = {}
        self.seen: dict[tuple[str, LayerBits], list[str]] = {}
        designs = profiling._designs(self.pairs)
        files = []
        for i, config in enumerate([*designs, *profiling.drawn(space, N_FIT + N_CHECK)]):
            model = profiling.exported(search.quantized(config), batches, "int4")
            feed = profiling._first_sample(model, batches)
            files.append((config, Timed(session(model.SerializeToString(), optimize=True), feed)))
            if i >= len(designs):
                continue
            for layer, piece in profiling.cut(model, list(self.pairs), batches)[1].items():
                self.seen.setdefault((layer, config.get(layer, EIGHT)), []).append(piece.key)
                if piece.key not in self.pieces:
                    made = session(piece.model.SerializeToString(), optimize=True)
                    self.pieces[piece.key] = Timed(made, piece.feed)
        self.call = profiling._call_cost()
        profiling.in_turns([self.call, *self.pieces.values(), *(t for _, t in files)], TURNS)
        n = len(designs)
        self.designs, self.fit, self.check = files[:n], files[n:-N_CHECK], files[-N_CHECK:]

    def fitted(self, files: Sequence[Any], *, moved: bool = False) -> Predict:
        """Return the prediction of `hq_optuna.export.profiling`'s table, fitted to some files."""
        given = self.pairs, self.seen, self.pieces, files, self.call.seconds
        return profiling._fitted(*given, moved=moved).table.total

    def alone(self, of: Callable[[list[float]], float]) -> Mapping[Any, float]:
        """Return one time for each layer and pair, of its pieces'."""
        call = self.call.seconds
        return {
            at: of([max(self.pieces[key].seconds - call, 0.0) for key in keys])
            for at, keys in self.seen.items()
        }

    def summed(self, config: BitConfig) -> float:
        """Return the sum of pieces."""
        times = self.alone(statistics.fmean)
        rest = times.get((profiling.REST, EIGHT), 0.0) + self.call.seconds
        return rest + sum(times[at] for at in config.items())

    def by_next_layer(self, config: BitConfig) -> float:
        """Return the sum of the pieces that the next layer's bits choose."""
        slow, quick = self.alone(max), self.alone(min)
        total = slow.get((profiling.REST, EIGHT), 0.0) + self.call.seconds
        layers = list(config.items())
        following = [bits for _, bits in layers[1:]] + [EIGHT]
        for at, after in zip(layers, following, strict=True):
            alone = at[0] in self.depthwise and at[1] == EIGHT != after
            total += (quick if alone else slow)[at]
        return total


def compared(name: str, data: Path) -> list[dict[str, Any]]:
    """Return the errors of each way on one network."""
    found = Measured(name, data)
    mixed = [*found.designs, *found.fit]
    ways: dict[str, Predict] = {
        "sum of pieces": found.summed,
        "pieces scaled by pair, to the designs": found.fitted(found.designs),
        "pieces scaled by pair, to designs and 40 mixed": found.fitted(mixed),
        "entries moved, to designs and 10 mixed": found.fitted(mixed[:-30], moved=True),
        "entries moved, to designs and 20 mixed": found.fitted(mixed[:-20], moved=True),
        "entries moved, to designs and 40 mixed": found.fitted(mixed, moved=True),
        "pieces by the next layer's bits": found.by_next_layer,
    }
    took = np.array([one.seconds for _, one in found.check])
    halves = [
        [statistics.median(one.turns[start::2]) for _, one in found.check] for start in (0, 1)
    ]
    rows = [{"network": name, "way": "another half of the turns", **errors(*map(np.array, halves))}]
    for way, predict in ways.items():
        told = np.array([predict(config) for config, _ in found.check])
        rows.append({"network": name, "way": way, **errors(told, took)})
    for row in rows:
        print(row, flush=True)
    return rows


def errors(told: Any, took: Any) -> dict[str, float]:
    """Return the largest and mean relative error, and the rank correlation."""
    off = np.abs(told / took - 1)
    rank = float(spearmanr(told, took).statistic)
    return {"error_max": float(off.max()), "error_mean": float(off.mean()), "rank": rank}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--networks", nargs="+", default=["digits", "kws"])
    parser.add_argument("--out", type=Path, help="file for everything")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcome = Outcome("latency_fits")
    rows = [row for name in arguments.networks for row in compared(name, arguments.data)]
    outcome.details["rows"] = rows
    best = [row for row in rows if row["way"] == "pieces by the next layer's bits"]
    outcome.figures["latency_error_by_neighbours"] = max(row["error_mean"] for row in best)
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
