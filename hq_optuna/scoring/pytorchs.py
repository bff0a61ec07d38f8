"""Which code is PyTorch's own, and so does nothing that PyTorch's documentation does not say."""

from __future__ import annotations

from types import BuiltinFunctionType
from typing import Any

from torch import nn
from torch._ops import OpOverload, OpOverloadPacket

_PACKAGES = ("torch", "_operator", "builtins", "math")


def runs_pytorchs(module: nn.Module) -> bool:
    """Say whether what a module itself runs is PyTorch's or this package's, hooks included."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    functions = filter(callable, vars(module).values())  # such as an activation
    own = (*type(module).mro()[:-1], *hooks, *functions)
    return all(_is_of(each, "hq_optuna", *_PACKAGES) for each in own)


def is_pytorchs(target: Any) -> bool:
    """Say whether a function is PyTorch's or Python's."""
    return _is_of(target, *_PACKAGES)


def _is_of(target: Any, *packages: str) -> bool:
    """Say whether a function or class belongs to packages, or to torch._C, which names none."""
    if isinstance(target, BuiltinFunctionType) and target.__module__ is None:
        return True
    if isinstance(target, (OpOverload, OpOverloadPacket)):  # anybody's may be registered
        return str(target).partition(".")[0] == "aten"
    return str(getattr(target, "__module__", None)).partition(".")[0] in packages
