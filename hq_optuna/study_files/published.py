"""What studies of published networks share: files in a local folder, their weights, a fair deal."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.errors import DataError

DATA = Path(os.environ.get("HQ_OPTUNA_ZOO", "zoo"))
"""Where ``--data`` points unless it is given."""


def needed(path: Path, what: str) -> Path:
    """Return a path that exists.

    Args:
        path: File or folder.
        what: What the study's folder holds, in words, for who has not got it.

    Raises:
        DataError: It is missing; the message names the option and the variable for the folder.
    """
    if not path.exists():
        raise DataError(
            f"{path} is missing. Give --data FOLDER (or set HQ_OPTUNA_ZOO) with {what}."
        )
    return path


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Load a state dict into a network, and return it in eval mode.

    Batch-norm's counters of batches may be missing in the file; nothing else may.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = network.state_dict()
    counters = {name: tensor for name, tensor in own.items() if name.endswith("batches_tracked")}
    network.load_state_dict(counters | dict(state))
    return network.eval()


def dealt(n: int, seed: int) -> list[int]:
    """Return the numbers below ``n`` in a random order, the same one for the same seed."""
    found: list[int] = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return found


class SamePad(nn.Module):
    """TensorFlow's padding "SAME" for a convolution: the odd pixel goes right and below."""

    def __init__(self, kernel: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """Pad ``(N, C, H, W)`` so that the outputs are ``H / stride`` by ``W / stride``, up."""
        sides: list[int] = []
        for size, kernel in zip(x.shape[:1:-1], self.kernel[::-1], strict=True):
            total = max((-(-size // self.stride) - 1) * self.stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return functional.pad(x, sides) if any(sides) else x
