"""The classes of modules this package tells apart: the only table of them.

What is known of a class holds where its code is kept: `runs_forward_of` says so.
"""

from __future__ import annotations

import dis
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

QUANTIZABLE: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
"""Classes of layers that can be quantized; their subclasses count, as long as they are called."""

BatchNorm = _BatchNorm
"""Base of all batch-norm layers; PyTorch has no public name for it."""

OTHER_NORMS = (nn.LayerNorm, nn.RMSNorm)
"""Normalization without stored statistics: nothing to quantize and nothing to correct."""

UNSUPPORTED: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "a table that is looked up, nothing is multiplied"),
    (
        (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase),
        "multiplies inside one function, and is taken apart into linear layers only where it is "
        "PyTorch's own class without hooks or computed weights",
    ),
    (nn.Bilinear, "bilinear layers are not supported"),
    (nn.Module, "not a Conv, ConvTranspose or Linear layer"),
)
"""Modules with weights that are not quantized, and why; the first class that fits counts."""


def has_statistics(module: nn.Module | None) -> bool:
    """Return whether a module is a batch-norm layer that stores statistics."""
    return isinstance(module, BatchNorm) and module.running_mean is not None


def has_known_axes(module: nn.Module) -> bool:
    """Return whether inputs and outputs are laid out as in PyTorch's own layers.

    A layer with a forward pass of its own may have its channels along any axis.
    """
    return runs_forward_of(module, *QUANTIZABLE)


def runs_forward_of(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Say whether calling a module computes what one of these classes computes.

    A subclass counts as long as neither it nor the module itself replaces a method that the class
    has of its own, such as ``forward`` or ``_conv_forward``. Hooks are not looked at.

    Example:
        >>> class Doubled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> runs_forward_of(nn.Linear(1, 1), nn.Linear), runs_forward_of(Doubled(1, 1), nn.Linear)
        (True, False)
    """
    mine = type(module)
    for shipped in classes:
        if isinstance(module, shipped):
            names = [
                name for name in ("__call__", "forward", "_conv_forward") if hasattr(shipped, name)
            ]
            kept = all(getattr(mine, name) is getattr(shipped, name) for name in names)
            return kept and not any(name in vars(module) for name in names)
    return False


def plain_settings(network: nn.Module) -> dict[str, Any]:
    """Return the numbers, strings and tuples of them that modules hold as attributes, by name.

    Those that code of the module's class writes outside ``__init__`` are no settings, such as a
    counter of calls; nor are those that matter in training alone.

    Example:
        >>> plain_settings(nn.Sequential(nn.ReLU6()))
        {'0.max_val': 6.0, '0.min_val': 0.0}
    """
    found: dict[str, Any] = {}
    for path, module in network.named_modules():
        if type(module).__module__.startswith("hq_optuna.quantization"):
            continue
        shipped = type(module).__module__.startswith("torch.")
        written = set(_OF_TRAINING) if shipped else set[str]()
        written |= {name for kind in type(module).__mro__ for name in _written(kind)}
        for name, value in sorted(vars(module).items()):
            kept = not name.startswith("_") and name != "training" and name not in written
            if kept and _is_plain(value):
                found[f"{path}.{name}" if path else name] = value
    return found


_OF_TRAINING = ("momentum", "p", "inplace")
"""Attributes of PyTorch's own modules that say nothing of what they compute in evaluation mode."""


def _written(kind: type) -> set[str]:
    """Return the attributes that functions of a class write, but for the one that sets it up."""
    if kind.__module__.startswith("torch."):
        return set()
    functions = [
        f for n, f in vars(kind).items() if isinstance(f, FunctionType) and n != "__init__"
    ]
    return {
        str(step.argval)
        for function in functions
        for step in dis.get_instructions(function)
        if step.opname == "STORE_ATTR"
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
