"""A prepared network as a list of operations of which some can be left out.

`torch.fx` traces the network into nodes. Prepared layers are nodes of their own, so are modules
with hooks, and modules that cannot be traced (control flow that depends on data) are taken whole.
Running the nodes in order calls the very modules and functions that the network calls, in the same
order, so the outputs are the network's bit for bit.

Operations in place are followed: whoever reads a tensor after it was written reads the node that
wrote it, and what somebody else still needs is copied before it is written.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from hq_optuna.batches import Inputs, plain_attention, tensors
from hq_optuna.devices import wait_for
from hq_optuna.quantization.prepare import prepared_layers

_ROOT = "network"
_LARGEST_TRIES = 200


class UncuttableError(Exception):
    """The network cannot be taken apart; the text says why, as the end of a sentence."""


@dataclass
class Measured:
    """What a node did when the network ran once.

    Attributes:
        seconds: How long it took.
        n_bytes: Memory that its value holds.
        writes: Nodes whose values it writes into.
        alone: Whether no node that is read later shared memory with its arguments.
    """

    seconds: float = 0.0
    n_bytes: int = 0
    writes: tuple[fx.Node, ...] = ()
    alone: bool = True


@dataclass
class NetworkGraph:
    """A traced network.

    Attributes:
        network: The prepared network, whose modules the nodes call.
        nodes: Operations in order, without inputs and the output.
        entry: The node that stands for a batch's inputs.
        output: What the network returns, made of nodes.
        constants: Values of nodes that are attributes, by node; parameters are read when used.
        measured: What was seen of each node in `measure`.
        downstream: For each prepared layer the nodes that change with its bits; after `measure`.
        inside: The modules that a node calls: its own, and after `measure` those that it was seen
            to call, from a hook or a plain list.
    """

    network: nn.Module
    nodes: list[fx.Node]
    entry: fx.Node
    output: Any
    constants: dict[fx.Node, Tensor]
    measured: dict[fx.Node, Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.modules: dict[fx.Node, nn.Module] = {
            node: self.network.get_submodule(_name(node))
            for node in self.nodes
            if node.op == "call_module"
        }
        self.downstream: dict[str, frozenset[fx.Node]] = {}
        self.inside = {node: set(module.modules()) for node, module in self.modules.items()}

    def _find_downstream(self) -> None:
        self.downstream = {
            name: frozenset(
                self._after(node for node, held in self.inside.items() if layer in held)
            )
            for name, layer in prepared_layers(self.network).items()
        }

    @classmethod
    def trace(cls, network: nn.Module, inputs: Inputs) -> NetworkGraph:
        """Take a prepared network apart.

        Raises:
            UncuttableError: It cannot be traced, or only as a whole.
        """
        call = _Call(copy.deepcopy(network), inputs)  # modules that keep what passes keep a proxy
        whole: set[str] = set()
        for _ in range(_LARGEST_TRIES):
            tracer = _Tracer(whole)
            try:
                graph = tracer.trace(call)
                break
            except Exception as error:
                if tracer.failed in (None, _ROOT, *whole):
                    raise UncuttableError(f"it cannot be traced ({_first_line(error)})") from error
                assert tracer.failed is not None
                whole.add(tracer.failed)
        else:
            raise UncuttableError("it cannot be traced")
        entry, *rest, last = graph.nodes
        if any(node.target == _ROOT for node in rest):
            raise UncuttableError("it cannot be traced (it has hooks of its own)")
        constants = {
            node: _attribute(call, str(node.target))
            for node in rest
            if node.op == "get_attr" and not str(node.target).startswith(f"{_ROOT}.")
        }
        return cls(network, rest, entry, last.args[0], constants)

    def _after(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        found = set(nodes)
        stack = list(found)
        while stack:
            for user in stack.pop().users:
                if user not in found and user in self.position:
                    found.add(user)
                    stack.append(user)
        return found

    def needed(self, known: Iterable[fx.Node], goal: Any = None) -> list[fx.Node]:
        """Return the nodes to run when the values of some are known, in order.

        Args:
            known: Nodes that need not run.
            goal: Nodes whose values are wanted; by default the output.
        """
        stack: list[fx.Node] = []
        map_arg(self.output if goal is None else goal, stack.append)
        known = set(known) | {self.entry}
        found: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node not in known and node not in found:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return sorted(found, key=self.position.__getitem__)

    def call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Run one node on the values of those it reads."""
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        if node.op == "call_module":
            return self.modules[node](*args, **kwargs)
        if node.op == "get_attr":
            known = self.constants.get(node)
            return _attribute(self.network, _name(node)) if known is None else known
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    @torch.no_grad()
    def measure(self, inputs: Inputs) -> Any:
        """Run all nodes once, see what they write, share and cost, and return the outputs.

        Raises:
            UncuttableError: A node writes what is read later in another shape.
        """
        values: dict[fx.Node, Any] = {self.entry: inputs}
        called: set[nn.Module] = set()
        watch = register_module_forward_pre_hook(lambda module, _: called.add(module))
        with plain_attention(), watch:
            for index, node in enumerate(self.nodes):
                called.clear()
                seen = [
                    (other, tensor, tensor._version)
                    for other, value in values.items()
                    for tensor in tensors(value)
                ]
                started = time.perf_counter()
                value = self.call(node, values)
                wait_for(tensors(value))
                seconds = time.perf_counter() - started
                self.inside[node] = self.inside.get(node, set()) | called
                _check_followed(node, value)
                written = {other for other, t, version in seen if t._version != version}
                self.measured[node] = Measured(seconds, _held(value), tuple(written))
                values[node] = value
                for other in written:
                    self._follow(other, node, values)
                live = self._read_after(index)
                values = {n: v for n, v in values.items() if n in live}
                read = {memory_of(t) for other, t, _ in seen if other in node.all_input_nodes}
                kept = {
                    memory_of(t) for n, v in values.items() if n is not node for t in tensors(v)
                }
                self.measured[node].alone = not read & kept
        self._find_downstream()
        return plain(map_arg(self.output, values.__getitem__))

    @cached_property
    def peak_bytes(self) -> int:
        """Memory of the values that are alive at once while the network runs, at most.

        To be asked for after `measure`.
        """
        last = {value: node for node in self.nodes for value in node.all_input_nodes}
        map_arg(self.output, lambda node: last.pop(node, None))
        live, peak = 0, 0
        for node in self.nodes:
            live += self.measured[node].n_bytes
            peak = max(peak, live)
            done = (v for v in node.all_input_nodes if last.get(v) is node and v in self.measured)
            live -= sum(self.measured[value].n_bytes for value in done)
        return peak

    def _follow(self, written: fx.Node, writer: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Let whoever reads a written value later read the node that wrote it."""
        if written is self.entry:
            raise UncuttableError(f"{writer} writes into the inputs")
        at = self.position[writer]
        later = [u for u in written.users if self.position.get(u, len(self.nodes)) > at]
        if not later and not _contains(self.output, written):
            return
        before, after = values[written], values[writer]
        if not (isinstance(before, Tensor) and isinstance(after, Tensor) and _same(before, after)):
            raise UncuttableError(f"{writer} writes into {written}, which is read later")
        for user in later:
            user.replace_input_with(written, writer)
        self.output = map_arg(self.output, lambda n: writer if n is written else n)

    def _read_after(self, index: int) -> set[fx.Node]:
        """Return the nodes that are read after the one at a position."""
        live: set[fx.Node] = set()
        map_arg(self.output, live.add)
        for node in self.nodes[index + 1 :]:
            live.update(node.all_input_nodes)
        return live


def _check_followed(node: fx.Node, value: Any) -> None:
    """Refuse a value in which tensors hide.

    Raises:
        UncuttableError: An object with tensors in its attributes, which nobody here looks at.
    """
    followed = isinstance(value, (Tensor, nn.Module, Mapping, list, tuple))
    if not followed and next(tensors(getattr(value, "__dict__", {})), None) is not None:
        raise UncuttableError(f"{node} returns tensors in a {type(value).__name__}")


def plain(tree: Any) -> Any:
    """Return lists and dictionaries instead of torch.fx's immutable ones."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    if isinstance(tree, tuple):
        items = [plain(value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return tree


class _Call(nn.Module):
    """Calls a network the way `hq_optuna.batches.forward` does, from one argument."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.network = network
        self._given: Any = None
        if isinstance(inputs, Mapping):
            self._given = list(inputs)
        elif not isinstance(inputs, Tensor):
            self._given = len(inputs)

    def forward(self, inputs: Any) -> Any:
        if self._given is None:
            return self.network(inputs)
        if isinstance(self._given, int):
            return self.network(*(inputs[i] for i in range(self._given)))
        return self.network(**{name: inputs[name] for name in self._given})


class _Tracer(fx.Tracer):
    """Leaves prepared layers, modules with hooks and some named ones whole."""

    def __init__(self, whole: set[str]) -> None:
        super().__init__()
        self.whole = whole
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        hooked = bool(m._forward_hooks or m._forward_pre_hooks)
        plain = isinstance(m, (nn.Sequential, nn.ModuleList))
        return (
            module_qualified_name in self.whole
            or hooked
            or isinstance(m, _BatchNorm)  # any subclass: its statistics are corrected when called
            or (not plain and super().is_leaf_module(m, module_qualified_name))
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:  # the innermost one
                self.failed = self.path_of_module(m)
            raise


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix(f"{_ROOT}.")


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def memory_of(tensor: Tensor) -> int:
    """Return where the memory is that a tensor looks at."""
    return tensor.untyped_storage().data_ptr()


def _held(value: Any) -> int:
    """Return the bytes that keeping a value keeps alive."""
    held = {memory_of(t): t.untyped_storage().nbytes() for t in tensors(value)}
    return sum(held.values())


def _same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are the same numbers in the same memory."""
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype:
        return False
    return a.shape == b.shape and a.stride() == b.stride()


def _contains(tree: Any, node: fx.Node) -> bool:
    found: list[fx.Node] = []
    map_arg(tree, found.append)
    return node in found


def equal(a: Any, b: Any) -> bool:
    """Say whether two outputs are the same numbers in the same structure; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)
