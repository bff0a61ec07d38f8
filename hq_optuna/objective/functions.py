"""Name a function by all that it was made with, so that two searches with another loss differ."""

from __future__ import annotations

import contextlib
import dis
import enum
import hashlib
import re
import sys
from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hq_optuna.network.containers import digest_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SAID = (torch.dtype, torch.device, torch.layout, enum.Enum, range, slice)
_OF_MODULES = {*vars(nn.Module()), "training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CALLED = ("forward", "__call__")
_MAKERS = ("__init__", "__new__", "__post_init__", "__setstate__")
_CHANGING = {"append", "extend", "insert", "pop", "update", "add", "clear", "setdefault"}
_STANDARD = sys.stdlib_module_names - {"__main__"}
_LONGEST = 200


def name_of(function: object) -> str:
    """Return a function's name with its settings, the same for one that is made alike.

    Settings are arguments of a `partial`, attributes of a callable object or a module and of what
    it holds, weights, hooks, the object of a bound method, what a function closes over, its default
    arguments, and the numbers, texts, names and global settings that its code reads. What is longer
    than a line ends in a digest of it all. Of a library's own code the name says enough, and of an
    object of a kind that is not known here its attributes.

    Example:
        >>> name_of(partial(torch.nn.functional.cross_entropy, ignore_index=255))
        'cross_entropy(ignore_index=255)'
    """
    text = _Description().of(function)
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}… {_digest(text.encode())}"


class _Description:
    """Describes objects without their addresses; one that is met inside itself is left out."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[Any, str]] = {}  # an id names what lives

    def of(self, value: Any) -> str:
        """Return the description of a value."""
        if isinstance(value, _PLAIN) and type(value) in _PLAIN:
            return repr(value)
        if id(value) not in self._met:
            self._met[id(value)] = value, "…"
            self._met[id(value)] = value, self._of_held(value)
        return self._met[id(value)][1]

    def _of_held(self, value: Any) -> str:
        if isinstance(value, _SAID):
            return str(value)
        if isinstance(value, Tensor):
            what = "parameter" if isinstance(value, nn.Parameter) else "tensor"
            return f"{what} {tuple(value.shape)} {digest_of([('', value)])}"
        if isinstance(value, (np.ndarray, np.generic)):
            array = np.ascontiguousarray(value)
            return f"array {array.dtype} {array.shape} {_digest(array.tobytes())}"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{self.of(k)}: {self.of(v)}" for k, v in value.items()) + "}"
        if isinstance(value, (list, tuple, Set)):
            parts = [self.of(each) for each in value]
            return f"[{', '.join(sorted(parts) if isinstance(value, Set) else parts)}]"
        if isinstance(value, MethodType):
            return f"{self.of(value.__self__)}.{self.of(value.__func__)}"
        if isinstance(value, partial):
            given: dict[Any, Any] = dict(enumerate(value.args))
            return self._with(self.of(value.func), given | value.keywords)
        for inside in ("_orig_mod", "_torchdynamo_orig_callable"):  # of torch.compile
            if inside in getattr(value, "__dict__", ()):
                return self.of(getattr(value, inside))
        if isinstance(value, FunctionType):
            return self._with(value.__qualname__, _of_function(value))
        kind = value if isinstance(value, type) else type(value)
        name = str(getattr(value, "__qualname__", kind.__qualname__))
        if isinstance(value, (type, ModuleType)) or _is_standard(kind):
            return str(getattr(value, "__name__", name))
        return self._with(name, _of_object(value))

    def _with(self, name: str, settings: Mapping[Any, Any]) -> str:
        said = ", ".join(f"{key}={self.of(value)}" for key, value in settings.items())
        return f"{name}({said})" if said else name


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _is_standard(kind: type) -> bool:
    """Return whether a class is the standard library's, such as a logger's, which changes."""
    return kind.__module__.partition(".")[0] in _STANDARD and kind is not SimpleNamespace


def _is_library(kind: Any) -> bool:
    """Return whether a class or function is not the user's, so that its name says what it does."""
    if str(kind.__module__).partition(".")[0] in {"torch", "hq_optuna", *_STANDARD}:
        return True
    code = getattr(kind, "__code__", None)
    return code is not None and "site-packages" in code.co_filename


