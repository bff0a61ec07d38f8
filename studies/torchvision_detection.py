"""A one-stage detector of torchvision on COCO-like data: SSDLite, SSD, RetinaNet or FCOS.

The detector returns the boxes that it selected, so the rise compares what its head returns before.
Weights are a state dict of yours or of torchvision (the checkpoint that `torchvision.models`
downloads). Data: a folder of images and annotations as COCO's JSON. The first images calibrate,
without labels; the others judge by AP50.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastestdet import average_precision as of_records  # a neighbour
from fastestdet import matched_by_coco
from torch import Tensor, nn

import hq_optuna
from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Batches

SETTINGS: dict[str, Any] = {"bits": range(2, 9), "budget": "0.25 bops"}
MODELS = (
    *("ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "fcos_resnet50_fpn"),
    *("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"),
)

rise = hq_optuna.rises.At(
    {
        "head": hq_optuna.rises.Heads(
            {
                "cls_logits": hq_optuna.rises.SquaredError(relative=True),
                "bbox_regression": hq_optuna.rises.SquaredError(relative=True),
            }
        )
    }
)


def network(checkpoint: Path, model: str = MODELS[0]) -> nn.Module:
    """Return the detector.

    Args:
        checkpoint: State dict saved by torch.save, loaded with weights_only=True.
        model: Name of a one-stage detector of torchvision.
    """
    return detector(checkpoint, model, MODELS)


def detector(checkpoint: Path, model: str, known: Sequence[str]) -> nn.Module:
    """Return one of torchvision's detectors that are known here."""
    from torchvision.models import get_model

    if model not in known:
        raise DataError(f"--model is one of {', '.join(known)}; got {model!r}.")
    if not checkpoint.is_file():
        raise DataError(f"--checkpoint {checkpoint} is no file. Give a state dict.")
    net: nn.Module = get_model(model, weights=None, weights_backbone=None)
    net.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    return net.eval()


def calibration(images: Path, annotations: Path, n_calibration: int = 64) -> Batches:
    """Return the first images; their labels are not read.

    Args:
        images: Folder of images.
        annotations: COCO's JSON of them.
        n_calibration: Images that the score reads.
    """
    files = [file for file, _ in _annotated(annotations)[:n_calibration]]
    return _batches(images, [(file, None) for file in files])


def validation(
    images: Path, annotations: Path, n_calibration: int = 64, n_validation: int = 500
) -> Batches:
    """Return the images behind these, with (boxes, classes) for labels.

    Args:
        images: Folder of images.
        annotations: COCO's JSON of them.
        n_calibration: Images that the score reads.
        n_validation: Images that judge.
    """
    found = _annotated(annotations)[n_calibration : n_calibration + n_validation]
    return _batches(images, found)


def _annotated(path: Path) -> list[tuple[str, Any]]:
    """Return files and their boxes as corners with classes, in the order of the files' numbers."""
    if not path.is_file():
        raise DataError(f"--annotations {path} is no file. Give COCO's JSON.")
    data = json.loads(path.read_text("utf-8"))
    boxes: dict[int, list[tuple[list[float], int]]] = {one["id"]: [] for one in data["images"]}
    for one in data["annotations"]:
        x, y, w, h = one["bbox"]
        boxes[one["image_id"]].append(([x, y, x + w, y + h], one["category_id"]))
    images = sorted(data["images"], key=lambda one: int(one["id"]))
    return [(one["file_name"], _as_tensors(boxes[one["id"]])) for one in images]


def _as_tensors(rows: list[tuple[list[float], int]]) -> tuple[Tensor, Tensor]:
    corners = torch.tensor([row for row, _ in rows]).reshape(-1, 4)
    return corners, torch.tensor([kind for _, kind in rows], dtype=torch.long)


def _batches(folder: Path, pairs: list[tuple[str, Any]], size: int = 8) -> Batches:
    if not pairs:
        raise DataError("--annotations names too few images for --n-calibration and validation.")
    batches = []
    for at in range(0, len(pairs), size):
        part = pairs[at : at + size]
        for file, _ in part:
            if not (folder / file).is_file():
                raise DataError(f"--images {folder} has no {file!r}, which the annotations name.")
        images = [_image(folder / file) for file, _ in part]
        told = [label for _, label in part] if part[0][1] is not None else None
        batches.append(Batch((images,), told, len(part)))
    return Batches(batches)


def _image(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as stored:
        return torch.from_numpy(np.array(stored.convert("RGB"))).movedim(-1, 0).float() / 255


def matches(net: nn.Module, batches: Batches) -> list[list[Any]]:
    """Return of each image what COCO's evaluation matched, class by class."""
    found = [one for batch in batches for one in net(*batch.inputs)]
    boxes = [(one["boxes"], one["scores"], one["labels"]) for one in found]
    truth = [pair for batch in batches for pair in batch.labels]
    return matched_by_coco(boxes, truth, [*range(1, 91)])


def average_precision(records: list[list[Any]]) -> float:
    """Return the mean average precision at an overlap of 0.5, percent."""
    return float(of_records(records))


evaluate = hq_optuna.Metric(average_precision, name="AP50", unit="%", per_sample=matches)
