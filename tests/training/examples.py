"""A small network with batch-norm and dropout, and data, for tests of training."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from tests.small_networks import seeded

BITS = {"conv": (2, 4), "head": (3, 3)}


class Net(nn.Module):
    """A convolution, batch-norm, dropout, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.dropout(x.mean((2, 3))))


def float_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net().to(dtype)
        with torch.no_grad():
            for _ in range(5):  # statistics of their own
                net(torch.randn(32, 2, 5, 5, dtype=dtype))
            net.head.weight.mul_(10)  # a teacher that is sure of some images
    return net.eval()


def images(n: int = 30, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 2, 5, 5, generator=seeded(7), dtype=dtype)


def labelled(n: int = 30, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = images(n, dtype)
    return x, (x[:, 0].mean((1, 2)) > x[:, 1].mean((1, 2))).long()


def prepared_net(
    bits: Mapping[str, tuple[int, int]] = BITS, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    net, data = float_net(seed, dtype), read_batches(labelled(dtype=dtype))
    layers = introspect(net, data[0].inputs).layers
    prepared = prepare(net, layers, observe_inputs(net, [layer.name for layer in layers], data))
    set_bits(prepared, bits)
    return prepared
