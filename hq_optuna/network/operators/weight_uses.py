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


_RECURRENT = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
"""Operators that run a recurrent layer whole; the flop counter does not know them."""


_BY_ELEMENT = {
    **dict.fromkeys(("add", "add_"), "additions"),
    **dict.fromkeys(("mul", "mul_"), "products of elements"),
    "cat": "concatenations",
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), "softmax"),
    **dict.fromkeys(("native_layer_norm", "native_group_norm", "_fused_rms_norm"), "normalization"),
    **dict.fromkeys(("embedding", "_embedding_bag"), "embeddings"),
}
"""Operators that take several activations, or compute with them as they are, and what they do."""


class WatchedWeights(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls ``see(name, use)`` for each multiplication with one of the named weights.

    A view of a weight, or of a part of it, is the weight: it is known by its memory. Of all other
    multiplications ``see_other(operator, macs)`` is called, and ``see_elements(what, elements)`` of
    what computes element by element: additions of tensors, softmax, normalization, ….
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        see: Callable[[str, WeightUse], None],
        see_other: Callable[[str, int], None] = lambda operator, macs: None,
        see_elements: Callable[[str, int], None] = lambda what, elements: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._at: dict[int, list[tuple[int, int, str]]] = {}
        for name, weight in weights.items():
            if _is_plain(weight):
                begin, place = weight.data_ptr(), weight.untyped_storage().data_ptr()
                end = begin + weight.numel() * weight.element_size()
                self._at.setdefault(place, []).append((begin, end, name))
        self._see, self._see_other, self._see_elements = see, see_other, see_elements

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        operator = getattr(func, "overloadpacket", None)
        count = flop_registry.get(operator)
        if count is None:
            name = getattr(operator, "__name__", "")
            if name in _RECURRENT:
                self._see_other(name, _of_recurrent(args))
            elif name.startswith("_scaled_dot_product"):
                q, k, v = args[:3]  # (…, places, width)
                pairs = q.numel() // q.shape[-1] * k.shape[-2]
                self._see_other(name, pairs * _widths(q, v))
                self._see_elements("softmax", pairs)
            elif name in _BY_ELEMENT and _joins(name, args):
                first = found[0] if isinstance(found, tuple) else found
                self._see_elements(_BY_ELEMENT[name], first.numel())
            return found
        macs = int(count(*args, **(kwargs or {}), out_val=found) // 2)
        for argument in args:
            name = self._name_of(argument)
            if name is not None:
                self._see(name, WeightUse(operator, args, argument, macs))
                break
        else:
            self._see_other(getattr(operator, "__name__", "?"), macs)
        return found

    def _name_of(self, argument: Any) -> str | None:
        if not _is_plain(argument):
            return None
        held = self._at.get(argument.untyped_storage().data_ptr(), ())
        begin = argument.data_ptr() if held else 0
        return next((name for first, end, name in held if first <= begin < end), None)


def _of_recurrent(args: tuple[Any, ...]) -> int:
    """Return the multiply-accumulates of a recurrent layer: its weights at each step of each row.

    Inputs are ``(steps, rows, features)``, or ``(rows, steps, features)``.
    """
    x, given, other, *_ = args
    weights = given if isinstance(given, (list, tuple)) else (given, other)
    return int(x.shape[0] * x.shape[1] * sum(w.numel() for w in weights if w.dim() == 2))


def _joins(name: str, args: tuple[Any, ...]) -> bool:
    """Say whether an operator takes what it is counted for: a number that is added is none."""
    return name[:3] not in ("add", "mul") or (isinstance(args[1], Tensor) and args[1].dim() > 0)


def _widths(q: Tensor, v: Tensor) -> int:
    return q.shape[-1] + v.shape[-1]


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and x.numel() > 0 and not x.is_meta
