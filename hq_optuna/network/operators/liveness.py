"""What is in memory when: the tensors of one forward pass, from their making to their last reading.

PyTorch's operators are watched while the network runs, so whatever its code does is seen: views
are their tensor, writes in place make none. Then pointwise operations (batch normalization,
activation functions, the addition of a residual) are merged into the operation before them where
nobody else reads its result, as runtimes merge them; `memory_map` can leave that out, and then
describes what PyTorch itself allocates.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from hq_optuna.network.batches import forward
from hq_optuna.network.containers import tensors
from hq_optuna.network.products import Product
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.space.memory import LiveTensor, MemoryMap

_POINTWISE = {"native_batch_norm", "_native_batch_norm_legit_no_training", "native_dropout"}
"""Pointwise operators that PyTorch does not tag so."""

_MONOTONE = {"relu", "relu_", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min"}
_MOVES = {"max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "cat", "stack"} | {
    *("clone", "_to_copy", "copy_", "index_select", "constant_pad_nd", "channel_shuffle"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
}
"""Operators that commute with rounding: their inputs can be as narrow as their output."""


@dataclass(slots=True, eq=False)
class _Made:
    """A tensor's memory: the operation that made it, and who read it.

    ``reads`` holds places in the list of operations; ``by_layers`` the layers that take it.
    """

    at: int  # -1: what the network is given
    name: str
    n_elements: int
    is_float: bool
    itemsize: int
    of_batch: bool
    reads: list[int] = field(default_factory=list)
    by_layers: list[nn.Module] = field(default_factory=list)
    returned: bool = False

    def read(self, at: int) -> None:
        """Note that an operation reads it."""
        self.reads.append(at)

    def read_by(self, layer: nn.Module) -> None:
        """Note that a layer takes it as its input."""
        self.by_layers.append(layer)

    def kept(self) -> None:
        """Note that the network returns it."""
        self.returned = True


@dataclass(frozen=True, slots=True)
class _Operation:
    name: str
    pointwise: bool
    took: tuple[_Made, ...]
    gave: tuple[_Made, ...]
    wrote: tuple[_Made, ...]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations of one forward pass and the memory that they read and make.

    Args:
        network: The network, in evaluation mode.
        inputs: What `run` calls it with.
        n_samples: Samples in the inputs.
    """

    def __init__(self, network: nn.Module, inputs: Any, n_samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {module: name for name, module in network.named_modules()}
        held = [*network.parameters(), *network.buffers()]
        self._constant = {key for x in held if (key := _key(x)) is not None}
        self._known: dict[int, _Made] = {}
        self._within: list[nn.Module] = []
        self.n_samples = n_samples
        self.made: list[_Made] = []
        self.operations: list[_Operation] = []
        for tensor in tensors(inputs):
            self._make(tensor, "input", at=-1, of_batch=True)

    def run(self, network: nn.Module, inputs: Any) -> Any:
        """Call the network, and return what it does."""
        begin = register_module_forward_pre_hook(self._enter)
        end = register_module_forward_hook(self._leave)
        try:
            with self:
                outputs = forward(network, inputs)
        finally:
            begin.remove()
            end.remove()
        for tensor in tensors(outputs):
            if (made := self._of(tensor)) is not None:
                made.kept()
        return outputs

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._within.append(module)
        factors = 2 if isinstance(module, Product) else 1
        for taken in itertools.islice(tensors(args), factors):
            if (made := self._of(taken)) is not None:
                made.read_by(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._within:
            self._within.pop()

    def _of(self, tensor: Tensor) -> _Made | None:
        key = _key(tensor)
        return None if key is None else self._known.get(key)

    def _make(self, tensor: Tensor, name: str, at: int, *, of_batch: bool) -> _Made | None:
        key = _key(tensor)
        if key is None or key in self._constant:
            return None
        n_elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        of_batch = of_batch or self.n_samples in tensor.shape
        made = _Made(
            *(at, name, n_elements, tensor.is_floating_point()),
            *(tensor.element_size(), of_batch),
        )
        self._known[key] = made
        self.made.append(made)
        return made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        taken = _distinct(self._of(x) for x in tensors((args, kwargs or {})))
        keys = {_key(x) for x in tensors((args, kwargs or {}))}
        found = func(*args, **(kwargs or {}))
        name = self._names.get(self._within[-1], "") if self._within else ""
        new = [x for x in tensors(found) if x.numel() and _key(x) not in keys]
        of_batch = any(made.of_batch for made in taken)
        operator = getattr(getattr(func, "overloadpacket", None), "__name__", "?")
        at = len(self.operations)
        gave = _distinct(self._make(x, name or operator, at, of_batch=of_batch) for x in new)
        mutable = getattr(getattr(func, "_schema", None), "is_mutable", False)
        wrote = _distinct(self._of(x) for x in tensors(found)) if mutable and not gave else ()
        if gave or wrote:  # a view alone reads nothing
            for made in taken:
                made.read(at)
            pointwise = torch.Tag.pointwise in getattr(func, "tags", ()) or operator in _POINTWISE
            self.operations.append(_Operation(operator, pointwise, taken, gave, wrote))
        return found


def _key(tensor: Tensor) -> int | None:
    """Return the address of a tensor's memory, ``None`` for what is not strided."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return None
    return int(tensor.untyped_storage()._cdata)


def _distinct(found: Iterable[_Made | None]) -> tuple[_Made, ...]:
    return tuple({id(made): made for made in found if made is not None}.values())


class _Groups:
    """Memory that operations share: what pointwise ones write over what they read.

    Attributes:
        runs: When each operation runs, as the place of the first of its group.
    """

    def __init__(self, record: Recorder, merge: bool) -> None:
        self._operations = record.operations
        self.runs = list(range(len(record.operations)))
        self._owner = {id(made): made for made in record.made}
        self._members = {id(made): [made] for made in record.made}
        self._names = {id(made): {""} for made in record.made}  # operators of each group
        for at, operation in enumerate(record.operations):
            for made in operation.gave:
                self._names[id(made)] = {operation.name}
            if merge and operation.pointwise:
                self._merge(at, operation)

    def of(self, made: _Made) -> _Made:
        """Return the first memory of a group."""
        return self._owner[id(made)]

    def members(self, made: _Made) -> list[_Made]:
        """Return what shares the memory of a group, in order."""
        return self._members[id(self.of(made))]

    def time(self, made: _Made) -> int:
        """Return the operation that makes a group; -1 for what the network is given."""
        first = self.of(made)
        return first.at if first.at < 0 else self.runs[first.at]

    def _readers_of(self, made: _Made) -> set[int]:
        """Return the operations that read it, without those that write it in place."""
        return {at for at in made.reads if made not in self._operations[at].wrote}

    def _merge(self, at: int, operation: _Operation) -> None:
        if operation.wrote:
            times = [self.time(made) for made in operation.wrote]
            others = [self.time(made) for made in operation.took if made not in operation.wrote]
            earliest = min(
                (t for made in operation.wrote for t in self._readers_of(made)), default=at
            )
            if max(others, default=-1) < min(times) and earliest >= at:
                self.runs[at] = max(times)
            for made in operation.wrote:
                self._names[id(self.of(made))].add(operation.name)
            return
        if len(operation.gave) != 1:
            return
        (new,) = operation.gave
        fit = [
            made
            for made in operation.took
            if made.at >= 0
            and (made.n_elements, made.itemsize) == (new.n_elements, new.itemsize)
            and self._readers_of(made) == {at}
            and not made.returned
        ]
        if fit:
            into = self.of(max(fit, key=self.time))
            self.runs[at] = self.time(into)
            self._owner[id(new)] = into
            self._members[id(into)].append(new)
            self._names[id(into)].add(operation.name)

    def reads(self, made: _Made) -> set[int]:
        """Return the operations outside a group that read it."""
        members = self.members(made)
        found = {at for one in members for at in self._readers_of(one)}
        return {at for at in found if not set(self._operations[at].gave) & set(members)}

    def readers(self, made: _Made) -> set[nn.Module]:
        """Return the modules that take it, or what is only moved from it."""
        found = {module for one in self.members(made) for module in one.by_layers}
        reads = self.reads(made)
        for at in reads:
            operation = self._operations[at]
            for new in operation.gave:
                if operation.name not in _MOVES or self.of(new) is self.of(made):
                    continue
                alike = self._names[id(self.of(new))]
                if alike <= _MOVES or (alike <= _MOVES | _MONOTONE and len(reads) == 1):
                    found |= self.readers(new)
        return found


def memory_map(
    record: Recorder, layers: Mapping[nn.Module, str], *, merge: bool = True
) -> MemoryMap:
    """Return what is in memory at each moment of a recorded pass, for one sample.

    Args:
        record: A recorded pass.
        layers: Names of the layers that quantize what they read, by module.
        merge: Whether pointwise operations write over what they read, where nobody else reads it;
            what nobody reads is not made then. Otherwise: what PyTorch allocates, in its formats.
    """
    groups = _Groups(record, merge)
    firsts = [made for made in record.made if groups.of(made) is made]
    if merge:
        firsts = [m for m in firsts if any(x.reads or x.returned for x in groups.members(m))]
    when = sorted({max(groups.time(made), 0) for made in firsts})
    held = []
    for made in firsts:
        members = groups.members(made)
        first = bisect_right(when, max(groups.time(made), 0)) - 1
        last = max(
            [first, *(bisect_right(when, groups.runs[at]) - 1 for m in members for at in m.reads)]
        )
        modules = groups.readers(made) if merge and made.is_float else set()
        readers = tuple(name for module, name in layers.items() if module in modules)
        returned = any(m.returned for m in members)
        held.append(
            LiveTensor(
                name=made.name,
                n_elements=-(-made.n_elements // (record.n_samples if made.of_batch else 1)),
                first=first,
                last=len(when) - 1 if returned else last,
                readers=readers,
                bits=FLOAT_BITS if merge and made.is_float else 8 * made.itemsize,
                alone=len(readers) == 1 and len(groups.reads(made)) == 1 and not returned,
            )
        )
    given = (record.operations[at].gave for at in when) if record.operations else ()
    names = (gave[0].name if gave else "" for gave in given)
    return MemoryMap(tuple(names), tuple(held))
