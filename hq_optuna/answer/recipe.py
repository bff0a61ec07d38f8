"""The answer on disk: ``recipe.json`` (bits, ranges, cost, origin) and ``weights.safetensors``.

`load` rebuilds a network whose outputs equal the saved one's bit for bit: it stores the float
weights, the scales, and the integer codes of weights that were not rounded to nearest, or by a
quantizer that could round them otherwise on another machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from hq_optuna.answer.resolve import layers_digest
from hq_optuna.atomic_files import write_atomically
from hq_optuna.errors import RecipeError, SpaceError
from hq_optuna.network.containers import is_plain, load_state_, strided_state, unsaved_buffers
from hq_optuna.network.copies import copied
from hq_optuna.network.layer_types import plain_settings
from hq_optuna.network.modes import own_modes
from hq_optuna.network.products import products_named
from hq_optuna.network.searchable import check_structure
from hq_optuna.network.unfused import unfused
from hq_optuna.quantization.correction import SHIFT, add_shift
from hq_optuna.quantization.functional import activation_grid, along
from hq_optuna.quantization.modules import InputFakeQuantize
from hq_optuna.quantization.outputs import (
    Place,
    RoundsOutputs,
    output_quantizers,
    put_output_quantizers_,
)
from hq_optuna.quantization.prepare import (
    factor_quantizers,
    float_weight,
    get_bits,
    input_quantizer,
    prepare,
    prepared_names,
    set_bits,
    weight_quantizer,
)
from hq_optuna.quantization.ranges import AffineRange
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec

FORMAT = "hq_optuna recipe"
FORMAT_VERSION = 1
RECIPE, WEIGHTS = "recipe.json", "weights.safetensors"
_SCALE = "hq_optuna.weight_scale."
_CODES = "hq_optuna.weight_codes."
_SHIFT = "hq_optuna.output_shift."
_BUFFER = "hq_optuna.buffer."
_OURS = (_SCALE, _CODES, _SHIFT, _BUFFER)
_PARAMETRIZED = ".parametrizations.weight.original"


@own_modes()
def save(
    folder: Path, network: nn.Module, layers: tuple[LayerSpec, ...], about: Mapping[str, Any]
) -> None:
    """Write a prepared network of these layers with the bits it has now, and ``about`` it.

    Each file is written beside its place and then moved there, the recipe last, and names the
    weights by their hash, so `load` never takes a half of a killed save. ``about`` is further JSON
    data for the recipe: cost, score, fingerprint, versions.

    Raises:
        RecipeError: The folder cannot be made or written.
    """
    config, tensors = get_bits(network), plain_state_dict(network)
    described = {
        layer.name: _described(
            network.get_submodule(layer.name), layer, config[layer.name], tensors
        )
        for layer in layers
    }
    for place, quantizer in _places(network):
        owner, _, name = place.name.rpartition(".")
        grid = _grid(quantizer, quantizer.bits)
        said = {"kind": place.kind, "call": place.call, "bits": quantizer.bits, **grid}
        described[owner].setdefault("outputs", {})[name] = said
    calls = network.output_calls if isinstance(network, RoundsOutputs) else {}
    weights = safetensors.save(tensors)
    recipe = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "layers": described,
        "layers_sha256": layers_digest(described),
        **({"output_calls": dict(calls)} if calls else {}),
        "modules": plain_settings(network),
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest()},
        **about,
    }
    text = json.dumps(recipe, indent=1, ensure_ascii=False) + "\n"
    try:
        write_atomically(folder / WEIGHTS, weights)
        write_atomically(folder / RECIPE, text.encode())
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"The result cannot be saved in {folder}: {error}. Give a folder that can be made and "
            f"written, with room for {len(weights) + len(text):,} bytes."
        ) from error


def _described(
    module: nn.Module, layer: LayerSpec, bits: LayerBits, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Return what the recipe says of a layer; put its scale, codes and shift among the tensors."""
    entry: dict[str, Any] = {**layer.to_json(), **bits._asdict()}
    if layer.is_product:
        if bits.activation_bits != FLOAT_BITS:
            found = factor_quantizers(module)
            entry["factor_quantizers"] = [_grid(one, bits.activation_bits) for one in found]
        return entry
    if bits.weight_bits != FLOAT_BITS:
        weight, holder = float_weight(module), weight_quantizer(module)
        scale = holder.scale(weight, bits.weight_bits)
        tensors[f"{_SCALE}{layer.name}"] = scale.detach().cpu().clone()
        kept = holder.kept(weight, bits.weight_bits)
        if kept is None and holder.quantizer.stores_codes:
            kept = holder.quantized(weight, bits.weight_bits)
        if kept is not None:
            step = along(scale, kept, layer.channel_axis)
            # In half precision the quotient could miss its code.
            codes = (kept.double() / step.double()).round()
            small = holder.quantizer.largest_code(bits.weight_bits) <= 127
            codes = codes.to(torch.int8 if small else torch.int16)
            tensors[f"{_CODES}{layer.name}"] = codes.detach().cpu().contiguous()
        entry["weight_quantizer"] = holder.quantizer.describe(bits.weight_bits)
    if bits.activation_bits != FLOAT_BITS:
        entry["activation_quantizer"] = _grid(input_quantizer(module), bits.activation_bits)
    shift = dict(module.named_buffers(recurse=False)).get(SHIFT)
    if shift is not None and bool(shift.any()):
        tensors[f"{_SHIFT}{layer.name}"] = shift.detach().cpu().clone()
    return entry


