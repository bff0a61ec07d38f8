"""Small networks with everything that makes layers hard to quantize, for the torch half's tests."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_optuna.network.introspection import introspect
from hq_optuna.quantization.ranges import weight_scale
from hq_optuna.space.layers import LayerSpec


def layers_of(network: nn.Module, x: Tensor) -> Sequence[LayerSpec]:
    return introspect(network, x).layers


def rounded_by_hand(module: nn.Module, layer: LayerSpec, bits: int) -> Tensor:
    """Return a layer's weight rounded to nearest, each group of a transposed one by itself."""
    top = 2 ** (bits - 1) - 1
    groups = getattr(module, "groups", 1) if layer.channel_axis else 1
    parts = []
    for part in module.weight.detach().chunk(groups):
        scale = weight_scale(part, bits, layer.channel_axis)
        zero = torch.zeros(len(scale), dtype=torch.int32)
        given = part, scale, zero, layer.channel_axis, -top, top
        parts.append(torch.fake_quantize_per_channel_affine(*given))
    return torch.cat(parts)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class ConvNet(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions, batch-norm, dropout, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.stem(x)))
        x = F.relu_(self.grouped(self.depthwise(x)))
        return self.head(self.dropout(self.up(x).mean((2, 3))))


class Residual(nn.Module):
    """A shortcut around two layers, and two layers that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(x + torch.tanh(self.a(x)) * self.b(x))


class Twice(nn.Module):
    """One layer that is called twice, under two names, with an in-place ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 4)
        self.shared = nn.Linear(4, 4)
        self.again = self.shared
        self.leave = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.shared(torch.tanh(self.enter(x))))
        return self.leave(torch.tanh(self.again(x)))


class Tokens(nn.Module):
    """Linear layers on ``(N, T, D)``, and on ``(N · T, D)`` where ``flat``."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.embed = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        x = x.flatten(0, 1) if self.flat else x
        return self.head(torch.tanh(self.embed(x))).reshape(n, tokens, 3).mean(1)


class LaterInPlace(nn.Module):
    """Changes a tensor in place after a layer has read it: fine to infer with."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        return self.head(F.relu_(x) + y)


class PartlyDetached(nn.Module):
    """`frozen` computes without gradient, so nothing is known of its curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.tanh(self.frozen(x))
        return self.head(x)


def make(kind: type[nn.Module] | nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Return the network with weights of the seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = (kind() if isinstance(kind, type) else kind).to(dtype).eval()
        for parameter in network.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, dtype=dtype) * 0.6)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, dtype=dtype) * 0.1)
    return network


def snapshot(network: nn.Module) -> dict[str, object]:
    """Return everything of a network that a function must leave as it found it."""
    return {
        "state": {k: v.clone() for k, v in network.state_dict().items()},
        "training": [(name, m.training) for name, m in network.named_modules()],
        "classes": [type(m) for m in network.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "grads": [p.grad for p in network.parameters()],
        "identity": [id(p) for p in network.parameters()],
    }


def assert_unchanged(network: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(network)
    state, old = after.pop("state"), before["state"]
    assert list(state) == list(old)
    assert all(torch.equal(state[k], old[k]) for k in old)
    assert after == {k: v for k, v in before.items() if k != "state"}
