"""How well scores rank assignments by what they do to images nobody has seen.

Truth: mean KL divergence of the quantized from the float network's output on the test images and on
training images set aside, without and with statistics correction; loss rise and accuracy drop
beside it. Scores read other images. Assignments draw each layer's bits at random. Figures are
Spearman correlations with the truth; 95 % bootstrap intervals, Kendall's tau, the other truths and
the seconds of each scorer are in ``--out``. The ceiling is the agreement of the truth on two random
halves of its images: no score can be expected to agree better with either half.

    python -m benchmarks.fidelity --data DIR --checkpoint FILE [--plot FILE.html]
    python -m benchmarks.fidelity --study digits
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.outcome import Outcome
from benchmarks.published_scores import PUBLISHED, measure_published
from hq_optuna.network.batches import Batches, forward, read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.compensation import ROUNDINGS, compensate_weights
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.rises import CrossEntropy
from hq_optuna.scoring import Sensitivity
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.study_files.study_file import StudyFile, StudyParts, find_study

REGIMES = {
    "weights_3_8": (3, False),
    "weights_2_8": (2, False),
    "joint_3_8": (3, True),
    "joint_2_8": (2, True),
}
GAUSS_NEWTON = (1.0, 2.0, 3.0, 4.0)
"""Temperatures of the softened Gauss-Newton score."""
DIVERGENCE = (1.0, 3.0)
DEFAULT = "gauss_newton_t3"

Array = NDArray[np.float64]


def divergence(outputs: Tensor, moved: Tensor, temperature: float = 1.0) -> Array:
    """Return the KL divergence of each sample, nats."""
    p, q = (torch.log_softmax(z.double() / temperature, 1) for z in (outputs, moved))
    return (p.exp() * (p - q)).sum(1).numpy()


def cross_entropy(outputs: Tensor, labels: Tensor) -> float:
    """Return the mean loss, nats."""
    return float(functional.cross_entropy(outputs.double(), labels))


@torch.no_grad()
def outputs_of(network: nn.Module, data: Batches) -> Tensor:
    """Return the network's outputs on all samples."""
    return torch.cat([forward(network, batch.inputs) for batch in data])


