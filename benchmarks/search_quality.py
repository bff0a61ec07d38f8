"""How good the search is on ResNet-20 / CIFAR-10, weights only, without training.

All 20 layers are free (no pins), 2 to 8 bits, activations in float. The score is additive, so the
exact optimum is an integer program, solved here with SciPy's HiGHS; ``gap`` is the score found over
that optimum. Accuracy is on the test images, which nothing else reads.

    python -m benchmarks.search_quality --data DIR --checkpoint FILE [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch.nn import functional

from benchmarks.outcome import Outcome
from hq_optuna.assignment import BitConfig
from hq_optuna.batches import Batches, read_batches
from hq_optuna.cost import Budget, CostModel
from hq_optuna.introspect import introspect
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.curvature import calibration_adam
from hq_optuna.runner.evaluation import accuracy
from hq_optuna.runner.study_file import StudyFile, find_study
from hq_optuna.scoring import Sensitivity, measure_sensitivity
from hq_optuna.search import ProgressiveSearch
from hq_optuna.space import SearchSpace

AVERAGES = {"avg4": 4.0, "avg3": 3.0, "avg2_5": 2.5}


def exact(space: SearchSpace, table: Sensitivity, limit: float) -> BitConfig:
    """Return the assignment with the least additive score within the limit."""
    choices = [(v.layers[0], bits) for v in space.variables for bits in v.bits]
    rises = np.array([table.weights[name][bits] for name, bits in choices])
    sizes = {layer.name: layer.n_weights for layer in space.layers}
    costs = np.array([sizes[name] * bits / 8 for name, bits in choices])
    one_each = np.array([[name == v.layers[0] for name, _ in choices] for v in space.variables])
    solved = milp(
        rises / rises.max(),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs, -np.inf, limit)],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    chosen = [choice for choice, x in zip(choices, solved.x, strict=True) if x > 0.5]
    return space.config([bits for _, bits in chosen])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the scores' medians")
    parser.add_argument("--accuracy-seeds", type=int, default=3)
    parser.add_argument("--scorers", nargs="+", default=["trace", "diagonal"])
    parser.add_argument("--candidates", type=int, default=8)
    arguments = parser.parse_args()
    n_seeds, n_measured = (2, 1) if arguments.quick else (arguments.seeds, arguments.accuracy_seeds)

    outcome = Outcome("search_quality")
    study = StudyFile.load(find_study("cifar10_resnet20"))
    options = study.parse_options(
        ["--data", str(arguments.data), "--checkpoint", str(arguments.checkpoint)]
    )
    parts = study.build(Path("."), options)
    data = read_batches(parts.calibration)
    assert parts.test is not None
    test = read_batches(parts.test(), batch_size=256, what="test")
    space, prepared, tables = tables_of(parts.network, data, arguments.scorers)
    model = CostModel(space.layers, "size_bytes")
    outcome.details["float"] = accuracy(copy.deepcopy(parts.network).eval(), test)["accuracy"]
    outcome.details["n_calibration"] = data.n_samples

    def measure(config: BitConfig) -> float:
        set_bits(prepared, config)
        return 100 * accuracy(prepared, test)["accuracy"]

    for bits in (4, 3):
        uniform = BitConfig.uniform([layer.name for layer in space.layers], bits, 32)
        outcome.details[f"uniform_{bits}"] = measure(uniform)
    for scorer, table in tables.items():
        for name, average in AVERAGES.items():
            limit = Budget.fraction(size_bytes=average / 8).limit(space.layers)
            best = exact(space, table, limit)
            optimum = sum(table.score(best))
            row: dict[str, Any] = {"optimum": optimum, "accuracy_exact": measure(best)}
            for rule in ("ratio", "min"):
                found = [
                    search(space, model, limit, rule, seed, table, arguments.candidates)
                    for seed in range(n_seeds)
                ]
                row[f"gap_{rule}"] = statistics.median(score / optimum for score, _ in found)
                measured = [measure(config) for _, config in found[:n_measured]]
                row[f"accuracy_{rule}"] = measured
                print(
                    f"{scorer:9} {rule:6} {name:7} gap {row[f'gap_{rule}']:.3f}  accuracy "
                    f"{', '.join(f'{a:.2f}' for a in measured)}  (exact {row['accuracy_exact']:.2f})"
                )
                suffix = "" if rule == "ratio" else f"_{rule}"
                outcome.figures[f"gap_{name}{suffix}_{scorer}"] = round(row[f"gap_{rule}"], 4)
                outcome.figures[f"accuracy_{name}{suffix}_{scorer}"] = round(
                    statistics.mean(measured), 2
                )
            outcome.details[f"{scorer}_{name}"] = row
    outcome.finish(arguments.out)


def tables_of(
    network: torch.nn.Module, data: Batches, scorers: list[Any]
) -> tuple[SearchSpace, torch.nn.Module, dict[str, Sensitivity]]:
    """Return the space without pins, the prepared network, and a table per scorer."""
    layers = introspect(network, data[0].inputs).layers
    space = SearchSpace.build(layers, activation_bits=None, pin_first_last=None)
    prepared = prepare(network, layers)
    curvature = calibration_adam(network, layers, data, functional.cross_entropy)
    return (
        space,
        prepared,
        {
            scorer: measure_sensitivity(prepared, space, curvature, data, scorer)
            for scorer in scorers
        },
    )


def search(
    space: SearchSpace,
    model: CostModel,
    limit: float,
    rule: Any,
    seed: int,
    table: Sensitivity,
    n_candidates: int,
) -> tuple[float, BitConfig]:
    """Return score and assignment that the progressive search ends with."""
    mind = ProgressiveSearch(space, model.cost, limit, n_candidates, rule, seed)
    last = mind.run(lambda config: sum(table.score(config)))[-1]
    return last.score, space.config(last.state)


if __name__ == "__main__":
    main()
