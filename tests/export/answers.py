"""Networks with bits, as a search would answer with, and the files that are written of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from hq_optuna import export
from hq_optuna.network.batches import Batch, Batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data_of(x: Tensor, n: int = 16) -> Batches:
    labels = torch.zeros(len(x), dtype=torch.int64)
    parts = zip(x.split(n), labels.split(n), strict=True)
    return Batches([Batch(inputs, labels, len(inputs)) for inputs, labels in parts])


def answer_of(
    network: nn.Module,
    x: Tensor,
    bits: tuple[int, int] | Mapping[str, tuple[int, int]],
    quantizers: Mapping[str, str] | None = None,
    *,
    correct: bool = False,
) -> nn.Module:
    """Return a prepared copy with these bits."""
    data = data_of(x)
    layers = introspect(network, data).layers
    names = [layer.name for layer in layers]
    prepared = prepare(network, layers, observe_inputs(network, names, data), quantizers=quantizers)
    set_bits(prepared, dict.fromkeys(names, bits) if isinstance(bits, tuple) else bits)
    if correct:
        StatisticsCorrection(prepared, data).apply()
    return prepared


def written(network: nn.Module, x: Tensor, path: Path, **options: Any) -> onnx.ModelProto:
    """Write an answer as ONNX and read it again."""
    export.write(network, path, data_of(x), **options)
    return onnx.load(path)


def stored(model: onnx.ModelProto) -> dict[str, Any]:
    """Return the initializers of a file as arrays."""
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network weights and statistics of the seed, in eval mode."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return network.eval()


class Everything(nn.Module):
    """Plain, depthwise, grouped and transposed convolutions, batch-norms, a shortcut, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.norm_2 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.up_norm = nn.BatchNorm2d(6)
        self.down = nn.ConvTranspose2d(6, 8, 1)
        self.tokens = nn.Linear(8, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.norm_2(self.depthwise(x)))
        x = torch.relu(self.up_norm(self.up(x)))
        x = self.down(x)
        x = self.tokens(x.flatten(2).transpose(1, 2))
        return self.head(torch.relu(x).mean(1))


def everything(seed: int = 0) -> nn.Module:
    return randomized(Everything(), seed)


def images(n: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=seeded(seed))
