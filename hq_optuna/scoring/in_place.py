"""Which operations may write over an argument that nobody reads any more.

A fresh tensor of a hundred megabytes costs several times what filling it costs, because the system
hands it out page by page. So where a node is the last reader of a tensor that an operation made
for it alone, the result takes its place. The numbers are those of the operation that returns a new
tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from hq_optuna.layers import FLOAT_BITS
from hq_optuna.quantization.prepare import input_quantizer, is_prepared

_WITH_SWITCH = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.LeakyReLU)
_FUNCTIONS_WITH_SWITCH = (functional.relu, functional.relu6, functional.silu, functional.hardswish)
_SWITCH = "inplace"
_SUMS = (operator.add, operator.iadd, torch.add)
_FRESH = (*_SUMS, *_FUNCTIONS_WITH_SWITCH, torch.relu, torch.cat, operator.mul, torch.mul)


def is_fresh(node: fx.Node, modules: Mapping[fx.Node, nn.Module]) -> bool:
    """Say whether a node's value is a tensor of its own and not somebody's view or attribute."""
    if node.op == "call_function":
        return node.target in _FRESH
    module = modules.get(node)
    return module is not None and (
        isinstance(module, (_BatchNorm, *_WITH_SWITCH)) or is_prepared(module)
    )


def in_place(
    node: fx.Node, module: nn.Module | None, args: tuple[Any, ...], free: tuple[bool, ...]
) -> tuple[bool, Any]:
    """Run a node in place if it can.

    Args:
        node: The node.
        module: Its module, of a node that calls one.
        args: Its positional arguments.
        free: For each argument whether it may be written over.

    Returns:
        Whether it ran, and its value.
    """
    if not args or not any(free) or (len(args) > 1 and node.op == "call_module"):
        return False, None
    x = args[0]
    if module is not None:
        if node.kwargs or not isinstance(x, Tensor):
            return False, None
        if is_prepared(module):
            quantizer = input_quantizer(module)
            if quantizer.bits == FLOAT_BITS:
                return False, None
            quantizer.overwrites = True
            try:
                return True, module(x)
            finally:
                quantizer.overwrites = False
        if type(module) in _WITH_SWITCH and not module.inplace:
            setattr(module, _SWITCH, True)
            try:
                return True, module(x)
            finally:
                setattr(module, _SWITCH, False)
        return False, None
    if node.target in _FUNCTIONS_WITH_SWITCH and len(args) == 1 and free[0]:
        return True, node.target(x, inplace=True)
    if node.target is torch.relu and free[0] and not node.kwargs:
        return True, torch.relu_(x)
    if node.target in _SUMS and not node.kwargs and len(args) == 2:
        y = args[1]
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
            if x.dtype != y.dtype or x.stride() != y.stride():
                return False, None
            return True, x.add_(y) if free[0] else y.add_(x)
    return False, None
