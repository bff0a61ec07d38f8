"""Any classifier of torchvision on a folder of images, with published weights or a checkpoint.

Data: a folder of images by class, ``FOLDER/CLASS/*.jpg``; classes count in the order of their
names, as torchvision.datasets.ImageFolder counts them. Some images calibrate, dealt by a seed, the
others judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Batches

SETTINGS: dict[str, Any] = {"bits": range(2, 9), "budget": "0.25 bops"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what torchvision's weights want

loss = functional.cross_entropy


def network(
    model: str = "resnet18", checkpoint: Path | None = None, weights: str = "", n_classes: int = 0
) -> nn.Module:
    """Return the classifier.

    Args:
        model: Name of a torchvision model, such as resnet18 or mobilenet_v2.
        checkpoint: State dict saved by torch.save, loaded with weights_only=True.
        weights: Name of torchvision's weights, such as DEFAULT, which are downloaded.
        n_classes: Outputs of the checkpoint's network, where they are not 1,000.
    """
    from torchvision.models import get_model, list_models

    if model not in list_models():
        raise DataError(f"--model is one of torchvision.models.list_models(); got {model!r}.")
    if (checkpoint is None) == (not weights):
        raise DataError("Give --checkpoint FILE, or --weights DEFAULT to download torchvision's.")
    options = {"num_classes": n_classes} if n_classes else {}
    net: nn.Module = get_model(model, weights=weights or None, **options)
    if checkpoint is not None:
        if not checkpoint.is_file():
            raise DataError(f"--checkpoint {checkpoint} is no file. Give a state dict.")
        net.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    return net.eval()


def calibration(
    data: Path, n_calibration: int = 256, size: int = 224, split_seed: int = 0
) -> Batches:
    """Return images that the score reads.

    Args:
        data: Folder of images by class.
        n_calibration: How many.
        size: Side of the images in pixels.
        split_seed: What deals images to calibration and validation.
    """
    return _batches(data, slice(n_calibration), size, split_seed)


def validation(
    data: Path,
    n_calibration: int = 256,
    n_validation: int = 1000,
    size: int = 224,
    split_seed: int = 0,
) -> Batches:
    """Return images by which the network is judged.

    Args:
        data: Folder of images by class.
        n_calibration: How many the score reads.
        n_validation: How many judge.
        size: Side of the images in pixels.
        split_seed: What deals images to calibration and validation.
    """
    part = slice(n_calibration, n_calibration + n_validation)
    return _batches(data, part, size, split_seed)


def _batches(data: Path, part: slice, size: int, seed: int) -> Batches:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if not data.is_dir():
        raise DataError(f"--data {data} is no folder. Give one with a folder of images by class.")
    change = v2.Compose(
        [
            *(v2.Resize(size * 8 // 7), v2.CenterCrop(size), v2.ToImage()),
            *(v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)),
        ]
    )
    images = ImageFolder(str(data), transform=change)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen = order[part].tolist()
    if not chosen:
        raise DataError(f"--data {data} holds {len(images)} images, too few for this part of them.")
    batches = []
    for at in range(0, len(chosen), 32):
        pairs = [images[place] for place in chosen[at : at + 32]]
        x: Tensor = torch.stack([image for image, _ in pairs])
        batches.append(Batch(x, torch.tensor([label for _, label in pairs]), len(pairs)))
    return Batches(batches)
