"""The modes of PyTorch that this package works in, whatever the caller has set around it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Self

import torch
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from hq_optuna.errors import NetworkError, note_caller


@contextmanager
def own_modes() -> Iterator[None]:
    """Turn gradients on, and inference mode and autocast off; also a decorator.

    Only what belongs to the thread is set, and put back: default type and device, deterministic
    algorithms and anomaly detection stay the caller's, whose network may count on them. An error
    that the caller's own code raises inside says which function of ours called it.

    Raises:
        NetworkError: The caller is inside ``torch.nn.utils.parametrize.cached()``.
    """
    if parametrize._cache_enabled:
        raise NetworkError(
            "This runs inside torch.nn.utils.parametrize.cached(), which keeps each weight as it "
            "was rounded first, whatever bits it gets later. Leave that block first."
        )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        try:
            yield
        except Exception as error:
            note_caller(error)
            raise


class _Running(threading.local):
    """The innermost mode of a kind in each thread."""

    def __init__(self) -> None:
        self.mode: Any = None

    def begin(self, mode: Any) -> Any:
        """Have a mode run; return the one before."""
        before, self.mode = self.mode, mode
        return before


class InnermostMode(TorchFunctionMode):
    """A mode that knows whether it is the innermost of its kind in this thread."""

    _running: ClassVar[_Running]

    def __init_subclass__(cls, **options: Any) -> None:
        """Give each kind threads of its own, which its subclasses share."""
        super().__init_subclass__(**options)
        if InnermostMode in cls.__bases__:
            cls._running = _Running()

    @classmethod
    def innermost(cls) -> Self | None:
        """Return the mode of this kind that was entered last and not left."""
        found: Self | None = cls._running.mode
        return found

    def __enter__(self) -> Self:
        """Be the innermost from here on."""
        self._outer = self._running.begin(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the place to the one around."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._running.begin(self._outer)


def kind_of(function: Any) -> str:
    """Return the name of a function of PyTorch's, the same for methods and in-place spellings.

    Example:
        >>> [kind_of(f) for f in (torch.add, torch.Tensor.__matmul__, torch.relu_)]
        ['add', 'matmul', 'relu']
    """
    return str(getattr(function, "__name__", "")).strip("_")


_fused_lock = threading.Lock()
_fused_off: list[bool] = []
"""How it was before, once for each thread that is inside `without_fused_attention`."""


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Turn PyTorch's fused transformer layer off: it uses weights of layers that it never calls.

    The switch is one for all threads: the first that comes turns it, the last puts it back.
    """
    with _fused_lock:
        on = torch.backends.mha.get_fastpath_enabled()
        _fused_off.append(_fused_off[0] if _fused_off else on)
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _fused_lock:
            before = _fused_off.pop()
            if not _fused_off:
                torch.backends.mha.set_fastpath_enabled(before)
