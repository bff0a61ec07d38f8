"""One verb for users: `prepare` a copy of the network once, then `set_bits` at will."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from hq_optuna.errors import NetworkError, SpaceError
from hq_optuna.network.copies import copied
from hq_optuna.network.products import Product, products_named
from hq_optuna.network.unfused import unfused
from hq_optuna.quantization.calls import uncounted
from hq_optuna.quantization.modules import InputFakeQuantize, WeightFakeQuantize
from hq_optuna.quantization.observers import InputHistogram, first_input, with_first_input
from hq_optuna.quantization.outputs import RoundsOutputs, set_outputs
from hq_optuna.quantization.quantizers import UNIFORM, ByGroup, quantizer_named
from hq_optuna.quantization.ranges import ANY_GRID, InputGrid
from hq_optuna.settings import Observer
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.layers import FLOAT_BITS, MAX_BITS, MIN_BITS, LayerSpec, is_whole

_INPUT, OTHER = "input_fake_quantize", "other_fake_quantize"


def prepare(
    network: nn.Module,
    layers: Sequence[LayerSpec],
    inputs: Mapping[str, InputHistogram] | None = None,
    *,
    observer: Observer = "squared_error",
    quantizers: Mapping[str, str] | None = None,
    grid: InputGrid = ANY_GRID,
) -> nn.Module:
    """Return a copy of the network whose layers can be set to any number of bits.

    The copy is in eval mode and starts in float: its outputs equal the network's bit for bit, or
    those of `hq_optuna.network.unfused`. The
    weights become `torch.nn.utils.parametrize` parametrizations, so ``layer.weight`` is the rounded
    weight wherever it is read, and training reaches the float weight behind it. Of a product of
    activations both factors are rounded.

    Args:
        network: Left exactly as it is.
        layers: Layers to prepare.
        inputs: Histograms of what enters each layer (`observe_inputs`); without them activations
            can only stay in float. They know nothing of products, which `fit_layers` fits.
        observer: How activation ranges are found.
        quantizers: Layer → name of its weight's quantizer; ``"uniform"`` for layers not named.
        grid: Which ranges of inputs the target takes.

    Raises:
        SpaceError: A quantizer, or a layer of ``quantizers``, that does not exist.
    """
    chosen = {name: quantizer_named(q) for name, q in (quantizers or {}).items()}
    unknown = sorted(set(chosen) - {layer.name for layer in layers})
    if unknown:
        raise SpaceError(
            f"quantizers: {unknown[0]!r} is none of the layers to prepare: "
            f"{', '.join(layer.name for layer in layers)}."
        )
    products = [layer.name for layer in layers if layer.is_product]
    prepared = copied(products_named(unfused(network), products))
    for layer in layers:
        module = prepared.get_submodule(layer.name)
        if isinstance(module, Product):
            for name in (_INPUT, OTHER):
                module.add_module(name, InputFakeQuantize(None, observer, grid=grid))
            module.register_forward_pre_hook(_quantize_factors)
            continue
        rounds, groups = chosen.get(layer.name, UNIFORM), getattr(module, "groups", 1)
        if layer.channel_axis == 1 and groups > 1:
            rounds = ByGroup(rounds, groups)
        quantizer = WeightFakeQuantize(layer.channel_axis, rounds)
        parametrize.register_parametrization(module, "weight", quantizer, unsafe=True)
        histogram = None if inputs is None else inputs[layer.name]
        module.add_module(_INPUT, InputFakeQuantize(histogram, observer, grid=grid))
        module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    prepared.eval()
    return prepared


def check_preparable(prepared: nn.Module) -> None:
    """Refuse a network whose copies are not prepared as it is, by a ``__deepcopy__`` of its own."""
    names = list(prepared_layers(prepared))
    try:
        kept = list(prepared_layers(copied(prepared))) == names
    except NetworkError as error:
        raise NetworkError(_COPIES) from error
    if not kept:
        raise NetworkError(_COPIES)


_COPIES = (
    "Once its layers round, a copy of the network is not what it is: it has a __deepcopy__ (or "
    "__reduce__) of its own that makes another network. Leave copying to PyTorch."
)


def _quantize_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    with uncounted():
        x = input_quantizer(module)(first_input(args, kwargs))
    return with_first_input(args, kwargs, x)


def _quantize_factors(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    first, second = factor_quantizers(module)
    with uncounted():
        return first(args[0]), second(args[1]), *args[2:]


def factor_quantizers(module: nn.Module) -> tuple[InputFakeQuantize, InputFakeQuantize]:
    """Return what rounds the factors of a prepared product of activations."""
    second = getattr(module, OTHER)
    assert isinstance(second, InputFakeQuantize)
    return input_quantizer(module), second


def without_factors_(module: nn.Module) -> None:
    """Take hook and quantizers from a prepared product of activations."""
    delattr(module, _INPUT)
    delattr(module, OTHER)
    remove_hook_(module._forward_pre_hooks, _quantize_factors)


def unprepared_(module: nn.Module) -> None:
    """Take hook and quantizers from a prepared layer; it then has no weight at all.

    `torch.nn.utils.parametrize.remove_parametrizations` would take the weight from copies too,
    which share the layer's class.
    """
    del module.parametrizations["weight"]  # type: ignore[union-attr, operator]
    if not module.parametrizations:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    delattr(module, _INPUT)
    remove_hook_(module._forward_pre_hooks, _quantize_input)
    for key in set(module._forward_pre_hooks_with_kwargs) - set(module._forward_pre_hooks):
        del module._forward_pre_hooks_with_kwargs[key]


def remove_hook_(hooks: dict[int, Any], hook: Any) -> None:
    """Take a function out of a module's hooks."""
    for key in [key for key, function in hooks.items() if function is hook]:
        del hooks[key]


