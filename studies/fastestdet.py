"""Object detection: FastestDet on COCO at 352x352, judged by the average precision AP50.

Network: dog-qiuqiu/FastestDet (BSD-3-Clause), fastestdet/fastestdet_coco.pth. Data: COCO 2017,
coco/images/{train2017,val2017}/*.jpg and boxes as text, a line ``CLASS CX CY W H`` each in shares
of the image, coco/object_detection/labels/val2017/*.txt. Training images calibrate, without
labels; validation images judge.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hq_optuna
from hq_optuna.network.batches import Batch, Batches
from hq_optuna.study_files.published import DATA, needed

SETTINGS: dict[str, Any] = {"bits": range(2, 9), "budget": "0.25 bops"}
FILES = "fastestdet/fastestdet_coco.pth, coco/images and coco/object_detection/labels/val2017"
CLASSES = 80
SIZE = 352
OVERLAPS = np.linspace(0.5, 0.95, 10)  # COCO's

rise = hq_optuna.rises.Detection(0, (1, 5), (5, 5 + CLASSES), probabilities=True)


def _unit(
    i: int, o: int, k: int = 1, stride: int = 1, groups: int = 1, act: bool = True
) -> list[nn.Module]:
    conv = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(o), *([nn.ReLU()] if act else [])]


class Shuffle(nn.Module):
    """A unit of ShuffleNetV2: half of the channels pass, or a branch halves the size."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        half = o // 2
        self.branch_main = nn.Sequential(
            *_unit(i, half), *_unit(half, half, 3, stride, half, act=False), *_unit(half, o - i)
        )
        self.branch_proj = None
        if stride == 2:
            self.branch_proj = nn.Sequential(*_unit(i, i, 3, stride, i, act=False), *_unit(i, i))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)``."""
        if self.branch_proj is None:
            return torch.cat((x[:, ::2], self.branch_main(x[:, 1::2])), 1)
        return torch.cat((self.branch_proj(x), self.branch_main(x)), 1)


class Backbone(nn.Module):
    """Three stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*_unit(3, 24, 3, 2))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage2, self.stage3 = _stage(24, 48, 4), _stage(48, 96, 8)
        self.stage4 = _stage(96, 192, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of all stages."""
        one = self.stage2(self.maxpool(self.first_conv(x)))
        two = self.stage3(one)
        return one, two, self.stage4(two)


def _stage(i: int, o: int, n: int) -> nn.Sequential:
    return nn.Sequential(Shuffle(i, o, 2), *(Shuffle(o // 2, o, 1) for _ in range(n - 1)))


class Named(nn.Module):
    """Layers under a name, as the state dict has them."""

    def __init__(self, name: str, *layers: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        y: Tensor = self.get_submodule(self.name)(x)
        return y


class SPP(nn.Module):
    """One, two and three depthwise convolutions side by side, beside a shortcut."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.Conv1x1 = Named("conv1x1", *_unit(i, o))
        self.S1, self.S2, self.S3 = (
            nn.Sequential(*(m for _ in range(k) for m in _unit(o, o, 5, groups=o)))
            for k in (1, 2, 3)
        )
        self.output = nn.Sequential(*_unit(3 * o, o, act=False))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)``."""
        x = self.Conv1x1(x)
        y: Tensor = self.relu(x + self.output(torch.cat((self.S1(x), self.S2(x), self.S3(x)), 1)))
        return y


class Heads(nn.Module):
    """Objectness, boxes and classes."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1x1 = Named("conv1x1", *_unit(n, n))

        def head(out: int) -> Named:
            return Named("conv5x5", *_unit(n, n, 5, groups=n), *_unit(n, out, act=False))

        self.obj_layers, self.reg_layers, self.cls_layers = head(1), head(4), head(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, 85, H, W)``."""
        x = self.conv1x1(x)
        found = self.obj_layers(x).sigmoid(), self.reg_layers(x), self.cls_layers(x).softmax(1)
        return torch.cat(found, 1)


class FastestDet(nn.Module):
    """From ``(N, 3, 352, 352)``, blue, green, red in [0, 1], to ``(N, 85, 22, 22)``."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.avg_pool = nn.AvgPool2d(3, 2, 1)
        self.SPP = SPP(336, 96)
        self.detect_head = Heads(96)

    def forward(self, x: Tensor) -> Tensor:
        """Return objectness, box and class probabilities of each cell."""
        one, two, three = self.backbone(x)
        joined = torch.cat((self.avg_pool(one), two, self.upsample(three)), 1)
        y: Tensor = self.detect_head(self.SPP(joined))
        return y


def network(data: Path = DATA) -> nn.Module:
    """Return the published network.

    Args:
        data: Folder with fastestdet/ and coco/.
    """
    path = needed(data / "fastestdet" / "fastestdet_coco.pth", FILES)
    net = FastestDet()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval()


def calibration(data: Path = DATA, n_calibration: int = 64) -> Tensor:
    """Return training images; their labels are not needed.

    Args:
        data: Folder with fastestdet/ and coco/.
        n_calibration: Images that the score reads.
    """
    paths = sorted(needed(data / "coco" / "images" / "train2017", FILES).glob("*.jpg"))
    return torch.stack([_image(path) for path in paths[:n_calibration]])


def validation(data: Path = DATA, n_validation: int = 64) -> Batches:
    """Return validation images, with a list of (boxes, classes) for labels.

    Args:
        data: Folder with fastestdet/ and coco/.
        n_validation: Images that the network is judged by.
    """
    coco = data / "coco"
    paths = sorted(needed(coco / "images" / "val2017", FILES).glob("*.jpg"))[:n_validation]
    texts = needed(coco / "object_detection" / "labels" / "val2017", FILES)
    batches = []
    for at in range(0, len(paths), 16):
        part = paths[at : at + 16]
        truth = [_boxes(texts / f"{path.stem}.txt") for path in part]
        batches.append(Batch(torch.stack([_image(path) for path in part]), truth, len(part)))
    return Batches(batches)


