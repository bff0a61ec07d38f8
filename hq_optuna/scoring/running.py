"""Runs one node of a network's graph, over its argument where nobody reads that any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from hq_optuna.batches import tensors
from hq_optuna.scoring.graph import NetworkGraph, memory_of
from hq_optuna.scoring.in_place import in_place, is_fresh


class NodeRunner:
    """Runs the nodes of one graph.

    Args:
        graph: A traced network, not yet measured.
    """

    def __init__(self, graph: NetworkGraph) -> None:
        self.graph = graph
        self._fresh = {n for n in graph.nodes if is_fresh(n, graph.modules)}

    def own(self) -> set[int]:
        """Return where the network's own tensors are in memory."""
        network = self.graph.network
        held = (*network.parameters(), *network.buffers())
        return {memory_of(t) for t in (*held, *self.graph.constants.values())}

    def last_readers(self, plan: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Return for each value that a plan reads who reads it last, but for the outputs."""
        last = {value: node for node in plan for value in node.all_input_nodes}
        map_arg(self.graph.output, lambda node: last.pop(node, None))
        return last

    def run(
        self,
        node: fx.Node,
        values: Mapping[fx.Node, Any],
        foreign: set[int],
        last: Mapping[fx.Node, fx.Node],
    ) -> Any:
        """Run a node.

        Args:
            node: The node.
            values: Values of those it reads, and of others that are still to be read.
            foreign: Where memory is that must not be written.
            last: Who reads a value last; a value of nobody's may be written over by them.
        """
        measured = self.graph.measured[node]
        for written in measured.writes:
            if written in node.all_input_nodes and _touches(values[written], foreign):
                values = {**values, written: _copied(values[written])}

        def free(value: Any) -> bool:
            return (
                isinstance(value, fx.Node)
                and value in self._fresh
                and last.get(value) is node
                and not _touches(values[value], foreign)
                and not _touches(values[value], others(value))
            )

        def others(value: fx.Node) -> set[int]:  # on this batch an operation may return a view
            return {memory_of(t) for n, v in values.items() if n is not value for t in tensors(v)}

        if measured.alone and not measured.writes and any(map(free, node.args)):
            args = map_arg(node.args, values.__getitem__)
            done, value = in_place(
                node, self.graph.modules.get(node), args, tuple(map(free, node.args))
            )
            if done:
                return value
        return self.graph.call(node, values)


def _touches(value: Any, foreign: set[int]) -> bool:
    return any(memory_of(t) in foreign for t in tensors(value))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
