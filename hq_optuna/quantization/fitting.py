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
from hq_optuna.network.products import Product
from hq_optuna.quantization.compensation import compensate_weights
from hq_optuna.quantization.modules import InputFakeQuantize, Kept, WeightFakeQuantize
from hq_optuna.quantization.observers import InputHistogram, observed_inputs
from hq_optuna.quantization.prepare import (
    OTHER,
    factor_quantizers,
    float_weight,
    input_quantizer,
    weight_quantizer,
)
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
    products = [layer.name for layer in layers if layer.is_product]
    seconds = [f"{name}.{OTHER}" for name in products]
    with observed_inputs(prepared, names + seconds) as histograms:
        if compensate:
            weights = {name: bits[name][0] for name in names}
            compensate_weights(prepared, layers, data, weights, progress=progress)
        else:
            for batch in data:
                forward(prepared, batch.inputs)
    for name in names:
        module = prepared.get_submodule(name)
        for at, rounds in _rounding(module, name):
            rounds.calibrate(histograms[at])
            for b in bits[name][1]:
                rounds.range(b)
        for b in bits[name][0]:
            weight_quantizer(module).scale(float_weight(module).detach(), b)


def _rounding(module: nn.Module, name: str) -> list[tuple[str, InputFakeQuantize]]:
    """Return what rounds a layer's input, or both factors of a product, with where it is seen."""
    if not isinstance(module, Product):
        return [(name, input_quantizer(module))]
    first, second = factor_quantizers(module)
    return [(name, first), (f"{name}.{OTHER}", second)]


def fitted_tensors(
    prepared: nn.Module, layers: Sequence[LayerSpec], bits: Bits
) -> dict[str, Tensor]:
    """Return what `fit_layers` found, on the CPU."""
    found: dict[str, Tensor] = {}
    for place, layer in enumerate(layers):
        module = prepared.get_submodule(layer.name)
        for factor, (_, inputs) in enumerate(_rounding(module, layer.name)):
            assert inputs.histogram is not None, "the layer was fitted"
            found[f"{place}.counts.{factor}"] = torch.from_numpy(inputs.histogram.counts)
            found[f"{place}.edges.{factor}"] = torch.from_numpy(inputs.histogram.edges)
            for b in sorted(bits[layer.name][1]):
                found[f"{place}.range.{factor}.{b}"] = torch.tensor(
                    inputs.range(b), dtype=torch.float64, device="cpu"
                )
        if layer.is_product:
            continue
        weights = weight_quantizer(module)
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
        for factor, (_, inputs) in enumerate(_rounding(module, layer.name)):
            histogram = (found[f"{place}.{name}.{factor}"].numpy() for name in ("counts", "edges"))
            ranges = {}
            for b in sorted(bits[layer.name][1]):
                step, zero_point = found[f"{place}.range.{factor}.{b}"].tolist()
                ranges[b] = AffineRange(step, int(zero_point))
            inputs.calibrate(InputHistogram(*histogram), ranges)
        if layer.is_product:
            continue
        weight, weights = float_weight(module).detach(), weight_quantizer(module)
        for b in sorted(bits[layer.name][0]):
            scale = found[f"{place}.scale.{b}"].to(weight.device)
            codes = found.get(f"{place}.codes.{b}")
            if codes is None:
                weights.scales[b] = scale
                continue
            error = found.get(f"{place}.error.{b}")
            kept = Kept(codes.to(weight.device), scale, error)
            weights.keep_as(weight, b, kept)
