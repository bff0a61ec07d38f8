"""Curvature: ours against PyHessian run as HAWQ-V2 does, on ResNet-20 and the same images.

PyHessian's `hessian(...).trace()` sums over all parameters that take gradients, so the average
trace of each layer, HAWQ-V2's measure, takes one call a layer with the others frozen, with its own
stopping rule (`maxIter=100, tol=1e-3`) and all images in one batch, so that it keeps the gradient.
``shared`` is what a careful user could make of the same package: its `hessian_vector_product` with
one probe for all layers at once, and its stopping rule on the sum of the traces; less time, more
noise. Ours is `output_curvature`: one backward sweep for weights *and* inputs, stopped by its
standard error.

Each curvature is multiplied by the same squared errors of the same weights (trace form), and its
Spearman correlation with the truth is taken: the mean KL divergence and the loss rise of random
assignments (weights 3 to 8 bits, activations in float) on images that no curvature has seen. The
ratio of times compares curvature alone: squared errors cost all of them the same.

    python -m benchmarks.curvature --data DIR --checkpoint FILE [--quick] [--out FILE]
        [--images 512] [--assignments 100] [--truth FILE]

PyHessian (0.1, GPL, only needed here: ``pip install pyhessian``) imports and runs with present
torch as it is; only its `density`, which is not used here, calls the removed `torch.eig`.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.fidelity import divergence, interval, outputs_of
from benchmarks.outcome import Outcome
from hq_optuna.curvature import calibration_adam, output_curvature
from hq_optuna.curvature.fisher import CrossEntropyProbe
from hq_optuna.network.batches import Batches, read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.study_files.study_file import StudyFile, find_study

Traces = Mapping[str, float]
"""Layer → mean curvature of its weights."""
BITS = range(3, 9)


def pyhessian_by_layer(network: nn.Module, names: list[str], data: Batches, most: int) -> Traces:
    """Return HAWQ-V2's average trace of each layer, one call of PyHessian a layer."""
    from pyhessian import hessian

    (batch,) = data
    found = {}
    for name in names:
        own = copy.deepcopy(network).eval()
        for parameter in own.parameters():
            parameter.requires_grad_(False)
        weight = own.get_parameter(f"{name}.weight").requires_grad_(True)
        measured = hessian(
            own, functional.cross_entropy, data=(batch.inputs, batch.labels), cuda=False
        )
        found[name] = float(np.mean(measured.trace(maxIter=most, tol=1e-3))) / weight.numel()
        own.zero_grad(set_to_none=True)  # its graph holds itself alive
    return found


def pyhessian_shared(network: nn.Module, names: list[str], data: Batches, most: int) -> Traces:
    """Return each layer's average trace from probes of all layers at once."""
    from pyhessian import hessian, hessian_vector_product

    (batch,) = data
    own = copy.deepcopy(network).eval()
    weights = [own.get_parameter(f"{name}.weight") for name in names]
    for parameter in own.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in weights))
    measured = hessian(own, functional.cross_entropy, (batch.inputs, batch.labels), cuda=False)
    products: list[list[float]] = []
    last = 0.0
    for _ in range(most):
        signs = [torch.randint_like(w, high=2) * 2 - 1 for w in measured.params]
        moved = hessian_vector_product(measured.gradsH, measured.params, signs)
        products.append([float((v * hv).sum()) for v, hv in zip(signs, moved, strict=True)])
        mean = float(np.mean([sum(row) for row in products]))
        if abs(mean - last) / (last + 1e-6) < 1e-3:
            break
        last = mean
    own.zero_grad(set_to_none=True)
    by_id = {id(w): name for name, w in zip(names, weights, strict=True)}
    means = np.mean(products, 0)
    return {by_id[id(w)]: float(m) / w.numel() for w, m in zip(measured.params, means, strict=True)}


def truth_of(
    prepared: nn.Module, names: list[str], unseen: Batches, n: int
) -> tuple[list[list[int]], list[float], list[float]]:
    """Return random assignments, and the mean KL divergence and the loss rise of each."""
    set_bits(prepared, BitConfig.uniform(names, FLOAT_BITS, FLOAT_BITS))
    labels = torch.cat([batch.labels for batch in unseen])
    original = outputs_of(prepared, unseen)
    before = float(functional.cross_entropy(original, labels))
    draw, bits, kls, rises = random.Random(7), [], [], []
    for _ in range(n):
        bits.append([draw.randint(min(BITS), max(BITS)) for _ in names])
        pairs = [(b, FLOAT_BITS) for b in bits[-1]]
        set_bits(prepared, BitConfig(dict(zip(names, pairs, strict=True))))
        moved = outputs_of(prepared, unseen)
        kls.append(float(divergence(original, moved).mean()))
        rises.append(float(functional.cross_entropy(moved, labels)) - before)
    set_bits(prepared, BitConfig.uniform(names, FLOAT_BITS, FLOAT_BITS))
    return bits, kls, rises


