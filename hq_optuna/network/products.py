"""Products of activations, as layers of their own: attention's queries times keys, and the like.

A function multiplies them, which has no name and no hook. `with_products` finds them by a forward
pass, and gives the module in whose forward they stand a child for each, `Product`, that is called
in the function's place: ``product_1``, ``product_2``, …, in the order of the module's matrix
products, those with weights counted too. `functional.scaled_dot_product_attention` is two of them,
and is computed step by step then.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from hq_optuna.errors import NetworkError
from hq_optuna.network.batches import Inputs, forward
from hq_optuna.network.containers import map_tensors
from hq_optuna.network.copies import copied, preserve_network
from hq_optuna.network.devices import device_of
from hq_optuna.network.layer_types import QUANTIZABLE
from hq_optuna.network.modes import InnermostMode, kind_of

_NAME = "product_"
_MATMUL = ("matmul", "bmm", "rmatmul")
_ATTENTION = "scaled_dot_product_attention"
_KINDS = frozenset((*_MATMUL, "baddbmm", "einsum", _ATTENTION))


class Product(nn.Module):
    """A matrix product of two activations."""

    def forward(self, input: Tensor, other: Tensor, equation: str = "") -> Tensor:
        """Return ``input @ other``, or what an equation of `torch.einsum` says."""
        if equation:
            return torch.einsum(equation, input, other)
        return torch.matmul(input, other)


class CallsProducts(nn.Module):
    """A module whose products of activations are modules; its class comes before its own.

    Attributes:
        n_products: Matrix products of one call, known from the first on.
    """

    n_products: int | None = None

    def check_products(self, n: int) -> None:
        """Refuse a call with other products than the first, whose places are not known then."""
        if self.n_products is None:
            self.n_products = n
        elif self.n_products != n:
            raise NetworkError(
                f"A {type(self).__name__} multiplies matrices {n} times in this call and "
                f"{self.n_products} times in others, so what it branches on decides which "
                "products are rounded. Search without products."
            )


def with_products(network: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a copy in evaluation mode in which products of activations are `Product` modules.

    Outputs are the network's, bit for bit but for fused attention, which sums in another order. The
    network itself comes back where it has none. Left in float are products in modules that call
    others from call to call, and those inside PyTorch's own functions.

    Args:
        network: Left as it is.
        inputs: What the network is called with, to find them.

    Raises:
        NetworkError: A module has an attribute of a product's name.

    Example:
        >>> class Attends(nn.Module):
        ...     def forward(self, x):
        ...         return (x @ x.mT).softmax(-1) @ x
        >>> network = with_products(nn.Sequential(Attends()), torch.randn(2, 4, 8))
        >>> [name for name, _ in network[0].named_children()]
        ['product_1', 'product_2']
    """
    device = device_of(network)
    finding = _Finding(network)
    with preserve_network(network), torch.no_grad():
        network.eval()
        with finding.watched():
            forward(network, map_tensors(inputs, lambda x: x.detach().to(device, copy=True)))
    return products_named(network, finding.names())


def products_named(network: nn.Module, names: Collection[str]) -> nn.Module:
    """Return a copy of a network that calls these products as modules; itself where it does."""
    known = {name for name, module in network.named_modules() if isinstance(module, Product)}
    if set(names) <= known:
        return network
    copy: Any = copied(network)
    for name in names:
        owner_name, _, own = name.rpartition(".")
        module: Any = copy.get_submodule(owner_name)
        if name in known:
            continue
        if hasattr(module, own):
            raise NetworkError(
                f"{owner_name or 'The network'!r} has an attribute {own!r}, the name of a product "
                "of its activations. Call it otherwise, or search without products."
            )
        module.add_module(own, Product())
        if not isinstance(module, CallsProducts):
            module.__class__ = _calling(type(module))
    copy.eval()
    return copy  # type: ignore[no-any-return]


