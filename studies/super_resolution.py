"""Super-resolution x4: RLFN (convolutions) or MobileSR (window attention), judged on Set5.

Networks and weights: F. Kong et al., Residual Local Feature Network, 2022, and L. Sun et al.,
MobileSR, 2022, as published by ofsoundof/NTIRE2022_ESR (MIT): sr/team04_rlfn.pth and
sr/team20_mobilesr.pth. Data: Set5 (Bevilacqua et al., 2012), sr/Set5/*.bmp with the authors'
bicubic images in sr/Set5_LR/x4. Calibration needs no labels: any photographs, made smaller.
PSNR is that of Y without a border of 4 pixels, as the field measures it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import hq_optuna
from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Batches

DATA = Path(os.environ.get("HQ_OPTUNA_ZOO", "zoo"))
SETTINGS: dict[str, Any] = {"bits": range(2, 9), "budget": "0.25 bops"}
SCALE = 4
FILES = "sr/team04_rlfn.pth, sr/team20_mobilesr.pth, sr/Set5 and sr/Set5_LR/x4"

rise = hq_optuna.rises.SquaredError(relative=True)


class Attention(nn.Module):
    """Self-attention of ``(windows, places, n)``."""

    def __init__(self, n: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(n, 3 * n, bias=False)
        self.proj_out = nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        """Return what places say of each other, of the same shape."""
        b, t, n = x.shape
        parts = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        weight = (q @ k.transpose(2, 3) * (n // self.heads) ** -0.5).softmax(-1)
        y: Tensor = self.proj_out((weight @ v).transpose(1, 2).reshape(b, t, n))
        return y


class Mlp(nn.Module):
    """Two dense layers."""

    def __init__(self, n: int, ratio: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(n, n * ratio), nn.GELU(), nn.Linear(n * ratio, n))

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        y: Tensor = self.fc(x)
        return y


class Transformer(nn.Module):
    """A depthwise convolution for the position, attention in windows of 8 x 8, two dense layers."""

    def __init__(self, n: int, heads: int, ratio: int, window: int = 8) -> None:
        super().__init__()
        self.window = window
        self.pos_embed = nn.Conv2d(n, n, 3, padding=1, groups=n)
        self.norm1, self.attn = nn.LayerNorm(n), Attention(n, heads)
        self.norm2, self.mlp = nn.LayerNorm(n), Mlp(n, ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, n, H, W)``."""
        s = self.window
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        b, h, w, n = x.shape
        y = functional.pad(self.norm1(x), (0, 0, 0, -w % s, 0, -h % s))
        down, across = y.shape[1] // s, y.shape[2] // s
        y = y.view(b, down, s, across, s, n).transpose(2, 3).reshape(-1, s * s, n)
        y = self.attn(y).view(b, down, across, s, s, n).transpose(2, 3)
        x = x + y.reshape(b, down * s, across * s, n)[:, :h, :w]
        return (x + self.mlp(self.norm2(x))).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class Inverted(nn.Module):
    """Wider, depthwise, narrow again, beside a shortcut."""

    def __init__(self, n: int, ratio: int) -> None:
        super().__init__()
        m = n * ratio
        self.net = nn.Sequential(
            *(nn.Conv2d(n, m, 1), nn.LeakyReLU(0.2), nn.Conv2d(m, m, 3, 1, 1, groups=m)),
            *(nn.LeakyReLU(0.2), nn.Conv2d(m, n, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, n, H, W)``."""
        return self.net(x) + x  # type: ignore[no-any-return]


class Body(nn.Module):
    """Transformers and convolutions in turn."""

    def __init__(self, n: int, heads: int, ratios: tuple[int, ...]) -> None:
        super().__init__()
        pairs = (nn.Sequential(Transformer(n, heads, r), Inverted(n, r)) for r in ratios)
        self.layers = nn.Sequential(*pairs)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, n, H, W)``."""
        y: Tensor = self.layers(x)
        return y


class MobileSR(nn.Module):
    """From ``(N, 3, H, W)`` in [0, 1] to ``(N, 3, 4 H, 4 W)``; 176 thousand parameters."""

    def __init__(self, n: int = 40, heads: int = 8) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, n, 3, 1, 1)
        self.body = Body(n, heads, (4, 2, 2, 2, 4))
        self.fuse = nn.Conv2d(2 * n, n, 3, 1, 1)
        self.upsapling = nn.Sequential(
            *(nn.Conv2d(n, 4 * n, 1), nn.PixelShuffle(2)),
            *(nn.Conv2d(n, 4 * n, 1), nn.PixelShuffle(2)),
        )
        self.act = nn.LeakyReLU(0.2)
        self.tail = nn.Conv2d(n, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger image."""
        y = self.head(x)
        y = self.upsapling(self.fuse(torch.cat([y, self.body(y)], 1)))
        large = functional.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
        return self.tail(self.act(y)) + large  # type: ignore[no-any-return]


class Esa(nn.Module):
    """Spatial attention from a smaller map."""

    def __init__(self, f: int, n: int) -> None:
        super().__init__()
        self.conv1, self.conv_f = nn.Conv2d(n, f, 1), nn.Conv2d(f, f, 1)
        self.conv2, self.conv3 = nn.Conv2d(f, f, 3, 2), nn.Conv2d(f, f, 3, 1, 1)
        self.conv4 = nn.Conv2d(f, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh ``(N, n, H, W)``, H and W at least 15."""
        c = self.conv1(x)
        y = self.conv3(functional.max_pool2d(self.conv2(c), 7, 3))
        y = functional.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False)
        return x * self.conv4(y + self.conv_f(c)).sigmoid()  # type: ignore[no-any-return]


class Rlfb(nn.Module):
    """Three convolutions beside a shortcut, and spatial attention."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.c1_r, self.c2_r = nn.Conv2d(n, m, 3, 1, 1), nn.Conv2d(m, m, 3, 1, 1)
        self.c3_r = nn.Conv2d(m, n, 3, 1, 1)
        self.c5 = nn.Conv2d(n, n, 1)
        self.esa = Esa(16, n)
        self.act = nn.LeakyReLU(0.05)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, n, H, W)``."""
        y = self.act(self.c3_r(self.act(self.c2_r(self.act(self.c1_r(x))))))
        return self.esa(self.c5(y + x))  # type: ignore[no-any-return]


class RLFN(nn.Module):
    """From ``(N, 3, H, W)`` in [0, 1] to ``(N, 3, 4 H, 4 W)``; 317 thousand parameters."""

    def __init__(self, n: int = 46, m: int = 48) -> None:
        super().__init__()
        self.fea_conv = nn.Conv2d(3, n, 3, 1, 1)
        self.B1, self.B2, self.B3, self.B4 = (Rlfb(n, m) for _ in range(4))
        self.LR_conv = nn.Conv2d(n, n, 3, 1, 1)
        self.upsampler = nn.Sequential(nn.Conv2d(n, 48, 3, 1, 1), nn.PixelShuffle(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger image; the weights are made for 0 to 255."""
        first = self.fea_conv(x * 255)
        y = self.B4(self.B3(self.B2(self.B1(first))))
        return self.upsampler(self.LR_conv(y) + first) / 255  # type: ignore[no-any-return]


def network(data: Path = DATA, model: str = "rlfn") -> nn.Module:
    """Return a published network.

    Args:
        data: Folder with sr/.
        model: rlfn or mobilesr.
    """
    known = {"rlfn": (RLFN, "team04_rlfn"), "mobilesr": (MobileSR, "team20_mobilesr")}
    if model not in known:
        raise DataError(f"--model is one of {', '.join(known)}; got {model!r}.")
    build, name = known[model]
    path = _needed(data / "sr" / f"{name}.pth")
    state = torch.load(path, map_location="cpu", weights_only=True)
    net = build()
    net.load_state_dict(state.get("net", state))
    return net.eval()


def calibration(
    data: Path = DATA, photographs: str = "coco/images/train2017", n_calibration: int = 32
) -> list[Tensor]:
    """Return small crops ``(8, 3, 64, 64)`` of photographs made four times smaller, no labels.

    Args:
        data: Folder with sr/.
        photographs: Folder within it with photographs, at least 256 pixels wide and high.
        n_calibration: Photographs that the score reads.
    """
    paths = sorted(_needed(data / photographs).glob("*.jpg"))
    small = (_image(path, 64) for path in paths)
    found = [image for image in small if image is not None][:n_calibration]
    if not found:
        raise DataError(f"{data / photographs} holds no *.jpg of 256 pixels or more.")
    return [torch.stack(found[at : at + 8]) for at in range(0, len(found), 8)]


def validation(data: Path = DATA) -> Batches:
    """Return the pairs of Set5, an image a batch, as their sizes differ.

    Args:
        data: Folder with sr/.
    """
    return Batches(Batch(x, y, 1) for x, y in _set5(data))


def _set5(data: Path) -> Iterator[tuple[Tensor, Tensor]]:
    for path in sorted(_needed(data / "sr" / "Set5").glob("*.bmp")):
        large = _pixels(path)
        h, w = (size // SCALE * SCALE for size in large.shape[1:])
        small = data / "sr" / "Set5_LR" / f"x{SCALE}" / f"{path.stem}x{SCALE}.bmp"
        yield _pixels(_needed(small))[None], large[None, :, :h, :w]


def _pixels(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as stored:
        return torch.from_numpy(np.array(stored.convert("RGB"))).movedim(-1, 0).float() / 255


def _image(path: Path, side: int) -> Tensor | None:
    """Return the middle of a photograph that was made four times smaller."""
    from PIL import Image

    with Image.open(path) as stored:
        w, h = (size // SCALE for size in stored.size)
        if min(w, h) < side:
            return None
        small = stored.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(small)).movedim(-1, 0).float() / 255
    top, left = (h - side) // 2, (w - side) // 2
    return x[:, top : top + side, left : left + side]


def _needed(path: Path) -> Path:
    if not path.exists():
        raise DataError(
            f"{path} is missing. Give --data FOLDER (or set HQ_OPTUNA_ZOO) with {FILES}, and "
            "--photographs for calibration."
        )
    return path


def luma(image: Tensor) -> Tensor:
    """Return Y of YCbCr (ITU-R BT.601), rounded to whole numbers, of ``(…, 3, H, W)`` in [0, 1]."""
    eight = (image.clamp(0, 1) * 255).round() / 255
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)
    return (16 + (eight.double().movedim(-3, -1) @ weights)).round()


def psnr(net: nn.Module, batches: Batches) -> list[float]:
    """Return the PSNR of Y of each image, dB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return [
        float(peak_signal_noise_ratio(_inner(net(b.inputs)), _inner(b.labels), data_range=255.0))
        for b in batches
    ]


def _inner(image: Tensor) -> Tensor:
    return luma(image)[..., SCALE:-SCALE, SCALE:-SCALE]


def ssim(net: nn.Module, batches: Batches) -> list[float]:
    """Return the structural similarity of Y of each image, 1 for the same (Wang et al., 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    pairs = ((_inner(net(b.inputs)), _inner(b.labels)) for b in batches)
    found = [similarity(x[:, None], y[:, None], data_range=255.0) for x, y in pairs]
    return [float(torch.as_tensor(each)) for each in found]


evaluate = hq_optuna.Metric(name="PSNR", unit="dB", per_sample=psnr)
similarity = hq_optuna.Metric(name="SSIM", per_sample=ssim)
