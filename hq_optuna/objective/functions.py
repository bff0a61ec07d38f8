"""Name a function by all that it was made with, so that two searches with another loss differ."""

from __future__ import annotations

import contextlib
import dis
import enum
import hashlib
import re
import sys
from collections.abc import Mapping, Set
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
    read: set[str] = set()
    constants: list[Any] = []
    _read(code, read, constants)
    found["reads"] = [*sorted(read), *constants]
    for name in sorted(read & set(function.__globals__)):
        value = function.__globals__[name]
        if not isinstance(value, (type, ModuleType)):
            found[name] = value
    return found


def _read(code: CodeType, names: set[str], constants: list[Any]) -> None:
    """Gather names, numbers and texts that code reads, in a form all versions of Python have."""
    for step in dis.get_instructions(code):
        if "CONST" in step.opname or "SMALL_INT" in step.opname:
            _gather(step.argval, names, constants)
        elif step.opname.startswith(("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_NAME")):
            names.add(str(step.argval))


def _gather(value: Any, names: set[str], constants: list[Any]) -> None:
    if isinstance(value, CodeType):
        _read(value, names, constants)
    elif isinstance(value, (tuple, frozenset)):
        for each in value if any(not isinstance(one, str) for one in value) else ():
            _gather(each, names, constants)  # texts alone are the names of arguments
    elif isinstance(value, _PLAIN) and value is not None:
        constants.append(value)


def _of_object(value: Any) -> dict[str, Any]:
    """Return what an object holds, also by its class, and what a class of the user's does."""
    kinds = [kind for kind in type(value).__mro__ if not _is_library(kind)]
    found: dict[str, Any] = {}
    for kind in reversed(kinds):
        found |= {n: v for n, v in vars(kind).items() if isinstance(v, _PLAIN) and n[0] != "_"}
    slots = [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())]
    found |= {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    graph = getattr(value, "inlined_graph", None)  # of what is scripted
    if graph is not None:
        text = re.sub(r" #.*|___torch_mangle_\d+\.", "", str(graph))
        found = {"graph": _digest(text.encode())}
    else:
        found |= {n: v for n, v in getattr(value, "__dict__", {}).items() if n not in _OF_MODULES}
    if isinstance(value, nn.Module):
        for held in (value._parameters, value._buffers, value._modules):
            found |= dict(held.items())
        found |= {name: list(getattr(value, name).values()) for name in _HOOKS}
    found = {n: v for n, v in sorted(found.items()) if not (n in _HOOKS and not v)}
    for kind in kinds:
        found |= {f"{kind.__qualname__}.{n}": vars(kind)[n] for n in _CALLED if n in vars(kind)}
    return {n: v for n, v in found.items() if not n.startswith(("_torchdynamo", "_is_torch"))}