def _calling(own: type[nn.Module]) -> type[nn.Module]:
    def calling(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Calls(self):
            return own.forward(self, *args, **kwargs)

    functools.update_wrapper(calling, own.forward)
    return type(
        own.__name__, (CallsProducts, own), {"forward": calling, "__module__": own.__module__}
    )


def _n_products(kind: str) -> int:
    return 2 if kind == _ATTENTION else 1


class _Calls(InnermostMode):
    """Calls the products of one call of a module's forward, not of a module's within."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self._owner, self._n = owner, 0

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None:
            self._owner.check_products(self._n)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kind, kwargs = kind_of(func), kwargs or {}
        if self.innermost() is not self or kind not in _KINDS:
            return func(*args, **kwargs)
        found = [self._next() for _ in range(_n_products(kind))]
        if not any(found):
            return func(*args, **kwargs)
        multiply = [torch.matmul if module is None else module for module in found]
        return _computed(kind, multiply, args, kwargs)

    def _next(self) -> Product | None:
        self._n += 1
        found: Product | None = self._owner._modules.get(f"{_NAME}{self._n}")
        return found


def _computed(
    kind: str, multiply: Sequence[Callable[..., Tensor]], args: Sequence[Any], kwargs: Any
) -> Tensor:
    """Return what a function does, with other functions for its products."""
    if kind == _ATTENTION:
        scored, mixed = multiply
        return _attention(scored, mixed, *args, **kwargs)
    if kind == "einsum":
        return multiply[0](*_factors(kind, args, kwargs), args[0])
    a, b = _factors(kind, args, kwargs)
    product = multiply[0](a, b)
    if kind != "baddbmm":
        return product
    added, beta = kwargs.get("input", args[0] if args else None), kwargs.get("beta", 1)
    product = product.mul(kwargs.get("alpha", 1))
    return product if beta == 0 else product.add(added.mul(beta))


def _factors(kind: str, args: Sequence[Any], kwargs: Any) -> tuple[Any, Any]:
    """Return what a function multiplies; ``None`` for what is not there."""
    if kind == "einsum":
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return tuple(operands) if len(operands) == 2 else (None, None)
    names = ("input", "batch1", "batch2") if kind == "baddbmm" else ("input", "other")
    if kind == "bmm":
        names = ("input", "mat2")
    if kind == _ATTENTION:
        names = ("query", "key")
    given = dict(zip(names, args, strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
    a, b = (given.get(name) for name in names[-2:])
    return (b, a) if kind == "rmatmul" else (a, b)


def _attention(
    scored: Callable[..., Tensor],
    mixed: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what `functional.scaled_dot_product_attention` does, step by step."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = scored(query, key.transpose(-2, -1))
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
        weights = scores.softmax(-1)
        # A row that is masked whole attends to nothing.
        weights = weights.masked_fill(~attn_mask.any(-1, keepdim=True), 0.0)
    else:
        weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
    if dropout_p > 0:
        weights = functional.dropout(weights, dropout_p)
    return mixed(weights, value)


class _Call:
    """A call of a module in the finding pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class _Finding(TorchFunctionMode):
    """Finds the products of activations of one forward pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in network.named_modules()}
        held = [*network.parameters(), *network.buffers()]
        self._constant = {x.untyped_storage().data_ptr() for x in held if _is_plain(x)}
        self._called: list[_Call] = []
        self._within: list[_Call] = []
        self._made: list[tuple[tuple[_Call, ...], str, bool]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the pass in the body."""
        begin = register_module_forward_pre_hook(lambda m, args: self._enter(m))
        end = register_module_forward_hook(lambda m, args, y: self._leave(m), always_call=True)
        try:
            with self:
                yield
        finally:
            begin.remove()
            end.remove()

    def _enter(self, module: nn.Module) -> None:
        self._called.append(_Call(module))
        self._within.append(self._called[-1])

    def _leave(self, module: nn.Module) -> None:
        while self._within and self._within.pop().module is not module:
            pass

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kind = kind_of(func)
        if kind in _KINDS and self._within:
            factors = _factors(kind, args, kwargs or {})
            fits = all(map(self._is_activation, factors)) and "out" not in (kwargs or {})
            self._made.append((tuple(self._within), kind, fits))
        return func(*args, **(kwargs or {}))

    def _is_activation(self, x: Any) -> bool:
        """Say whether a factor is a matrix, or several, and no weight."""
        fits = _is_plain(x) and x.is_floating_point() and x.dim() >= 2
        return fits and x.untyped_storage().data_ptr() not in self._constant

    def names(self) -> list[str]:
        """Return the names of what can be found again in every call, in the order of the calls.

        A module calls its products if it makes the same in each call; where it does not, what it
        multiplies counts among the products of the module around it.
        """
        owners = {
            within[-1].module
            for within, _, fits in self._made
            if fits and self._can_own(within[-1].module)
        }
        while True:
            calls = self._calls(owners)
            unsteady = {
                call.module
                for call, made in calls.items()
                if made != next(m for c, m in calls.items() if c.module is call.module)
            }
            if not unsteady:
                break
            owners -= unsteady
        return list(
            dict.fromkeys(
                ".".join(filter(None, (self._names[call.module], f"{_NAME}{number}")))
                for call, made in calls.items()
                for number, fits in enumerate(made, 1)
                if fits
            )
        )

    def _calls(self, owners: set[nn.Module]) -> dict[_Call, list[bool]]:
        """Return the calls of these modules, with what fits of the products that each counts."""
        found: dict[_Call, list[bool]] = {c: [] for c in self._called if c.module in owners}
        for within, kind, fits in self._made:
            counts = next((call for call in reversed(within) if call.module in owners), None)
            if counts is not None:
                own = fits and counts is within[-1]
                found[counts].extend([own] * _n_products(kind))
        return found

    def _can_own(self, module: nn.Module) -> bool:
        return (
            module in self._names
            and not isinstance(module, QUANTIZABLE)
            and "forward" not in vars(module)
        )


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_meta
