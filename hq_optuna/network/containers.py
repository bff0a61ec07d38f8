"""Tensors in whatever holds them, and numbers in whatever layout a tensor has.

Networks return, and data hold, tensors in classes of the user's: dictionaries with attributes,
dataclasses, named tuples, packed sequences. One walk finds the tensors in all of them, and one
rebuilds what holds them around other tensors, of the same class and with all else that it held.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from enum import Enum
from functools import partial
from types import (
    BuiltinFunctionType,
    FunctionType,
    GeneratorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import SUPPORTED_NODES

from hq_optuna.errors import DataError

_PLAIN = (str, bytes, bool, int, float, complex, type(None))
_CODE = (nn.Module, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, partial)
_LEAVES = (*_PLAIN, *_CODE, Enum, np.ndarray, np.generic, torch.Size, weakref.ref)
_BUILTIN = (OrderedDict, defaultdict, dict, deque, list, tuple)
_READ_ONCE = (GeneratorType, map, zip, filter)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in a tree, in order; in what is no container of PyTorch's, in attributes.

    A tensor that is held twice comes twice. Modules, functions, classes, NumPy arrays and weak
    references are not looked into. Raises `DataError` for what cannot be rebuilt around other
    tensors or read twice: sets of tensors, generators.
    """
    return (leaf for leaf in _leaves(tree, {}) if isinstance(leaf, Tensor))


def leaves(tree: Any) -> list[Any]:
    """Return all that a tree holds and that holds nothing itself, in order; see `tensors`."""
    return _leaves(tree, {})


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the tree with ``change`` applied to each of its tensors, once where one is shared.

    What holds a tensor that changes is copied, without writing into it, and the rest is kept: a
    tree in which nothing changes is returned itself. Classes that are registered in
    ``torch.utils._pytree`` are rebuilt as they were registered.

    Raises:
        DataError: What holds a tensor cannot be copied; the message names its class.

    Example:
        >>> from types import SimpleNamespace
        >>> tree = SimpleNamespace(logits=torch.zeros(2), note="kept")
        >>> map_tensors(tree, lambda x: x + 1)
        namespace(logits=tensor([1., 1.]), note='kept')
    """
    return _Mapped(change).of(tree)


class _Mapped:
    """A tree being rebuilt; what was rebuilt is kept, so that what is shared stays shared."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change = change
        self._kept: dict[int, tuple[Any, Any]] = {}  # id → (old, new), as an id dies with its old

    def of(self, node: Any) -> Any:
        if id(node) in self._kept:
            return self._kept[id(node)][1]
        if isinstance(node, Tensor):
            return self._tensor(node)
        if all(self._tensor(tensor) is tensor for tensor in tensors(node)):
            return self._keep(node, node)
        made = _made(node)
        if made is not None:
            children, make = made
            return self._keep(node, make([self.of(child) for child in children]))
        new = _copied(node)
        self._keep(new, self._keep(node, new))
        for value, put in [*_held(new)]:
            changed = self.of(value)
            if changed is not value:
                try:
                    put(new, changed)
                except (AttributeError, TypeError):
                    _refuse(node, "holds a tensor in an attribute that cannot be set")
        return new

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._kept:
            new = self._keep(tensor, self._change(tensor))
            if new is not tensor and type(new) is type(tensor) and _has_attributes(tensor):
                for name, value in vars(tensor).items():
                    vars(new).setdefault(name, self.of(value))
        found: Tensor = self._kept[id(tensor)][1]
        return found

    def _keep(self, old: Any, new: Any) -> Any:
        self._kept[id(old)] = old, new
        return new


def _leaves(node: Any, seen: dict[int, tuple[Any, list[Any]]]) -> list[Any]:
    if isinstance(node, _PLAIN):
        return [node]
    if isinstance(node, _READ_ONCE):
        _refuse(node, "can be read only once")
    if id(node) in seen:  # held twice, or a circle, which ends here
        return seen[id(node)][1]
    seen[id(node)] = node, []
    found: list[Any] = []
    if isinstance(node, Tensor):
        found.append(node)
        if not _has_attributes(node):
            seen[id(node)] = node, found
            return found
    children = _children(node)
    for child in children:
        found += _leaves(child, seen)
    if not children and not isinstance(node, Tensor):
        found = _closed(node, seen)
    elif isinstance(node, (set, frozenset)) and any(isinstance(leaf, Tensor) for leaf in found):
        _refuse(node, "holds tensors in no order")
    seen[id(node)] = node, found
    return found


def _children(node: Any) -> list[Any]:
    made = _made(node)
    return [value for value, _ in _held(node)] if made is None else made[0]


