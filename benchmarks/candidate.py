"""One candidate of a search against one plain float forward pass of the same calibration images.

A search is walked at random: from an incumbent, candidates that lower one random layer by one
notch, scored with the defaults of a search (Gauss-Newton, statistics correction, weights and
activations quantized); one of them is the next incumbent. A candidate's time includes its share of
what is run anew of the incumbent. In turn with it, in the same run: the float
forward pass in the calibration set's own batches, and candidates that run the whole network.

Beside it, several candidates in one pass against the same candidates one after the other, with what
both read of the incumbent kept before; and whether a search of this network tries it.

Times are seconds of the processor where there is no GPU, which other processes on the machine
disturb less than the clock on the wall. Weights and images are random: they do not change times.

    python -m benchmarks.candidate --networks digits resnet20 resnet18 mobilenet_v2
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.outcome import Outcome
from hq_optuna.batches import Batches, Precision, forward, merge_first, read_batches
from hq_optuna.bit_config import BitConfig, LayerBits
from hq_optuna.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.runner.scoring_setup import statistics_samples
from hq_optuna.scoring import Scorer, Sensitivity, output_rise_of
from hq_optuna.scoring.reuse import DEFAULT_MEMORY
from hq_optuna.space import SearchSpace
from studies.cifar10_resnet20 import ResNet20
from studies.digits import DigitsNet

NETWORKS = ("digits", "resnet20", "resnet18", "mobilenet_v2")
RATIOS = ("to_forward", "to_without_reuse", "without_reuse_to_forward", "together_to_apart")
IMAGES = {"digits": 256, "resnet20": 512}
"""Calibration images where there are not 32."""


def network_of(name: str) -> nn.Module:
    """Return a network with random weights."""
    torch.manual_seed(0)
    if name == "digits":
        return DigitsNet()
    if name == "resnet20":
        return ResNet20()
    from torchvision import models

    return getattr(models, name)(weights=None)


def images_of(name: str, n: int) -> Tensor:
    """Return random images of the network's usual size."""
    shape = {"digits": (1, 8, 8), "resnet20": (3, 32, 32)}.get(name, (3, 224, 224))
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes, with what it left to the GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def measure(
    name: str,
    n_images: int,
    n_steps: int,
    n_candidates: int,
    correct: bool,
    memory: int,
    precision: Precision,
) -> dict[str, float]:
    """Return the figures of one network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, images = network_of(name), images_of(name, n_images)
    with torch.no_grad():  # statistics that fit the images, as a trained network has
        network.train()(images[:64])
        network.eval()
    network.to(device)
    data = read_batches((images, torch.arange(n_images) % 10)).to(device)
    layers = introspect(network, data[0].inputs).layers
    space = SearchSpace.build(layers)
    histograms = observe_inputs(network, [layer.name for layer in layers], data)
    prepared = prepare(network, layers, histograms)
    merged = merge_first(data, statistics_samples(layers))
    scorers = [
        scorer_of(prepared, space, merged, correct=correct, memory=m, precision=precision)
        for m in (memory, 0)
    ]
    reusing, whole = scorers
    draw = random.Random(0)
    names = [variable.name for variable in space.variables]
    incumbent = space.start
    reusing.score(incumbent, incumbent)
    whole.score(incumbent)
    plain: list[float] = []
    ours: list[float] = []
    without: list[float] = []
    apart: list[float] = []
    together: list[float] = []
    for _ in range(n_steps):
        plain.append(seconds_of(lambda: run_plain(network, data), device))
        candidates = []
        free = draw.sample(names, len(names))
        for index in range(n_candidates):  # none twice, as in a search
            lowered = free[index % len(free)]
            bits = max(2, incumbent[lowered].weight_bits - 1 - index // len(free))
            candidate = BitConfig({**incumbent, lowered: LayerBits(bits, bits)})
            candidates.append(candidate)
            # A weight is rounded once in a search and then kept, so it is no part of the time.
            for scorer in scorers:
                round_weights(scorer, candidate)
            ours.append(
                seconds_of(
                    lambda candidate=candidate, origin=incumbent: reusing.score(candidate, origin),
                    device,
                )
            )
        without.append(seconds_of(lambda candidate=candidate: whole.score(candidate), device))
        in_one, one_by_one = (
            functools.partial(run, reusing, candidates, incumbent) for run in (in_one_pass, alone)
        )
        assert in_one() == one_by_one()  # which also finds out what may run together
        apart.append(seconds_of(one_by_one, device))
        together.append(seconds_of(in_one, device))
        incumbent = draw.choice(candidates)
    one = statistics.median(plain)
    assert reusing.reuse is not None, reusing.warnings
    return {
        "to_forward": statistics.mean(ours) / one,
        "to_without_reuse": statistics.mean(ours) / statistics.median(without),
        "without_reuse_to_forward": statistics.median(without) / one,
        "together_to_apart": statistics.median(a / b for a, b in zip(together, apart, strict=True)),
        "most_together": reusing.most_together,
        "forward_seconds": one,
        "kept_mib": reusing.reuse.n_bytes / 2**20,
    }


def scorer_of(
    prepared: nn.Module,
    space: SearchSpace,
    data: Batches,
    *,
    correct: bool,
    memory: int,
    precision: Precision,
) -> Scorer:
    """Return a scorer with the defaults of a search; the table of sensitivities does not matter."""
    free = {name for variable in space.variables for name in variable.layers}
    table = {
        layer.name: dict.fromkeys(range(2, 9) if layer.name in free else (8,), 0.0)
        for layer in space.layers
    }
    return Scorer(
        prepared,
        Sensitivity(table, table),
        data,
        functional.cross_entropy,
        output_rise=output_rise_of(functional.cross_entropy),
        correction=StatisticsCorrection(prepared, data, precision) if correct else None,
        memory=memory,
        precision=precision,
    )


def in_one_pass(scorer: Scorer, configs: list[BitConfig], incumbent: BitConfig) -> Any:
    """Measure candidates in one pass, whether a search would or not."""
    return scorer._measure_together(configs, incumbent)


def alone(scorer: Scorer, configs: list[BitConfig], incumbent: BitConfig) -> Any:
    """Measure candidates one after the other."""
    return [scorer.measure(config, incumbent) for config in configs]


@torch.no_grad()
def round_weights(scorer: Scorer, config: BitConfig) -> None:
    """Find the scales and ranges of an assignment, which a search finds once."""
    from hq_optuna.quantization.prepare import (
        float_weight,
        input_quantizer,
        prepared_layers,
        weight_quantizer,
    )

    for name, layer in prepared_layers(scorer.prepared).items():
        weight_quantizer(layer).quantized(float_weight(layer), config[name].weight_bits)
        input_quantizer(layer).range(config[name].activation_bits)


@torch.no_grad()
def run_plain(network: nn.Module, data: Batches) -> None:
    """Run the float network on all batches."""
    for batch in data:
        forward(network, batch.inputs)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--images", type=int, help="[default: 256 of 8x8, 512 of 32x32, 32 else]")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--memory", type=int, default=DEFAULT_MEMORY, help="bytes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="float32",
        help="of candidates; the float forward pass stays in float32",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    outcome = Outcome("candidate")
    outcome.details["precision"] = arguments.precision
    for name in arguments.networks:
        n = arguments.images or IMAGES.get(name, 32)
        n, n_steps = (8, 1) if arguments.quick else (n, arguments.steps)
        for correct in (True, False):
            found = measure(
                *(name, n, n_steps, arguments.candidates, correct),
                memory=arguments.memory,
                precision=arguments.precision,
            )
            suffix = f"{name}{'' if correct else '_no_correction'}"
            for what in RATIOS:
                outcome.figures[f"ratio_{what}_{suffix}"] = round(found[what], 3)
            outcome.details[suffix] = {key: round(value, 4) for key, value in found.items()}
            print(
                f"{suffix:28} candidate / float forward {found['to_forward']:.3f}   "
                f"/ without reuse {found['to_without_reuse']:.3f}   "
                f"without reuse / float forward {found['without_reuse_to_forward']:.3f}   "
                f"{arguments.candidates} in one pass / apart {found['together_to_apart']:.3f} "
                f"(a search tries it: {found['most_together'] > 1})   "
                f"{found['kept_mib']:.0f} MiB kept",
                flush=True,
            )
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
