"""Look at a network: which layers can be quantized, how large they are and what they compute.

The network runs once on the example input and every call of a convolution or linear layer is
counted from the shapes that really occur. What has weights and cannot be quantized is listed with
the reason. The network is handed back as it came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from hq_optuna.errors import NetworkError
from hq_optuna.network.batches import Inputs, forward, map_tensors, tensors
from hq_optuna.network.copies import preserve_network
from hq_optuna.network.layer_types import (
    CONVOLUTIONS,
    OTHER_NORMS,
    QUANTIZABLE,
    TRANSPOSED,
    UNSUPPORTED,
)
from hq_optuna.network.searchable import check_searchable
from hq_optuna.space.layers import LayerSpec, SkippedModule


@dataclass(frozen=True, slots=True)
class Introspection:
    """What `introspect` found.

    Attributes:
        layers: Quantizable layers in the order of their first call (`L` of them).
        skipped: Modules with weights of their own that are not quantized, in the order the
            network registers them. Normalization layers are not listed.
        n_parameters: Elements of all parameters of the network, each counted once.
        n_samples: Samples in the example input; MACs and inputs were divided by it.
    """

    layers: tuple[LayerSpec, ...]
    skipped: tuple[SkippedModule, ...]
    n_parameters: int
    n_samples: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the quantizable layers for one sample."""
        return sum(layer.macs for layer in self.layers)

    @property
    def n_weights(self) -> int:
        """Weights of the quantizable layers, without biases."""
        return sum(layer.n_weights for layer in self.layers)


@dataclass(slots=True)
class _Tally:
    """Counts of one layer over one forward pass, all samples together."""

    macs: int = 0
    n_calls: int = 0
    n_inputs: int = 0


def introspect(
    network: nn.Module, example_input: Inputs, *, n_samples: int | None = None
) -> Introspection:
    """Run the network once in evaluation mode and describe its quantizable layers.

    MACs come from the shapes of each call: a convolution has output elements · input channels of a
    group · kernel elements of them, a transposed convolution input elements · output channels of
    a group · kernel elements, a linear layer output elements · input features. Calls add up; the
    sum is for one sample (rounded up where a layer works on something the samples share).

    A module registered under several names is one layer. Two *modules* that share one weight
    tensor are not: bits of their own would leave two copies of a weight that is stored once. The
    first called is quantized, the others stay in float and are listed; register one module under
    both names to quantize them together.

    Training flags, buffers, parameters, gradients, hooks, plain attributes and the random state of
    PyTorch, NumPy and Python are put back, also when the network raises.

    Args:
        network: The network; its weights must be finite floating-point numbers.
        example_input: A tensor, a tuple of positional or a mapping of keyword arguments, with the
            samples along the first dimension. It is copied to the device of the network.
        n_samples: Samples in the example. Default: first dimension of the first tensor, or the
            length of the first argument where that is a list (one tensor per image, as
            torchvision's detectors take them).

    Raises:
        NetworkError: Nothing in the network can be quantized, it holds uninitialized lazy modules,
            compiled ones, NaN or infinite weights, or it does not run on the example input.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
        >>> found = introspect(network, torch.zeros(2, 3, 8, 8))
        >>> [(layer.name, layer.kind, layer.macs) for layer in found.layers]
        [('0', 'Conv2d', 7776), ('2', 'Linear', 2880)]
    """
    check_searchable(network)
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    # A copy: networks may write into their input.
    example = map_tensors(example_input, lambda x: x.detach().to(device, copy=True))
    n = _n_samples(example) if n_samples is None else n_samples
    if n < 1:
        raise NetworkError(f"The example input holds {n} samples. Give at least one.")
    tallies = _count(network, example, check_batch=n_samples is None)
    layers = _quantized_layers(names, tallies, n)
    skipped = _skipped_modules(network, names, tallies, layers)
    _check_found(layers, skipped)
    n_parameters = sum(p.numel() for p in network.parameters())
    return Introspection(tuple(layers.values()), tuple(skipped), n_parameters, n)