def interval(score: Array, truth: Array, n: int = 1000) -> list[float]:
    """Return the 95 % bootstrap interval of a Spearman correlation."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(truth), (n, len(truth)))
    values = [spearmanr(score[p], truth[p])[0] for p in picks]
    return [round(float(v), 3) for v in np.nanpercentile(values, (2.5, 97.5))]


def agreement(score: Array, truth: Array) -> float | None:
    """Return the Spearman correlation, or ``None`` where the truth is the same for all."""
    return None if np.ptp(truth) == 0 else round(float(spearmanr(score, truth)[0]), 3)


def ceiling(per_image: Array, n: int = 20) -> float:
    """Return the mean rank agreement of two random halves of the images."""
    rng = np.random.default_rng(0)
    agreements = []
    for _ in range(n):
        order = rng.permutation(per_image.shape[1])
        half = len(order) // 2
        a, b = per_image[:, order[:half]].mean(1), per_image[:, order[half:]].mean(1)
        agreements.append(spearmanr(a, b)[0])
    return float(np.mean(agreements))


class Bench:
    """One network, prepared, with the images scores read and the images they never see."""

    def __init__(
        self,
        parts: StudyParts,
        rounding: str,
        n_unseen: int | None,
        sums: list[str],
        with_train: bool = False,
    ) -> None:
        assert parts.test is not None and parts.validation is not None
        sources = [parts.test(), parts.validation]
        if with_train:
            assert parts.train is not None
            sources.append(parts.train())
        unseen = [torch.cat(tensors)[:n_unseen] for tensors in zip(*sources, strict=True)]
        self.unseen = read_batches(tuple(unseen), batch_size=256)
        self.labels = unseen[1]
        data = read_batches(parts.calibration)
        self.layers: tuple[LayerSpec, ...] = introspect(parts.network, data[0].inputs).layers
        self.names = [layer.name for layer in self.layers]
        histograms = observe_inputs(parts.network, self.names, data)
        self.prepared = prepare(parts.network, self.layers, histograms)
        space = SearchSpace.build(self.layers, pin_first_last=None)
        if rounding == "compensated":
            compensate_weights(
                self.prepared, self.layers, data, dict.fromkeys(self.names, range(2, 9))
            )
        self.correction = StatisticsCorrection(self.prepared, data)
        self.seen = self.correction.data
        self.seen_labels = torch.cat([batch.labels for batch in self.seen])
        self.tables: dict[str, Sensitivity] = {}
        self.seconds: dict[str, float] = {}
        for name in sums:
            started = time.perf_counter()
            self.tables[name] = measure_published(
                name,  # type: ignore[arg-type]
                parts.network,
                self.prepared,
                space,
                data,
                functional.cross_entropy,
            ).sensitivity
            self.seconds[name] = round(time.perf_counter() - started, 2)
            print(f"{name}: {self.seconds[name]} s for all layers and bits", flush=True)
        set_bits(self.prepared, BitConfig.uniform(self.names, FLOAT_BITS, FLOAT_BITS))
        self.float_unseen = outputs_of(self.prepared, self.unseen)
        self.float_seen = outputs_of(self.prepared, self.seen)

    def truths(self) -> tuple[Array, float, float]:
        """Return KL divergence per unseen image, loss rise, and accuracy drop, with bits as set."""
        outputs = outputs_of(self.prepared, self.unseen)
        drop = (
            (self.float_unseen.argmax(1) == self.labels).double()
            - (outputs.argmax(1) == self.labels).double()
        ).mean()
        rise = cross_entropy(outputs, self.labels) - cross_entropy(self.float_unseen, self.labels)
        return divergence(self.float_unseen, outputs), rise, float(drop)

    def forward_scores(self, seen: Tensor) -> dict[str, float]:
        """Return the scores that a candidate's outputs on the calibration images tell."""
        scores = {
            f"gauss_newton_t{t:g}": float(CrossEntropy(temperature=t)(self.float_seen, seen))
            for t in GAUSS_NEWTON
        }
        for t in DIVERGENCE:
            scores[f"kl_t{t:g}"] = float(divergence(self.float_seen, seen, t).mean())
        scores["loss"] = cross_entropy(seen, self.seen_labels)
        return scores