def errors_of(prepared: nn.Module, names: list[str]) -> dict[str, dict[int, float]]:
    """Return ‖Q(W) − W‖² of each layer at each number of bits."""
    found = {}
    for name in names:
        module = prepared.get_submodule(name)
        weight: Tensor = float_weight(module).detach()
        quantizer = weight_quantizer(module)
        found[name] = {
            b: float((quantizer.quantized(weight, b) - weight).double().square().sum())
            for b in BITS
        }
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--images", type=int, default=512, help="images that curvature may read")
    parser.add_argument("--assignments", type=int, default=100)
    parser.add_argument("--most-probes", type=int, default=100, help="PyHessian's maxIter")
    parser.add_argument("--truth", type=Path, help="keeps the truth here, or takes it from here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.assignments, arguments.most_probes = 32, 6, 2

    outcome = Outcome("curvature")
    study = StudyFile.load(find_study("cifar10_resnet20"))
    options = ["--data", str(arguments.data), "--checkpoint", str(arguments.checkpoint)]
    parts = study.build(Path(), study.parse_options(options))
    assert parts.test is not None
    network = parts.network.eval()
    images, labels = (part[: arguments.images] for part in parts.calibration)
    data = read_batches((images, labels))
    whole = read_batches((images, labels), batch_size=len(labels))
    layers = introspect(network, data[0].inputs).layers
    names = [layer.name for layer in layers]
    prepared = prepare(network, layers)
    if arguments.truth is not None and arguments.truth.exists():
        kept = torch.load(arguments.truth, weights_only=True)
        bits, kls, rises = kept["bits"], kept["kls"], kept["rises"]
    else:
        n_unseen = 100 if arguments.quick else 10_000
        pairs = zip(parts.test(), parts.validation, strict=True)
        unseen = read_batches(tuple(torch.cat(two)[:n_unseen] for two in pairs), batch_size=256)
        bits, kls, rises = truth_of(prepared, names, unseen, arguments.assignments)
        if arguments.truth is not None:
            torch.save({"bits": bits, "kls": kls, "rises": rises}, arguments.truth)
    errors = errors_of(prepared, names)

    samples: dict[str, int] = {}

    def ours() -> Traces:
        found = output_curvature(network, layers, data, CrossEntropyProbe())
        samples["ours"] = found.n_samples
        return {name: float(h.double().mean()) for name, h in found.weights.items()}

    def adam() -> Traces:
        found = calibration_adam(network, layers, data, functional.cross_entropy)
        return {name: float(h.double().mean()) for name, h in found.weights.items()}

    most = arguments.most_probes
    contenders: dict[str, Callable[[], Traces]] = {
        "ours": ours,
        "adam": adam,
        "pyhessian_shared": lambda: pyhessian_shared(network, names, whole, most),
        "pyhessian": lambda: pyhessian_by_layer(network, names, whole, most),
    }
    ours()  # the first pass of a process is slower
    torch.manual_seed(0)
    for who, measure in contenders.items():
        seconds = []
        for _ in range(1 if who.startswith("pyhessian") or arguments.quick else 5):
            started = time.perf_counter()
            traces = measure()
            seconds.append(time.perf_counter() - started)
        scores = np.array(
            [
                sum(traces[name] * errors[name][b] for name, b in zip(names, row, strict=True))
                for row in bits
            ]
        )
        outcome.figures[f"seconds_{who}"] = round(statistics.median(seconds), 3)
        outcome.figures[f"spearman_{who}"] = round(float(spearmanr(scores, kls)[0]), 3)
        outcome.figures[f"spearman_rise_{who}"] = round(float(spearmanr(scores, rises)[0]), 3)
        outcome.details[who] = {"traces": traces, "interval": interval(scores, np.array(kls))}
        print(
            f"{who:17} {outcome.figures[f'seconds_{who}']:9.3f} s  Spearman with KL "
            f"{outcome.figures[f'spearman_{who}']}, with the loss rise "
            f"{outcome.figures[f'spearman_rise_{who}']}",
            flush=True,
        )
    figures = outcome.figures
    for who in ("pyhessian", "pyhessian_shared"):
        ratio = figures[f"seconds_{who}"] / figures["seconds_ours"]
        figures[f"speedup_over_{who}"] = round(ratio, 1)
    figures |= {"images_ours": samples["ours"], "images_pyhessian": len(labels)}
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
