"""Several candidates of one incumbent in one pass.

Behind the layers that they change, the candidates of a step run the same operations on tensors of
their own. What an operation costs besides its arithmetic (Python, PyTorch's dispatch, the start of
a GPU's kernels) can be paid once for all of them, which matters where a network is small.

A value that differs between k candidates is one tensor ``(N·k, …)``: the candidates of a sample lie
side by side. An operation sees a larger batch, and a batch-norm layer with statistics of its own
for each candidate sees ``(N, k·C, …)``. A layer runs apart for the candidates that change it, and
what candidates have in common with the incumbent runs once.

No operation is trusted with that. Only PyTorch's own are tried; the first time one meets tensors of
some shapes of so many candidates it runs both ways; where one bit differs, where it fails, or where
its results lie otherwise in memory, do not have a row for each sample or do not fill a processor's
vectors, it runs candidate by candidate from then on. So outputs are those of a candidate's own
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional

from hq_optuna.batches import plain_attention, tensors
from hq_optuna.bit_config import BitConfig
from hq_optuna.quantization.correction import StatisticsCorrection, channel_axis
from hq_optuna.quantization.prepare import input_quantizer, prepared_layers, weight_quantizer
from hq_optuna.scoring.graph import equal, memory_of, plain
from hq_optuna.scoring.pytorchs import is_pytorchs, runs_pytorchs
from hq_optuna.scoring.running import NodeRunner
from hq_optuna.scoring.side_by_side import (
    ApartError,
    copy_of,
    join,
    part_of,
    repeat,
    same_in_one,
)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]

Statistics = dict[str, tuple[Tensor, ...]]

Plan = list[tuple[fx.Node, tuple[int, ...], bool]]
"""Nodes in order, the candidates that run each, and whether the incumbent does."""


@dataclass
class Group:
    """Candidates that are run together.

    Attributes:
        configs: Their bits, of all layers.
        incumbent: The bits that they were made from, which the network has.
        changed: For each candidate the nodes with other values than the incumbent's.
        statistics: What was corrected for each candidate, by module.
        side_by_side: The same for several candidates in one, by module and candidates.
        plans: What runs, by what is known.
    """

    configs: Sequence[BitConfig]
    incumbent: BitConfig
    changed: Sequence[frozenset[fx.Node]]
    statistics: list[Statistics] = field(init=False)
    side_by_side: dict[tuple[str, tuple[int, ...]], tuple[Tensor, ...]] = field(
        default_factory=dict
    )
    plans: dict[frozenset[fx.Node], Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.statistics = [{} for _ in self.configs]


class Stacker:
    """Runs groups of candidates of one prepared network, batch by batch.

    Args:
        runner: Runs a node.
        correction: Corrects the statistics of each candidate on the first batch.
        inside: Names of the corrected modules within each node.
    """

    def __init__(
        self,
        runner: NodeRunner,
        correction: StatisticsCorrection | None,
        inside: Mapping[fx.Node, set[str]],
    ) -> None:
        self.runner, self.graph = runner, runner.graph
        self.correction, self.inside = correction, inside
        names = {layer: name for name, layer in prepared_layers(self.graph.network).items()}
        self._layers = {
            node: {names[module]: module for module in held if module in names}
            for node, held in self.graph.inside.items()
        }
        self._tried = {node for node in self.graph.nodes if self._may_be_tried(node)}
        self._trusted: dict[tuple[fx.Node, Shapes, int], bool] = {}

    def run(
        self,
        group: Group,
        batch: tuple[Any, int, bool],
        known: Mapping[fx.Node, Any],
        shared: Callable[[fx.Node, Mapping[fx.Node, Any], set[int]], Any],
        foreign: set[int],
    ) -> list[Any]:
        """Return the outputs of each candidate on a batch.

        Args:
            group: The candidates.
            batch: Inputs, samples, and whether statistics are corrected on it.
            known: Values of the incumbent's.
            shared: Runs a node for the incumbent, given values and memory that is not to be
                written.
            foreign: Memory of the network's own.

        Returns:
            For each candidate what the network returns for the batch's n samples.
        """
        plan = self._plan(group, frozenset(known))
        inputs, n, measuring = batch
        values: dict[fx.Node, Any] = {self.graph.entry: inputs, **known}
        foreign = foreign | {memory_of(t) for value in values.values() for t in tensors(value)}
        last = self.runner.last_readers([node for node, _, _ in plan])
        at = _Pass(self, group, n, measuring, values, {}, foreign, last)
        with plain_attention():
            for node, own, is_shared in plan:
                if is_shared:
                    values[node] = shared(node, values, foreign)
                    foreign |= {memory_of(t) for t in tensors(values[node])}
                if own:
                    at.each[node] = at.run(node, own)
                for value in node.all_input_nodes:
                    if last.get(value) is node:
                        at.each.pop(value, None)
                        if value not in known:
                            values.pop(value, None)
        return [at.outputs(j) for j in range(len(group.configs))]

    def _plan(self, group: Group, known: frozenset[fx.Node]) -> Plan:
        """Return the nodes to run when some are known, in order."""
        if known not in group.plans:
            needed = [set(self.graph.needed(known - changed)) for changed in group.changed]
            plan = []
            for node in sorted(set().union(*needed), key=self.graph.position.__getitem__):
                having = [j for j, its in enumerate(needed) if node in its]
                own = tuple(j for j in having if node in group.changed[j])
                plan.append((node, own, len(own) < len(having)))
            group.plans[known] = plan
        return group.plans[known]

    def _may_be_tried(self, node: fx.Node) -> bool:
        """Say whether what a node runs is PyTorch's own, and has statistics that are known here."""
        module = self.graph.modules.get(node)
        if module is None:
            return node.op == "call_method" or is_pytorchs(node.target)
        is_layer = module in self._layers[node].values()
        if node in self.inside and self.inside[node] and not (is_layer or type(module) in _NORMS):
            return False
        return all(map(runs_pytorchs, module.modules()))

    def trusts(self, node: fx.Node, shapes: Shapes, k: int) -> bool | None:
        """Return whether a node may run for k candidates at once; ``None`` if nobody knows yet."""
        if node not in self._tried:
            return False
        return self._trusted.get((node, shapes, k))

    def judge(self, node: fx.Node, shapes: Shapes, k: int, trusted: bool) -> None:
        """Remember it."""
        self._trusted[node, shapes, k] = trusted

    @contextmanager
    def bits(self, node: fx.Node, config: BitConfig, otherwise: BitConfig) -> Iterator[None]:
        """Give the layers within a node a candidate's bits for a while."""
        layers = self._layers.get(node, {})
        other = {name: layer for name, layer in layers.items() if config[name] != otherwise[name]}
        try:
            for name, layer in other.items():
                weight_quantizer(layer).bits, input_quantizer(layer).bits = config[name]
            yield
        finally:
            for name, layer in other.items():
                weight_quantizer(layer).bits, input_quantizer(layer).bits = otherwise[name]

    def changes(self, node: fx.Node, config: BitConfig, incumbent: BitConfig) -> bool:
        """Return whether a candidate has other bits than the incumbent within a node."""
        return any(config[name] != incumbent[name] for name in self._layers.get(node, ()))


