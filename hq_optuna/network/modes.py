"""The modes of PyTorch that this package works in, whatever the caller has set around it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.utils import parametrize

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
