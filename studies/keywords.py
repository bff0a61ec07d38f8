"""Keyword spotting: DS-CNN of MLPerf Tiny on Speech Commands v2.

Network and weights: mlcommons/tiny (Apache-2.0), converted to a PyTorch state dict. Data: P.
Warden, Speech Commands, 2018 (CC BY 4.0), 500 clips as 8-bit features. The clips serve for
calibration and validation, dealt by a seed.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.study_files.published import DATA, SamePad, dealt, load_weights, needed

SETTINGS: dict[str, Any] = {"bits": range(2, 9), "budget": "0.25 bops"}

N_SAMPLES = 500
FILES = "kws/kws_dscnn.pt and kws/mfcc.npz"
ZERO_POINT, SCALE = 83, 0.5847029089927673  # of the 8-bit features

loss = functional.cross_entropy


def _unit(
    width: int, out: int, kernel: tuple[int, int], stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(width, out, kernel, stride, groups=groups)
    norm = nn.BatchNorm2d(out, eps=1e-3)
    pad = SamePad(kernel, stride)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv, bn=norm, act=nn.ReLU()))


def _separable(width: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        _unit(width, width, (3, 3), stride, groups=width), _unit(width, out, (1, 1))
    )


class Keywords(nn.Module):
    """DS-CNN of MLPerf Tiny, from features ``(N, 1, 49, 10)`` to ``(N, 12)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _unit(1, 64, (10, 4), 2)
        self.blocks = nn.Sequential(*(_separable(64, 64) for _ in range(4)))
        self.head = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.blocks(self.first(x))
        x = x[:, :, :24]  # the reference pools 24 of its 25 rows
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def network(data: Path = DATA) -> nn.Module:
    """Return the published network.

    Args:
        data: Folder with kws/kws_dscnn.pt and kws/mfcc.npz.
    """
    return load_weights(Keywords(), needed(data / "kws" / "kws_dscnn.pt", FILES))


def calibration(
    data: Path = DATA, n_calibration: int = 200, split_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return samples that the score reads, drawn by a seed.

    Args:
        data: Folder with kws/kws_dscnn.pt and kws/mfcc.npz.
        n_calibration: Samples that the score reads.
        split_seed: What deals samples to calibration and validation.
    """
    (x, y), order = _samples(data), dealt(N_SAMPLES, split_seed)
    return x[order[:n_calibration]], y[order[:n_calibration]]


def validation(
    data: Path = DATA, n_calibration: int = 200, split_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return all other samples, by which the network is judged.

    Args:
        data: Folder with kws/kws_dscnn.pt and kws/mfcc.npz.
        n_calibration: Samples that the score reads.
        split_seed: What deals samples to calibration and validation.
    """
    (x, y), order = _samples(data), dealt(N_SAMPLES, split_seed)
    return x[order[n_calibration:]], y[order[n_calibration:]]


def _samples(data: Path) -> tuple[Tensor, Tensor]:
    with np.load(needed(data / "kws" / "mfcc.npz", FILES)) as stored:
        x, y = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"])
    return (x.float().reshape(-1, 1, 49, 10) - ZERO_POINT) * SCALE, y.long()
