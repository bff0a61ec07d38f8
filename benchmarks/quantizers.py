"""How well ResNet-20 / CIFAR-10 keeps its accuracy under each quantizer of weights, no training.

All 20 layers have the same quantizer and bits, first and last layer too or at 8 bits uniform;
activations stay in float and statistics are corrected. Accuracy is on the test images, with weights
rounded to nearest and, where the quantizer allows it, with compensated rounding. ``error`` is
‖Q(w) − w‖² / ‖w‖² over all weights, ``predicted`` the sum over layers of the score ``fisher``, from
calibration images alone; ``spearman_predicted`` tells how well it ranks the quantizers by their
loss on the test images.

Three variants stand beside the library's quantizers, for what was decided there: ``twn`` is ternary
with the threshold of its paper, 0.7 times the mean magnitude; ``two_scales`` ternary with one scale
for positive and one for negative weights (as trained ternary quantization has them), of least
squared error; ``dorefa_layer`` DoReFa with the maximum of the layer instead of the channel.

    python -m benchmarks.quantizers --data DIR --checkpoint FILE [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

from benchmarks.outcome import Outcome
from hq_optuna.network.batches import Batches, forward, read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.quantization.compensation import compensate_weights
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.quantization.quantizers import QUANTIZERS
from hq_optuna.scoring.layer_sums import measure_curvature
from hq_optuna.space.assignment import BitConfig
from hq_optuna.study_files.study_file import StudyFile, find_study

ROWS = (
    *(("binary", 1), ("uniform", 2), ("ternary", 2), ("midrise", 2), ("dorefa", 2)),
    *(("uniform", 3), ("midrise", 3), ("dorefa", 3)),
    *(("uniform", 4), ("midrise", 4), ("dorefa", 4)),
)


def twn(weight: Tensor, bits: int) -> Tensor:
    """Return ternary weights with the paper's threshold, ``(channels, …)``."""
    rows = weight.flatten(1)
    above = rows.abs() > 0.7 * rows.abs().mean(1, keepdim=True)
    scale = (rows.abs() * above).sum(1, keepdim=True) / above.sum(1, keepdim=True).clamp_min(1)
    return (rows.sign() * above * scale).reshape(weight.shape)


def two_scales(weight: Tensor, bits: int) -> Tensor:
    """Return ternary weights with a scale for each sign, of least squared error."""
    rows = weight.flatten(1).double()
    found = torch.zeros_like(rows)
    for sign in (1, -1):
        side = (sign * rows).clamp_min(0)
        sums = side.sort(1, descending=True).values.cumsum(1)
        best = (sums.square() / torch.arange(1, rows.shape[1] + 1)).argmax(1, keepdim=True)
        scale = sums.gather(1, best) / (best + 1)
        found = torch.where(side > scale / 2, sign * scale, found)
    return found.to(weight.dtype).reshape(weight.shape)


def dorefa_layer(weight: Tensor, bits: int) -> Tensor:
    """Return DoReFa's weights with one maximum for the layer, scaled to each channel."""
    n = 2**bits - 1
    squeezed = torch.tanh(weight)
    steps = torch.round(n * (squeezed / (2 * squeezed.abs().max()) + 0.5))
    rows, published = weight.flatten(1), (2 * steps / n - 1).flatten(1)
    scale = (rows * published).sum(1) / published.square().sum(1)
    return (published * scale[:, None]).reshape(weight.shape)


VARIANTS: tuple[tuple[str, int, Callable[[Tensor, int], Tensor]], ...] = (
    *(("twn", 2, twn), ("two_scales", 2, two_scales)),
    *(("dorefa_layer", 2, dorefa_layer), ("dorefa_layer", 3, dorefa_layer)),
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="rows of 2 bits alone")
    arguments = parser.parse_args()

    outcome = Outcome("quantizers")
    study = StudyFile.load(find_study("cifar10_resnet20"))
    options = study.parse_options(
        ["--data", str(arguments.data), "--checkpoint", str(arguments.checkpoint)]
    )
    parts = study.build(Path(), options)
    assert parts.test is not None
    bench = Bench(
        parts.network,
        read_batches(parts.calibration),
        read_batches(parts.test(), batch_size=256, what="test"),
        outcome,
    )
    for name, bits in ROWS:
        if bits == 2 or not arguments.quick:
            bench.row(name, bits)
    for name, bits, variant in VARIANTS:
        if bits == 2 or not arguments.quick:
            bench.row(name, bits, variant)
    predicted, losses = zip(*bench.ranked, strict=True)
    found = float(spearmanr(predicted, losses).statistic)
    outcome.figures["spearman_predicted"] = round(found, 4)
    outcome.finish(arguments.out)


