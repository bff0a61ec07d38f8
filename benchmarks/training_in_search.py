"""Whether training winners inside the search pays, against training the answer alone.

For each seed a search trains its winner every ``--every`` steps and its answer at the end; then
others train the answer alone, for as many epochs in sum, and not at all. All have the same network,
data, budget and seed of the draws. Accuracy and loss are of validation and test data; the score is
that of the answer before its last training, ``score_after`` that after it. ``--patent`` runs the
method of patent CN112183742B too, which trains every winner and not the answer, and again the
search by table whose answer is trained for as many epochs.

    python -m benchmarks.training_in_search [--every 4 12] [--budget 0.12] [--seeds 3]
    python -m benchmarks.training_in_search --every --patent --train-epochs 1
    python -m benchmarks.training_in_search --data DIR --checkpoint FILE   # ResNet-20 on CIFAR-10
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch

import hq_optuna as hq
from benchmarks.outcome import Outcome
from hq_optuna.cli.session import plan_of
from hq_optuna.network.batches import read_batches
from hq_optuna.network.evaluation import Accuracy
from hq_optuna.protocol.history import read_history
from hq_optuna.study_files.study_file import StudyFile, StudyParts, find_study
from hq_optuna.training.plan import TrainingPlan


def measure(
    parts: StudyParts, plan: TrainingPlan | None, options: dict[str, Any], seed: int
) -> dict[str, float]:
    """Run one search and return what its answer is worth."""
    assert parts.test is not None
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        search = hq.BitSearch(
            parts.network,
            parts.calibration,
            training=plan,
            validation=parts.validation,
            **{name: options[name] for name in ("budget", "method") if name in options},
        )
        study = search.optimize(
            n_candidates=options["n_candidates"], seed=seed, artifacts=folder, study_name="s"
        )
        seconds = time.perf_counter() - started
        history = read_history(study)
        last = history.records[-1]
        network = search.objective.answer(study, last.config)
        trained = [r.training for r in history.records if r.training is not None]
        untrained = next(r for r in reversed(history.records) if not _is_final(r.training))
        score = (untrained.trained or untrained.winner).score
        test = read_batches(parts.test(), batch_size=256)
        return {
            "validation": 100 * Accuracy()(network, search.validation)["accuracy"],  # type: ignore[arg-type]
            "test": 100 * Accuracy()(network, test)["accuracy"],
            "score": score,
            "score_after": (last.trained or last.winner).score,
            "cost": last.winner.cost / history.info.int8,
            "candidates": sum(c.counted for c in history.candidates),
            "trainings": len(trained),
            "kept": sum(t["kept"] for t in trained),
            "epochs": sum(t["epochs"] for t in trained),
            "training_seconds": sum(t["seconds"] for t in trained),
            "seconds": seconds,
        }


def _is_final(training: Any) -> bool:
    return training is not None and training["kind"] == "final"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="CIFAR-10, for the ResNet-20")
    parser.add_argument("--checkpoint", type=Path, help="of the ResNet-20")
    parser.add_argument("--every", type=int, nargs="*", default=[4, 12])
    parser.add_argument("--patent", action="store_true", help="the patent's method too")
    parser.add_argument("--train-epochs", type=int, default=2)
    parser.add_argument("--final-epochs", type=int, default=20)
    parser.add_argument("--budget", type=float, default=0.12, help="share of the all-8-bit BOPs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--bfloat16", action="store_true", help="train in bfloat16, channels last")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if arguments.quick:
        arguments.seeds, arguments.every, arguments.budget = 1, [12], 0.5
        arguments.train_epochs = arguments.final_epochs = 1
    name, options = "digits", []
    if arguments.data is not None:
        name = "cifar10_resnet20"
        options = ["--data", str(arguments.data), "--checkpoint", str(arguments.checkpoint)]
    outcome = Outcome("training_in_search")
    file = StudyFile.load(find_study(name))
    with tempfile.TemporaryDirectory() as folder:
        parts = file.build(Path(folder), file.parse_options(options))
    test = read_batches(parts.test(), batch_size=256)  # type: ignore[misc]
    found: dict[str, list[dict[str, float]]] = {}
    search = {
        "budget": hq.Budget.fraction(bops=arguments.budget),
        "n_candidates": arguments.candidates,
    }
    training = dict(file.settings.get("training", {}))
    if arguments.bfloat16:
        training |= {"precision": "bfloat16", "channels_last": True}
    for seed in range(arguments.seeds):
        ways = {f"every_{every}": (f"end_as_{every}", every) for every in arguments.every}
        ways |= {"patent": ("end_as_patent", 1)} if arguments.patent else {}
        for way, (compared, every) in ways.items():
            asked = {
                **file.settings,
                "training": training,
                "train_every": every,
                "train_epochs": arguments.train_epochs,
                "final_epochs": arguments.final_epochs,
            }
            plan = plan_of(hq.SearchSettings(**asked), parts.train, parts.augment)
            assert plan is not None and plan.final is not None
            plan = replace(
                plan,
                settings=replace(plan.settings, seed=seed),
                final=replace(plan.final, seed=seed),
            )
            assert plan.final is not None
            if way == "patent":
                patent = {**search, "method": "patent"}
                row = measure(parts, replace(plan, final=None), patent, seed)
            else:
                row = measure(parts, plan, search, seed)
            found.setdefault(way, []).append(row)
            print(f"seed {seed} {way}: {row}", flush=True)
            final = replace(plan.final, epochs=int(row["epochs"]))
            row = measure(parts, replace(plan, every=0, final=final), search, seed)
            found.setdefault(compared, []).append(row)
            print(f"seed {seed} at the end, {final.epochs} epochs: {row}", flush=True)
        row = measure(parts, None, search, seed)
        found.setdefault("never", []).append(row)
        print(f"seed {seed} never: {row}", flush=True)
    outcome.details = {
        "study": name,
        "budget": arguments.budget,
        "float_test": 100 * Accuracy()(parts.network.eval(), test)["accuracy"],
        "runs": found,
    }
    for method, rows in found.items():
        for what in ("test", "validation", "score", "score_after", "epochs", "seconds"):
            value = statistics.mean(row[what] for row in rows)
            outcome.figures[f"{what}_{method}"] = round(value, 5)
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
