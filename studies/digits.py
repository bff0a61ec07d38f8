"""Handwritten digits, 8x8 pixels (scikit-learn), and a small residual network trained on the spot.

The study that `hq-optuna run digits` searches. The network trains in seconds and is kept in the
run's folder; there is nothing to download. Data: E. Alpaydin and C. Kaynak, Optical Recognition of
Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.errors import StudyFileError

SETTINGS: dict[str, Any] = {
    "bits": range(2, 9),
    "activation_bits": "same",
    "budget": "0.25 bops",
    "n_candidates": 8,
    "rule": "ratio",
}

WEIGHTS = "digits-network.safetensors"
SPLIT_SEED = 20240229
N_CALIBRATION, N_VALIDATION, N_TEST = 256, 300, 300  # of 1797; the rest is trained on
TRAINING_SEED = 0
BATCH_SIZE = 64
PEAK_RATE = 0.01
WEIGHT_DECAY = 0.1  # with 30 epochs: confidence on unseen images as high as accuracy, about 99 %
SHIFT = 1  # pixels, each way


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, width, H, W)`` to the same shape."""
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(x + self.bn2(self.conv2(inner)))


class Down(nn.Module):
    """Half the resolution, more channels: a depthwise and a pointwise convolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, width, H, W)`` to ``(N, out, H / 2, W / 2)``."""
        x = functional.relu(self.bn1(self.depthwise(x)))
        return functional.relu(self.bn2(self.pointwise(x)))


class DigitsNet(nn.Module):
    """Ten layers that can be quantized, from ``(N, 1, 8, 8)`` in [0, 1] to ``(N, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.block1 = Residual(16)
        self.down1 = Down(16, 32)
        self.block2 = Residual(32)
        self.down2 = Down(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = functional.relu(self.bn(self.stem(x)))
        x = self.down1(self.block1(x))
        x = self.down2(self.block2(x))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def network(folder: Path, epochs: int = 30) -> nn.Module:
    """Return the trained network, from the run's folder if it is there already.

    Args:
        folder: The run's folder.
        epochs: Times the training goes through the training images.
    """
    if epochs < 1:
        raise StudyFileError(f"--epochs is at least 1; got {epochs}.")
    settings = _training_settings(epochs)
    path = folder / WEIGHTS
    weights = _kept(path, settings)
    if weights is None:
        weights = _train(epochs)
        folder.mkdir(parents=True, exist_ok=True)
        # One metadata key: with several, their order in the file would differ from run to run.
        _write(path, save(weights, metadata={"training": settings}))
    with torch.random.fork_rng(devices=[]):
        net = DigitsNet()
    net.load_state_dict(weights)
    return net.eval()


def calibration() -> tuple[Tensor, Tensor]:
    """Return the 256 images that the score reads; the network was not trained on them."""
    return _part("calibration")


def train() -> tuple[Tensor, Tensor]:
    """Return the images that the network was trained on, for training it at its bits."""
    return _part("train")


def augment(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to a pixel each way, as when the network was trained."""
    return _shift(inputs, SHIFT, generator)


def validation() -> tuple[Tensor, Tensor]:
    """Return the 300 images on which accuracy is measured before and after."""
    return _part("validation")


def test() -> tuple[Tensor, Tensor]:
    """Return the 300 images for the very end."""
    return _part("test")


def _part(name: str) -> tuple[Tensor, Tensor]:
    """Return images ``(N, 1, 8, 8)`` float32 in [0, 1] and labels ``(N,)`` of one part."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise StudyFileError(
            "The study 'digits' reads its images from scikit-learn, which is not installed. "
            "Run: pip install 'hq_optuna[studies]'"
        ) from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16  # 17 grey levels
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    n_train = len(labels) - N_CALIBRATION - N_VALIDATION - N_TEST
    names = ("calibration", "validation", "test", "train")
    parts = torch.split(order, [N_CALIBRATION, N_VALIDATION, N_TEST, n_train])
    chosen = parts[names.index(name)]
    return images[chosen], labels[chosen]


def _training_settings(epochs: int) -> str:
    """Return what the trained weights depend on, as kept in their file."""
    settings = {
        "architecture": "16-32-64 residual depthwise",
        "split": [SPLIT_SEED, N_CALIBRATION, N_VALIDATION, N_TEST],
        "seed": TRAINING_SEED,
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "peak_rate": PEAK_RATE,
        "weight_decay": WEIGHT_DECAY,
        "shift": SHIFT,
    }
    return json.dumps(settings, sort_keys=True)


def _train(epochs: int) -> dict[str, Tensor]:
    """Train from scratch; the same weights each time on one machine, random state untouched."""
    images, labels = _part("train")
    n, n_steps = len(labels), len(labels) // BATCH_SIZE
    generator = torch.Generator().manual_seed(TRAINING_SEED)
    n_threads = torch.get_num_threads()
    # Sums over several threads depend on their number, and so small a network gains nothing.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(TRAINING_SEED)
            net = DigitsNet()
            optimizer = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, PEAK_RATE, total_steps=epochs * n_steps
            )
            for _ in range(epochs):
                order = torch.randperm(n, generator=generator)
                for batch in torch.split(order, BATCH_SIZE)[:n_steps]:
                    shifted = _shift(images[batch], SHIFT, generator)
                    loss = functional.cross_entropy(net(shifted), labels[batch])
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
                    schedule.step()
    finally:
        torch.set_num_threads(n_threads)
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def _shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image by up to ``most`` pixels each way, black moving in."""
    n, _, height, width = images.shape
    padded = functional.pad(images, (most,) * 4)
    dy, dx = torch.randint(2 * most + 1, (2, n), generator=generator)
    rows = dy[:, None] + torch.arange(height)  # (N, H)
    columns = dx[:, None] + torch.arange(width)  # (N, W)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None]][:, None]


def _kept(path: Path, settings: str) -> dict[str, Tensor] | None:
    """Return the weights of an earlier run with the same training settings, if there are any."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("training") != settings:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return None


def _write(path: Path, content: bytes) -> None:
    """Write the file whole or not at all, whoever else writes or dies meanwhile."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