def weight_quantizer(module: nn.Module) -> WeightFakeQuantize:
    """Return the weight's quantizer of a prepared layer."""
    quantizer = module.parametrizations.weight[-1]  # type: ignore[union-attr, index]
    assert isinstance(quantizer, WeightFakeQuantize)
    return quantizer


def input_quantizer(module: nn.Module) -> InputFakeQuantize:
    """Return the input's quantizer of a prepared layer."""
    quantizer = getattr(module, _INPUT)
    assert isinstance(quantizer, InputFakeQuantize)
    return quantizer


def is_prepared(module: nn.Module) -> bool:
    """Say whether a module is a prepared layer."""
    return _INPUT in module._modules  # attributes may be those of a layer that it wraps


def prepared_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the prepared layers of a network by name, in its order."""
    return {name: m for name, m in network.named_modules() if is_prepared(m)}


def prepared_names(network: nn.Module) -> dict[str, str]:
    """Return every name of each prepared layer, with the one that `prepared_layers` knows it by."""
    first = {module: name for name, module in prepared_layers(network).items()}
    named = network.named_modules(remove_duplicate=False)
    return {name: first[module] for name, module in named if module in first}


def float_weight(module: nn.Module) -> Any:
    """Return the float weight behind a prepared layer's rounded one."""
    parametrizations = module.parametrizations.weight  # type: ignore[union-attr]
    weight = parametrizations.original  # type: ignore[union-attr]
    for earlier in list(parametrizations)[:-1]:  # type: ignore[arg-type]
        weight = earlier(weight)
    return weight


def set_bits(network: nn.Module, bits: Mapping[str, tuple[int, int]]) -> None:
    """Set the bits of a prepared network's layers; layers not named keep theirs.

    Bits are pairs, weights first: `LayerBits(4, 8)` or ``(4, 8)``. Nothing changes on an error.
    A product of activations has no weights: what is said of activations holds for both factors.
    Output quantizers (`hq_optuna.quantization.outputs`) round unless all layers are in float.
    Changes two integers a layer. Scales and rounded weights are found at first use and kept, so
    returning to an assignment returns its outputs bit for bit.

    Raises:
        SpaceError: A layer the network was not prepared for, bits outside 1 to 16 (and 32), or
            bits that the layer's quantizer cannot do.
    """
    layers = prepared_layers(network)
    for name, pair in bits.items():
        if name not in layers:
            raise SpaceError(
                f"Layer {name!r} is not prepared for quantization. Prepared are: "
                f"{', '.join(layers) or 'none; call prepare() first'}."
            )
        for value in pair:
            if not is_whole(value) or (value != FLOAT_BITS and not MIN_BITS <= value <= MAX_BITS):
                raise SpaceError(
                    f"Layer {name!r}: bits are {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS} for "
                    f"float; got {value!r}."
                )
        if isinstance(layers[name], Product):
            if FLOAT_BITS not in pair and pair[0] != pair[1]:
                raise SpaceError(
                    f"{name!r} is a product of activations, whose factors share their bits; got "
                    f"{pair[0]} and {pair[1]}."
                )
            continue
        quantizer = weight_quantizer(layers[name]).quantizer
        if pair[0] != FLOAT_BITS and pair[0] not in quantizer.all_bits:
            raise SpaceError(
                f"Layer {name!r}: the quantizer {quantizer.name!r} can do {quantizer.bits_text}; "
                f"got {pair[0]} bits for its weights."
            )
    for name, (weight_bits, activation_bits) in bits.items():
        if isinstance(layers[name], Product):
            for module in factor_quantizers(layers[name]):
                module.bits = int(activation_bits)
            continue
        weight_quantizer(layers[name]).bits = int(weight_bits)
        input_quantizer(layers[name]).bits = int(activation_bits)
    if isinstance(network, RoundsOutputs):
        now = get_bits(network).values()
        set_outputs(network, rounded=any(b != FLOAT_BITS for pair in now for b in pair))


def get_bits(network: nn.Module) -> BitConfig:
    """Return the bits a prepared network has now."""
    found = {}
    for name, module in prepared_layers(network).items():
        bits = input_quantizer(module).bits
        product = isinstance(module, Product)
        found[name] = (bits if product else weight_quantizer(module).bits, bits)
    return BitConfig(found)
