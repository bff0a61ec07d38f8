"""How good the search is on ResNet-20 / CIFAR-10, weights only, without training.

All 20 layers are free (no pins), 2 to 8 bits, activations in float. The score is additive, so the
exact optimum is an integer program, solved here with SciPy's HiGHS; ``gap`` is the score found over
that optimum. Accuracy is on the test images, which nothing else reads, without and with statistics
correction. The scorer ``gauss_newton`` is not a sum over layers, so there is no exact optimum to
compare with, and each candidate takes a forward pass: name it with ``--scorers`` to run it.

    python -m benchmarks.search_quality --data DIR --checkpoint FILE [--quick] [--out FILE]
        [--scorers trace diagonal gauss_newton]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.outcome import Outcome
from hq_optuna.batches import Batches, merge, read_batches
from hq_optuna.bit_config import BitConfig
from hq_optuna.cost import Budget, CostModel
from hq_optuna.curvature import calibration_adam
from hq_optuna.introspection import introspect
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.runner.evaluation import accuracy
from hq_optuna.runner.study_file import StudyFile, find_study
from hq_optuna.scoring import Scorer, Sensitivity, measure_sensitivity, output_rise_of
from hq_optuna.search import ProgressiveSearch, exact_allocation
from hq_optuna.space import SearchSpace

AVERAGES = {"avg4": 4.0, "avg3": 3.0, "avg2_5": 2.5}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the scores' medians")
    parser.add_argument("--accuracy-seeds", type=int, default=3)
    parser.add_argument(
        "--scorers", nargs="+", default=["trace", "diagonal"], help="trace, diagonal, gauss_newton"
    )
    parser.add_argument("--candidates", type=int, default=8)
    arguments = parser.parse_args()
    n_seeds, n_measured = (2, 1) if arguments.quick else (arguments.seeds, arguments.accuracy_seeds)

    outcome = Outcome("search_quality")
    study = StudyFile.load(find_study("cifar10_resnet20"))
    options = study.parse_options(
        ["--data", str(arguments.data), "--checkpoint", str(arguments.checkpoint)]
    )
    parts = study.build(Path(), options)
    data = read_batches(parts.calibration)
    assert parts.test is not None
    test = read_batches(parts.test(), batch_size=256, what="test")
    sums = [scorer for scorer in arguments.scorers if scorer != "gauss_newton"]
    space, prepared, tables = tables_of(parts.network, data, sums)
    correction = StatisticsCorrection(prepared, merge(data, 256))
    model = CostModel(space.layers, "size_bytes")
    outcome.details["float"] = accuracy(copy.deepcopy(parts.network).eval(), test)["accuracy"]
    outcome.details["n_calibration"] = data.n_samples

    def measure(config: BitConfig) -> tuple[float, float]:
        """Return accuracy without and with statistics correction, in percent."""
        set_bits(prepared, config)
        plain = accuracy(prepared, test)["accuracy"]
        correction.apply()
        corrected = accuracy(prepared, test)["accuracy"]
        correction.reset()
        return 100 * plain, 100 * corrected

    for bits in (4, 3):
        uniform = BitConfig.uniform([layer.name for layer in space.layers], bits, 32)
        plain, corrected = measure(uniform)
        outcome.figures[f"accuracy_uniform_{bits}"] = round(plain, 2)
        outcome.figures[f"accuracy_uniform_{bits}_corrected"] = round(corrected, 2)
    for name, average in AVERAGES.items():
        limit = Budget.fraction(size_bytes=average / 8).limit(space.layers)
        for scorer, table in tables.items():
            best = exact_config(space, table, limit)
            optimum = sum(table.score(best))
            row: dict[str, Any] = {"optimum": optimum, "accuracy_exact": measure(best)}
            for rule in ("ratio", "min"):
                for refine in (False, True) if rule == "ratio" else (False,):
                    found = [
                        search(
                            ProgressiveSearch(
                                space, model.cost, limit, arguments.candidates, rule, seed, refine
                            ),
                            lambda config, table=table: sum(table.score(config)),
                        )
                        for seed in range(n_seeds)
                    ]
                    how = f"{scorer}{'_min' if rule == 'min' else ''}{'_refined' if refine else ''}"
                    gap = statistics.median(score / optimum for score, _, _ in found)
                    outcome.figures[f"gap_{name}_{how}"] = round(gap, 4)
                    row[how] = found
                    report(outcome, name, how, found[:n_measured], measure, f"gap {gap:.3f}")
            outcome.details[f"{scorer}_{name}"] = str(row)
        if "gauss_newton" in arguments.scorers:
            scored = Scorer(
                prepared,
                next(iter(tables.values())),
                correction.data,
                functional.cross_entropy,
                output_rise=output_rise_of(functional.cross_entropy),
                correction=correction,
            )
            found = [
                search(
                    ProgressiveSearch(
                        space, model.cost, limit, arguments.candidates, "ratio", seed, True
                    ),
                    lambda config, scored=scored: scored.score(config).total,
                )
                for seed in range(n_measured)
            ]
            correction.reset()
            report(outcome, name, "gauss_newton_refined", found, measure, "")
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


def exact_config(space: SearchSpace, table: Sensitivity, limit: float) -> BitConfig:
    """Return the assignment with the least layer sum within the limit."""
    sizes = {layer.name: layer.n_weights for layer in space.layers}
    state = exact_allocation(
        space,
        [table.weights[v.layers[0]] for v in space.variables],
        lambda name, bits: sizes[name] * bits.weight_bits / 8,
        limit,
    )
    assert state is not None
    return space.config(state)


def search(mind: ProgressiveSearch, score: Any) -> tuple[float, BitConfig, int]:
    """Return score, assignment, and how many candidates it took."""
    scored = 0

    def counted(config: BitConfig) -> float:
        nonlocal scored
        scored += 1
        return float(score(config))

    last = mind.run(counted)[-1]
    return last.score, mind.space.config(last.state), scored


def report(
    outcome: Outcome, name: str, how: str, found: list[Any], measure: Any, says: str
) -> None:
    """Measure what was found, print it and keep the figures."""
    measured = [measure(config) for _, config, _ in found]
    for what, values in zip(("", "_corrected"), zip(*measured, strict=True), strict=True):
        outcome.figures[f"accuracy_{name}_{how}{what}"] = round(statistics.mean(values), 2)
    n = round(statistics.median(scored for _, _, scored in found))
    print(
        f"{name:7} {how:22} {says:9} {n:5} candidates  accuracy "
        + ", ".join(f"{a:.2f}/{b:.2f}" for a, b in measured),
        flush=True,
    )


if __name__ == "__main__":
    main()
