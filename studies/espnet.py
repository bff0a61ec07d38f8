"""Segmentation: ESPNet on CamVid, judged by the mean intersection over union of eleven classes.

Network: S. Mehta et al., ESPNet, 2018; weights of sacmehta/ESPNet (MIT), espnet/*.pth. Data: G.
Brostow et al., CamVid, 2009 (CC BY-NC 4.0), espnet/CamVid/{train,val,test} with labels beside them
in {train,val,test}annot. Training images calibrate; validation and test images judge.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import hq_optuna
from hq_optuna.network.batches import Batch, Batches
from hq_optuna.study_files.published import DATA, needed

SETTINGS: dict[str, Any] = {"bits": range(2, 9), "budget": "0.25 bops"}
FILES = "espnet/espnet_p_2_q_8_camvid.pth and espnet/CamVid"
CLASSES = 11
VOID = 255  # pixels of no class
# Of the CamVid training images, blue, green, red: what the weights were trained with.
MEAN = (110.33102643, 108.40886315, 105.03319369)
STD = (72.12571015, 72.69074534, 69.90434816)

loss = partial(functional.cross_entropy, ignore_index=VOID)


class Conv(nn.Module):
    """A convolution without bias."""

    def __init__(self, i: int, o: int, k: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = (k - 1) // 2 * dilation
        self.conv = nn.Conv2d(i, o, k, stride, padding, dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, i, H, W)``."""
        y: Tensor = self.conv(x)
        return y


class BnAct(nn.Module):
    """Batch-norm and PReLU."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(n, eps=1e-3), nn.PReLU(n)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, n, H, W)``."""
        y: Tensor = self.act(self.bn(x))
        return y


class ConvBnAct(nn.Module):
    """A convolution, batch-norm and PReLU."""

    def __init__(self, i: int, o: int, k: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, stride, (k - 1) // 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(o, eps=1e-3), nn.PReLU(o)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, i, H, W)``."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class Pyramid(nn.Module):
    """Fewer channels, then five dilated convolutions whose running sums stand side by side."""

    def __init__(self, i: int, o: int, down: bool = False) -> None:
        super().__init__()
        n = o // 5
        self.c1 = Conv(i, n, 3, 2) if down else Conv(i, n, 1)
        self.d1 = Conv(n, o - 4 * n, 3)
        self.d2, self.d4, self.d8, self.d16 = (Conv(n, n, 3, dilation=d) for d in (2, 4, 8, 16))

    def spread(self, x: Tensor) -> Tensor:
        """Map ``(N, i, H, W)``."""
        x = self.c1(x)
        outs, total = [self.d1(x)], torch.zeros((), device=x.device)
        for conv in (self.d2, self.d4, self.d8, self.d16):
            total = conv(x) + total
            outs.append(total)
        return torch.cat(outs, 1)


class Down(Pyramid):
    """A pyramid at half the size."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, down=True)
        self.bn, self.act = nn.BatchNorm2d(o, eps=1e-3), nn.PReLU(o)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, i, H, W)``."""
        y: Tensor = self.act(self.bn(self.spread(x)))
        return y


class ESP(Pyramid):
    """A pyramid, beside a shortcut if told."""

    def __init__(self, i: int, o: int, add: bool = True) -> None:
        super().__init__(i, o)
        self.bn, self.add = BnAct(o), add

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, i, H, W)``."""
        out = self.spread(x)
        y: Tensor = self.bn(x + out if self.add else out)
        return y


class Encoder(nn.Module):
    """Three levels, each at half the size of the one before."""

    def __init__(self, classes: int, p: int, q: int) -> None:
        super().__init__()
        self.level1 = ConvBnAct(3, 16, 3, 2)
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.b1 = BnAct(19)
        self.level2_0 = Down(19, 64)
        self.level2 = nn.Sequential(*(ESP(64, 64) for _ in range(p)))
        self.b2 = BnAct(131)
        self.level3_0 = Down(131, 128)
        self.level3 = nn.Sequential(*(ESP(128, 128) for _ in range(q)))
        self.b3 = BnAct(256)
        self.classifier = Conv(256, classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three levels."""
        half = self.pool(x)
        one = self.b1(torch.cat([self.level1(x), half], 1))
        first = self.level2_0(one)
        two = self.b2(torch.cat([self.level2(first), first, self.pool(half)], 1))
        first = self.level3_0(two)
        return one, two, self.classifier(self.b3(torch.cat([first, self.level3(first)], 1)))


