"""A trained network: as flat tensors in an artifact, and as what the next steps start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hq_optuna.errors import CheckpointError
from hq_optuna.network.copies import copied
from hq_optuna.quantization.correction import SHIFT, add_shift
from hq_optuna.quantization.prepare import (
    float_weight,
    get_bits,
    input_quantizer,
    prepare,
    prepared_layers,
    prepared_names,
    set_bits,
    weight_quantizer,
)
from hq_optuna.quantization.ranges import AffineRange
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec

_ORIGINAL = "parametrizations.weight.original"
_STATE, _BITS, _SCALE, _RANGE = "network.", "bits.", "weight_scale.", "input_range."


def trained_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return everything that a prepared network's outputs at its bits come from, as copies.

    Names are ``network.<parameter or buffer>``, and of each prepared layer ``bits.<layer>``
    (weights, activations), ``weight_scale.<layer>`` and ``input_range.<layer>`` (scale, zero
    point). Compensated weights that were never trained are not among them.
    """
    tensors = {f"{_STATE}{n}": t.detach().clone() for n, t in network.state_dict().items()}
    config = get_bits(network)
    for name, module in prepared_layers(network).items():
        bits = config[name]
        tensors[f"{_BITS}{name}"] = torch.tensor(list(bits), device="cpu")
        if bits.weight_bits != FLOAT_BITS:
            scale = weight_quantizer(module).scale(float_weight(module), bits.weight_bits)
            tensors[f"{_SCALE}{name}"] = scale.detach().clone()
        if bits.activation_bits != FLOAT_BITS:
            range_ = list(input_quantizer(module).range(bits.activation_bits))
            # Double precision: single precision's scale and a zero point up to 2¹⁶, both exact.
            tensors[f"{_RANGE}{name}"] = torch.tensor(range_, dtype=torch.float64, device="cpu")
    return tensors


@torch.no_grad()
def load_trained_(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a freshly prepared network the weights, statistics, bits and ranges of a trained one.

    The network has the same quantizers of weights; the tensors are those of `trained_tensors`, on
    any device, and others are not looked at. Its outputs are then equal to the trained one's bit
    for bit. Raises `CheckpointError`, and changes nothing, where the network has another structure.
    """
    layers = prepared_layers(network)
    named = part_of(tensors, _BITS)
    if sorted(named) != sorted(layers):
        raise CheckpointError(
            f"The trained layers are {', '.join(sorted(named)) or 'none'}; the network is prepared "
            f"for {', '.join(sorted(layers)) or 'none'}. Prepare it for the same layers."
        )
    _load_state_(network, part_of(tensors, _STATE))
    bits = BitConfig({name: (int(pair[0]), int(pair[1])) for name, pair in named.items()})
    set_bits(network, bits)
    scales, ranges = part_of(tensors, _SCALE), part_of(tensors, _RANGE)
    for name, module in layers.items():
        known = {}
        if name in scales:
            known[bits[name][0]] = scales[name].clone().to(float_weight(module).device)
        weight_quantizer(module).retrained(known)
        if name in ranges:
            scale, zero_point = ranges[name].tolist()
            found = AffineRange(scale, int(zero_point))
            input_quantizer(module).ranges[bits[name][1]] = found


def _load_state_(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load parameters and buffers, shifts of the output too, after a look at their shapes."""
    own = network.state_dict()
    for name in prepared_names(network):
        shift = f"{name}.{SHIFT}"
        if shift in state and shift not in own:
            own[shift] = state[shift]
        elif shift in own and shift not in state:  # never corrected: a shift of zero
            state[shift] = torch.zeros_like(own[shift])
    mine, theirs = ({name: t.shape for name, t in held.items()} for held in (own, state))
    differ = sorted(name for name in {*own, *state} if mine.get(name) != theirs.get(name))
    if differ:
        raise CheckpointError(
            f"The trained network has another structure: {', '.join(differ[:5])}"
            f"{', …' if len(differ) > 5 else ''} differ. Give the network it was trained from."
        )
    for name, module in prepared_layers(network).items():
        if f"{name}.{SHIFT}" in state:
            add_shift(module)
    network.load_state_dict(state)


def rounded_copy(network: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose weights *are* the rounded ones; inputs are still rounded.

    It computes what the prepared network computes, and ``layer.weight`` is a plain parameter, so
    curvature can be measured at the trained network: rounding of inputs passes gradients straight
    through.
    """
    plain = copied(network)
    for module in prepared_layers(plain).values():
        _make_plain_(module)
    return plain


@torch.no_grad()
def _make_plain_(module: nn.Module) -> None:
    """Make the rounded weight a plain parameter of a prepared layer.

    `parametrize.remove_parametrizations` takes the property off the layer's class, which copies of
    the layer share, so it would break the layer that this one is a copy of.
    """
    rounded: Tensor = module.weight.clone()  # type: ignore[operator]
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    module.register_parameter("weight", nn.Parameter(rounded))


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network as the next steps of a search start from it.

    Its weights *are* the rounded ones, so at its own bits (``config``) it is exact, and every other
    number of bits is judged by what it changes against that. Learned scales, ``(channels,)``, and
    ranges stay for its own bits, and a layer that keeps its bits is trained on from the float
    weights behind its rounded ones.
    """

    network: nn.Module
    config: BitConfig
    scales: Mapping[str, Tensor]
    ranges: Mapping[str, AffineRange]
    float_weights: Mapping[str, Tensor]

    @classmethod
    @torch.no_grad()
    def rebuild(
        cls,
        model: nn.Module,
        layers: Sequence[LayerSpec],
        tensors: Mapping[str, Tensor],
        quantizers: Mapping[str, str] | None = None,
    ) -> TrainedNetwork:
        """Rebuild a trained network from `trained_tensors` and the network the search was given.

        Raises `CheckpointError` where the tensors belong to a network of another structure.
        """
        prepared = prepare(model, layers, quantizers=quantizers)
        load_trained_(prepared, tensors)
        config = get_bits(prepared)
        state = prepared.state_dict()
        plain = copied(model)
        scales, ranges, float_weights = {}, {}, {}
        for name, module in prepared_layers(prepared).items():
            bits, quantizer = config[name], weight_quantizer(module)
            weight = state.pop(f"{name}.{_ORIGINAL}")
            if bits.weight_bits != FLOAT_BITS:
                float_weights[name] = weight
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
        return cls(plain, config, scales, ranges, float_weights)

    def restore_learned_(self, prepared: nn.Module) -> None:
        """Give a freshly prepared copy of `network` what was learned for these bits."""
        for name, module in prepared_layers(prepared).items():
            bits = self.config[name]
            if name in self.scales:
                weight, quantizer = float_weight(module).detach(), weight_quantizer(module)
                scale = self.scales[name].to(weight.device)
                error = torch.zeros(len(scale), dtype=torch.float64, device=weight.device)
                quantizer.keep(
                    *(weight, bits.weight_bits, weight.clone(), scale, error),
                    training_start=self.float_weights[name].to(weight.device),
                )
            if name in self.ranges:
                input_quantizer(module).ranges[bits.activation_bits] = self.ranges[name]


def _untie_(module: nn.Module, weight: Tensor) -> None:
    """Give a layer a weight of its own: one that it shares is rounded in this layer alone."""
    own = module._parameters.get("weight")
    if own is not None:
        module.register_parameter("weight", nn.Parameter(weight.clone(), own.requires_grad))


def layers_without_bias(network: nn.Module) -> set[str]:
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


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
