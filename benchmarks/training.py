"""What training brings back: ResNet-20 / CIFAR-10 at about two bits, and the next step's Hessian.

Bits of weights come from the project's own exact allocation of the layer sums ``fisher`` (with
compensated rounding) under a budget of size, all 20 layers searched and counted:

``13x_a4``         at most 32 / 13.1 = 2.44 bits a weight on average, 4-bit activations, and the
                   image, which the first layer reads, at 4 bits too
``13x_a4_image8``  the same, but the image keeps the 8 bits that its pixels have
``avg2_a8``        at most 2 bits on average, 8-bit activations

Weights are rounded by the quantizer ``midrise``. The network starts from compensated weights and
corrected statistics, is trained by distillation from the float network on all training images but
the 512 that calibrate, and its statistics are corrected again. Nothing is chosen by the test
images: no early stopping, no best epoch. ``drop_…`` are points of test accuracy below the float
network, mean over seeds; the standard error is that of the paired difference: per image, correct in
float less correct after training (mean over seeds), over the images. ``divergence_…`` is the mean
KL divergence of the outputs on the test images from the float network's, nats.

Second moments: a network at 4 bits everywhere is trained, then ``--assignments`` random ones lower
some of its layers to 2 and 3 bits. Spearman's rank correlation of the predicted rise of the loss
with the measured one on the test images, once with the curvature of the optimizer's second moments
and once with that of calibration Adam at the same trained weights; ``…_trace`` takes the mean
curvature of each layer, ``…_divergence`` measures the divergence from the trained network's outputs
instead.

``--only tuning`` is how settings are chosen: it trains ``13x_a4_image8`` on fewer images, from seed
0, and measures accuracy and divergence from the float network's outputs on the study's 1,000
validation images, and that of outputs softened at temperature 4 on augmented ones
(``augmented_softened_…``). The float network knows these by heart, so they tell trainings apart;
they do not tell what unseen images would say.

    python -m benchmarks.training --data DIR --checkpoint FILE [--quick] [--out FILE] [--seeds 3]
        [--only 13x_a4 avg2_a8 moments] [--set epochs=5 learning_rate=0.002] [--quantizer uniform]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.outcome import Outcome
from hq_optuna.curvature import Curvature, calibration_adam
from hq_optuna.network.batches import Batches, forward, read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.compensation import compensate_weights
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.quantization.quantizers import QUANTIZERS
from hq_optuna.scoring import measure_layer_sums
from hq_optuna.search import Additive
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import CostModel
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.training import Trainer, TrainingSettings, rounded_copy
from studies import cifar10_resnet20 as study

COMPRESSION = 13.1
TARGETS: dict[str, tuple[float, int, int]] = {
    "13x_a4": (32 / COMPRESSION, 4, 4),
    "13x_a4_image8": (32 / COMPRESSION, 4, 8),
    "avg2_a8": (2.0, 8, 8),
}
"""Name → bits a weight at most on average, bits of activations, bits of the image."""
N_CALIBRATION = 512
TUNING_TEMPERATURE = 4.0
MOMENT_BITS, MOMENT_EPOCHS = 4, 2
MEANS = ("trained_second_moment_trace", "calibration_adam_trace")


class Parts(NamedTuple):
    """What every measurement starts from."""

    network: nn.Module
    layers: Sequence[LayerSpec]
    calibration: Batches
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: Batches
    quantizer: str


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--assignments", type=int, default=60)
    names = [*TARGETS, "moments"]
    parser.add_argument("--only", nargs="+", choices=[*names, "tuning"], default=names)
    parser.add_argument(
        "--quantizer", choices=list(QUANTIZERS), default="midrise", help="of weights"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = dict(text.partition("=")[::2] for text in arguments.set)
    settings = TrainingSettings.from_json(
        {**SETTINGS.to_json(), **{name: parsed(value) for name, value in given.items()}}
    )
    if arguments.quick:
        arguments.seeds, arguments.assignments = 1, 8
        settings = replace(settings, epochs=1, warmup_epochs=0)
    outcome = Outcome("training")
    outcome.details["settings"] = settings.to_json()
    parts = read(arguments.data, arguments.checkpoint, arguments.quick, arguments.quantizer)
    for name in TARGETS:
        if name in arguments.only:
            measure_target(name, parts, settings, range(arguments.seeds), outcome)
    if "tuning" in arguments.only:
        measure_tuning(parts, settings, outcome)
    if "moments" in arguments.only:
        compare_moments(parts, settings, arguments.assignments, outcome)
    outcome.finish(arguments.out)


SETTINGS = TrainingSettings(channels_last=True, precision="bfloat16")


def parsed(value: str) -> Any:
    """Return a setting as typed: JSON where it is, else text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def read(data: Path, checkpoint: Path, quick: bool, quantizer: str) -> Parts:
    """Read the study's parts."""
    network = study.network(checkpoint)
    calibration = read_batches(study.calibration(data, n_calibration=N_CALIBRATION))
    train = study.train(data, n_calibration=N_CALIBRATION)
    if quick:
        train = train[0][:256], train[1][:256]
    return Parts(
        network=network,
        layers=introspect(network, calibration[0].inputs).layers,
        calibration=calibration,
        train=train,
        validation=study.validation(data),
        test=read_batches(study.test(data), batch_size=128),
        quantizer=quantizer,
    )


