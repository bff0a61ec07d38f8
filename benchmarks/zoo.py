"""Trained networks with data, for benchmarks that must not choose anything by a single network.

Weights and data are the project's shared data, which it cannot ship: ``zoo.tar``, the CIFAR-10
images and checkpoints, or a folder with the same files. Definitions follow the names in the state
dicts. What calibrates and what nobody has seen are dealt by a seed where there is one set for both:
digits, keywords and wake words. The other networks calibrate on images of their training set.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from studies import cifar10_resnet20 as cifar10
from studies import digits

DATA = Path(__file__).parents[2] / "shared" / "data"
IMAGE_SIZE = 128  # of EfficientNet-Lite0, which was trained at 224

Samples = tuple[Tensor, Tensor]


def data_folder() -> Path:
    """Return the folder of the shared data: ``HQ_OPTUNA_DATA``, or the one beside the checkout."""
    return Path(os.environ.get("HQ_OPTUNA_DATA", DATA))


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network in eval mode, what scores may read, and what they never see."""

    network: nn.Module
    calibration: Samples
    unseen: Samples


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


class CifarResNet(nn.Module):
    """ResNet-20, -32, … on CIFAR-10, with 3, 5, … blocks a stage and option-A shortcuts."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16)
        self.layer2 = self._stage(blocks, 16, 32)
        self.layer3 = self._stage(blocks, 32, 64)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(blocks: int, width: int, out: int) -> nn.Sequential:
        first = cifar10.Block(width, out, out // width)
        return nn.Sequential(first, *(cifar10.Block(out, out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of normalized ``(N, 3, 32, 32)``."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


@contextmanager
def _folder(data: Path, name: str, *parts: str) -> Iterator[Path]:
    """Give a folder: as it lies in the data, or unpacked from the archive of its name."""
    if (data / name).is_dir():
        yield data / name
        return
    with tempfile.TemporaryDirectory() as temporary, tarfile.open(data / f"{name}.tar") as archive:
        wanted = tuple(f"{name}/{part}" for part in parts) or (name,)
        members = [member for member in archive if member.name.startswith(wanted)]
        archive.extractall(temporary, members, filter="data")
        yield Path(temporary) / name


def _with_weights(network: nn.Module, path: Path) -> nn.Module:
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = network.state_dict()
    counters = {name: tensor for name, tensor in own.items() if name.endswith("batches_tracked")}
    network.load_state_dict(counters | dict(state))
    return network.eval()


def _dealt(samples: Samples, seed: int, n_calibration: int) -> tuple[Samples, Samples]:
    """Return the calibration samples and all others, in a random order."""
    order = torch.randperm(len(samples[1]), generator=torch.Generator().manual_seed(seed))
    (x, y), (first, rest) = samples, (order[:n_calibration], order[n_calibration:])
    return (x[first], y[first]), (x[rest], y[rest])


def _digits(data: Path, seed: int) -> Trained:
    with tempfile.TemporaryDirectory() as folder:
        network = digits.network(Path(folder))
    parts = digits.calibration(), digits.validation(), digits.test()
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Trained(network, *_dealt((x, y), seed, 256))


def _resnet(blocks: int) -> Callable[[Path, int], Trained]:
    def load(data: Path, seed: int) -> Trained:
        path = data / f"resnet{6 * blocks + 2}_cifar10.pt"
        network = _with_weights(CifarResNet(blocks), path)
        with _folder(data, "cifar10_subset") as images:
            seen = cifar10.calibration(images, split_seed=seed)
            return Trained(network, seen, cifar10.test(images))

    return load


def _kws(data: Path, seed: int) -> Trained:
    with _folder(data, "zoo", "kws") as folder:
        network = _with_weights(Keywords(), folder / "kws" / "kws_dscnn.pt")
        with np.load(folder / "kws" / "mfcc.npz") as stored:
            x, y = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"])
    # Zero point and scale of the 8-bit features.
    x = (x.float().reshape(-1, 1, 49, 10) - 83) * 0.5847029089927673
    return Trained(network, *_dealt((x, y.long()), seed, 200))


def _vww(data: Path, seed: int) -> Trained:
    with _folder(data, "zoo", "vww") as folder:
        network = _with_weights(WakeWords(), folder / "vww" / "vww_mobilenet.pt")
        with np.load(folder / "vww" / "vww.npz") as stored:
            x, y = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"])
    x = x.movedim(-1, 1).float() / 255
    return Trained(network, *_dealt((x, y.long()), seed, 200))


def _efficientnet_lite0(data: Path, seed: int) -> Trained:
    with _folder(data, "zoo", "efficientnet_lite0", "imagenet") as folder:
        (path,) = (folder / "efficientnet_lite0").glob("*.pth")
        network = _with_weights(EfficientNetLite0(), path)
        images = folder / "imagenet"
        lines = (images / "val" / "labels.csv").read_text().split()
        rows = [line.split(",") for line in lines]
        unseen = _images([images / "val" / name for name, _ in rows], 224 / 227)
        files = sorted((images / "calibration").glob("*.jpg"))  # named after their classes
        seen = _images(files, 224 / 256)
    labels = torch.tensor([int(file.stem) for file in files])
    calibration, _ = _dealt((seen, labels), seed, len(files))
    _, rest = _dealt((unseen, torch.tensor([int(label) for _, label in rows])), seed, 0)
    return Trained(network, calibration, rest)


def _images(paths: list[Path], share: float) -> Tensor:
    """Return the middle of images, the given share of their shorter side, made smaller."""
    from PIL import Image

    found = []
    for path in paths:
        with Image.open(io.BytesIO(path.read_bytes())) as stored:
            image: Any = stored.convert("RGB")
        side = share * min(image.size)
        left, top = ((size - side) / 2 for size in image.size)
        box = (left, top, left + side, top + side)
        small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box)
        found.append(torch.from_numpy(np.array(small)).movedim(-1, 0))
    return (torch.stack(found).float() - 127) / 128


ZOO: dict[str, Callable[[Path, int], Trained]] = {
    "digits": _digits,
    "kws": _kws,
    "vww": _vww,
    "resnet20": _resnet(3),
    "resnet32": _resnet(5),
    "efficientnet_lite0": _efficientnet_lite0,
}


def load_trained(
    name: str,
    data: Path,
    *,
    seed: int = 0,
    n_calibration: int | None = None,
    n_unseen: int | None = None,
) -> Trained:
    """Return a network of the zoo, with as many samples as there are or are wanted.

    ``seed`` deals the samples; FileNotFoundError where the data are absent.
    """
    if name not in ZOO:
        raise ValueError(f"A network is one of {', '.join(ZOO)}; got {name!r}.")
    with torch.random.fork_rng(devices=[]):
        found = ZOO[name](data, seed)
    (x, y), (u, v) = found.calibration, found.unseen
    seen = x[:n_calibration], y[:n_calibration]
    return Trained(found.network, seen, (u[:n_unseen], v[:n_unseen]))
