"""Which tensors of the incumbent are worth their memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    known = set(kept) - graph.downstream[layer]
    return sum(graph.measured[node].seconds for node in graph.needed(known))


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
    costs = {layer: seconds(graph, layer, kept) for layer in needs}

    def loss(node: fx.Node) -> tuple[float, dict[str, float]]:
        """Return the seconds that dropping a node costs all layers together, and new costs."""
        fewer = kept - {node}
        new = {
            layer: seconds(graph, layer, fewer) for layer, read in reading.items() if node in read
        }
        return sum(new[layer] - costs[layer] for layer in new), new

    while kept and sum(size[node] for node in kept) > memory:
        reading = {layer: _read(graph, layer, kept) for layer in needs}
        droppable = [node for node in kept if size[node]]
        if not droppable:
            break
        losses = {node: loss(node) for node in droppable}
        worst = min(droppable, key=lambda n: (losses[n][0] / size[n], -size[n], graph.position[n]))
        kept.discard(worst)
        costs |= losses[worst][1]
    return frozenset(kept)


def _read(graph: NetworkGraph, layer: str, kept: set[fx.Node]) -> set[fx.Node]:
    """Return the kept nodes that a candidate changing one layer reads."""
    known = kept - graph.downstream[layer]
    return {
        value for node in graph.needed(known) for value in node.all_input_nodes if value in known
    }
