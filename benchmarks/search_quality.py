"""How good the search is on ResNet-20 / CIFAR-10, weights only, without training.

All 20 layers are free (no pins), 2 to 8 bits, activations in float. The score is additive, so the
exact optimum is known (`hq_optuna.search.exact`); ``gap`` is the score found over that optimum. The
scorer ``hawq_v2`` with its exact optimum is HAWQ-V2. Accuracy is on the test images, which nothing
else reads, without and with statistics correction. The scorer ``gauss_newton`` is not a sum over
layers, so there is no exact optimum to compare with, and each candidate takes a forward pass: name
it with ``--scorers`` to run it.

With ``--baselines`` random draws within the budget, Optuna's TPE and its NSGA-II get the same
space, score, constraint and number of evaluations as the refined search, under
``--accuracy-seeds`` seeds.

    python -m benchmarks.search_quality --data DIR --checkpoint FILE [--quick] [--out FILE]
        [--scorers fisher trace hawq_v2 gauss_newton] [--rounding nearest] [--quantizer midrise]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from benchmarks.baselines import METHODS, Problem, run_method
from benchmarks.outcome import Outcome
from benchmarks.published_scores import PUBLISHED, measure_published
from hq_optuna.network.batches import Batches, forward, read_batches
from hq_optuna.network.evaluation import Accuracy
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.quantization.compensation import ROUNDINGS, compensate_weights
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.rises import rise_of_loss
from hq_optuna.scoring import Scorer, Sensitivity
from hq_optuna.search import Additive, ProgressiveSearch
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.budget import Budget
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.study_files.study_file import StudyFile, find_study


class Measured(NamedTuple):
    """On the test images: accuracy in percent and mean loss, without and with correction."""

    accuracy: float
    accuracy_corrected: float
    loss: float
    loss_corrected: float


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
        "--scorers",
        nargs="+",
        default=["fisher", "trace"],
        choices=[*PUBLISHED, "gauss_newton"],
        help="sums over layers, or gauss_newton",
    )
    parser.add_argument("--rounding", default="compensated", choices=ROUNDINGS)
    parser.add_argument("--quantizer", default="uniform", choices=["uniform", "midrise", "dorefa"])
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--baselines", action="store_true", help="random, TPE and NSGA-II too")
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
    space, prepared, tables = tables_of(
        parts.network, data, sums, arguments.rounding, arguments.quantizer
    )
    correction = StatisticsCorrection(prepared, data)
    model = space.costs("size_bytes")
    outcome.details["float"] = Accuracy()(copy.deepcopy(parts.network).eval(), test)["accuracy"]
    outcome.details |= {"n_calibration": data.n_samples, "rounding": arguments.rounding}
    outcome.details["quantizer"] = arguments.quantizer

    def judge() -> tuple[float, float]:
        with torch.no_grad():
            outputs = torch.cat([forward(prepared, batch.inputs) for batch in test])
        labels = torch.cat([batch.labels for batch in test])
        right = (outputs.argmax(1) == labels).double().mean()
        return 100 * float(right), float(functional.cross_entropy(outputs, labels))

    def measure(config: BitConfig) -> Measured:
        set_bits(prepared, config)
        plain = judge()
        correction.apply()
        corrected = judge()
        correction.reset()
        return Measured(plain[0], corrected[0], plain[1], corrected[1])

    for bits in (4, 3, 2):
        uniform = BitConfig.uniform([layer.name for layer in space.layers], bits, 32)
        report(outcome, "uniform", str(bits), [(0.0, uniform, 1)], measure, "")
    for name, average in AVERAGES.items():
        limit = Budget.fraction(size_bytes=average / 8).limit(space)
        for scorer, table in tables.items() if sums else ():
            best = exact_config(space, table, limit)
            optimum = sum(table.score(best))
            row: dict[str, Any] = {"optimum": optimum}
            report(outcome, name, f"{scorer}_exact", [(optimum, best, 1)], measure, "gap 1.000")
            evaluations: dict[str, int] = {}
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
                    evaluations[how] = round(statistics.median(n for _, _, n in found))
                    report(outcome, name, how, found[:n_measured], measure, f"gap {gap:.3f}")
            if arguments.baselines:
                problem = Problem(
                    space, model.cost, limit, lambda config, table=table: sum(table.score(config))
                )
                n = evaluations[f"{scorer}_refined"]
                compare(outcome, name, scorer, problem, n, n_measured, optimum, measure)
            outcome.details[f"{scorer}_{name}"] = str(row)
        if "gauss_newton" in arguments.scorers:
            scored = Scorer(
                prepared,
                next(iter(tables.values())),
                correction.data,
                functional.cross_entropy,
                output_rise=rise_of_loss(functional.cross_entropy),
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


def compare(
    outcome: Outcome,
    name: str,
    scorer: str,
    problem: Problem,
    n: int,
    n_seeds: int,
    optimum: float,
    measure: Any,
) -> None:
    """Run the other methods with ``n`` evaluations each and report them like the search."""
    for method in METHODS:
        runs = [run_method(method, problem, n, seed) for seed in range(n_seeds)]
        how = f"{scorer}_{method.lower().replace('-', '')}"
        gap = statistics.median(run.score / optimum for run in runs)
        outcome.figures[f"gap_{name}_{how}"] = round(gap, 4)  # infinite: nothing within the budget
        seconds = statistics.mean(run.seconds for run in runs)
        outcome.figures[f"seconds_{name}_{how}"] = round(seconds, 2)
        within = [(r.score, r.config, r.evaluations) for r in runs if r.config is not None]
        if within:
            says = f"gap {gap:.3f}, {seconds:.1f} s"
            report(outcome, name, how, within, measure, says)


def tables_of(
    network: torch.nn.Module, data: Batches, scorers: list[Any], rounding: str, quantizer: str
) -> tuple[SearchSpace, torch.nn.Module, dict[str, Sensitivity]]:
    """Return the space without pins, the prepared network, and a table per scorer."""
    layers = introspect(network, data[0].inputs).layers
    space = SearchSpace.build(layers, activation_bits=None, pin_first_last=None)
    names = [layer.name for layer in layers]
    prepared = prepare(network, layers, quantizers=dict.fromkeys(names, quantizer))
    if rounding == "compensated":
        compensate_weights(prepared, layers, data, dict.fromkeys(names, range(2, 9)))
    loss = functional.cross_entropy
    tables = {
        scorer: measure_published(scorer, network, prepared, space, data, loss).sensitivity
        for scorer in scorers or ["fisher"]
    }
    return space, prepared, tables


def exact_config(space: SearchSpace, table: Sensitivity, limit: float) -> BitConfig:
    """Return the assignment with the least layer sum within the limit."""
    table_json = {n: {"weights": table.weights[n], "activations": {}} for n in table.weights}
    sums = Additive(space, table_json, space.costs("size_bytes"))
    best = sums.exact(limit)
    assert best is not None
    return best.config


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
    """Measure what was found, print it and keep the figures: means, and spread over seeds."""
    measured = [measure(config) for _, config, _ in found]
    for what, values in zip(Measured._fields, zip(*measured, strict=True), strict=True):
        key = f"{what.split('_')[0]}_{name}_{how}" + ("_corrected" if "_" in what else "")
        outcome.figures[key] = round(statistics.mean(values), 4 if "loss" in what else 2)
        outcome.details[key] = list(values)
        if len(values) > 1:
            outcome.details[f"{key}_deviation"] = statistics.stdev(values)
    n = round(statistics.median(scored for _, _, scored in found))
    print(
        f"{name:7} {how:22} {says:20} {n:5} candidates  accuracy "
        + ", ".join(f"{m.accuracy:.2f}/{m.accuracy_corrected:.2f}" for m in measured)
        + "  loss "
        + ", ".join(f"{m.loss:.3f}/{m.loss_corrected:.3f}" for m in measured),
        flush=True,
    )


if __name__ == "__main__":
    main()
