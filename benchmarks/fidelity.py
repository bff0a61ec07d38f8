"""How well scores rank assignments by what they do to images nobody has seen.

Truth: mean KL divergence of the quantized from the float network's output, on the test images and
on training images set aside, without and with statistics correction. Scores read other images.
Assignments draw each layer's bits at random. Figures are Spearman correlations with the truth, with
95 % bootstrap intervals in ``--out``; the ceiling is the agreement of the truth on two random
halves of its images.

    python -m benchmarks.fidelity --data DIR --checkpoint FILE [--assignments 100] [--quick]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.outcome import Outcome
from hq_optuna.batches import Batches, forward, merge, read_batches
from hq_optuna.bit_config import BitConfig
from hq_optuna.curvature import calibration_adam
from hq_optuna.introspection import introspect
from hq_optuna.layers import FLOAT_BITS
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.runner.study_file import StudyFile, find_study
from hq_optuna.scoring import measure_sensitivity
from hq_optuna.scoring.outputs import CrossEntropyRise
from hq_optuna.space import SearchSpace

REGIMES = {
    "weights_3_8": (3, False),
    "weights_2_8": (2, False),
    "joint_3_8": (3, True),
    "joint_2_8": (2, True),
}
TEMPERATURES = (1.0, 2.0, 3.0, 4.0, 8.0)


def divergence(outputs: Tensor, moved: Tensor, temperature: float = 1.0) -> NDArray[np.float64]:
    """Return the KL divergence of each sample, nats."""
    p, q = (torch.log_softmax(z.double() / temperature, 1) for z in (outputs, moved))
    return (p.exp() * (p - q)).sum(1).numpy()


@torch.no_grad()
def outputs_of(network: nn.Module, data: Batches) -> Tensor:
    """Return the network's outputs on all samples."""
    return torch.cat([forward(network, batch.inputs) for batch in data])


def interval(score: Any, truth: Any, n: int = 1000) -> list[float]:
    """Return the 95 % bootstrap interval of a Spearman correlation."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(truth), (n, len(truth)))
    values = [spearmanr(np.asarray(score)[p], np.asarray(truth)[p])[0] for p in picks]
    return [round(float(v), 3) for v in np.nanpercentile(values, (2.5, 97.5))]


def ceiling(per_image: NDArray[np.float64], n: int = 20) -> float:
    """Return the mean rank agreement of two random halves of the images."""
    rng = np.random.default_rng(0)
    agreements = []
    for _ in range(n):
        order = rng.permutation(per_image.shape[1])
        half = len(order) // 2
        a, b = per_image[:, order[:half]].mean(1), per_image[:, order[half:]].mean(1)
        agreements.append(spearmanr(a, b)[0])
    return float(np.mean(agreements))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--assignments", type=int, default=100)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    arguments = parser.parse_args()
    n = 6 if arguments.quick else arguments.assignments

    outcome = Outcome("fidelity")
    study = StudyFile.load(find_study("cifar10_resnet20"))
    options = ["--data", str(arguments.data), "--checkpoint", str(arguments.checkpoint)]
    parts = study.build(Path(), study.parse_options(options))
    assert parts.test is not None
    n_unseen = 100 if arguments.quick else 10_000
    unseen = read_batches(
        tuple(
            torch.cat(two)[:n_unseen] for two in zip(parts.test(), parts.validation, strict=True)
        ),
        batch_size=256,
    )
    data = read_batches(parts.calibration)
    layers = introspect(parts.network, data[0].inputs).layers
    names = [layer.name for layer in layers]
    curvature = calibration_adam(parts.network, layers, data, functional.cross_entropy)
    histograms = observe_inputs(parts.network, names, data)
    prepared = prepare(parts.network, layers, histograms)
    correction = StatisticsCorrection(prepared, merge(data, 256))
    space = SearchSpace.build(layers, pin_first_last=None)
    tables = {
        scorer: measure_sensitivity(prepared, space, curvature, data, scorer)
        for scorer in ("trace", "diagonal")
    }
    set_bits(prepared, BitConfig.uniform(names, FLOAT_BITS, FLOAT_BITS))
    float_unseen, float_seen = (outputs_of(prepared, d) for d in (unseen, correction.data))

    for regime in arguments.regimes:
        low, joint = REGIMES[regime]
        draw = random.Random(7)
        scores: dict[str, list[float]] = {}
        truths: dict[str, list[NDArray[np.float64]]] = {"": [], "_corrected": []}
        for _ in range(n):
            bits = [
                (draw.randint(low, 8), draw.randint(low, 8) if joint else FLOAT_BITS) for _ in names
            ]
            config = BitConfig(dict(zip(names, bits, strict=True)))
            for scorer, table in tables.items():
                scores.setdefault(scorer, []).append(sum(table.score(config)))
            set_bits(prepared, config)
            for state in truths:
                if state:
                    correction.apply()
                truths[state].append(divergence(float_unseen, outputs_of(prepared, unseen)))
                seen = outputs_of(prepared, correction.data)
                for t in TEMPERATURES:
                    rise = float(CrossEntropyRise(t)(float_seen, seen))
                    scores.setdefault(f"gauss_newton_t{t:g}{state}", []).append(rise)
                    kl = float(divergence(float_seen, seen, t).mean())
                    scores.setdefault(f"kl_t{t:g}{state}", []).append(kl)
                correction.reset()
        for state, rows in truths.items():
            per_image = np.stack(rows)
            truth = per_image.mean(1)
            outcome.figures[f"ceiling_{regime}{state}"] = round(ceiling(per_image), 3)
            for scorer, values in scores.items():
                # A candidate's outputs are judged in the state they were measured in.
                if scorer in tables or scorer.endswith("_corrected") == bool(state):
                    plain = scorer.removesuffix("_corrected")
                    key = f"spearman_{regime}{state}_{plain}"
                    outcome.figures[key] = round(float(spearmanr(values, truth)[0]), 3)
                    outcome.details[key] = interval(values, truth)
            best = outcome.figures[f"spearman_{regime}{state}_gauss_newton_t3"]
            outcome.figures[f"spearman_{regime}{state}"] = best
            print(
                f"{regime}{state}: ceiling {outcome.figures[f'ceiling_{regime}{state}']}, "
                + ", ".join(
                    f"{s} {outcome.figures[f'spearman_{regime}{state}_{s}']}"
                    for s in ("trace", "diagonal", "kl_t1", "kl_t2", "gauss_newton_t3")
                ),
                flush=True,
            )
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
