"""Which calls of PyTorch a forward pass makes: counted by kind, so that one can be found again.

A residual addition is no module: it has no name and no hook. The n-th addition of a forward pass
does not change from pass to pass, however, unless the network branches on its data. `Counting`
counts the calls that a network's own code makes and may replace what one returns; what quantizers
and hooks of this package call in between is `uncounted`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from hq_optuna.errors import NetworkError
from hq_optuna.network.modes import InnermostMode, kind_of

NORMS = ("batch_norm",)
CLIPS = ("relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min")
"""Activations that runtimes fuse into the integer layer before them."""
JOINS = ("add", "mul", "cat")
POOLS = (
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "mean"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
)
MAX_POOLS = (
    *("max_pool1d", "max_pool2d", "max_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
)
CURVES = (
    *("sigmoid", "hardsigmoid", "tanh", "silu", "hardswish", "gelu", "elu", "leaky_relu"),
    *("softmax", "layer_norm"),
)
COUNTED = frozenset((*NORMS, *CLIPS, *JOINS, *POOLS, *MAX_POOLS, *CURVES))

_SAME = {"iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "multiply": "mul"} | {
    **{"concat": "cat", "concatenate": "cat"}
}


class _State(threading.local):
    """Whether calls of this thread are counted now."""

    def __init__(self) -> None:
        self.suspended = 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.suspended += 1
        try:
            yield
        finally:
            self.suspended -= 1


_STATE = _State()


def uncounted() -> AbstractContextManager[None]:
    """Leave out calls of the body, which are none of the network's own."""
    return _STATE.pause()


def count(kind: str, x: Tensor) -> Tensor:
    """Count a call that is not made any more; return what replaces ``x``, which it returned."""
    counting = Counting.innermost()
    if counting is None or _STATE.suspended:
        return x
    with uncounted():
        return counting.returned(kind, x)


def counted_kind(function: Any) -> str:
    """Return the kind that a function of PyTorch's counts as, the same in all its spellings.

    Example:
        >>> import torch
        >>> [counted_kind(f) for f in (torch.add, torch.Tensor.__iadd__, torch.relu_)]
        ['add', 'add', 'relu']
    """
    name = kind_of(function)
    return _SAME.get(name, name)


class Counting(InnermostMode):
    """Counts a forward pass's calls by kind; functions in ``at`` replace what some return.

    Attributes:
        counts: Calls of each kind so far.
    """

    def __init__(self, at: Mapping[tuple[str, int], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.counts = Counter[str]()
        self._at = at

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of PyTorch's, and count it."""
        result = func(*args, **(kwargs or {}))
        return result if _STATE.suspended else self.called(func, args, kwargs or {}, result)

    def called(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Any:
        """Return what replaces a call's result."""
        kind = counted_kind(function)
        if kind not in COUNTED or not isinstance(result, Tensor):
            return result
        return self.returned(kind, result) if result.is_floating_point() else result

    def returned(self, kind: str, x: Tensor) -> Tensor:
        """Count a call, and return what replaces its result."""
        replaced = self._at.get((kind, self.counts[kind]))
        self.counts[kind] += 1
        return x if replaced is None else replaced(x)

    def is_running(self) -> bool:
        """Say whether this counts now, in this thread."""
        return self.innermost() is self

    def check(self, expected: Mapping[str, int]) -> None:
        """Refuse a forward pass that called other functions than the recorded one.

        Raises:
            NetworkError: The network branches on its data, so that a call cannot be found again.
        """
        differ = [k for k in sorted({*expected, *self.counts}) if self.counts[k] != expected.get(k)]
        if differ:
            kind = differ[0]
            raise NetworkError(
                f"The network calls {kind!r} {self.counts[kind]} times for these inputs and "
                f"{expected.get(kind, 0)} times for others, so what it branches on decides which "
                "outputs are rounded. Search it without output_bits."
            )
