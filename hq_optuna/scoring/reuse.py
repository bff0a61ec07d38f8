"""Evaluating a candidate from what its incumbent left: only what the changed layers reach.

A candidate differs from its incumbent in a layer or two. Everything that does not depend on these
layers is the incumbent's, also with statistics correction, which corrects layers in order. So the
tensors that cross from the unchanged part into the changed one are kept for the incumbent, on all
batches, and a candidate runs only the operations downstream of its changes. When the incumbent
changes, what changed with it is forgotten; the first candidate that needs it runs it, with the
incumbent's bits as these are its own there, and leaves it to the others. So a worker whose
candidates all change early layers never runs the incumbent behind them. Nothing is approximated:
the operations that run are those of a full pass on the same tensors, so outputs are equal bit for
bit, whatever was kept.

If all tensors do not fit into the memory allowed, those are kept that save the most time per byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from hq_optuna.batches import Batches, Inputs, plain_attention, tensors
from hq_optuna.bit_config import BitConfig
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.prepare import set_bits
from hq_optuna.scoring.cut_checks import CutChecks
from hq_optuna.scoring.cuts import choose_cuts
from hq_optuna.scoring.graph import NetworkGraph, UncuttableError, memory_of, plain
from hq_optuna.scoring.running import NodeRunner
from hq_optuna.scoring.together import Group, Stacker

MOST_TOGETHER = 16
"""Candidates in one pass at most: more gain little."""

LONG_S = 1e-3
"""An operation that takes longer on a CPU has nothing to gain from more samples."""

DEFAULT_MEMORY = 2 * 2**30
"""Bytes of activations that are kept unless told otherwise."""


@dataclass(frozen=True)
class _Kept:
    """What is kept of an incumbent, as far as its candidates needed it.

    Attributes:
        config: Its bits.
        weights: The state of the network's float weights when this was computed.
        values: For each batch, values of nodes.
        statistics: Corrected statistics of all that was run to get them, by module.
    """

    config: BitConfig
    weights: object
    values: list[dict[fx.Node, Any]]
    statistics: dict[str, tuple[Tensor, ...]]


class Reuse:
    """Runs candidates of one prepared network on one set of batches.

    Args:
        prepared: The prepared network.
        data: Batches on the network's device.
        searched: Names of the layers whose bits change in a search.
        correction: Corrects the statistics of each candidate, on the first batch.
        memory: Bytes of activations to keep.

    Raises:
        UncuttableError: The network cannot be cut between its layers; run it as a whole.
    """

    def __init__(
        self,
        prepared: nn.Module,
        data: Batches,
        searched: Sequence[str],
        *,
        correction: StatisticsCorrection | None = None,
        memory: int = DEFAULT_MEMORY,
    ) -> None:
        self.prepared = prepared
        self.data = data
        self.correction = correction
        self.memory = memory
        if len({_structure(batch.inputs) for batch in data}) > 1:
            raise UncuttableError("its batches have inputs of different structure")
        self.graph = NetworkGraph.trace(prepared, data[0].inputs)
        self._kept: _Kept | None = None
        self._own: set[int] = set()  # memory of the network's own tensors, as a run begins
        self.runner = NodeRunner(self.graph)
        checks = CutChecks(self.graph, data, correction, self._nodes)
        self._own = self.runner.own()
        checks.check_parts()
        self.cuts = choose_cuts(self.graph, searched, memory, self._batches)
        names = (
            {} if correction is None else {prepared.get_submodule(n): n for n in correction.modules}
        )
        self._inside = {
            node: {names[m] for m in modules if m in names}
            for node, modules in self.graph.inside.items()
        }
        held = Counter(name for its in self._inside.values() for name in its)
        for name, n in held.items():
            if n > 1:  # once in float, and at other bits perhaps twice, each time corrected
                raise UncuttableError(f"{name!r} may be called by {n} of its parts")
        self.stacker = Stacker(self.runner, correction, self._inside)
        if self.cuts:
            checks.check_reuse(searched, self.cuts)

    @property
    def n_bytes(self) -> int:
        """Bytes of activations kept at the moment."""
        kept = [] if self._kept is None else self._kept.values
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for values in kept
            for value in values.values()
            for t in tensors(value)
        }
        return sum(held.values())

    @property
    def most_together(self) -> int:
        """Candidates in one pass: as many as fit beside what is kept; 1 where it cannot pay."""
        measured = self.graph.measured
        seconds = sum(m.seconds for m in measured.values()) / max(len(measured), 1)
        if not self.cuts or (seconds > LONG_S and not self._on_gpu):
            return 1
        kept = sum(measured[node].n_bytes for node in self.cuts) * self._batches
        peak = self.graph.peak_bytes * max(_sizes(self.data)) / _sizes(self.data)[0]
        room = min(max(self.memory - kept, 0) // max(peak, 1), MOST_TOGETHER - 1)
        return 1 + int(room)

    @property
    def _batches(self) -> float:
        """How many batches of the first one's size there are; images may differ in size."""
        sizes = _sizes(self.data)
        return float(max(sum(sizes) / sizes[0], self.data.n_samples / self.data[0].n))

    @property
    def _on_gpu(self) -> bool:
        return any(tensor.device.type != "cpu" for tensor in tensors(self.data[0].inputs))

    def forget(self) -> None:
        """Keep nothing; the next candidate runs whole unless it names an incumbent."""
        self._kept = None

    @torch.no_grad()
    def run(self, config: BitConfig, incumbent: BitConfig | None = None) -> Iterator[Any]:
        """Yield the outputs of each batch for an assignment of all layers.

        Args:
            config: The candidate, whose bits the network has.
            incumbent: What the candidate was made from. What is run of it is kept for candidates
                that follow. Without it what is kept already serves as far as it goes.
        """
        weights, self._own = self._weights(), self.runner.own()
        if self._kept is not None and self._kept.weights != weights:
            self._kept = None
        if incumbent is not None and self.cuts:
            self._turn_to(incumbent, weights)
        changed = self._changed(config)
        for index in range(len(self.data)):
            yield self._batch(index, changed)

    @torch.no_grad()
    def run_together(
        self, configs: Sequence[BitConfig], incumbent: BitConfig
    ) -> Iterator[list[Any]]:
        """Yield for each batch the outputs of several candidates, in one pass.

        The network has the incumbent's bits after it.

        Args:
            configs: Bits of all layers, of each candidate.
            incumbent: What all of them were made from.
        """
        weights, self._own = self._weights(), self.runner.own()
        if self._kept is not None and self._kept.weights != weights:
            self._kept = None
        self._turn_to(incumbent, weights)
        set_bits(self.prepared, incumbent)
        group = Group(configs, incumbent, [self._changed(config) for config in configs])
        for index in range(len(self.data)):
            yield self._batch_together(index, group)

    def _batch_together(self, index: int, group: Group) -> list[Any]:
        """Return the outputs of one batch for each candidate; keep what is the incumbent's."""
        kept, found, corrected = self._kept, dict[fx.Node, Any](), set[str]()
        assert kept is not None
        batch, correction = self.data[index], self.correction
        measuring = index == 0 and correction is not None

        def shared(node: fx.Node, values: Mapping[fx.Node, Any], foreign: set[int]) -> Any:
            def run() -> Any:
                return self.runner.run(node, values, foreign, {})

            new = self._corrected([node]) - kept.statistics.keys()
            if measuring and new:
                assert correction is not None
                value = correction.apply(run, only=new, begun=corrected)
                corrected.update(new)
            else:
                value = run()
            if node in self.cuts:
                found[node] = value
            return value

        if measuring:
            assert correction is not None
            correction.restore(kept.statistics)
        outputs = self.stacker.run(
            group, (batch.inputs, batch.n, measuring), kept.values[index], shared, self._own
        )
        if correction is not None:
            kept.statistics.update(correction.state(corrected))
        kept.values[index].update(found)
        return outputs

    def _turn_to(self, incumbent: BitConfig, weights: object) -> None:
        """Keep only what is also an incumbent's."""
        old = self._kept
        if old is None:
            self._kept = _Kept(incumbent, weights, [{} for _ in self.data], {})
        elif old.config != incumbent:
            changed = self._changed(incumbent)
            self._kept = _Kept(
                incumbent,
                weights,
                [_without(values, changed) for values in old.values],
                _without(old.statistics, self._corrected(changed)),
            )

    def _changed(self, config: BitConfig) -> frozenset[fx.Node]:
        """Return the nodes with other values than those of what is kept."""
        if self._kept is None:
            return frozenset(self.graph.nodes)
        layers = [name for name, bits in config.items() if self._kept.config[name] != bits]
        return frozenset().union(*(self.graph.downstream[name] for name in layers))

    def _corrected(self, nodes: Iterable[fx.Node]) -> set[str]:
        """Return the names of the corrected modules within some nodes."""
        return set().union(*(self._inside.get(node, ()) for node in nodes))

    def _batch(self, index: int, changed: frozenset[fx.Node]) -> Any:
        """Return the outputs of one batch; keep what is the incumbent's of all that is run."""
        kept, found = self._kept, dict[fx.Node, Any]()
        known = {} if kept is None else _without(kept.values[index], changed)
        plan = self.graph.needed(known)
        keep = frozenset() if kept is None else self.cuts - changed

        def run() -> Any:
            return self._nodes(self.data[index].inputs, known, plan, keep, found)

        if index or self.correction is None:
            outputs = run()
        else:
            fresh = {} if kept is None else _without(kept.statistics, self._corrected(changed))
            self.correction.restore(fresh)
            outputs = self.correction.apply(run, only=self._corrected(plan) - fresh.keys())
            if kept is not None:
                new = self._corrected(set(plan) - changed) - fresh.keys()
                kept.statistics.update(self.correction.state(new))
        if kept is not None:  # only now, so that an error on the way leaves nothing half-made
            kept.values[index].update(found)
        return outputs

    def _nodes(
        self,
        inputs: Inputs,
        known: Mapping[fx.Node, Any],
        plan: Sequence[fx.Node],
        keep: frozenset[fx.Node],
        found: dict[fx.Node, Any],
    ) -> Any:
        """Run what is planned beyond known values; put the values to keep into ``found``."""
        graph, runner = self.graph, self.runner
        values: dict[fx.Node, Any] = {graph.entry: inputs, **known}
        # Memory that is not the pass's own: inputs, parameters, and what is kept.
        foreign = {memory_of(t) for v in values.values() for t in tensors(v)} | self._own
        last = runner.last_readers(plan)
        with plain_attention():
            for node in plan:
                values[node] = runner.run(node, values, foreign, last)
                if node in keep:
                    found[node] = values[node]
                    foreign |= {memory_of(t) for t in tensors(values[node])}
                for value in node.all_input_nodes:
                    if last.get(value) is node and value not in known:
                        del values[value]
        return plain(map_arg(graph.output, values.__getitem__))

    def _weights(self) -> object:
        """Return what changes with the network's float weights and the statistics not corrected."""
        corrected = set() if self.correction is None else set(self.correction.modules)
        return tuple(
            (t.data_ptr(), 0 if t.is_inference() else t._version)
            for name, t in (*self.prepared.named_parameters(), *self.prepared.named_buffers())
            if name.rpartition(".")[0] not in corrected or isinstance(t, nn.Parameter)
        )


def _structure(tree: Any) -> str:
    """Return what tells inputs of one structure from those of another, whatever their values."""
    if isinstance(tree, Mapping):
        return f"{{{','.join(f'{key}:{_structure(value)}' for key, value in tree.items())}}}"
    if isinstance(tree, (list, tuple)):
        return f"{type(tree).__name__}({','.join(map(_structure, tree))})"
    return type(tree).__name__


def _sizes(data: Batches) -> list[int]:
    """Return the elements of each batch's inputs."""
    return [max(sum(t.numel() for t in tensors(batch.inputs)), 1) for batch in data]


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def _without(values: Mapping[_Key, _Value], keys: Container[_Key]) -> dict[_Key, _Value]:
    return {key: value for key, value in values.items() if key not in keys}
