"""ResNet-20 on CIFAR-10, from a checkpoint of yours.

Data: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. Network: K. He et
al., Deep Residual Learning for Image Recognition, 2016, section 4.2, with option-A shortcuts.

Calibration and validation are training images. A checkpoint that was trained on all of them gets
more of these right than of unseen images: compare its accuracies before and after with each other,
and read the accuracy itself on the test images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.errors import DataError, HqOptunaError, NetworkError

SETTINGS: dict[str, Any] = {
    "bits": range(2, 9),
    "activation_bits": "same",
    "budget": "0.25 bops",
    "n_candidates": 8,
    "rule": "ratio",
}

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# Channel means and deviations of ImageNet: what the published checkpoint was trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
N_VALIDATION = 1000
SHIFT = 4  # pixels


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (He et al., option A)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride = stride
        self.added = (out - width) // 2  # zero channels before and after; out // 4 where it doubles

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, width, H, W)`` to ``(N, out, H / stride, W / stride)``."""
        inner = functional.relu(self.bn1(self.conv1(x)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.added, self.added))
        return functional.relu(self.bn2(self.conv2(inner)) + shortcut)


class ResNet20(nn.Module):
    """Twenty layers, 269,722 parameters; from normalized ``(N, 3, 32, 32)`` to ``(N, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _stage(width: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(width, out, stride), Block(out, out, 1), Block(out, out, 1))


def network(checkpoint: Path) -> nn.Module:
    """Return the network with the weights of a checkpoint.

    Args:
        checkpoint: State dict, .pt or .safetensors, with the names conv1, bn1,
            layer1.0.conv1 … layer3.2.bn2, linear.
    """
    state = _state_dict(checkpoint)
    with torch.random.fork_rng(devices=[]):
        net = ResNet20()
    own = net.state_dict()
    # PyTorch counts batches since 1.0; older checkpoints do not have the counters.
    missing = [name for name in own if name not in state and "num_batches" not in name]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        raise NetworkError(
            f"{checkpoint} is no ResNet-20 of this study: missing {_some(missing)}, unexpected "
            f"{_some(unexpected)}. Give the checkpoint of a network with its layer names."
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise NetworkError(
                f"{checkpoint} is no ResNet-20 of this study: {name} has the shape "
                f"{tuple(tensor.shape)}, expected {tuple(own[name].shape)}."
            )
    net.load_state_dict({**own, **state})
    return net.eval()


def calibration(
    data: Path, download: bool = False, n_calibration: int = 512, split_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return training images, not augmented, that the score reads.

    Args:
        data: Folder with train/ and test/, each with one folder of images per class, or folder of
            torchvision's CIFAR10 (with cifar-10-batches-py).
        download: Let torchvision download CIFAR-10 into the folder first.
        n_calibration: Images that the score reads.
        split_seed: Seed by which training images are dealt to calibration and validation.
    """
    images = _Images(data, download, train=True)
    most = len(images) - N_VALIDATION
    if not 1 <= n_calibration <= most:
        raise DataError(
            f"--n-calibration is 1 to {most}: {data} has {len(images)} training images, of which "
            f"{N_VALIDATION} are for validation; got {n_calibration}."
        )
    return images.read(_order(len(images), split_seed)[:n_calibration])


def train(
    data: Path, download: bool = False, n_calibration: int = 512, split_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the training images that are neither for calibration nor for validation."""
    images = _Images(data, download, train=True)
    chosen = _order(len(images), split_seed)[n_calibration:-N_VALIDATION]
    if not chosen:
        raise DataError(
            f"{data} has {len(images)} training images; {n_calibration} of them calibrate and "
            f"{N_VALIDATION} validate, so none are left to train on. Give more images with --data."
        )
    return images.read(chosen)


def augment(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Shift images by up to four pixels each way, black moving in, and mirror every other one.

    As the published network was trained (He et al., section 4.2).
    """
    n, _, height, width = inputs.shape
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    padded = (-mean / std).to(inputs).repeat(n, 1, height + 2 * SHIFT, width + 2 * SHIFT)
    padded[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT] = inputs
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    rows = torch.arange(height) + down
    columns = torch.arange(width) + right
    columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(n)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None]].movedim(-1, 1)


def validation(data: Path, download: bool = False, split_seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return another 1000 training images: the same ones whatever --n-calibration is."""
    images = _Images(data, download, train=True)
    if len(images) <= N_VALIDATION:
        raise DataError(
            f"{data} has {len(images)} training images; this study sets {N_VALIDATION} aside for "
            "validation and needs some for calibration. Give more images with --data."
        )
    return images.read(_order(len(images), split_seed)[-N_VALIDATION:])


def test(data: Path, download: bool = False) -> tuple[Tensor, Tensor]:
    """Return all test images."""
    images = _Images(data, download, train=False)
    return images.read(range(len(images)))


def _order(n: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


class _Images:
    """Training or test images in a fixed order, read only when asked for."""

    def __init__(self, data: Path, download: bool, train: bool) -> None:
        try:
            from torchvision import datasets
        except ImportError as error:
            raise DataError(
                "The study 'cifar10_resnet20' reads its images with torchvision, which is not "
                "installed. Run: pip install 'hq_optuna[studies]'"
            ) from error
        part = "train" if train else "test"
        self._pairs: Any
        if download or (data / "cifar-10-batches-py").is_dir():
            try:
                self._pairs = datasets.CIFAR10(str(data), train=train, download=download)
            except (OSError, RuntimeError) as error:
                done = "downloaded to" if download else "read in"
                raise DataError(
                    f"torchvision's CIFAR10 could not be {done} {data} ({error}). Fetch it on "
                    "a machine with a network and give its folder, the one with "
                    "cifar-10-batches-py in it, with --data."
                ) from error
        elif (data / part).is_dir():
            try:
                self._pairs = datasets.ImageFolder(str(data / part))
            except FileNotFoundError as error:
                raise DataError(f"--data: {error}") from error
        else:
            raise DataError(
                f"--data {data} holds neither {part}/ with a folder of images per class nor "
                "cifar-10-batches-py. Give the folder of the images, or --download to fetch "
                "CIFAR-10 into it."
            )
        if tuple(self._pairs.classes) != CLASSES:
            raise DataError(
                f"The classes in {data} are {_some(self._pairs.classes)}; the checkpoint's are "
                f"{', '.join(CLASSES)}. Name the folders like these."
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return normalized images ``(N, 3, 32, 32)`` float32 and labels ``(N,)``."""
        from torchvision.transforms import functional as transforms

        pairs = [self._pairs[index] for index in indices]
        for image, _ in pairs:
            if image.size != (32, 32):
                raise DataError(f"CIFAR-10 images have 32x32 pixels; got {image.size}.")
        images = torch.stack([transforms.to_tensor(image) for image, _ in pairs])
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
        return (images - mean) / std, torch.tensor([label for _, label in pairs])


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict; ``{"state_dict": ...}`` and the prefix ``module.`` are taken off."""
    if not path.is_file():
        raise NetworkError(f"--checkpoint {path} does not exist. Give a .pt or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except HqOptunaError:
        raise
    except Exception as error:
        raise NetworkError(
            f"--checkpoint {path} cannot be read: {type(error).__name__}: {error!s:.200} "
            "Give a state dict saved with torch.save, or a .safetensors file."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise NetworkError(
            f"--checkpoint {path} holds no state dict but a {type(content).__name__}. "
            "Save network.state_dict()."
        )
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "nothing"