def _grid(quantizer: InputFakeQuantize, bits: int) -> dict[str, Any]:
    scale, zero_point = quantizer.range(bits)
    quant_min, quant_max = activation_grid(bits)
    return {
        **{"scheme": "per-tensor affine", "scale": scale, "zero_point": zero_point},
        **{"quant_min": quant_min, "quant_max": quant_max},
    }


def _places(network: nn.Module) -> Iterator[tuple[Place, InputFakeQuantize]]:
    """Yield where a network rounds its outputs, and what does."""
    if isinstance(network, RoundsOutputs):
        found = zip(network.output_places, output_quantizers(network).values(), strict=True)
        yield from ((place, q) for place, q in found if q.bits != FLOAT_BITS)


@own_modes()
def load(folder: str | Path, network: nn.Module) -> nn.Module:
    """Return a copy of ``network`` with the weights, bits and ranges of a saved result.

    Args:
        folder: What `SearchResult.save` wrote.
        network: A network of the same structure; its weights do not matter. Left as it is.

    Raises:
        RecipeError: A file is missing, altered or of a newer format, or the network's structure
            is another one.
        NetworkError: The network hides its layers, or is none.
    """
    folder = Path(folder)
    check_structure(network)
    recipe = _read_recipe(folder)
    tensors = _read_weights(folder, recipe)
    prepared = _prepared(folder, network, recipe["layers"], tensors)
    for name, entry in recipe["layers"].items():
        _restore_(prepared.get_submodule(name), name, entry, tensors)
    _restore_outputs_(prepared, recipe)
    bits = {n: (e["weight_bits"], e["activation_bits"]) for n, e in recipe["layers"].items()}
    set_bits(prepared, BitConfig(bits))
    _check_modules(folder, recipe.get("modules", {}), prepared)
    return prepared


def _check_modules(folder: Path, saved: Mapping[str, Any], network: nn.Module) -> None:
    """Refuse a network whose modules are set in another way than when the result was saved."""
    now = json.loads(json.dumps(plain_settings(network)))
    other = [name for name in saved if name in now and repr(saved[name]) != repr(now[name])]
    if other:
        name = other[0]
        raise RecipeError(
            f"The result in {folder} is of a network whose {name!r} is {saved[name]!r}, and here "
            f"it is {now[name]!r}, so outputs would be others. Make the network as it was."
        )