class ESPNet(nn.Module):
    """From normalized ``(N, 3, H, W)`` to scores ``(N, classes, H, W)``; H and W multiples of 8."""

    def __init__(self, classes: int, p: int = 2, q: int = 8) -> None:
        super().__init__()
        self.encoder = Encoder(classes, p, q)
        self.level3_C = Conv(131, classes, 1)
        self.br = nn.BatchNorm2d(classes, eps=1e-3)
        self.conv = ConvBnAct(19 + classes, classes, 3)
        self.up_l3 = nn.Sequential(_up(classes))
        self.combine_l2_l3 = nn.Sequential(BnAct(2 * classes), ESP(2 * classes, classes, add=False))
        self.up_l2 = nn.Sequential(_up(classes), BnAct(classes))
        self.classifier = _up(classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of each pixel."""
        one, two, three = self.encoder(x)
        three = self.up_l3(self.br(three))
        two = self.up_l2(self.combine_l2_l3(torch.cat([self.level3_C(two), three], 1)))
        y: Tensor = self.classifier(self.conv(torch.cat([two, one], 1)))
        return y


def _up(classes: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(classes, classes, 2, 2, bias=False)


def network(data: Path = DATA) -> nn.Module:
    """Return the published network.

    Args:
        data: Folder with espnet/.
    """
    path = needed(data / "espnet" / "espnet_p_2_q_8_camvid.pth", FILES)
    state = torch.load(path, map_location="cpu", weights_only=True)
    net = ESPNet(len(state["classifier.weight"]))
    net.load_state_dict(state)
    return net.eval()


def calibration(data: Path = DATA, n_calibration: int = 24) -> Batches:
    """Return training images.

    Args:
        data: Folder with espnet/.
        n_calibration: Images that the score reads.
    """
    return _batches(data, "train", n_calibration)


def validation(data: Path = DATA, n_validation: int = 25) -> Batches:
    """Return validation images.

    Args:
        data: Folder with espnet/.
        n_validation: Images that the network is judged by.
    """
    return _batches(data, "val", n_validation)


def test(data: Path = DATA, n_test: int = 48) -> Batches:
    """Return test images.

    Args:
        data: Folder with espnet/.
        n_test: Images that the network is judged by when the search is over.
    """
    return _batches(data, "test", n_test)


def _batches(data: Path, split: str, n: int, size: int = 4) -> Batches:
    from PIL import Image

    folder = data / "espnet" / "CamVid"
    paths = sorted(needed(folder / split, FILES).glob("*.png"))
    step = max(len(paths) // n, 1)  # neighbours are frames of one film
    xs, ys = [], []
    for path in paths[::step][:n]:
        with Image.open(path) as stored:
            pixels = np.array(stored.convert("RGB"))[:, :, ::-1].copy()
        with Image.open(needed(folder / f"{split}annot" / path.name, FILES)) as stored:
            y = torch.from_numpy(np.array(stored)).long()
        x = (torch.from_numpy(pixels).float() - torch.tensor(MEAN)) / torch.tensor(STD) / 255
        xs.append(x.movedim(-1, 0))
        ys.append(torch.where(y < CLASSES, y, VOID))
    parts = range(0, len(xs), size)
    pairs = ((torch.stack(xs[i : i + size]), torch.stack(ys[i : i + size])) for i in parts)
    return Batches(Batch(x, y, len(x)) for x, y in pairs)


def tables(net: nn.Module, batches: Batches) -> list[Tensor]:
    """Return of each image how many pixels of a class (rows) were taken for which (columns)."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    found = []
    for batch in batches:
        for scores, y in zip(net(batch.inputs), batch.labels, strict=True):
            guess = scores[:CLASSES].argmax(0)
            found.append(multiclass_confusion_matrix(guess, y, CLASSES, ignore_index=VOID))
    return found


def mean_iou(records: list[Tensor]) -> float:
    """Return the mean intersection over union of the classes that occur, percent."""
    total = torch.stack(records).sum(0).double()
    hit = total.diagonal()
    union = total.sum(0) + total.sum(1) - hit
    return float(100 * (hit / union)[union > 0].mean())


evaluate = hq_optuna.Metric(mean_iou, name="mIoU", unit="%", per_sample=tables)
