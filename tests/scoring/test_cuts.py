"""Which tensors are kept: against all subsets of a small network's tensors."""

import itertools
import random

import pytest
import torch
from torch import Tensor, nn

from hq_optuna.introspection import introspect
from hq_optuna.quantization import prepare
from hq_optuna.scoring.cuts import choose_cuts, frontier, seconds
from hq_optuna.scoring.graph import Measured, NetworkGraph
from tests.scoring.side_by_side import IMAGES, Mixed
from tests.small_networks import make, seeded


class Chain(nn.Module):
    """Four layers in a row, one of them beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = torch.tanh(self.b(x)) + x
        return self.d(torch.tanh(self.c(x)))


def graph_of(seconds_each: dict[str, float], bytes_each: int = 10) -> NetworkGraph:
    network = make(Chain, dtype=torch.float32)
    x = torch.randn(5, 3, generator=seeded(0))
    graph = NetworkGraph.trace(prepare(network, introspect(network, x).layers), x)
    graph.measure(x)
    graph.measured = {
        node: Measured(seconds_each.get(node.name.removeprefix("network_"), 0.0), bytes_each)
        for node in graph.nodes
    }
    return graph


EVERY = ["a", "b", "c", "d"]


def test_the_frontier_is_what_crosses_into_the_changed_part():
    graph = graph_of({})
    names = {layer: sorted(n.name for n in frontier(graph, layer)) for layer in EVERY}
    assert names == {"a": [], "b": ["tanh"], "c": ["add"], "d": ["tanh_2"]}


@pytest.mark.parametrize("memory", [0, 10, 20, 30, 1000])
def test_what_is_kept_is_the_best_choice_that_fits(memory):
    graph = graph_of({"a": 5.0, "b": 3.0, "c": 2.0, "d": 1.0})
    kept = choose_cuts(graph, EVERY, memory, batches=1.0)
    assert sum(graph.measured[node].n_bytes for node in kept) <= memory

    def cost(nodes) -> float:
        return sum(seconds(graph, layer, nodes) for layer in EVERY)

    every = [n for layer in EVERY for n in frontier(graph, layer)]
    fitting = [
        subset
        for size in range(len(every) + 1)
        for subset in itertools.combinations(every, size)
        if 10 * size <= memory
    ]
    assert cost(kept) == min(map(cost, fitting))


def test_all_batches_count_towards_the_memory():
    graph = graph_of({"a": 5.0, "b": 3.0, "c": 2.0, "d": 1.0})
    assert len(choose_cuts(graph, EVERY, 30, batches=1.0)) == 3
    assert len(choose_cuts(graph, EVERY, 30, batches=1.5)) == 2
    assert len(choose_cuts(graph, EVERY, 30, batches=3.1)) == 0


def test_what_only_fixed_layers_need_is_not_kept():
    graph = graph_of({"a": 1.0})
    assert [n.name for n in choose_cuts(graph, ["b"], 1000, 1.0)] == ["tanh"]


def one_by_one(graph: NetworkGraph, layers: list[str], memory: int) -> set[object]:
    """Drop the node that costs least per byte, all costs computed anew each time."""
    kept = set().union(*(frontier(graph, layer) for layer in layers))

    def cost(nodes) -> float:
        return sum(seconds(graph, layer, nodes) for layer in layers)

    size = {node: graph.measured[node].n_bytes for node in kept}
    while sum(size[node] for node in kept) > memory:
        whole = cost(kept)
        kept -= {
            min(
                kept,
                key=lambda n: (
                    *((cost(kept - {n}) - whole) / size[n], -size[n]),
                    graph.position[n],
                ),
            )
        }
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_costs_that_are_remembered_change_nothing(seed):
    draw = random.Random(seed)
    pieces = draw.choices(Mixed.PIECES, k=5)
    network = make(Mixed(pieces), seed, torch.float32)
    layers = introspect(network, IMAGES).layers
    graph = NetworkGraph.trace(prepare(network, layers), IMAGES)
    graph.measure(IMAGES)
    graph.measured = {
        node: Measured(float(draw.randint(1, 99)), draw.randint(1, 50)) for node in graph.nodes
    }
    names = [layer.name for layer in layers]
    most = sum(m.n_bytes for m in graph.measured.values())
    for share in (0.05, 0.2, 0.4):
        memory = int(share * most)
        assert choose_cuts(graph, names, memory, 1.0) == one_by_one(graph, names, memory)
