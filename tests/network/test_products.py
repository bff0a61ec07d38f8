"""Products of activations as layers: found, called in the functions' place, and the same result."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.errors import NetworkError
from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.network.products import Product, products_named, with_products
from hq_optuna.network.unfused import unfused
from tests.small_networks import seeded

N, T, D = 3, 6, 8


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(sum(shape)), dtype=torch.float64)


class Computes(nn.Module):
    """A layer, and what a function makes of queries, keys and values."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.function = nn.Linear(D, 3 * D), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self.qkv(x).chunk(3, -1))


def products_of(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, Product)]


def pair(network: nn.Module, x: Tensor | None = None) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a network in double precision, and the one with products, and an input."""
    network, x = network.double().eval(), drawn(N, T, D) if x is None else x
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network, with_products(network, x), x


SPELLINGS = {
    "matmul": lambda q, k, v: torch.matmul((q @ k.mT).softmax(-1), v),
    "bmm": lambda q, k, v: torch.bmm(q, mat2=k.mT).softmax(-1).bmm(v),
    "rmatmul": lambda q, k, v: v.mT.__rmatmul__(v) @ q,
    "einsum": lambda q, k, v: torch.einsum(
        "nqk,nkd->nqd", [torch.einsum("nqd,nkd->nqk", q, k).softmax(-1), v]
    ),
    "baddbmm": lambda q, k, v: (
        torch.baddbmm(torch.ones(1, 1, T).double(), q, k.mT, beta=0.5, alpha=2).softmax(-1) @ v
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_products_of_every_spelling_are_modules_and_compute_the_same(name: str) -> None:
    network, found, x = pair(Computes(SPELLINGS[name]))
    assert products_of(found) == ["product_1", "product_2"]
    assert torch.equal(found(x), network(x))
    assert not products_of(network)
    assert type(network) is Computes


BOOL = drawn(T, T) > -0.5
MASKS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "added": {"attn_mask": drawn(T, T)},
    "bool": {"attn_mask": BOOL},
    "infinite": {"attn_mask": torch.zeros(T, T).double().masked_fill(~BOOL, -math.inf)},
    "row": {"attn_mask": torch.ones(T, T, dtype=torch.bool).index_fill(0, torch.tensor(2), False)},
}


@pytest.mark.parametrize("name", MASKS)
def test_fused_attention_is_two_products_that_compute_the_same(name: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, key=k, value=v, **MASKS[name])

    network, found, x = pair(Computes(attend))
    assert products_of(found) == ["product_1", "product_2"]
    assert torch.allclose(found(x), network(x), atol=1e-12)


def test_fused_attention_of_groups_of_heads_computes_the_same() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (4, 2)).transpose(1, 2) for x in (q, k, v))
        few = k[:, :2], v[:, :2]
        return functional.scaled_dot_product_attention(q, *few, enable_gqa=True)

    network, found, x = pair(Computes(attend))
    assert torch.allclose(found(x), network(x), atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_that_is_taken_apart_has_products(need_weights: bool) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(D, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x, need_weights=need_weights)[0]

    network, found, x = pair(unfused(Attends()))
    assert products_of(found) == ["attend.product_1", "attend.product_2"]
    assert torch.allclose(found(x), network(x), atol=1e-12)


def test_products_with_weights_count_and_stay_what_they_are() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(D, D))
            self.register_buffer("basis", drawn(D, D))

        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.weight.t()
            x = x @ self.basis
            return (x @ x.mT) @ x[0, :, 0]  # which is a vector

    network, found, x = pair(Mixed())
    assert products_of(found) == ["product_3"]
    assert torch.equal(found(x), network(x))


class Nested(nn.Module):
    """Multiplies before and after a module that multiplies too, and is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Computes(SPELLINGS["matmul"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner((x @ x.mT) @ x)
        return self.inner(y) @ y.mT


def test_each_product_belongs_to_the_module_in_whose_forward_it_stands() -> None:
    network, found, x = pair(Nested())
    inner = [f"inner.product_{i}" for i in (1, 2)]
    assert products_of(found) == [*inner, "product_1", "product_2", "product_3"]
    assert torch.equal(found(x), network(x))
    again = copy.deepcopy(found)
    assert torch.equal(again(x), network(x))
    calls = {layer.name: layer.n_calls for layer in introspect(found, x).layers}
    assert calls["inner.product_1"] == 2
    assert calls["product_1"] == 1


class Branches(nn.Module):
    """Multiplies once more where its input is long, or where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.more = nn.Linear(D, D), False

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        x = self.layer(x)
        if more or x.shape[1] > T:
            x = (x @ x.mT) @ x
        return x @ x.mT


def test_a_module_that_multiplies_otherwise_from_call_to_call_stays_in_float() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Branches()

        def forward(self, x: Tensor) -> Tensor:
            y = self.part(x)
            return (y @ y.mT) @ self.part(x, more=True)

    network, found, x = pair(Twice())
    assert products_of(found) == ["product_2", "product_6"]
    assert torch.equal(found(x), network(x))


def test_another_number_of_products_than_before_is_refused() -> None:
    network, found, x = pair(Branches())
    found(x)
    with pytest.raises(NetworkError, match="3 times in this call and 1 times in others"):
        found(drawn(N, T + 1, D))
    given = read_batches([(x.clone(),), (drawn(N, T + 1, D),)], labelled=False)
    with pytest.raises(NetworkError, match="Search without products"):
        introspect(with_products(network, x), given)


def test_an_attribute_of_a_products_name_is_refused() -> None:
    network = Computes(SPELLINGS["matmul"])
    network.product_2 = 5
    with pytest.raises(NetworkError, match="has an attribute 'product_2'"):
        pair(network)


def test_products_are_layers_with_operations_and_without_weights() -> None:
    _, found, x = pair(Computes(SPELLINGS["matmul"]))
    seen = introspect(found, x)
    said = [(a.name, a.kind, a.macs, a.n_weights, a.n_inputs) for a in seen.layers]
    assert said == [
        ("qkv", "Linear", T * D * 3 * D, 3 * D * D, T * D),
        ("product_1", "Product", T * T * D, 0, 2 * T * D),
        ("product_2", "Product", T * T * D, 0, T * T + T * D),
    ]
    assert not seen.others
    assert not seen.warnings
    read = {held.name: held.readers for held in seen.memory.tensors}
    assert any({"product_1", "product_2"} <= set(readers) for readers in read.values())


def test_products_are_made_again_from_their_names() -> None:
    network, found, x = pair(Nested())
    names = products_of(found)
    again = products_named(network, names)
    assert torch.equal(again(x), network(x))
    assert products_named(again, names) is again
