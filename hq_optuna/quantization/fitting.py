"""What layers need at all their bits (ranges, scales, rounded weights), found and handed over.

A part of a network's layers is fitted from one pass of the float network. What that gave is a set
of tensors, small enough to keep: a byte for each weight and number of bits. A copy of the network
elsewhere that loads them computes the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hq_optuna.network.batches import Batches, forward
from hq_optuna.quantization.compensation import compensate_weights
from hq_optuna.quantization.modules import Kept, WeightFakeQuantize
from hq_optuna.quantization.observers import InputHistogram, observed_inputs
from hq_optuna.quantization.prepare import float_weight, input_quantizer, weight_quantizer
from hq_optuna.quantization.ranges import AffineRange
from hq_optuna.space.layers import LayerSpec

Bits = Mapping[str, tuple[set[int], set[int]]]
"""Layer → bits of its weights, and of what enters it."""


@torch.no_grad()
def fit_layers(
    prepared: nn.Module,
    layers: Sequence[LayerSpec],
    data: Batches,
    bits: Bits,
    *,
    compensate: bool,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Find ranges, scales and rounded weights of some layers of a prepared network in float.

    Costs a pass over the data. ``progress`` is called with (layers done, layers). Raises
    `DataError` where a layer receives NaN or infinity.
    """
    names = [layer.name for layer in layers]
    with observed_inputs(prepared, names) as histograms:
        if compensate:
            weights = {name: bits[name][0] for name in names}
            compensate_weights(prepared, layers, data, weights, progress=progress)
        else:
            for batch in data:
                forward(prepared, batch.inputs)
    for name in names:
        module = prepared.get_submodule(name)
        rounds = input_quantizer(module)
        rounds.calibrate(histograms[name])
        for b in bits[name][1]:
            rounds.range(b)
        for b in bits[name][0]:
            weight_quantizer(module).scale(float_weight(module).detach(), b)


def fitted_tensors(
    prepared: nn.Module, layers: Sequence[LayerSpec], bits: Bits
) -> dict[str, Tensor]:
    """Return what `fit_layers` found, on the CPU."""
    found: dict[str, Tensor] = {}
    for place, layer in enumerate(layers):
        module = prepared.get_submodule(layer.name)
        weights, inputs = weight_quantizer(module), input_quantizer(module)
        assert inputs.histogram is not None, "the layer was fitted"
        found[f"{place}.counts"] = torch.from_numpy(inputs.histogram.counts)
        found[f"{place}.edges"] = torch.from_numpy(inputs.histogram.edges)
        for b in sorted(bits[layer.name][1]):
            found[f"{place}.range.{b}"] = torch.tensor(
                inputs.range(b), dtype=torch.float64, device="cpu"
            )
        found |= {
            f"{place}.{name}": v for name, v in _weights(module, weights, bits[layer.name][0])
        }
    return found


def _weights(
    module: nn.Module, quantizer: WeightFakeQuantize, bits: set[int]
) -> Iterator[tuple[str, Tensor]]:
    weight = float_weight(module).detach()
    for b in sorted(bits):
        yield f"scale.{b}", quantizer.scale(weight, b).cpu()
        kept = quantizer.kept_at(weight, b)
        if kept is not None:
            yield f"codes.{b}", kept.codes.cpu()
            if kept.output_error is not None:
                yield f"error.{b}", kept.output_error.cpu()


def load_fitted_(
    prepared: nn.Module, layers: Sequence[LayerSpec], bits: Bits, found: Mapping[str, Tensor]
) -> None:
    """Give the layers of another copy of the network what `fitted_tensors` returned."""
    for place, layer in enumerate(layers):
        module = prepared.get_submodule(layer.name)
        weight = float_weight(module).detach()
        inputs, weights = input_quantizer(module), weight_quantizer(module)
        histogram = (found[f"{place}.{name}"].numpy() for name in ("counts", "edges"))
        ranges = {}
        for b in sorted(bits[layer.name][1]):
            step, zero_point = found[f"{place}.range.{b}"].tolist()
            ranges[b] = AffineRange(step, int(zero_point))
        inputs.calibrate(InputHistogram(*histogram), ranges)
        for b in sorted(bits[layer.name][0]):
            scale = found[f"{place}.scale.{b}"].to(weight.device)
            codes = found.get(f"{place}.codes.{b}")
            if codes is None:
                weights.scales[b] = scale
                continue
            error = found.get(f"{place}.error.{b}")
            kept = Kept(codes.to(weight.device), scale, error)
            weights.keep_as(weight, b, kept)