def _image(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as stored:
        image = stored.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)[:, :, ::-1].copy()).movedim(-1, 0).float() / 255


def _boxes(path: Path) -> tuple[Tensor, Tensor]:
    """Return corners ``(n, 4)`` in shares of the image, and classes."""
    lines = needed(path, FILES).read_text("utf-8").split("\n")
    rows = torch.tensor([[float(x) for x in line.split()] for line in lines if line])
    rows = rows.reshape(-1, 5)
    centre, half = rows[:, 1:3], rows[:, 3:5] / 2
    return torch.cat([centre - half, centre + half], 1), rows[:, 0].long()


def detections(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, scores and classes of one image ``(85, H, W)``, at most 100, as published."""
    from torchvision.ops import batched_nms

    p = outputs.movedim(0, -1)
    h, w, _ = p.shape
    best, kinds = p[..., 5:].max(-1)
    scores = (p[..., 0] ** 0.6 * best**0.4).flatten()
    down, across = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    x, y = (p[..., 1].tanh() + across) / w, (p[..., 2].tanh() + down) / h
    half = p[..., 3:5].sigmoid() / 2
    corners = (x - half[..., 0], y - half[..., 1], x + half[..., 0], y + half[..., 1])
    boxes, kinds = torch.stack(corners, -1).reshape(-1, 4), kinds.flatten()
    sure = scores > 0.001
    boxes, scores, kinds = boxes[sure], scores[sure], kinds[sure]
    kept = batched_nms(boxes, scores, kinds, 0.45)[:100]
    return boxes[kept], scores[kept], kinds[kept]


Boxes = tuple[Tensor, Tensor]
"""Corners ``(n, 4)`` and classes ``(n,)`` of an image."""

Found = tuple[Tensor, Tensor, Tensor]
"""Corners, scores and classes."""


def matches(net: nn.Module, batches: Batches) -> list[list[Any]]:
    """Return of each image what COCO's evaluation matched, class by class."""
    found = [detections(z) for batch in batches for z in net(batch.inputs)]
    truth = [pair for batch in batches for pair in batch.labels]
    return matched_by_coco(found, truth, [*range(CLASSES)])


def matched_by_coco(
    found: Sequence[Found], truth: Sequence[Boxes], classes: list[int]
) -> list[list[Any]]:
    """Return what pycocotools matched at all `OVERLAPS`, for each image and class.

    `average_precision` reads it.
    """
    from pycocotools.coco import COCO

    images = [{"id": place} for place in range(len(truth))]
    shared = {"images": images, "categories": [{"id": kind} for kind in classes]}

    def coco(rows: list[tuple[int, list[float], int, float]]) -> Any:
        made = COCO()
        made.dataset = {
            **shared,
            "annotations": [
                {
                    **{"id": number, "image_id": image, "category_id": kind, "score": score},
                    **{"bbox": [x, y, u - x, v - y], "area": (u - x) * (v - y), "iscrowd": 0},
                }
                for number, (image, (x, y, u, v), kind, score) in enumerate(rows, 1)
            ],
        }
        made.createIndex()
        return made

    def rows(sets: Sequence[Any]) -> list[tuple[int, list[float], int, float]]:
        return [
            (image, box, kind, score)
            for image, (boxes, *scores, kinds) in enumerate(sets)
            for box, kind, score in zip(
                boxes.tolist(),
                kinds.tolist(),
                scores[0].tolist() if scores else [1.0] * len(kinds),
                strict=True,
            )
        ]

    with contextlib.redirect_stdout(io.StringIO()):
        judge = _judge(len(truth), classes, OVERLAPS, coco(rows(truth)), coco(rows(found)))
        judge.evaluate()
    n = len(truth)
    return [[judge.evalImgs[place * n + i] for place in range(len(classes))] for i in range(n)]


def _judge(n: int, classes: list[int], overlaps: Any, truth: Any, found: Any) -> Any:
    from pycocotools.cocoeval import COCOeval

    judge = COCOeval(truth, found, "bbox")
    judge.params.imgIds, judge.params.catIds = [*range(n)], classes
    judge.params.iouThrs, judge.params.maxDets = overlaps, [100]
    judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
    return judge


def average_precision(records: list[list[Any]], n_overlaps: int = 1) -> float:
    """Return the mean average precision of the classes that occur, percent.

    It is the mean over so many of `OVERLAPS`: 1 for AP50, all for AP.
    """
    n, kinds = len(records), [*range(len(records[0]))]
    parts = "dtMatches", "gtMatches", "dtIgnore"

    def cut(seen: Any) -> Any:
        return seen and {**seen, **{name: seen[name][:n_overlaps] for name in parts}}

    with contextlib.redirect_stdout(io.StringIO()):
        judge = _judge(n, kinds, OVERLAPS[:n_overlaps], None, None)
        judge.evalImgs = [cut(record[kind]) for kind in kinds for record in records]
        judge._paramsEval = copy.deepcopy(judge.params)
        judge.accumulate()
    precision = judge.eval["precision"]
    return float(100 * precision[precision > -1].mean())


def mean_precision(records: list[list[Any]]) -> float:
    """Return the mean average precision at all `OVERLAPS`, percent."""
    return average_precision(records, len(OVERLAPS))


evaluate = hq_optuna.Metric(average_precision, name="AP50", unit="%", per_sample=matches)
precision = hq_optuna.Metric(mean_precision, name="AP", unit="%", per_sample=matches)
