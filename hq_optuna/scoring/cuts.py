"""Which tensors of the incumbent are worth their memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import fx

from hq_optuna.scoring.graph import NetworkGraph


def frontier(graph: NetworkGraph, layer: str) -> set[fx.Node]:
    """Return the nodes whose values cross from the unchanged part into what a layer changes."""
    changed = graph.downstream[layer]
    return {
        value
        for node in changed
        for value in node.all_input_nodes
        if value not in changed and value in graph.position and value.op != "get_attr"
    }


def seconds(graph: NetworkGraph, layer: str, kept: Iterable[fx.Node]) -> float:
    """Return what a candidate that changes one layer costs when some values are kept."""
    return _run(graph, layer, kept)[0]


def choose_cuts(
    graph: NetworkGraph, layers: Sequence[str], memory: int, batches: float
) -> frozenset[fx.Node]:
    """Return the nodes whose values are kept.

    Starts from all that any layer needs, and drops what saves the least time per byte until the
    rest fits. Every layer is as likely to be changed as any other.

    Args:
        graph: A measured network.
        layers: Layers whose bits change.
        memory: Bytes that may be kept.
        batches: How many batches of the measured size there are.
    """
    needs = {layer: frontier(graph, layer) for layer in layers if layer in graph.downstream}
    kept = set().union(*needs.values())
    size = {node: graph.measured[node].n_bytes * batches for node in kept}
    now = {layer: _run(graph, layer, kept) for layer in needs}
    losses: dict[fx.Node, _Loss] = {}

    def loss(node: fx.Node) -> _Loss:
        runs = {
            layer: _run(graph, layer, kept - {node})
            for layer, (_, read) in now.items()
            if node in read
        }
        lost = sum(cost - now[layer][0] for layer, (cost, _) in runs.items())
        return _Loss(lost, set(runs), set().union(*(read for _, read in runs.values())))

    while kept and sum(size[node] for node in kept) > memory:
        droppable = [node for node in kept if size[node]]
        if not droppable:
            break
        losses |= {node: loss(node) for node in droppable if node not in losses}
        worst = min(
            droppable, key=lambda n: (losses[n].lost / size[n], -size[n], graph.position[n])
        )
        kept.discard(worst)
        changed = {layer for layer, (_, read) in now.items() if worst in read}
        now |= {layer: _run(graph, layer, kept) for layer in changed}
        nearer = set().union(*(now[layer][1] for layer in changed))
        losses = {  # the others would come out as they did
            node: its
            for node, its in losses.items()
            if node is not worst
            and node not in nearer
            and worst not in its.read
            and not its.layers & changed
        }
    return frozenset(kept)


class _Loss(NamedTuple):
    """What dropping a node costs.

    Attributes:
        lost: Seconds, of all layers together.
        layers: Whose candidates read the node.
        read: Kept nodes that these candidates read when it is gone.
    """

    lost: float
    layers: set[str]
    read: set[fx.Node]


def _run(graph: NetworkGraph, layer: str, kept: Iterable[fx.Node]) -> tuple[float, set[fx.Node]]:
    """Return the seconds of a candidate that changes one layer, and the kept nodes it reads."""
    known = set(kept) - graph.downstream[layer]
    run = graph.needed(known)
    read = {value for node in run for value in node.all_input_nodes if value in known}
    return sum(graph.measured[node].seconds for node in run), read
