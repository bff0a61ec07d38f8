"""A trained network as what the next steps of a search are made from.

Its weights *are* the rounded ones, so that at its own bits it does no harm at all, and every other
number of bits is judged by what it changes against that. Scales and ranges that were learned stay
for its own bits, and a layer that keeps its bits is trained on from the float weights behind its
rounded ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hq_optuna.network.copies import copied
from hq_optuna.quantization.correction import SHIFT
from hq_optuna.quantization.prepare import (
    float_weight,
    get_bits,
    input_quantizer,
    prepare,
    prepared_layers,
    prepared_names,
    weight_quantizer,
)
from hq_optuna.quantization.ranges import AffineRange
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec
from hq_optuna.training.trained import load_trained_

_ORIGINAL = "parametrizations.weight.original"


@dataclass(frozen=True)
class TrainedBase:
    """A trained network, and what it learned for its bits.

    Attributes:
        network: Without quantizers; its weights are the rounded ones.
        config: Bits it was trained at.
        scales: Layer → scale of its weights at these bits, ``(channels,)``.
        ranges: Layer → range of its input at these bits.
        behind: Layer → the float weights that round to those of the network.
    """

    network: nn.Module
    config: BitConfig
    scales: Mapping[str, Tensor]
    ranges: Mapping[str, AffineRange]
    behind: Mapping[str, Tensor]

    def settle_(self, prepared: nn.Module) -> None:
        """Give a copy of `network` that was prepared anew what was learned for these bits."""
        for name, module in prepared_layers(prepared).items():
            bits = self.config[name]
            if name in self.scales:
                weight, quantizer = float_weight(module).detach(), weight_quantizer(module)
                scale = self.scales[name].to(weight.device)
                error = torch.zeros(len(scale), dtype=torch.float64, device=weight.device)
                quantizer.keep(
                    *(weight, bits.weight_bits, weight.clone(), scale, error),
                    training_start=self.behind[name].to(weight.device),
                )
            if name in self.ranges:
                input_quantizer(module).ranges[bits.activation_bits] = self.ranges[name]


@torch.no_grad()
def trained_base(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    tensors: Mapping[str, Tensor],
    quantizers: Mapping[str, str] | None = None,
) -> TrainedBase:
    """Return the base that `trained_tensors` of a trained network make.

    Args:
        model: The network as the search was given it; left as it is.
        layers: Its layers.
        tensors: On any device.
        quantizers: Layer → quantizer of its weights, where that is not the uniform one.

    Raises:
        CheckpointError: The tensors belong to a network of another structure.
    """
    prepared = prepare(model, layers, quantizers=quantizers)
    load_trained_(prepared, tensors)
    config = get_bits(prepared)
    state = prepared.state_dict()
    plain = copied(model)
    scales, ranges, behind = {}, {}, {}
    for name, module in prepared_layers(prepared).items():
        bits, quantizer = config[name], weight_quantizer(module)
        weight = state.pop(f"{name}.{_ORIGINAL}")
        if bits.weight_bits != FLOAT_BITS:
            behind[name] = weight
            weight = quantizer.quantized(float_weight(module), bits.weight_bits)
            scales[name] = quantizer.scale(float_weight(module), bits.weight_bits).clone()
        if bits.activation_bits != FLOAT_BITS:
            ranges[name] = input_quantizer(module).range(bits.activation_bits)
        state[f"{name}.weight"] = weight
        state.pop(f"{name}.{SHIFT}", None)  # zero: see `fold_shifts_`
        _untie_(plain.get_submodule(name), weight)
    for name, first in prepared_names(prepared).items():
        if name != first:
            del state[f"{name}.{_ORIGINAL}"]
            state.pop(f"{name}.{SHIFT}", None)
            state[f"{name}.weight"] = state[f"{first}.weight"]
    plain.load_state_dict(state)
    return TrainedBase(plain, config, scales, ranges, behind)


def _untie_(module: nn.Module, weight: Tensor) -> None:
    """Give a layer a weight of its own: one that it shares is rounded in this layer alone."""
    own = module._parameters.get("weight")
    if own is not None:
        module.register_parameter("weight", nn.Parameter(weight.clone(), own.requires_grad))


def without_bias(network: nn.Module) -> set[str]:
    """Return the names of a prepared network's layers that have no bias."""
    layers = prepared_layers(network).items()
    return {name for name, module in layers if getattr(module, "bias", None) is None}


@torch.no_grad()
def fold_shifts_(network: nn.Module) -> None:
    """Put the output shifts of statistics correction into biases, where training finds them.

    A layer without bias loses its shift: behind it training has other means.
    """
    for module in prepared_layers(network).values():
        shift = dict(module.named_buffers(recurse=False)).get(SHIFT)
        if shift is None:
            continue
        if getattr(module, "bias", None) is not None:
            module.bias.add_(shift)  # type: ignore[operator]
        shift.zero_()
