"""Visual wake words: is a person in the picture? MobileNetV1 x0.25 of MLPerf Tiny, 96x96.

Network and weights: mlcommons/tiny (Apache-2.0), converted to a PyTorch state dict. Data: A.
Chowdhery et al., Visual Wake Words, 2019: 500 crops of COCO. They serve for calibration and
validation, dealt by a seed.
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
FILES = "vww/vww_mobilenet.pt and vww/vww.npz"

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


class WakeWords(nn.Module):
    """MobileNetV1 x0.25 of MLPerf Tiny, from images ``(N, 3, 96, 96)`` in [0, 1] to ``(N, 2)``."""

    LAYERS = (
        *((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2)),
        *((128, 1), (128, 1), (128, 1), (128, 1), (128, 1), (256, 2), (256, 1)),
    )
    """Width and stride of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _unit(3, 8, (3, 3), 2)
        width, blocks = 8, []
        for out, stride in self.LAYERS:
            blocks.append(_separable(width, out, stride))
            width = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.blocks(self.first(x)).mean((2, 3)))  # type: ignore[no-any-return]


def network(data: Path = DATA) -> nn.Module:
    """Return the published network.

    Args:
        data: Folder with vww/vww_mobilenet.pt and vww/vww.npz.
    """
    return load_weights(WakeWords(), needed(data / "vww" / "vww_mobilenet.pt", FILES))


def calibration(
    data: Path = DATA, n_calibration: int = 200, split_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return samples that the score reads, drawn by a seed.

    Args:
        data: Folder with vww/vww_mobilenet.pt and vww/vww.npz.
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
        data: Folder with vww/vww_mobilenet.pt and vww/vww.npz.
        n_calibration: Samples that the score reads.
        split_seed: What deals samples to calibration and validation.
    """
    (x, y), order = _samples(data), dealt(N_SAMPLES, split_seed)
    return x[order[n_calibration:]], y[order[n_calibration:]]


def _samples(data: Path) -> tuple[Tensor, Tensor]:
    with np.load(needed(data / "vww" / "vww.npz", FILES)) as stored:
        x, y = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"])
    return x.movedim(-1, 1).float() / 255, y.long()
