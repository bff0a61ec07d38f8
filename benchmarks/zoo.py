"""Trained networks with data, for benchmarks that must not choose anything by a single network.

Weights and data are the project's shared data, which it cannot ship: ``zoo.tar``, the CIFAR-10
images and checkpoints, or a folder with the same files. Definitions follow the names in the state
dicts. What calibrates and what nobody has seen are dealt by a seed where there is one set for both:
digits, keywords and wake words. The other networks calibrate on images of their training set.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.network.batches import Batch, Batches
from hq_optuna.rises import CrossEntropy, Rise
from hq_optuna.study_files.published import load_weights
from studies import cifar10_resnet20 as cifar10
from studies import (
    digits,
    efficientnet_lite0,
    espnet,
    fastestdet,
    keywords,
    visual_wake_words,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
IMAGE_SIZE = 128  # of EfficientNet-Lite0, which was trained at 224

Samples = tuple[Tensor, Tensor]


def data_folder() -> Path:
    """Return the folder of the shared data: ``HQ_OPTUNA_DATA``, or the one beside the checkout."""
    return Path(os.environ.get("HQ_OPTUNA_DATA", DATA))


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network in eval mode, what scores may read, and what they never see.

    Networks without a class a sample say the rise of their outputs.
    """

    network: nn.Module
    calibration: Any
    unseen: Any
    rise: Rise | None = None


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


@contextmanager
def unpacked(data: Path) -> Iterator[Path]:
    """Give the zoo's folder: itself, within the data, or unpacked from its archive there."""
    if (data / "kws").is_dir():
        yield data
    else:
        with _folder(data, "zoo") as folder:
            # Studies name folders within the zoo.
            yield folder


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
        network = load_weights(CifarResNet(blocks), path)
        with _folder(data, "cifar10_subset") as images:
            seen = cifar10.calibration(images, split_seed=seed)
            return Trained(network, seen, cifar10.test(images))

    return load


def _kws(data: Path, seed: int) -> Trained:
    with _folder(data, "zoo", "kws") as folder:
        return _of_study(keywords, folder, split_seed=seed)


def _vww(data: Path, seed: int) -> Trained:
    with _folder(data, "zoo", "vww") as folder:
        return _of_study(visual_wake_words, folder, split_seed=seed)


def _efficientnet_lite0(data: Path, seed: int) -> Trained:
    with _folder(data, "zoo", "efficientnet_lite0", "imagenet") as folder:
        return _of_study(efficientnet_lite0, folder, split_seed=seed, size=IMAGE_SIZE)


def _fastestdet(data: Path, seed: int) -> Trained:
    with _folder(data, "zoo", "fastestdet", "coco") as folder:
        seen, unseen = fastestdet.calibration(folder), fastestdet.validation(folder)
        return Trained(fastestdet.network(folder), seen, _unlabelled(unseen), fastestdet.rise)


def _espnet(data: Path, seed: int) -> Trained:
    with _folder(data, "zoo", "espnet") as folder:
        seen, unseen = _unlabelled(espnet.calibration(folder)), _unlabelled(espnet.test(folder))
        return Trained(espnet.network(folder), seen, unseen, CrossEntropy())


def _unlabelled(data: Batches) -> Batches:
    return Batches(replace(batch, labels=None) for batch in data)


def _of_study(study: Any, folder: Path, **options: Any) -> Trained:
    network = study.network(folder)
    return Trained(
        network, study.calibration(folder, **options), study.validation(folder, **options)
    )


ZOO: dict[str, Callable[[Path, int], Trained]] = {
    "digits": _digits,
    "kws": _kws,
    "vww": _vww,
    "resnet20": _resnet(3),
    "resnet32": _resnet(5),
    "efficientnet_lite0": _efficientnet_lite0,
    "fastestdet": _fastestdet,
    "espnet": _espnet,
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
    return replace(
        found,
        calibration=_first(found.calibration, n_calibration),
        unseen=_first(found.unseen, n_unseen),
    )


def _first(samples: Any, n: int | None) -> Any:
    """Return the first samples of tensors, and the first batches that hold so many."""
    if n is None:
        return samples
    if isinstance(samples, Tensor):
        return samples[:n]
    if not isinstance(samples, Batches):
        return tuple(part[:n] for part in samples)
    found, held = list[Batch](), 0
    for batch in samples:
        if held >= n:
            break
        found.append(batch)
        held += batch.n
    return Batches(found)