def measure(bench: Bench, regime: str, n: int, outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Score ``n`` random assignments, compare with the truths, and return what to draw."""
    low, joint = REGIMES[regime]
    draw = random.Random(7)
    scores: dict[str, dict[str, list[float]]] = {"": {}, "_corrected": {}}
    truths: dict[str, list[tuple[Array, float, float]]] = {"": [], "_corrected": []}
    seconds: list[float] = []
    for _ in range(n):
        bits = [
            (draw.randint(low, 8), draw.randint(low, 8) if joint else FLOAT_BITS)
            for _ in bench.names
        ]
        config = BitConfig(dict(zip(bench.names, bits, strict=True)))
        set_bits(bench.prepared, config)
        for state in truths:
            started = time.perf_counter()
            if state:
                bench.correction.apply()
            seen = outputs_of(bench.prepared, bench.seen)
            seconds.append(time.perf_counter() - started)
            told = bench.forward_scores(seen) | {
                name: sum(table.score(config)) for name, table in bench.tables.items()
            }
            for name, value in told.items():
                scores[state].setdefault(name, []).append(value)
            truths[state].append(bench.truths())
        bench.correction.reset()
    outcome.details[f"seconds_per_candidate_{regime}"] = round(float(np.median(seconds)), 3)
    drawn = {}
    for state in truths:
        per_image = np.stack([kl for kl, _, _ in truths[state]])
        kl = per_image.mean(1)
        others = {
            "loss_rise": np.array([rise for _, rise, _ in truths[state]]),
            "accuracy_drop": np.array([drop for _, _, drop in truths[state]]),
        }
        key = f"{regime}{state}"
        outcome.figures[f"ceiling_{key}"] = round(ceiling(per_image), 3)
        rows: dict[str, Any] = {}
        for name, values in scores[state].items():
            score = np.array(values)
            rows[name] = {
                "spearman": round(float(spearmanr(score, kl)[0]), 3),
                "interval": interval(score, kl),
                "kendall": round(float(kendalltau(score, kl)[0]), 3),
                **{f"spearman_{k}": agreement(score, truth) for k, truth in others.items()},
            }
        outcome.details[key] = {"scores": rows, "kl": kl.round(6).tolist()}
        outcome.figures[f"spearman_{key}"] = rows[DEFAULT]["spearman"]
        drawn[key] = {"ceiling": outcome.figures[f"ceiling_{key}"], "scores": rows}
        print(f"{key}: ceiling {drawn[key]['ceiling']}")
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["spearman"]):
            print(f"  {name:16} {row['spearman']:.3f} {row['interval']}", flush=True)
    return drawn


def plot(drawn: Mapping[str, Mapping[str, Any]], title: str) -> go.Figure:
    """Draw each scorer's agreement with its interval, and the ceiling, one panel per regime."""
    figure = make_subplots(
        rows=len(drawn),
        cols=1,
        subplot_titles=[key.replace("_", " ") for key in drawn],
        vertical_spacing=0.3 / max(len(drawn), 1),
    )
    for index, part in enumerate(drawn.values(), 1):
        rows = sorted(part["scores"].items(), key=lambda item: item[1]["spearman"])
        values = [row["spearman"] for _, row in rows]
        figure.add_trace(
            go.Scatter(
                x=values,
                y=[name for name, _ in rows],
                mode="markers",
                marker={"color": "#0072b2", "size": 9},
                error_x={
                    "array": [row["interval"][1] - row["spearman"] for _, row in rows],
                    "arrayminus": [row["spearman"] - row["interval"][0] for _, row in rows],
                },
                hovertemplate="%{y}: %{x:.3f}<extra></extra>",
                showlegend=False,
            ),
            row=index,
            col=1,
        )
        figure.add_vline(x=part["ceiling"], line={"color": "#d55e00", "dash": "dash"}, row=index)
    figure.update_xaxes(title="Spearman correlation with the KL divergence on unseen images")
    figure.update_layout(title=title, height=420 * len(drawn), width=900, template="plotly_white")
    return figure


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--study", default="cifar10_resnet20", choices=["cifar10_resnet20", "digits"]
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10, for the ResNet-20")
    parser.add_argument("--checkpoint", type=Path, help="of the ResNet-20")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="HTML file for the figure")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--assignments", type=int, default=100)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--rounding", default="compensated", choices=ROUNDINGS)
    parser.add_argument(
        "--with-train",
        action="store_true",
        help="truth of the study's training images too, which nothing here has read",
    )
    parser.add_argument("--sums", nargs="*", default=list(PUBLISHED), choices=PUBLISHED)
    arguments = parser.parse_args()
    options = []
    if arguments.study != "digits":
        if arguments.data is None or arguments.checkpoint is None:
            parser.error("the ResNet-20 needs --data and --checkpoint; or use --study digits")
        options = ["--data", str(arguments.data), "--checkpoint", str(arguments.checkpoint)]
    n = 6 if arguments.quick else arguments.assignments

    outcome = Outcome("fidelity")
    study = StudyFile.load(find_study(arguments.study))
    with tempfile.TemporaryDirectory() as folder:  # where digits keeps the network it trains
        parts = study.build(Path(folder), study.parse_options(options))
    bench = Bench(
        parts,
        arguments.rounding,
        100 if arguments.quick else None,
        list(arguments.sums),
        arguments.with_train,
    )
    outcome.details |= {
        "study": arguments.study,
        "rounding": arguments.rounding,
        "assignments": n,
        "images_scores_read": bench.seen.n_samples,
        "images_unseen": bench.unseen.n_samples,
        "seconds": bench.seconds,
    }
    drawn: dict[str, dict[str, Any]] = {}
    for regime in arguments.regimes:
        drawn |= measure(bench, regime, n, outcome)
    if arguments.plot is not None:
        plot(drawn, f"{arguments.study}, weights rounded {arguments.rounding}").write_html(
            arguments.plot, include_plotlyjs=True
        )
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
