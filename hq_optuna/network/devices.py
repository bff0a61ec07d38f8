"""Devices: their random states, moving to one, and whether it has float64."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from hq_optuna.errors import NetworkError


@contextmanager
def preserve_rng_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put random states back after the body: PyTorch's on these devices, NumPy's and Python's."""
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in set(devices):
            if device.type not in ("cpu", "meta"):
                states = torch.random.fork_rng([device.index or 0], device_type=device.type)
                stack.enter_context(states)
        yield


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's first parameter, or the CPU where it has none."""
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def move_to(network: nn.Module, device: str) -> None:
    """Move a network to a device by its name, such as ``"cuda:1"``, if there is one here."""
    try:
        network.to(device)
    except Exception as error:  # its type depends on the device
        n = torch.cuda.device_count()
        here = "CUDA finds no GPU" if n == 0 else f"CUDA finds {n}, cuda:0 to cuda:{n - 1}"
        if n == 1:
            here = "CUDA finds one GPU, cuda:0"
        raise NetworkError(
            f"The network cannot be moved to {device!r}: {str(error).splitlines()[0]} "
            f"({here}; --device cpu always works.)"
        ) from error


def check_double_precision(device: torch.device) -> None:
    """Refuse a device without double precision (Apple's ``mps``): scores and scales need it."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        raise NetworkError(
            f"The network is on {device}, which has no double precision, and scores are summed in "
            "it. Move it to the CPU: network.cpu()."
        ) from error