def _prepared(
    folder: Path, network: nn.Module, layers: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """Return a prepared copy of a network with a recipe's float weights."""
    products = [name for name, entry in layers.items() if not entry["weight_shape"]]
    own = copied(products_named(unfused(network), products))
    try:
        load_state_(own, {k: v for k, v in tensors.items() if not k.startswith(_OURS)})
    except RuntimeError as error:
        raise RecipeError(
            f"The result in {folder} belongs to a network of another structure: {error}"
        ) from None
    state = own.state_dict()
    for name, buffer in unsaved_buffers(own).items():  # one that is not there yet makes itself
        kept = tensors.get(f"{_BUFFER}{name}", buffer).to(buffer.device)
        owner, _, key = name.rpartition(".")
        setattr(own.get_submodule(owner), key, kept.clone())
    for name, tensor in tensors.items():
        if name in state and state[name].dtype != tensor.dtype:
            raise RecipeError(
                f"The result in {folder} is of a network in {tensor.dtype}, and {name!r} of this "
                f"one is {state[name].dtype}. Give network.to({tensor.dtype}) for the same outputs."
            )
    for name, entry in layers.items():
        if (kind := type(own.get_submodule(name)).__name__) != entry["kind"]:
            raise RecipeError(
                f"The result in {folder} belongs to a network of another structure: {name!r} is "
                f"a {entry['kind']} there and a {kind} here."
            )
    named = {
        name: entry["weight_quantizer"]["name"]
        for name, entry in layers.items()
        if "name" in entry.get("weight_quantizer", {})
    }
    try:
        specs = [LayerSpec.from_json(_spec(entry)) for entry in layers.values()]
        return prepare(own, specs, quantizers=named)
    except SpaceError as error:
        raise RecipeError(
            f"The result in {folder} needs a quantizer of another version: {error} "
            "Update hq_optuna."
        ) from None


def _restore_(
    module: nn.Module, name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Give a prepared layer its scale, codes, shift and input range."""
    bits, axis = entry["weight_bits"], entry["channel_axis"]
    if "factor_quantizers" in entry:
        module.input_fake_quantize, module.other_fake_quantize = (
            _rounding(entry["activation_bits"], grid) for grid in entry["factor_quantizers"]
        )
    if f"{_SCALE}{name}" in tensors:
        weight, holder = float_weight(module), weight_quantizer(module)
        scale = tensors[f"{_SCALE}{name}"].to(weight.device)
        holder.scales[bits] = scale
        codes = tensors.get(f"{_CODES}{name}")
        if codes is not None:
            rounded = codes.to(weight) * along(scale, weight, axis)
            holder.keep(weight.detach(), bits, rounded, scale)
    if f"{_SHIFT}{name}" in tensors:
        add_shift(module)
        module.get_buffer(SHIFT).copy_(tensors[f"{_SHIFT}{name}"])
    if "activation_quantizer" in entry:
        grid = entry["activation_quantizer"]
        module.input_fake_quantize = _rounding(entry["activation_bits"], grid)


def _rounding(bits: int, grid: Mapping[str, Any]) -> InputFakeQuantize:
    """Return what rounds to these bits as the recipe says."""
    return InputFakeQuantize(None, ranges={bits: AffineRange(grid["scale"], grid["zero_point"])})


def _restore_outputs_(prepared: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Give a prepared network the output quantizers of a recipe, if it has any."""
    grids = {
        Place(grid["kind"], grid["call"], f"{layer}.{name}"): grid
        for layer, entry in recipe["layers"].items()
        for name, grid in entry.get("outputs", {}).items()
    }
    if grids:
        ranges = {p.name: AffineRange(g["scale"], g["zero_point"]) for p, g in grids.items()}
        (bits,) = {grid["bits"] for grid in grids.values()}
        calls = recipe.get("output_calls", {})
        put_output_quantizers_(prepared, list(grids), calls, bits, ranges)


def plain_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Return a prepared network's float weights and buffers under the names users know."""
    names = prepared_names(network)
    state = {}
    for key, value in strided_state(network).items():
        layer = key.removesuffix(_PARAMETRIZED)
        if key.rpartition(".")[2] == SHIFT and key.rpartition(".")[0] in names:
            continue
        plain = f"{layer}.weight" if key.endswith(_PARAMETRIZED) and layer in names else key
        # safetensors refuses tensors that share memory, as tied weights do.
        state[plain] = value.detach().cpu().contiguous().clone()
    for key, buffer in unsaved_buffers(network).items():
        if is_plain(buffer):
            state[f"{_BUFFER}{key}"] = buffer.detach().cpu().contiguous().clone()
    return state


def _spec(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in LayerSpec.__dataclass_fields__}


def _read_recipe(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        given = (
            "the folder this file lies in" if folder.is_file() else "a folder a result was saved in"
        )
        raise RecipeError(f"{folder} holds no {RECIPE}; give {given}.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error}.") from None
    except ValueError as error:
        raise RecipeError(f"{path} is damaged: {error}.") from None
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        raise RecipeError(f"{path} is not a recipe of hq_optuna.")
    version = recipe.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise RecipeError(
            f"{path} has format {version}, this version reads up to {FORMAT_VERSION}. "
            "Update hq_optuna."
        )
    for name in ("format_version", "layers", "layers_sha256", "weights"):
        if name not in recipe:
            raise RecipeError(f"{path} is damaged: it lacks {name!r}.")
    # Other bits with the ranges found for the old ones would be a silently different network.
    if layers_digest(recipe["layers"]) != recipe["layers_sha256"]:
        raise RecipeError(f"{path} was altered after it was saved: the hash of its layers differs.")
    return recipe


def _read_weights(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        name, expected = recipe["weights"]["file"], recipe["weights"]["sha256"]
    except (KeyError, TypeError):
        raise RecipeError(f"{folder / RECIPE} is damaged: it does not name its weights.") from None
    path = folder / name
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != expected:
            raise RecipeError(f"{path} was altered after it was saved: its hash differs.")
        return safetensors.load(content)
    except FileNotFoundError:
        raise RecipeError(f"{path} is missing; the recipe needs it.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error}.") from None
    except SafetensorError as error:
        raise RecipeError(f"{path} is damaged: {error}.") from None
