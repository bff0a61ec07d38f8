"""Where weights are used: every multiplication with one, whoever calls it.

A layer's class tells what it computes as a rule; what it really computes is seen where PyTorch's
operators run. A weight may also be used by a function outside its layer, or by a layer in a way of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class WeightUse(NamedTuple):
    """A multiplication with a weight: the operator, its arguments, and what it cost.

    ``weight`` is the argument, perhaps a view of the weight; ``macs`` are multiply-accumulates of
    all samples together.
    """

    operator: Any
    arguments: tuple[Any, ...]
    weight: Tensor
    macs: int


class WatchedWeights(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls ``see(name, use)`` for each multiplication with one of the named weights.

    A view of a weight, or of a part of it, is the weight: it is known by its memory.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], see: Callable[[str, WeightUse], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._at: dict[int, list[tuple[int, int, str]]] = {}
        for name, weight in weights.items():
            if _is_plain(weight):
                begin, place = weight.data_ptr(), weight.untyped_storage().data_ptr()
                end = begin + weight.numel() * weight.element_size()
                self._at.setdefault(place, []).append((begin, end, name))
        self._see = see

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        operator = getattr(func, "overloadpacket", None)
        count = flop_registry.get(operator)
        for argument in args if count is not None else ():
            name = self._name_of(argument)
            if name is not None and count is not None:
                macs = count(*args, **(kwargs or {}), out_val=found) // 2
                self._see(name, WeightUse(operator, args, argument, int(macs)))
                break
        return found

    def _name_of(self, argument: Any) -> str | None:
        if not _is_plain(argument):
            return None
        held = self._at.get(argument.untyped_storage().data_ptr(), ())
        begin = argument.data_ptr() if held else 0
        return next((name for first, end, name in held if first <= begin < end), None)


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and x.numel() > 0 and not x.is_meta