def _closed(node: Any, seen: dict[int, tuple[Any, list[Any]]]) -> list[Any]:
    """Return what has no attributes as a leaf, unless there are tensors in it or none can tell."""
    if isinstance(node, (Mapping, Sequence, Set)) and not isinstance(node, (*_LEAVES, *_BUILTIN)):
        for value in [*(node.values() if isinstance(node, Mapping) else node)]:
            if any(isinstance(leaf, Tensor) for leaf in _leaves(value, seen)):
                _refuse(node, "holds tensors and does not show where")
    return [node]


def _made(node: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """Return children and how to make a node of others, of a class that is made and not filled."""
    kind = type(node)
    if kind in SUPPORTED_NODES and not issubclass(kind, _BUILTIN):
        children, context = SUPPORTED_NODES[kind].flatten_fn(node)
        return list(children), lambda new: SUPPORTED_NODES[kind].unflatten_fn(new, context)
    if kind is MappingProxyType:
        return [*node.values()], lambda new: kind(dict(zip(node, new, strict=True)))
    if not isinstance(node, tuple) or isinstance(node, torch.Size):
        return None
    items, n = list(tuple.__iter__(node)), len(node)
    if hasattr(kind, "n_sequence_fields"):  # of torch.return_types
        return items, kind
    if isinstance(node, PackedSequence):  # whose batch_sizes stay on the CPU

        def packed(new: list[Any]) -> Any:
            return tuple.__new__(kind, (new[0], node.batch_sizes, *new[2:]))

        return items, packed
    held = [*_attributes(node)]

    def filled(new: list[Any]) -> Any:
        made: Any = tuple.__new__(kind, new[:n])
        for (_, put), value in zip(held, new[n:], strict=True):
            put(made, value)
        return made

    return [*items, *(value for value, _ in held)], filled


def _held(node: Any) -> Iterator[tuple[Any, Callable[[Any, Any], None]]]:
    """Yield what a node holds, with what puts another value in its place in a copy."""
    if isinstance(node, _LEAVES):
        return
    base: Any = _base(node)
    if issubclass(base, dict):
        for key, value in base.items(node):
            yield value, _setter(base, key)
    elif base in (list, deque):
        for index, value in enumerate(base.__iter__(node)):
            yield value, _setter(base, index)
    elif isinstance(node, (set, frozenset)):
        for value in node:
            yield value, lambda new, value: _refuse(node, "holds tensors in no order")
    yield from _attributes(node)


def _attributes(node: Any) -> Iterator[tuple[Any, Callable[[Any, Any], None]]]:
    """Yield the values of attributes and slots, frozen ones too; none that a property computes."""
    own = getattr(node, "__dict__", None)
    if isinstance(own, dict):
        for name, value in own.items():
            yield value, partial(_set_attribute, name)
    if isinstance(node, Tensor):
        return
    for kind in type(node).__mro__:
        for slot in vars(kind).values():
            if isinstance(slot, MemberDescriptorType) and slot.__name__ != "__dict__":
                try:
                    value = slot.__get__(node)
                except AttributeError:  # never set
                    continue
                yield value, slot.__set__


def _setter(base: Any, key: Any) -> Callable[[Any, Any], None]:
    def put(new: Any, value: Any) -> None:
        base.__setitem__(new, key, value)

    return put


def _set_attribute(name: str, new: Any, value: Any) -> None:
    new.__dict__[name] = value


def _has_attributes(tensor: Tensor) -> bool:
    """Return whether a tensor holds attributes of the user's, and not those it is made of."""
    # One with operators of its own is made of them, even without `__tensor_flatten__`.
    own_operators = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    made_of = own_operators or hasattr(type(tensor), "__tensor_flatten__")
    return bool(vars(tensor)) and not made_of


def _base(node: Any) -> type:
    return next((base for base in _BUILTIN if isinstance(node, base)), object)


def _copied(node: Any) -> Any:
    """Return a shallow copy of a container, of which nothing is shared with it but what it holds.

    As the class copies itself, or else a new object that never saw its ``__init__``: for classes
    that want arguments, forbid writing, or return themselves.
    """
    try:
        new = copy.copy(node)
    except Exception:  # of the user's class
        new = node
    own = getattr(node, "__dict__", None)
    apart = own is None or getattr(new, "__dict__", None) is not own
    if type(new) is type(node) and new is not node and apart:
        return new
    base: Any = _base(node)
    try:
        new = base.__new__(type(node))
        for value in [node] if base is not object else []:
            if issubclass(base, dict):
                base.update(new, base.items(value))
            elif base is deque:
                deque.__init__(new, value, value.maxlen)
            else:
                list.extend(new, value)
        for value, put in _attributes(node):
            put(new, value)
    except (AttributeError, TypeError):
        _refuse(node, "holds tensors and cannot be copied")
    return new


def _refuse(node: Any, why: str) -> NoReturn:
    name = type(node).__qualname__
    raise DataError(
        f"A {name} in the network's inputs, labels or outputs {why}. Use a list, dict, tuple or "
        "dataclass, or say what it holds: torch.utils._pytree.register_pytree_node"
        f"({name}, flatten, unflatten)."
    )


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is a block of memory with strides: not sparse, nested or opaque."""
    return tensor.layout == torch.strided and not tensor.is_nested


def strided(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return strided tensors that hold all numbers of a tensor, sparse, nested or quantized.

    Each is of a type that can be compared, so float8 comes as float32 and half complex as complex.
    """
    tensor = tensor.detach()
    parts: tuple[Any, ...] = (tensor,)
    if tensor.is_nested:
        parts = tensor.unbind()
    elif tensor.layout == torch.sparse_coo:
        parts = tensor._indices(), tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = tensor.crow_indices(), tensor.col_indices(), tensor.values()
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    elif tensor.layout != torch.strided:
        parts = (tensor.to_dense(),)
    elif tensor.is_quantized and tensor.qscheme() == torch.per_tensor_affine:
        grid = torch.tensor([tensor.q_scale(), tensor.q_zero_point()], device="cpu")
        parts = tensor.int_repr(), grid
    elif tensor.is_quantized:
        scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        parts = tensor.int_repr(), scales, zeros
    return tuple(_comparable(part) for part in parts)


def _comparable(part: Tensor) -> Tensor:
    if part.dtype == torch.complex32:
        part = part.to(torch.complex64)
    elif part.is_floating_point() and part.dtype.itemsize == 1:
        part = part.float()
    return part.resolve_conj().resolve_neg()


def load_state_(network: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Load a state of which `strided_state` made parts; raises as ``load_state_dict`` does."""
    state = dict(parts)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_plain(tensor) or f"{name}{_PART}0" not in state:
            continue
        found = [state.pop(f"{name}{_PART}{i}") for i in range(len(strided(tensor)))]
        make: Any = partial(torch.sparse_compressed_tensor, layout=tensor.layout)
        if tensor.layout == torch.sparse_coo:
            make = torch.sparse_coo_tensor
        state[name] = make(*found, size=tensor.shape)
        owner, _, key = name.rpartition(".")  # gets a new one, as `copy_` wants as many numbers
        new = state[name].to(tensor.device)
        is_parameter = isinstance(tensor, nn.Parameter)
        own = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        setattr(network.get_submodule(owner), key, own)
    network.load_state_dict(state)


_PART = ".part"


def strided_state(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's state, in which several strided tensors stand for one that is sparse."""
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if is_plain(tensor):
            state[name] = tensor
        else:
            state |= {f"{name}{_PART}{i}": part for i, part in enumerate(strided(tensor))}
    return state


def unsaved_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a network's state leaves out (``persistent=False``), by name."""
    state = network.state_dict()
    return {name: buffer for name, buffer in network.named_buffers() if name not in state}


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same numbers in the same layout; NaN is as any other."""
    if a.dtype != b.dtype or a.layout != b.layout or a.is_nested != b.is_nested:
        return False
    if not a.is_nested and a.shape != b.shape:
        return False
    pairs = list(zip(strided(a), strided(b), strict=False))
    return len(strided(a)) == len(strided(b)) and all(
        x.shape == y.shape and bool(torch.where(x.isnan(), y.isnan(), x == y).all())
        for x, y in pairs
    )


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity, in whatever layout."""
    return all(bool(torch.isfinite(part).all()) for part in strided(tensor))


def clone(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor of any layout."""
    return tensor.to(tensor.device, copy=True) if tensor.is_quantized else tensor.clone()


def digest_of(named: Iterable[tuple[str, Any]], about: str = "", digits: int = 12) -> str:
    """Return hexadecimal digits that name these tensors, with their names, in this order.

    Numbers and texts among them count too; what else there may be does not.
    """
    sha = hashlib.sha256(about.encode())
    for name, leaf in named:
        if isinstance(leaf, _PLAIN):
            sha.update(f"{name}{leaf!r}".encode())
        if not isinstance(leaf, Tensor):
            continue
        shape = "nested" if leaf.is_nested else tuple(leaf.shape)
        layout = "" if leaf.layout == torch.strided else leaf.layout
        sha.update(f"{name}{shape}{leaf.dtype}{layout}".encode())
        parts = strided(leaf)
        for part in parts:
            if len(parts) > 1:
                sha.update(str(tuple(part.shape)).encode())
            sha.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:digits]