@dataclass
class _Code:
    """What code reads and writes, in a form all versions of Python have.

    What it writes is its state and no setting: variables and attributes that it sets, and of code
    that changes lists, dictionaries or sets, those that it has at hand.
    """

    names: set[str] = field(default_factory=set)
    globals: set[str] = field(default_factory=set)
    constants: list[Any] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    mutates: bool = False

    def read(self, code: CodeType) -> _Code:
        """Take in code and what is defined in it."""
        for step in dis.get_instructions(code):
            if "CONST" in step.opname or "SMALL_INT" in step.opname:
                self._gather(step.argval)
            elif step.opname.startswith(("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_NAME")):
                self.names.add(str(step.argval))
                if step.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME")):
                    self.globals.add(str(step.argval))
            elif step.opname in ("STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL"):
                self.written.add(str(step.argval))
            self.mutates |= step.opname == "STORE_SUBSCR"
        self.mutates |= not _CHANGING.isdisjoint(self.names)
        return self

    def _gather(self, value: Any) -> None:
        if isinstance(value, CodeType):
            self.read(value)
        elif isinstance(value, (tuple, frozenset)):
            for each in value if any(not isinstance(one, str) for one in value) else ():
                self._gather(each)  # texts alone are the names of arguments
        elif isinstance(value, _PLAIN) and value is not None:
            self.constants.append(value)

    def is_setting(self, name: str, value: Any) -> bool:
        """Return whether what the code has by this name is nothing that it changes."""
        return name not in self.written and not (
            self.mutates and isinstance(value, (list, dict, set, deque))
        )


def _of_function(function: FunctionType) -> dict[str, Any]:
    """Return attributes and closure; of the user's own also defaults and what its code reads."""
    code, found = function.__code__, dict(vars(function))
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            found[name] = cell.cell_contents
    if _is_library(function):
        return found
    defaults = function.__defaults__ or ()
    first = code.co_argcount - len(defaults)
    found |= dict(zip(code.co_varnames[first:], defaults, strict=False))
    found |= function.__kwdefaults__ or {}
    read = _Code().read(code)
    for name in sorted(read.globals & set(function.__globals__)):
        value = function.__globals__[name]
        if not isinstance(value, (type, ModuleType)):
            found[name] = value
    found = {name: value for name, value in found.items() if read.is_setting(name, value)}
    return {**found, "reads": [*sorted(read.names), *read.constants]}


def _of_object(value: Any) -> dict[str, Any]:
    """Return what an object holds, also by its class, and what a class of the user's does."""
    kinds = [kind for kind in type(value).__mro__ if not _is_library(kind)]
    code, found = _Code(), dict[str, Any]()
    for kind in reversed(kinds):
        found |= {n: v for n, v in vars(kind).items() if isinstance(v, _PLAIN) and n[0] != "_"}
        for name, method in vars(kind).items():
            if isinstance(method, FunctionType) and name not in _MAKERS:
                code.read(method.__code__)
    slots = [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())]
    found |= {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    graph = getattr(value, "inlined_graph", None)  # of what is scripted
    if graph is not None:
        text = re.sub(r" #.*|___torch_mangle_\d+\.", "", str(graph))
        found = {"graph": _digest(text.encode())}
    else:
        found |= {n: v for n, v in getattr(value, "__dict__", {}).items() if n not in _OF_MODULES}
    if isinstance(value, nn.Module):
        own_tensors = value.named_parameters(recurse=False), value.named_buffers(recurse=False)
        for part in (*own_tensors, value.named_children()):
            found |= dict(part)
        found |= {name: list(getattr(value, name).values()) for name in _HOOKS}
    found = {n: v for n, v in sorted(found.items()) if not (n in _HOOKS and not v)}
    for kind in kinds:
        found |= {f"{kind.__qualname__}.{n}": vars(kind)[n] for n in _CALLED if n in vars(kind)}
    own = {n: v for n, v in found.items() if not n.startswith(("_torchdynamo", "_is_torch"))}
    return {name: each for name, each in own.items() if code.is_setting(name, each)}
