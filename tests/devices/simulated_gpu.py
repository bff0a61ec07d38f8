"""A GPU that is not there: tensors that say ``simulated:0`` and hold their values on the CPU.

What it shows: that nothing mixes devices, that no tensor is left behind on the other one, that
random states, autocast and synchronization are asked of the right device. What it cannot show:
the digits, the speed and the memory of real kernels.

Refused as CUDA refuses it: an operation on tensors of both devices (but for single numbers,
indices and copies), a generator of the other device, ``numpy()``, and products of matrices of whole
numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CAN_BE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this PyTorch lets Python stand in for a device."""
aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy, aten._foreach_copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
PRODUCTS = {
    aten.mm,
    aten.bmm,
    aten.addmm,
    aten.baddbmm,
    aten.matmul,
    aten.linear,
    aten.convolution,
    aten.dot,
    aten.mv,
}
refused_types: set[torch.dtype] = set()
"""What the device cannot hold."""
AUTOCAST = ("conv1d", "conv2d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm")


class OnGpu(Tensor):
    """A tensor that says it is on the GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> OnGpu:
        """Wrap a tensor of the CPU, whose memory is shared."""
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device="simulated:0",
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of which some tensor is on the GPU."""
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """Where the values are."""
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the values."""
        return self.held.untyped_storage()

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        """The values without their history."""
        return self.detach()

    @data.setter
    def data(self, other: OnGpu) -> None:
        assert other.shape == self.shape
        self.held = other.held

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        """Copy a leaf, a parameter as a parameter."""
        assert self.is_leaf
        with torch.no_grad():
            copied = OnGpu(self.held.clone(), self.requires_grad)
        copied.__dict__.update({k: v for k, v in vars(self).items() if k != "held"})
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        """The values as numbers."""
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        """The values, marked."""
        return f"OnGpu({self.held!r})"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU's values and give its results the device they would have."""
    leaves, spec = tree_flatten((args, kwargs))
    on_gpu = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
    asked = kwargs.get("device")
    target = torch.device(asked or ("simulated:0" if on_gpu else "cpu"))
    _refuse(func, leaves, bool(on_gpu), target)
    if func.overloadpacket is aten._fused_sdp_choice:
        return 0  # plain arithmetic
    shapes = [(leaf, leaf.held.shape) for leaf in on_gpu]
    plain_args, plain_kwargs = tree_unflatten(
        [leaf.held if isinstance(leaf, OnGpu) else leaf for leaf in leaves], spec
    )
    if asked is not None:
        plain_kwargs["device"] = torch.device("cpu")
    found = func(*plain_args, **plain_kwargs)
    if any(leaf.held.shape != shape for leaf, shape in shapes):
        raise NotImplementedError(f"{func} changes a shape in place")
    known = {id(leaf.held): leaf for leaf in on_gpu}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return OnGpu(value) if target.type == "simulated" else value

    return tree_map(wrapped, found)


def _refuse(func: Any, leaves: list[Any], any_on_gpu: bool, target: torch.device) -> None:
    packet = func.overloadpacket
    if target.type == "simulated" and refused_types.intersection(leaves):
        raise TypeError(f"Cannot convert to {refused_types} on {target} ({func})")
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and leaf.device.type != target.type:
            raise RuntimeError(
                f"Expected a '{target.type}' device type for generator but found "
                f"'{leaf.device.type}' ({func})"
            )
    if not any_on_gpu or packet in COPIES:
        return
    elsewhere = [
        leaf
        for leaf in leaves
        if isinstance(leaf, Tensor) and not isinstance(leaf, OnGpu) and leaf.dim() > 0
    ]
    if packet in INDEXED and isinstance(leaves[0], OnGpu):
        elsewhere = [leaf for leaf in elsewhere if leaf.dtype not in (torch.int64, torch.bool)]
    if elsewhere:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"simulated:0 and cpu! ({func})"
        )
    if packet in PRODUCTS and not any(
        leaf.is_floating_point() or leaf.is_complex() for leaf in leaves if isinstance(leaf, Tensor)
    ):
        raise RuntimeError(f'"{func}" not implemented for whole numbers on cuda')


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Backend(getattr(backend_registration, "_DummyBackendModule", object)):  # type: ignore[misc]
    """What PyTorch asks of ``torch.simulated``."""

    synchronized = forked = restored = 0

    def synchronize(self, device: Any = None) -> None:
        """Count a wait for the GPU."""
        self.synchronized += 1

    def get_rng_state(self, device: Any = None) -> Tensor:
        """Count a random state that was read."""
        self.forked += 1
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Count a random state that was put back."""
        self.restored += 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Number formats of autocast."""
        return [torch.bfloat16, torch.float16]


def simulate() -> _Backend:
    """Let this process have a GPU, for good: run it in a process of its own."""
    if hasattr(torch, "simulated"):
        return torch.simulated  # type: ignore[no-any-return]
    backend = _Backend()
    backend_registration._setup_privateuseone_for_python_backend("simulated", backend)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` then moves where we see it
    rest, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in AUTOCAST:
        _let_autocast_lower(library, name)
    backend.libraries = (rest, library)  # or else they end with this function
    _Mode().__enter__()
    return backend


def _let_autocast_lower(library: torch.library.Library, name: str) -> None:
    packet = getattr(aten, name)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lowered(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype("simulated")
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return packet(
                *(
                    arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
                    for arg in args
                )
            )

    library.impl(name, lowered, "AutocastPrivateUse1")
