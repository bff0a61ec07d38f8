"""What random networks are made of: layers with a way of their own, outputs, and losses."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}

ACTIVATIONS = {
    **{"relu": nn.ReLU, "gelu": nn.GELU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish},
    **{"silu": nn.SiLU, "prelu": nn.PReLU, "tanh": nn.Tanh, "leaky": nn.LeakyReLU},
    "relu_": lambda: nn.ReLU(inplace=True),
    "silu_": lambda: nn.SiLU(inplace=True),
    "hardtanh_": lambda: nn.Hardtanh(inplace=True),
}


class KeepsForward(nn.Linear):
    """A subclass with no forward of its own."""


class CallsParent(nn.Linear):
    """A subclass whose forward is its parent's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class SecondAxis(nn.Linear):
    """A linear layer over the second axis, as others lay data out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)


class ScaledConv(nn.Conv2d):
    """A convolution whose filters have one norm before they are used."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return self._conv_forward(x, self.weight / (norm + 0.1), self.bias)


class ChannelsLast(nn.Module):
    """Calls a layer with the channels as the last axis."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


class Applied(nn.Module):
    """Calls its parts with a function of ours: how blocks are put together."""

    def __init__(self, way: Any, *parts: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.way = way
        self.parts = nn.ModuleList(parts)
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x, *self.parts, **self.settings)


def concatenate(_self: Any, x: Tensor, *parts: nn.Module) -> Tensor:
    return torch.cat([part(x) for part in parts], 1)


def add(_self: Any, x: Tensor, inner: nn.Module, shortcut: nn.Module) -> Tensor:
    return inner(x) + shortcut(x)


def twice(_self: Any, x: Tensor, layer: nn.Module, again: nn.Module) -> Tensor:
    return again(torch.tanh(layer(x)))


def recomputed(_self: Any, x: Tensor, inner: nn.Module, reentrant: bool) -> Tensor:
    return checkpoint(inner, x, use_reentrant=reentrant)


def without_grad(_self: Any, x: Tensor, inner: nn.Module, add: bool) -> Tensor:
    with torch.no_grad():
        y = inner(x)
    return x + y if add else y


def detached(_self: Any, x: Tensor, inner: nn.Module, add: bool) -> Tensor:
    return x + inner(x).detach() if add else inner(x.detach())


def conditional(_self: Any, x: Tensor, inner: nn.Module, above: float) -> Tensor:
    return x + inner(x) if float(x.detach().double().mean()) > above else x


def experts(_self: Any, x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    chosen = x.detach().double().flatten(1).sum(1) > 0
    y = x.clone()
    for mask, expert in ((chosen, first), (~chosen, second)):
        if bool(mask.any()):
            y[mask] = x[mask] + expert(x[mask])
    return y


def attention(_self: Any, x: Tensor, layer: nn.Module) -> Tensor:
    tokens = x.flatten(2).mT if x.dim() > 2 else x[:, None]
    y = layer(tokens, tokens, tokens, need_weights=False)[0]
    return x + (y.mT.reshape(x.shape) if x.dim() > 2 else y[:, 0])


def as_function(_self: Any, x: Tensor, layer: nn.Module, called: bool, product: bool) -> Tensor:
    """Use a layer's weight without the layer, and then, if it is also called, the layer."""
    last = x.movedim(1, -1)
    if product:
        y = last @ layer.weight.t() + (0 if layer.bias is None else layer.bias)
    else:
        y = F.linear(last, layer.weight, layer.bias)
    if called:
        y = y + layer(torch.tanh(last))
    return y.movedim(-1, 1)


class Scale(nn.Module):
    """Multiplies by a vector that is a parameter or a buffer, kept in the state or not."""

    def __init__(self, channels: int, axes: int, held: str) -> None:
        super().__init__()
        value = 0.5 + torch.arange(channels).reshape(-1, *[1] * axes) / channels
        if held == "parameter":
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value, persistent=held == "buffer")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class InDouble(nn.Module):
    """Keeps what it holds in double precision, whatever the network is converted to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.inner._apply(lambda t: t.double() if t.is_floating_point() else t)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.double()).to(x.dtype)


class Odd(nn.Module):
    """Random, or another function each time: no network to score."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "random":
            return x + 0.1 * torch.randn_like(x)
        self.calls += 1
        return x * self.calls


def in_half(_self: Any, x: Tensor, inner: nn.Module) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = inner(x)
    return y.to(x.dtype)


def by_keyword(_self: Any, x: Tensor, layer: nn.Module) -> Tensor:
    return layer(input=x.movedim(1, -1)).movedim(-1, 1)


def unused(_self: Any, x: Tensor, layer: nn.Module) -> Tensor:
    return x


Named = namedtuple("Named", "logits features")


@dataclass
class Output:
    """An output of a user's own class."""

    logits: Tensor
    features: Tensor | None = None


class ModelOutput(OrderedDict):
    """A mapping whose entries are attributes, as transformers has it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


OUTPUTS = {
    "tensor": lambda z, x: z,
    "tuple": lambda z, x: (z, x),
    "dict": lambda z, x: {"logits": z, "features": x},
    "named": Named,
    "dataclass": Output,
    "model_output": lambda z, x: ModelOutput(logits=z, features=x),
}


def logits_of(outputs: Any) -> Tensor:
    """Return the class scores, or numbers, in any container."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, tuple):
        return outputs[0]
    return outputs["logits"] if isinstance(outputs, dict) else outputs.logits


class Built(nn.Module):
    """Entry, body and head; a second input, where there is one, scales the channels."""

    def __init__(self, entry: nn.Module, gate: nn.Module | None, body: nn.Module, end: Any) -> None:
        super().__init__()
        self.entry, self.gate, self.body = entry, gate, body
        self.head, self.pooled, self.outputs = end
        self.notes: dict[str, Any] = {"seen": [1, 2]}
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        x = self.entry(x)
        if self.gate is not None:
            x = x * self.gate(extra).reshape(*x.shape[:2], *[1] * (x.dim() - 2))
        x = self.body(x)
        features = x.flatten(2).mean(2) if self.pooled and x.dim() > 2 else x
        return OUTPUTS[self.outputs](self.head(self.dropout(features)), features)


class Ids(nn.Embedding):
    """Token ids to ``(N, C, T)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).movedim(-1, 1)


def unknown_loss(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy or squared error behind a function, of outputs in any container."""
    z = logits_of(outputs)
    if labels.is_floating_point():
        return F.mse_loss(z, labels)
    return F.cross_entropy(z, labels)


LOSSES = {
    "cross_entropy": lambda: F.cross_entropy,
    "CrossEntropyLoss": nn.CrossEntropyLoss,
    "smoothed": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "ignored": lambda: nn.CrossEntropyLoss(ignore_index=1),
    "weighted": lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 3.0])),
    "mse_loss": lambda: F.mse_loss,
    "MSELoss": nn.MSELoss,
    "unknown": lambda: unknown_loss,
    "unknown_mse": lambda: unknown_loss,
}


def looks_on(module: nn.Module, args: Any, output: Any) -> None:
    """A hook of the user's own that changes nothing."""


def looks_before(module: nn.Module, args: Any) -> None:
    """A hook of the user's own that changes nothing."""