def prepared_for(parts: Parts, bits: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return the prepared network with compensated weights for these bits."""
    names = [layer.name for layer in parts.layers]
    histograms = observe_inputs(parts.network, names, parts.calibration)
    quantizers = dict.fromkeys(names, parts.quantizer)
    prepared = prepare(parts.network, parts.layers, histograms, quantizers=quantizers)
    compensate_weights(prepared, parts.layers, parts.calibration, bits)
    return prepared


def allocate(parts: Parts, average: float, activation_bits: int, image_bits: int) -> BitConfig:
    """Return the exact allocation for a number of bits a weight on average."""
    space = SearchSpace.build(
        parts.layers, bits=range(2, 9), activation_bits=None, pin_first_last=None
    )
    prepared = prepared_for(parts, {layer.name: range(2, 9) for layer in parts.layers})
    table = measure_layer_sums(
        "fisher", parts.network, prepared, space, parts.calibration, functional.cross_entropy
    ).sensitivity
    # Activations have the same bits everywhere, so all assignments have the same part of theirs.
    sums = {name: {"weights": table.weights[name], "activations": {}} for name in table.weights}
    limit = sum(layer.n_weights for layer in parts.layers) * average / 8
    cost = space.costs("size_bytes")
    best = Additive(space, sums, cost).exact(limit)
    assert best is not None
    first = parts.layers[0].name
    return BitConfig(
        {
            name: (b.weight_bits, image_bits if name == first else activation_bits)
            for name, b in best.config.items()
        }
    )


def start_of(parts: Parts, config: BitConfig) -> nn.Module:
    """Return the prepared network at these bits, with compensated weights, corrected."""
    prepared = prepared_for(parts, {name: [b.weight_bits] for name, b in config.items()})
    set_bits(prepared, config)
    StatisticsCorrection(prepared, parts.calibration).apply()
    return prepared


@torch.no_grad()
def correct(network: nn.Module, data: Batches) -> Tensor:
    """Return 1 for each image whose class is right, else 0, in double precision."""
    hits = [forward(network, batch.inputs).argmax(1) == batch.labels for batch in data]
    return torch.cat(hits).double()


def with_validation(parts: Parts) -> tuple[Tensor, Tensor]:
    """Return all training images that do not calibrate: nothing is chosen by validation here."""
    if len(parts.train[1]) < len(parts.validation[1]):  # a quick run
        return parts.train
    pairs = zip(parts.train, parts.validation, strict=True)
    images, labels = (torch.cat(pair) for pair in pairs)
    return images, labels


def train_(
    prepared: nn.Module, parts: Parts, data: tuple[Tensor, Tensor], settings: TrainingSettings
) -> Trainer:
    """Train a prepared network, printing each epoch, correct it, and return the trainer."""
    trainer = Trainer(
        prepared,
        data,
        settings,
        teacher=parts.network,
        loss_fn=functional.cross_entropy,
        augment=study.augment,
    )
    for epoch in trainer.epochs():
        print(
            f"  seed {settings.seed} epoch {epoch.epoch:2} loss {epoch.loss:.4f} training accuracy "
            f"{100 * (epoch.training_accuracy or 0):.2f} {epoch.seconds:.1f} s",
            flush=True,
        )
    StatisticsCorrection(prepared, parts.calibration, of=parts.network).apply()
    return trainer


def measure_tuning(parts: Parts, settings: TrainingSettings, outcome: Outcome) -> None:
    """Train one assignment and measure it on validation images."""
    prepared = start_of(parts, allocate(parts, *TARGETS["13x_a4_image8"]))
    validation = read_batches(parts.validation, batch_size=128)
    images, labels = parts.validation
    chance = torch.Generator().manual_seed(0)
    changed = torch.cat([study.augment(images, chance) for _ in range(3)])
    augmented = read_batches((changed, labels.repeat(3)), batch_size=128)
    for when in ("untrained", "trained"):
        if when == "trained":
            train_(prepared, parts, parts.train, settings)
        accuracy = 100 * float(correct(prepared, validation).mean())
        divergence = mean_divergence(prepared, parts.network, validation)
        softened = mean_divergence(prepared, parts.network, augmented, TUNING_TEMPERATURE)
        outcome.figures[f"validation_accuracy_{when}"] = round(accuracy, 2)
        outcome.figures[f"validation_divergence_{when}"] = round(divergence, 4)
        outcome.figures[f"augmented_softened_divergence_{when}"] = round(softened, 4)


@torch.no_grad()
def mean_divergence(
    network: nn.Module, teacher: nn.Module, data: Batches, temperature: float = 1.0
) -> float:
    """Return the mean of T² times the KL divergence from the teacher's softened outputs, nats."""
    total = 0.0
    for batch in data:
        own, target = (
            functional.log_softmax(forward(n, batch.inputs) / temperature, 1)
            for n in (network, teacher)
        )
        total += float(functional.kl_div(own, target, reduction="sum", log_target=True))
    return temperature**2 * total / data.n_samples


def measure_target(
    name: str, parts: Parts, settings: TrainingSettings, seeds: range, outcome: Outcome
) -> None:
    """Train one assignment from each seed and report it beside the float network."""
    config = allocate(parts, *TARGETS[name])
    size = CostModel(parts.layers, "size_bytes")
    float_right = correct(parts.network, parts.test)
    ratio = size.float32 / size.cost(config)
    print(f"{name}: {ratio:.2f}x smaller, {32 / ratio:.3f} bits a weight, {dict(config)}")
    rights, details = [], []
    for seed in seeds:
        prepared = start_of(parts, config)
        untrained = 100 * float(correct(prepared, parts.test).mean())
        before = mean_divergence(prepared, parts.network, parts.test)
        trainer = train_(prepared, parts, with_validation(parts), replace(settings, seed=seed))
        rights.append(correct(prepared, parts.test))
        found = 100 * float(rights[-1].mean())
        seconds = sum(epoch.seconds for epoch in trainer.history)
        after = mean_divergence(prepared, parts.network, parts.test)
        details.append(
            {"seed": seed, "untrained": untrained, "trained": found, "s": seconds}
            | {"divergence_untrained": before, "divergence_trained": after}
        )
        told = f"{untrained:.2f} untrained ({before:.4f} nats), {found:.2f} ({after:.4f} nats)"
        print(f"  seed {seed}: {told} trained", flush=True)
    difference = float_right - torch.stack(rights).mean(0)  # (N,)
    error = 100 * float(difference.std()) / len(difference) ** 0.5
    outcome.figures[f"accuracy_{name}"] = round(statistics.mean(d["trained"] for d in details), 2)
    outcome.figures[f"drop_{name}"] = round(100 * float(difference.mean()), 2)
    outcome.figures[f"drop_{name}_standard_error"] = round(error, 2)
    for when in ("untrained", "trained"):
        mean = statistics.mean(d[f"divergence_{when}"] for d in details)
        outcome.figures[f"divergence_{name}_{when}"] = round(mean, 4)
    outcome.figures[f"bits_{name}"] = round(32 / ratio, 4)
    outcome.details[name] = {
        "bits": {layer: list(bits) for layer, bits in config.items()},
        "float": 100 * float(float_right.mean()),
        "seeds": details,
    }


def compare_moments(
    parts: Parts, settings: TrainingSettings, n_assignments: int, outcome: Outcome
) -> None:
    """Hold both curvatures at the same trained weights against measured rises of the loss."""
    names = [layer.name for layer in parts.layers]
    uniform = BitConfig.uniform(names, MOMENT_BITS, MOMENT_BITS)
    prepared = start_of(parts, uniform)
    epochs = min(MOMENT_EPOCHS, settings.epochs)
    settings = replace(settings, epochs=epochs, optimizer="adamw", blend=0.0)
    trainer = train_(prepared, parts, with_validation(parts), settings)
    moments = trainer.second_moments()
    assert moments is not None
    measured = calibration_adam(
        rounded_copy(prepared), parts.layers, parts.calibration, functional.cross_entropy
    )
    curvatures = {
        "trained_second_moment": moments.curvature(measured),
        "calibration_adam": measured,
    }
    start = mean_loss(prepared, parts.test)
    chance = random.Random(0)
    rises: list[float] = []
    divergences: list[float] = []
    predicted: dict[str, list[float]] = {name: [] for name in (*curvatures, *MEANS)}
    trained = rounded_copy(prepared)
    for _ in range(n_assignments):
        lowered = {
            name: chance.choice((2, 3)) for name in chance.sample(names, chance.randint(1, 8))
        }
        set_bits(prepared, {name: (b, MOMENT_BITS) for name, b in lowered.items()})
        rises.append(mean_loss(prepared, parts.test) - start)
        divergences.append(mean_divergence(prepared, trained, parts.test))
        set_bits(prepared, uniform)
        for name, curvature in curvatures.items():
            diagonal, mean = predicted_rises(prepared, lowered, curvature)
            predicted[name].append(diagonal)
            predicted[f"{name}_trace"].append(mean)
    for name, values in predicted.items():
        for what, truth in (("", rises), ("_divergence", divergences)):
            found = float(spearmanr(values, truth).statistic)
            outcome.figures[f"spearman_{name}{what}"] = round(found, 4)
            print(f"{name}{what}: Spearman {found:.3f}, {n_assignments} assignments", flush=True)
    outcome.details["moments"] = {
        "rises": rises,
        "divergences": divergences,
        "predicted": predicted,
        "clipped": dict(moments.clipped),
        "steps": moments.n_steps,
    }


def predicted_rises(
    prepared: nn.Module, lowered: Mapping[str, int], curvature: Curvature
) -> tuple[float, float]:
    """Return ½ Σ h Δ², element by element and with each layer's mean of h.

    Δ goes from the weights as they are rounded now to the lowered ones.
    """
    diagonal = mean = 0.0
    for name, bits in lowered.items():
        module = prepared.get_submodule(name)
        quantizer, weight = weight_quantizer(module), float_weight(module)
        change = quantizer.quantized(weight, bits) - quantizer.quantized(weight, quantizer.bits)
        h, squared = curvature.weights[name].double(), change.double().square()
        diagonal += 0.5 * float((h * squared).sum())
        mean += 0.5 * float(h.mean() * squared.sum())
    return diagonal, mean


@torch.no_grad()
def mean_loss(network: nn.Module, data: Batches) -> float:
    """Return the mean cross-entropy over the samples."""
    losses = [
        float(functional.cross_entropy(forward(network, b.inputs), b.labels, reduction="sum"))
        for b in data
    ]
    return sum(losses) / data.n_samples


if __name__ == "__main__":
    main()