class Bench:
    """The network, its data, and the curvature that predictions are made from.

    Args:
        network: The float network.
        data: Calibration batches.
        test: Test batches.
        outcome: Where figures go.
    """

    def __init__(
        self, network: torch.nn.Module, data: Batches, test: Batches, outcome: Outcome
    ) -> None:
        self.network = network
        self.data, self.test, self.outcome = data, test, outcome
        self.layers = introspect(network, data[0].inputs).layers
        self.curvature = measure_curvature(
            "fisher", network, self.layers, data, functional.cross_entropy
        )
        self.ranked: list[tuple[float, float]] = []

    def row(
        self, name: str, bits: int, variant: Callable[[Tensor, int], Tensor] | None = None
    ) -> None:
        """Measure one quantizer at one number of bits, print it and keep the figures."""
        inner = [layer.name for layer in self.layers[1:-1]]
        everywhere = [layer.name for layer in self.layers]
        compensates = variant is None and QUANTIZERS[name].compensates
        for where, names in (("", everywhere), ("_inner", inner)):
            chosen = {} if variant is not None else dict.fromkeys(names, name)
            prepared = prepare(self.network, self.layers, quantizers=chosen)
            config = BitConfig({n: (bits if n in names else 8, 32) for n in everywhere})
            if variant is not None:
                for n in names:
                    holder = weight_quantizer(prepared.get_submodule(n))
                    weight = float_weight(prepared.get_submodule(n)).detach()
                    holder.keep(weight, bits, variant(weight, bits), torch.ones(len(weight)))
            correction = StatisticsCorrection(prepared, self.data)
            for how in ("nearest", "compensated") if compensates else ("nearest",):
                if how == "compensated":
                    needed = {n: [config[n].weight_bits] for n in everywhere}
                    compensate_weights(prepared, self.layers, self.data, needed)
                self.measure(prepared, correction, config, f"{name}{where}_{bits}_{how}")
                set_bits(prepared, dict.fromkeys(config, (32, 32)))
                correction.reset()

    @torch.no_grad()
    def measure(
        self,
        prepared: torch.nn.Module,
        correction: StatisticsCorrection,
        config: BitConfig,
        key: str,
    ) -> None:
        """Measure accuracy, loss, error and prediction of a prepared network."""
        set_bits(prepared, config)
        change = size = predicted = 0.0
        for layer in self.layers:
            module = prepared.get_submodule(layer.name)
            weight, holder = float_weight(module), weight_quantizer(module)
            bits = config[layer.name].weight_bits
            change += float((holder.quantized(weight, bits) - weight).double().square().sum())
            size += float(weight.double().square().sum())
            mean = float(self.curvature.weights[layer.name].double().mean())
            predicted += 0.5 * mean * float(holder.output_error(weight, bits).sum())
        correction.apply()
        outputs = torch.cat([forward(prepared, batch.inputs) for batch in self.test])
        labels = torch.cat([batch.labels for batch in self.test])
        loss = float(functional.cross_entropy(outputs, labels))
        accuracy = 100 * float((outputs.argmax(1) == labels).double().mean())
        self.ranked.append((predicted, loss))
        figures = {"accuracy": accuracy, "loss": loss, "error": change / size}
        for what, value in {**figures, "predicted": predicted}.items():
            self.outcome.figures[f"{what}_{key}"] = round(value, 2 if what == "accuracy" else 4)
        print(
            f"{key:32} error {change / size:7.4f}  accuracy {accuracy:6.2f}  loss {loss:6.3f}  "
            f"predicted {predicted:8.4f} nats",
            flush=True,
        )


if __name__ == "__main__":
    main()