def _check_found(layers: Mapping[nn.Module, LayerSpec], skipped: Sequence[SkippedModule]) -> None:
    """Refuse a network without quantizable layers, and one that is a layer without a name."""
    if not layers:
        seen = "".join(f"\n  {s.name} ({s.kind}): {s.reason}" for s in skipped[:8])
        raise NetworkError(
            "Nothing in the network can be quantized: a forward pass in evaluation mode must call "
            "a Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear layer with floating-point weights."
            + (f" Modules with weights that were passed over:{seen}" if seen else "")
        )
    for layer in layers.values():
        if not layer.name:
            raise NetworkError(
                f"The network is itself one {layer.kind} layer, which leaves it no name. "
                "Wrap it: nn.Sequential(layer)."
            )


def _quantized_layers(
    names: Mapping[nn.Module, list[str]], tallies: Mapping[nn.Module, _Tally], n: int
) -> dict[nn.Module, LayerSpec]:
    """Return the called layers that can be quantized; of several with one weight, the first."""
    layers: dict[nn.Module, LayerSpec] = {}
    weights: set[int] = set()
    for module, tally in tallies.items():
        if module in names and not _unfit(module) and id(module.weight) not in weights:
            weights.add(id(module.weight))
            layers[module] = _spec(module, names[module], tally, n)
    return layers


def _skipped_modules(
    network: nn.Module,
    names: Mapping[nn.Module, list[str]],
    tallies: Mapping[nn.Module, _Tally],
    layers: Mapping[nn.Module, LayerSpec],
) -> list[SkippedModule]:
    """Return the modules with weights of their own that are not quantized."""
    owners = {id(module.weight): layer.name for module, layer in layers.items()}
    computed = tuple(f"{name}.parametrizations" for m in names if _computed(m) for name in names[m])
    skipped: list[SkippedModule] = []
    for module, (name, *_) in names.items():
        if module in layers or name.startswith(computed):
            continue
        reason = _reason(network, module, name, called=module in tallies)
        if reason:
            owner = next(filter(None, (owners.get(id(p)) for p in _own(module).values())), None)
            if owner is not None:
                reason = f"shares its weight with {owner!r} and is quantized there only; {reason}"
            skipped.append(SkippedModule(name or "(network)", type(module).__name__, reason))
    kinds = [type(module).__name__ for module in tallies if module not in names]
    return skipped + [SkippedModule("(unregistered)", kind, _UNREGISTERED) for kind in kinds]


_UNREGISTERED = (
    "called, but not registered in the network, so its weights are in no state dict; "
    "keep layers in attributes or nn.ModuleList"
)


