"""What multiplies without a layer: attention, recurrent layers, products of activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.network.introspection import introspect

T, D = 6, 8


class Attends(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(D, 3 * D), nn.Linear(D, D), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return self.out(functional.scaled_dot_product_attention(q, k, v))
        return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)


@pytest.mark.parametrize("fused", [False, True])
def test_products_of_activations_are_counted_and_named(fused: bool) -> None:
    net = nn.Sequential(Attends(fused))
    found = introspect(net, torch.randn(3, T, D))
    assert found.macs == T * D * 3 * D + T * D * D
    (products,) = found.others
    assert (products.module, products.macs) == ("0", 2 * T * T * D)
    share = 2 * T * T * D / (2 * T * T * D + found.macs)
    assert found.share_of_others == pytest.approx(share)
    (skipped,) = found.skipped
    assert f"{100 * share:.2g} % of all operations" in skipped.reason
    (warning,) = found.warnings
    assert f"{100 * share:.1f} %" in warning
    assert "attention" in warning


@pytest.mark.parametrize(
    ("make", "gates", "layers"),
    [(nn.LSTM, 4, 1), (nn.GRU, 3, 1), (nn.RNN, 1, 2)],
)
def test_recurrent_layers_are_counted_with_their_weights(make, gates: int, layers: int) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = make(D, D, num_layers=layers, batch_first=True)
            self.head = nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    found = introspect(Recurrent(), torch.randn(3, T, D))
    counted = {layer.name: layer.macs for layer in found.layers}
    each = {f"rnn.{way}_l{level}" for way in ("ih", "hh") for level in range(layers)}
    assert counted == dict.fromkeys(each, T * gates * D * D) | {"head": D * 2}
    assert (found.others, found.skipped, found.warnings) == ((), (), ())


@pytest.mark.parametrize(("make", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_a_recurrent_layer_with_a_hook_stays_whole_and_is_counted(make, gates: int) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = make(D, D, batch_first=True), nn.Linear(D, 2)
            self.rnn.register_forward_hook(lambda module, args, output: output[0][:, -1])

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x))

    found = introspect(Recurrent(), torch.randn(3, T, D))
    assert sum(other.macs for other in found.others) == T * gates * 2 * D * D
    (skipped,) = found.skipped
    assert skipped.name == "rnn"
    assert "inside one function" in skipped.reason
    assert "of all operations" in skipped.reason
    assert len(found.warnings) == 1


def test_multihead_attention_is_four_layers_and_its_products_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attend(x, x, x, need_weights=False)[0])

    found = introspect(Net(), torch.randn(3, T, D))
    parts = [f"attend.{part}_proj" for part in ("q", "k", "v", "out")]
    assert {layer.name: layer.macs for layer in found.layers} == {
        **dict.fromkeys(parts, T * D * D),
        "head": T * D * 2,
    }
    assert [layer.input_of for layer in found.layers] == ["", parts[0], parts[0], "", ""]
    assert sum(other.macs for other in found.others) == 2 * T * T * D
    (skipped,) = found.skipped
    assert skipped.name == "attend"
    assert "% of all operations" in skipped.reason


def test_a_network_of_layers_alone_has_nothing_unseen() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4, 3))
    found = introspect(net, torch.randn(2, 1, 4, 4))
    assert (found.others, found.share_of_others, found.warnings) == ((), 0.0, ())


def test_a_layer_that_computes_its_weight_is_counted_once() -> None:
    class Standardized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight - self.weight.mean(), self.bias)

    found = introspect(nn.Sequential(Standardized(D, D)), torch.randn(3, D))
    assert (found.macs, found.others) == (D * D, ())


def test_what_computes_element_by_element_is_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc, self.norm = nn.Embedding(5, D), nn.Linear(D, D), nn.LayerNorm(D)
            self.attend = nn.MultiheadAttention(D, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = 1.0 + self.table(x)  # a number that is added joins nothing
            h = h + self.fc(h)
            h = self.norm(torch.cat([h, h], 1))
            return self.attend(h, h, h, need_weights=False)[0].softmax(-1) * h

    found = introspect(Net(), torch.zeros(3, T, dtype=torch.long))
    assert dict(found.elements) == {
        "embeddings": T * D,
        "additions": T * D,
        "concatenations": 2 * T * D,
        "normalization": 2 * T * D,
        "softmax": 2 * (2 * T) ** 2 + 2 * T * D,  # two heads, and the last
        "products of elements": 2 * T * D,
    }
    assert found.bops_of_others == 2 * (2 * T) ** 2 * D * 32 * 32
