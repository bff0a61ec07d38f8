"""Faster R-CNN of torchvision on COCO-like data, judged by the average precision AP50.

Its second stage looks at regions that the first one selected, which other bits would select anew.
So the rise compares what the first stage's head returns, and what the second stage says of a fixed
set of regions in each image. Weights are a state dict of yours or of torchvision (the checkpoint
that `torchvision.models` downloads). Data: a folder of images and annotations as COCO's JSON. The
first images calibrate, without labels; the others judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision_detection import calibration, detector, evaluate, validation  # a neighbour

import hq_optuna

__all__ = ["SETTINGS", "calibration", "evaluate", "network", "rise", "validation"]

SETTINGS: dict[str, Any] = {"bits": range(2, 9), "budget": "0.25 bops"}
MODELS = (
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn"),
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"),
)
GRIDS = (1, 2, 3, 4)
"""Each image is cut into so many regions by so many, one size after the other."""


class TwoStages(hq_optuna.rises.At):
    """A rise of both stages, the second on regions that are the same whatever the bits."""

    def run(self, network: Any, inputs: Any) -> Any:
        """Return what both heads return, by name."""
        handle = network.rpn.register_forward_hook(with_fixed_regions)
        try:
            found = super().run(network, inputs)
        finally:
            handle.remove()
        objectness, moves = found["rpn.head"]  # a tensor (N, anchors, H, W) of each size
        scores, boxes = found["roi_heads.box_predictor"]  # rows of all images' regions
        return {
            "rpn.head": {
                "objectness": torch.cat([x.flatten(1) for x in objectness], 1),
                "boxes": torch.cat([x.flatten(1) for x in moves], 1),
            },
            "roi_heads.box_predictor": {"scores": scores, "boxes": boxes},
        }


def with_fixed_regions(rpn: nn.Module, args: Any, found: Any) -> tuple[list[Tensor], Any]:
    """Return what the first stage returns, with fixed regions in the place of the selected."""
    boxes, losses = found
    regions = []
    for (height, width), like in zip(args[0].image_sizes, boxes, strict=True):
        corners = [
            (x / n, y / n, (x + 1) / n, (y + 1) / n)
            for n in GRIDS
            for x in range(n)
            for y in range(n)
        ]
        regions.append(like.new_tensor(corners) * like.new_tensor([width, height, width, height]))
    return regions, losses


rise = TwoStages(
    {
        "rpn.head": hq_optuna.rises.Heads(
            {
                "objectness": hq_optuna.rises.Binary(),
                "boxes": hq_optuna.rises.SquaredError(relative=True),
            }
        ),
        "roi_heads.box_predictor": hq_optuna.rises.Heads(
            {
                "scores": hq_optuna.rises.CrossEntropy(),
                "boxes": hq_optuna.rises.SquaredError(relative=True),
            }
        ),
    }
)


def network(checkpoint: Path, model: str = MODELS[0]) -> nn.Module:
    """Return the detector.

    Args:
        checkpoint: State dict saved by torch.save, loaded with weights_only=True.
        model: Name of a Faster R-CNN of torchvision.
    """
    return detector(checkpoint, model, MODELS)