def _count(network: nn.Module, example: Inputs, *, check_batch: bool) -> dict[nn.Module, _Tally]:
    """Run the network and return the counts of every quantizable module it calls, in order."""
    tallies: dict[nn.Module, _Tally] = {}
    first = next(tensors(_arguments(example)), None)
    alone: list[nn.Module] = []  # layers that took the example itself for a single sample

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(module, QUANTIZABLE):
            return
        taken, given = next(tensors((args, kwargs)), None), next(tensors(output), None)
        if taken is None or given is None:
            return
        tally = tallies.setdefault(module, _Tally())
        tally.n_calls += 1
        tally.n_inputs += taken.numel()
        if isinstance(module, nn.Linear):
            tally.macs += given.numel() * module.in_features
            n_batched = 2
        elif isinstance(module, CONVOLUTIONS):
            kernel = math.prod(module.kernel_size)
            if isinstance(module, TRANSPOSED):
                tally.macs += taken.numel() * (module.out_channels // module.groups) * kernel
            else:
                tally.macs += given.numel() * (module.in_channels // module.groups) * kernel
            n_batched = len(module.kernel_size) + 2
        if first is not None and taken.shape == first.shape and taken.dim() < n_batched:
            alone.append(module)

    try:
        with preserve_network(network), torch.no_grad():
            network.eval()
            # A hook on all modules touches none of them, and comes before the user's own hooks,
            # which may replace the output.
            handle = register_module_forward_hook(hook, with_kwargs=True)
            try:
                forward(network, example)
            finally:
                handle.remove()
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors(_arguments(example))) or "no tensor"
        raise NetworkError(
            f"The network does not run on the example input ({shapes}): {type(error).__name__}: "
            f"{error} Check the shape (samples along the first dimension), the number type and "
            "the number of arguments."
        ) from error
    # A list holds single samples on purpose; a tensor should have come as a batch.
    if check_batch and alone and first is not None and not isinstance(_arguments(example)[0], list):
        raise NetworkError(
            f"The example input {tuple(first.shape)} has no batch dimension: a "
            f"{type(alone[0]).__name__} took it for a single sample. Give example[None]."
        )
    return tallies


def _spec(module: nn.Module, names: list[str], tally: _Tally, n: int) -> LayerSpec:
    assert isinstance(module.weight, Tensor)
    return LayerSpec(
        name=names[0],
        kind=type(module).__name__,
        weight_shape=tuple(module.weight.shape),
        channel_axis=1 if isinstance(module, TRANSPOSED) else 0,
        macs=-(-tally.macs // n),
        n_calls=tally.n_calls,
        n_inputs=-(-tally.n_inputs // n),
        aliases=tuple(names[1:]),
    )


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _computed(module: nn.Module) -> bool:
    """Say whether the weight of a quantizable module is computed from other parameters."""
    return isinstance(module, QUANTIZABLE) and "weight" not in _own(module)


def _unfit(module: nn.Module) -> str:
    """Return why the weight of a quantizable module cannot be quantized, or nothing."""
    if _computed(module):
        return (
            "its weight is computed from other parameters (weight_norm, spectral_norm, pruning); "
            "make it a parameter first, with torch.nn.utils.parametrize.remove_parametrizations, "
            "remove_weight_norm or prune.remove"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    return ""


def _reason(network: nn.Module, module: nn.Module, name: str, *, called: bool) -> str:
    """Return why a module is not quantized, or nothing where nobody would ask."""
    if not isinstance(module, QUANTIZABLE):
        return _reason_of_kind(module)
    if called:
        return _unfit(module) or "stays in float; register one module under both names"
    if isinstance(network.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "MultiheadAttention uses its weight without calling the layer"
    return (
        "never called by the example input in evaluation mode (a branch not taken, or code "
        "that uses its weight without calling the layer)"
    )


def _reason_of_kind(module: nn.Module) -> str:
    """Return why modules of this class are not quantized, where it holds weights."""
    if hasattr(module, "_packed_params") and hasattr(module, "weight"):
        return "already quantized (packed weights)"
    if isinstance(module, OTHER_NORMS):
        return ""
    # Vectors shaped for broadcasting, such as a layer scale (C, 1, 1), are no filters.
    held = [
        f"{key} {tuple(p.shape)}"
        for key, p in _own(module).items()
        if p.dim() >= 2 and ("weight" in key or sum(size > 1 for size in p.shape) >= 2)
    ]
    if not held:
        return ""
    why = next(why for kind, why in UNSUPPORTED if isinstance(module, kind))
    return f"{why}; holds {', '.join(held[:3])}{', …' if len(held) > 3 else ''}"


def _arguments(example: Inputs) -> tuple[Any, ...]:
    """Return the arguments that `forward` calls the network with, keywords last."""
    if isinstance(example, Tensor):
        return (example,)
    return tuple(example.values() if isinstance(example, Mapping) else example)


def _n_samples(example: Inputs) -> int:
    for argument in _arguments(example):
        for tensor in tensors(argument):
            if isinstance(argument, list):
                return len(argument)
            if tensor.dim():
                return len(tensor)
    raise NetworkError(
        "The example input holds no tensor with a batch dimension. Give a tensor, a tuple of "
        "positional arguments or a mapping of keyword arguments."
    )