@dataclass
class _Each:
    """A node's values for those candidates in which it is not the incumbent's.

    Attributes:
        members: Which candidates.
        joined: All of them in one, if `parts` is ``None``.
        parts: By member.
    """

    members: tuple[int, ...]
    joined: Any = None
    parts: dict[int, Any] | None = None


@dataclass
class _Pass:
    """One batch's pass. ``values`` are the incumbent's, ``each`` the candidates' own."""

    stacker: Stacker
    group: Group
    n: int
    measuring: bool
    values: dict[fx.Node, Any]
    each: dict[fx.Node, _Each]
    foreign: set[int]
    last: Mapping[fx.Node, fx.Node]

    def part(self, value: fx.Node, j: int) -> Any:
        """Return a node's value for a candidate."""
        own = self.each.get(value)
        if own is None or j not in own.members:
            return self.values[value]
        if own.parts is not None:
            return own.parts[j]
        return part_of(own.joined, own.members.index(j), len(own.members), self.n)

    def outputs(self, j: int) -> Any:
        """Return what the network returns for a candidate."""
        return plain(map_arg(self.stacker.graph.output, lambda value: self.part(value, j)))

    def run(self, node: fx.Node, own: tuple[int, ...]) -> _Each:
        """Run a node for the candidates in which it is their own."""
        group, stacker = self.group, self.stacker
        alike = tuple(
            j for j in own if not stacker.changes(node, group.configs[j], group.incumbent)
        )
        k, parts = len(alike), dict[int, Any]()
        shapes = self._shapes(node, alike[0]) if k > 1 else ()
        trusted = k > 1 and stacker.trusts(node, shapes, k)
        if trusted is None:
            before = [dict(its) for its in group.statistics]
            try:
                joined = self._together(node, alike, careful=True)
            except Exception:  # whatever an operation raises on a batch it is not made for
                joined = None
            group.statistics = before
            parts = {j: self._apart(node, j) for j in alike}
            one_by_one = [parts[j] for j in alike]
            trusted = joined is not None and same_in_one(joined, one_by_one, self.n)
            # What mixes candidates shows only where they differ.
            if not trusted or not equal(one_by_one[0], one_by_one[-1]):
                stacker.judge(node, shapes, k, trusted)
        elif trusted:
            with suppress(ApartError):  # what depends on values may have another shape in one
                joined = self._together(node, alike)
                if k == len(own):
                    return _Each(own, joined)
                parts = {j: part_of(joined, i, k, self.n) for i, j in enumerate(alike)}
        parts |= {j: self._apart(node, j) for j in own if j not in parts}
        return _Each(own, parts=parts)

    def _shapes(self, node: fx.Node, j: int) -> Shapes:
        """Return shapes and types of what a node reads for a candidate."""
        shapes = []
        for value in node.all_input_nodes:
            own = self.each.get(value)
            if own is not None and j in own.members and own.parts is None:
                for t in tensors(own.joined):
                    shapes.append((torch.Size((self.n, *t.shape[1:])), t.dtype))
            else:
                shapes += [(t.shape, t.dtype) for t in tensors(self.part(value, j))]
        return tuple(shapes)

    def _apart(self, node: fx.Node, j: int) -> Any:
        """Run a node for one candidate."""
        stacker, group = self.stacker, self.group
        values = {value: self.part(value, j) for value in node.all_input_nodes}
        foreign = self.foreign | self._others(node)
        foreign |= {
            memory_of(t)
            for value in values
            if value in self.each and self.each[value].parts is None
            for t in tensors(self.each[value].joined)
        }

        def run() -> Any:
            return stacker.runner.run(node, values, foreign, self.last)

        with stacker.bits(node, group.configs[j], group.incumbent):
            names, correction = stacker.inside.get(node), stacker.correction
            if not names or correction is None:
                return run()
            before, its = correction.state(names), group.statistics[j]
            correction.restore({name: its[name] for name in names if name in its})
            if self.measuring:
                value = correction.apply(run, only=names, begun=its)
                its |= correction.state(names)
            else:
                value = run()
            correction.restore(before)
            return value

    def _together(self, node: fx.Node, members: tuple[int, ...], careful: bool = False) -> Any:
        """Run a node for several candidates at once; ``careful``: writing nothing that is read.

        Raises:
            ApartError: Their values do not go into one tensor.
        """
        stacker = self.stacker
        values = {value: self._joined(value, members) for value in node.all_input_nodes}
        if careful:
            values = {value: copy_of(tree) for value, tree in values.items()}
        names = stacker.inside.get(node)
        module = stacker.graph.modules.get(node)
        foreign = self.foreign | self._others(node)
        if not names or stacker.correction is None:
            return stacker.runner.run(node, values, foreign, {} if careful else self.last)
        [name] = names
        if isinstance(module, _NORMS):
            [x] = node.args
            assert isinstance(x, fx.Node)
            return self._normed(module, name, values[x], members)
        with stacker.correction.unshifted(name):
            output = stacker.runner.run(node, values, foreign, {} if careful else self.last)
        return self._shifted(name, output, members)

    def _others(self, node: fx.Node) -> set[int]:
        """Return the memory of candidates' own values that others will read and a node does not."""
        read = node.all_input_nodes
        others = [its for value, its in self.each.items() if value not in read]
        return {memory_of(t) for its in others for t in tensors((its.joined, its.parts))}

    def _normed(self, module: nn.Module, name: str, x: Tensor, members: tuple[int, ...]) -> Tensor:
        """Run a batch-norm layer with the statistics of each candidate."""
        norm: Any = module
        k = len(members)
        means, variances, *rest = self._statistics(name, x, members, norm.weight, norm.bias)
        weight, bias = rest or (None, None)
        side_by_side = x.view(self.n, k * x.shape[1], *x.shape[2:])
        normed = functional.batch_norm(
            side_by_side, means, variances, weight, bias, training=False, eps=norm.eps
        )
        return normed.view(x.shape)

    def _shifted(self, name: str, output: Tensor, members: tuple[int, ...]) -> Tensor:
        """Add the shift of each candidate to a layer's output."""
        correction, k = self.stacker.correction, len(members)
        assert correction is not None
        (shifts,) = self._statistics(name, output, members)
        axis = channel_axis(correction.prepared.get_submodule(name), output)
        shape = [1] * (output.dim() + 1)
        shape[1], shape[axis + 1] = k, -1
        shifted = output.view(self.n, k, *output.shape[1:]) + shifts.reshape(shape)
        return shifted.to(output.dtype).flatten(0, 1)

    def _statistics(
        self, name: str, x: Tensor, members: tuple[int, ...], *repeated: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return corrected statistics of candidates, and what they share, each ``(k·C,)``."""
        group, correction, k = self.group, self.stacker.correction, len(members)
        assert correction is not None
        if self.measuring:
            for i, j in enumerate(members):
                group.statistics[j][name] = correction.corrected(name, part_of(x, i, k, self.n))
        elif (name, members) in group.side_by_side:
            return group.side_by_side[name, members]
        each = zip(*(group.statistics[j][name] for j in members), strict=True)
        found = (*map(torch.cat, each), *(w.repeat(k) for w in repeated if w is not None))
        if not self.measuring:  # else it need not be what counts
            group.side_by_side[name, members] = found
        return found

    def _joined(self, value: fx.Node, members: tuple[int, ...]) -> Any:
        """Return a node's values for several candidates in one."""
        own = self.each.get(value)
        if own is not None and own.parts is None and own.members == members:
            return own.joined
        if value.op == "get_attr":
            return self.values[value]
        if own is None or not set(members) & set(own.members):
            return repeat(self.values[value], len(members), self.n)
        return join([self.part(value, j) for j in members], self.n)
