"""Look at a network: which layers can be quantized, how large they are and what they compute.

The network runs once on all data, and every multiplication with the weight of a convolution or
linear layer is counted, whoever does it. What has weights and cannot be quantized is listed with
the reason. The network is handed back as it came.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from hq_optuna.errors import HqOptunaError, NetworkError
from hq_optuna.network.batches import Batches, Inputs, forward
from hq_optuna.network.containers import map_tensors, tensors
from hq_optuna.network.copies import preserve_network
from hq_optuna.network.devices import device_of
from hq_optuna.network.layer_types import (
    OTHER_NORMS,
    QUANTIZABLE,
    TRANSPOSED,
    UNSUPPORTED,
)
from hq_optuna.network.operators.liveness import Recorder, memory_map
from hq_optuna.network.operators.weight_uses import WatchedWeights, WeightUse
from hq_optuna.network.products import Product
from hq_optuna.network.searchable import check_searchable
from hq_optuna.network.unfused import unfused
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec, SkippedModule
from hq_optuna.space.memory import MemoryMap


@dataclass(frozen=True, slots=True)
class OtherProduct:
    """Multiplications within a module that no weight of a searched layer takes part in.

    Attributes:
        module: The innermost module that they run in; empty: the network's own forward.
        operator: PyTorch's name, such as ``bmm`` for products of activations.
        macs: Multiply-accumulates for one sample.
    """

    module: str
    operator: str
    macs: int

    def __str__(self) -> str:
        what = _operation(self.operator)
        return f"{what} in {self.module or 'the network itself'!r}"


_OPERATORS = {
    **dict.fromkeys(("bmm", "baddbmm"), "products of activations (attention)"),
    **dict.fromkeys(("mm", "addmm"), "matrix products"),
    **dict.fromkeys(("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"), "a recurrent layer"),
    **dict.fromkeys(("convolution", "_convolution"), "convolutions with computed weights"),
}


def _operation(operator: str) -> str:
    """Return an operator in words."""
    attention = operator.startswith("_scaled_dot_product")
    return _OPERATORS["bmm"] if attention else _OPERATORS.get(operator, operator)


MOST_UNSEEN = 0.05
"""Share of the operations from which it is a warning that they stay in float."""


@dataclass(frozen=True, slots=True)
class Introspection:
    """What `introspect` found.

    Attributes:
        layers: Quantizable layers in the order of their first call (`L` of them).
        skipped: Modules with weights of their own that are not quantized, in the order the
            network registers them. Normalization layers are not listed.
        n_parameters: Elements of all parameters of the network, each counted once.
        n_samples: Samples that were seen; MACs and inputs were divided by it.
        warnings: Sentences about costs that hang on the data, or that bits do not tell, and where
            many of the operations are in no layer.
        others: Multiplications that no layer's weight takes part in, the most first.
        memory: What is in memory at each moment of a pass over the first batch, for one sample.
        elements: What computes element by element and stays in float, the most first: additions,
            concatenations, softmax, normalization, embeddings; with elements for one sample.
    """

    layers: tuple[LayerSpec, ...]
    skipped: tuple[SkippedModule, ...]
    n_parameters: int
    n_samples: int
    warnings: tuple[str, ...] = ()
    others: tuple[OtherProduct, ...] = ()
    memory: MemoryMap = field(default_factory=MemoryMap)
    elements: tuple[tuple[str, int], ...] = ()

    @property
    def bops_of_others(self) -> int:
        """Bit operations of what stays in float, at 32 bits by 32: no part of any cost."""
        return sum(other.macs for other in self.others) * FLOAT_BITS**2

    @property
    def share_of_others(self) -> float:
        """Share of all multiply-accumulates that stay in float, in no layer that is searched."""
        others = sum(other.macs for other in self.others)
        return others / max(others + self.macs, 1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the quantizable layers for one sample."""
        return sum(layer.macs for layer in self.layers)

    @property
    def n_weights(self) -> int:
        """Weights of the quantizable layers, without biases."""
        return sum(layer.n_weights for layer in self.layers)


@dataclass(slots=True)
class _Tally:
    """Counts of one layer over the passes of all batches, all samples together.

    ``outside`` are those of the MACs that functions did with the weight outside the layer;
    ``n_calls`` is of the pass with the most calls. ``unsteady``: two batches of one shape differ.
    """

    macs: int = 0
    outside: int = 0
    n_calls: int = 0
    n_inputs: int = 0
    unsteady: bool = False

    def add_macs(self, macs: int, *, outside: bool = False) -> None:
        """Count multiply-accumulates of the layer, or of a function outside it."""
        self.macs += macs
        self.outside += macs * outside

    def add_call(self, n_calls: int, n_inputs: int) -> None:
        """Count the so-manieth call of a forward pass."""
        self.n_calls = max(self.n_calls, n_calls)
        self.n_inputs += n_inputs

    def compare(self, macs: int, expected: int) -> None:
        """Take in the MACs of a batch, and those of an earlier one of the same shape."""
        self.unsteady |= macs != expected


def introspect(
    network: nn.Module,
    example_input: Inputs | Batches,
    *,
    n_samples: int | None = None,
    see: Callable[[int, Any], None] = lambda index, outputs: None,
) -> Introspection:
    """Run the network once in evaluation mode and describe its quantizable layers.

    MACs are those of each multiplication with a layer's weight, by the layer or by a function that
    was given the weight, as `torch.utils.flop_counter` counts them. A layer that computes another
    weight from its own has those of its class: for a convolution output elements · input channels
    of a group · kernel elements. Calls add up; the sum is for one sample, on average over all that
    are given (rounded up).

    A module registered under several names is one layer. Two *modules* that share one weight
    tensor are not: bits of their own would leave two copies of a weight that is stored once. The
    first called is quantized, the others stay in float and are listed; register one module under
    both names to quantize them together. `nn.MultiheadAttention` and recurrent modules are
    described as the linear layers they consist of, see `hq_optuna.network.unfused`. Products of
    activations are layers where `hq_optuna.network.products.with_products` made them modules.

    Training flags, buffers, parameters, gradients, hooks, plain attributes and the random state of
    PyTorch, NumPy and Python are put back, also when the network raises.

    Args:
        network: The network; its weights must be finite floating-point numbers.
        example_input: A tensor, a tuple of positional or a mapping of keyword arguments, with the
            samples along the first dimension; or all calibration data, of which each batch runs.
            Inputs are copied to the device of the network.
        n_samples: Samples in the example. Default: first dimension of the first tensor, or the
            length of the first argument where that is a list (one tensor per image, as
            torchvision's detectors take them).
        see: Called with the place of a batch and the network's outputs on it.

    Raises:
        NetworkError: Nothing in the network can be quantized, it holds uninitialized lazy modules,
            compiled ones, NaN or infinite weights, or it does not run on the example input.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
        >>> found = introspect(network, torch.zeros(2, 3, 8, 8))
        >>> [(layer.name, layer.kind, layer.macs) for layer in found.layers]
        [('0', 'Conv2d', 7776), ('2', 'Linear', 2880)]
    """
    check_searchable(network)
    network = unfused(network)
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    if isinstance(example_input, Batches):
        given = [(batch.inputs, batch.n) for batch in example_input]
    else:
        given = [(example_input, _n_samples(example_input) if n_samples is None else n_samples)]
    n = sum(of_batch for _, of_batch in given)
    if n < 1:
        raise NetworkError(f"The example input holds {n} samples. Give at least one.")
    check_batch = n_samples is None and not isinstance(example_input, Batches)
    counter, record = _count(network, given, see, check_batch=check_batch)
    tallies = counter.tallies
    layers = counter.readers.told(_quantized_layers(names, tallies, n))
    others = _others(names, counter, layers, n)
    total = sum(x.macs for x in layers.values()) + sum(x.macs for x in others)
    skipped = _skipped_modules(network, names, tallies, layers, n)
    _check_found(layers, skipped)
    skipped = _with_shares(skipped, others, total)
    n_parameters = sum(p.numel() for p in network.parameters())
    found = {layer.name: tallies[module] for module, layer in layers.items()}
    said = (*_warnings(found, n), *_unseen(others, total))
    memory = memory_map(record, {module: layer.name for module, layer in layers.items()})
    return Introspection(
        *(tuple(layers.values()), tuple(skipped), n_parameters, n, said, tuple(others), memory),
        elements=tuple((what, -(-total // n)) for what, total in counter.elements.most_common()),
    )


def _others(
    names: Mapping[nn.Module, list[str]],
    counter: _Counter,
    layers: Mapping[nn.Module, LayerSpec],
    n: int,
) -> list[OtherProduct]:
    """Return what is multiplied in no searched layer, the most first."""
    found: Counter[tuple[str, str]] = Counter()
    for (module, operator), macs in counter.others.items():
        name = "" if module is None else names.get(module, ["(unregistered)"])[0]
        found[name, operator] += macs
    for module, tally in counter.tallies.items():
        if module not in layers and tally.macs:
            found[names.get(module, ["(unregistered)"])[0], type(module).__name__] += tally.macs
    each = [OtherProduct(*key, -(-macs // n)) for key, macs in found.items() if macs]
    return sorted(each, key=lambda other: (-other.macs, other.module, other.operator))


def _with_shares(
    skipped: Sequence[SkippedModule], others: Sequence[OtherProduct], total: int
) -> list[SkippedModule]:
    """Return what is not quantized with its share of all operations, products of none added."""
    left = {(other.module, other.operator): other for other in others}
    found = []
    for one in skipped:
        own = "" if one.name == "(network)" else one.name
        within = [k for k in left if k[0] == own]
        macs = sum(left.pop(key).macs for key in within)
        text = f"{one.reason}; {100 * macs / total:.2g} % of all operations" if macs else one.reason
        found.append(SkippedModule(one.name, one.kind, text))
    for other in left.values():
        reason = (
            f"{_operation(other.operator)}, not quantized; "
            f"{100 * other.macs / total:.2g} % of all operations"
        )
        found.append(SkippedModule(other.module or "(network)", other.operator, reason))
    return found


def _unseen(others: Sequence[OtherProduct], total: int) -> list[str]:
    """Return a sentence where many of the operations stay in float."""
    share = sum(other.macs for other in others) / max(total, 1)
    if share <= MOST_UNSEEN:
        return []
    most = ", ".join(f"{x} ({100 * x.macs / total:.1f} %)" for x in others[:3])
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    products = {_OPERATORS["bmm"]} & {_operation(x.operator) for x in others}
    way = " The setting products (--products) searches attention's." if products else ""
    return [
        f"{100 * share:.1f} % of the multiply-accumulates are in no layer that is searched, stay "
        f"in float and are not counted in the cost: {most}{more}. The bits of the answer say "
        f"nothing of these.{way}"
    ]


def _warnings(tallies: Mapping[str, _Tally], n: int) -> tuple[str, ...]:
    """Return sentences about layers whose cost hangs on the data, or whose weight others use."""
    said = []
    unsteady = [repr(name) for name, tally in tallies.items() if tally.unsteady]
    if unsteady:
        more = f" and {len(unsteady) - 3} more" if len(unsteady) > 3 else ""
        said.append(
            f"How much {', '.join(unsteady[:3])}{more} compute depends on the data (a branch, or "
            f"experts); MACs and costs are means over the {n} calibration samples."
        )
    said += [
        f"Functions outside layer {name!r} use its weight too ({-(-tally.outside // n)} MACs a "
        "sample). They get its rounded weight, and count at its bits, but what enters them is not "
        "rounded; call the layer itself instead."
        for name, tally in tallies.items()
        if tally.outside
    ]
    return tuple(said)


def _check_found(layers: Mapping[nn.Module, LayerSpec], skipped: Sequence[SkippedModule]) -> None:
    """Refuse a network without quantizable layers, and one that is a layer without a name."""
    if not layers:
        seen = "".join(f"\n  {s.name} ({s.kind}): {s.reason}" for s in skipped[:8])
        raise NetworkError(
            "Nothing in the network can be quantized: a forward pass in evaluation mode must call "
            "a Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear layer with floating-point weights."
            + (f" Modules with weights that were passed over:{seen}" if seen else "")
        )
    for layer in layers.values():
        if not layer.name:
            raise NetworkError(
                f"The network is itself one {layer.kind} layer, which leaves it no name. "
                "Wrap it: nn.Sequential(layer)."
            )


def _quantized_layers(
    names: Mapping[nn.Module, list[str]], tallies: Mapping[nn.Module, _Tally], n: int
) -> dict[nn.Module, LayerSpec]:
    """Return the called layers that can be quantized; of several with one weight, the first."""
    layers: dict[nn.Module, LayerSpec] = {}
    weights: set[int] = set()
    for module, tally in tallies.items():
        fit = tally.n_inputs and tally.n_calls and module in names and not _unfit(module)
        key = id(getattr(module, "weight", module))
        if fit and key not in weights:
            weights.add(key)
            layers[module] = _spec(module, names[module], tally, n)
    return layers


def _skipped_modules(
    network: nn.Module,
    names: Mapping[nn.Module, list[str]],
    tallies: Mapping[nn.Module, _Tally],
    layers: Mapping[nn.Module, LayerSpec],
    n: int,
) -> list[SkippedModule]:
    """Return the modules with weights of their own that are not quantized."""
    owners = {id(m.weight): x.name for m, x in layers.items() if not x.is_product}
    computed = tuple(f"{name}.parametrizations" for m in names if _computed(m) for name in names[m])
    skipped: list[SkippedModule] = []
    for module, (name, *_) in names.items():
        if module in layers or name.startswith(computed):
            continue
        reason = _reason(network, module, name, tallies.get(module), n)
        if reason:
            owner = next(filter(None, (owners.get(id(p)) for p in _own(module).values())), None)
            if owner is not None:
                reason = f"shares its weight with {owner!r} and is quantized there only; {reason}"
            skipped.append(SkippedModule(name or "(network)", type(module).__name__, reason))
    kinds = [type(module).__name__ for module in tallies if module not in names]
    return skipped + [SkippedModule("(unregistered)", kind, _UNREGISTERED) for kind in kinds]


_UNREGISTERED = (
    "called, but not registered in the network, so its weights are in no state dict; "
    "keep layers in attributes or nn.ModuleList"
)


def _count(
    network: nn.Module,
    given: Sequence[tuple[Inputs, int]],
    see: Callable[[int, Any], None],
    *,
    check_batch: bool,
) -> tuple[_Counter, Recorder]:
    """Run the network on each batch, and return the counts of each layer that has any.

    The first batch's pass is recorded.
    """
    counter, record = _Counter(network), None
    first_of: dict[Any, dict[nn.Module, int]] = {}  # MACs of the first batch of each shape
    device = device_of(network)
    handles: list[Any] = []
    with preserve_network(network), torch.no_grad():
        network.eval()
        try:
            # Hooks on all modules touch none of them, and come before the user's own hooks, which
            # may replace the output.
            handles.append(register_module_forward_pre_hook(counter.enter))
            handles.append(register_module_forward_hook(counter.leave, with_kwargs=True))
            for index, (inputs, n) in enumerate(given):
                # A copy: networks may write into their input.
                example = map_tensors(inputs, lambda x: x.detach().to(device, copy=True))
                shapes = [tuple(t.shape) for t in tensors(example)]
                before = {module: tally.macs for module, tally in counter.tallies.items()}
                with _explained(shapes, index if len(given) > 1 else None), counter:
                    counter.begin(example)
                    if record is None:
                        record = Recorder(network, example, n)
                        outputs = record.run(network, example)
                    else:
                        outputs = forward(network, example)
                see(index, outputs)
                now = {m: t.macs - before.get(m, 0) for m, t in counter.tallies.items()}
                expected = first_of.setdefault((n, *shapes), now)
                for module in now:
                    counter.tallies[module].compare(now[module], expected.get(module, 0))
                if check_batch:
                    counter.check_batch(example)
        finally:
            for handle in handles:
                handle.remove()
    assert record is not None, "there is a batch"
    return counter, record


@contextmanager
def _explained(shapes: Sequence[tuple[int, ...]], batch: int | None) -> Iterator[None]:
    """Say of an error of the network's what it was called with."""
    try:
        yield
    except HqOptunaError:
        raise
    except Exception as error:
        what = "the example input" if batch is None else f"batch {batch} of the calibration data"
        given = ", ".join(str(shape) for shape in shapes) or "no tensor"
        raise NetworkError(
            f"The network does not run on {what} ({given}): {type(error).__name__}: "
            f"{error} Check the shape (samples along the first dimension), the number type and "
            "the number of arguments."
        ) from error


class _Counter(WatchedWeights):  # type: ignore[no-untyped-call]
    """Counts what the layers of a network do while it runs; see `_Tally`."""

    def __init__(self, network: nn.Module) -> None:
        self.tallies: dict[nn.Module, _Tally] = {}
        self._layers = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, QUANTIZABLE) and not _computed(module)
        }
        weights: dict[str, Tensor] = {name: m.weight for name, m in self._layers.items()}  # type: ignore[misc]
        self.elements = Counter[str]()
        super().__init__(weights, self._use, self._use_other, self._use_elements)
        self.others: Counter[tuple[nn.Module | None, str]] = Counter()
        self._aside: Counter[tuple[nn.Module | None, str]] = Counter()  # within a layer's own call
        self._within: list[nn.Module] = []
        self._running: list[tuple[nn.Module, int]] = []  # layers, and the MACs of each before
        self._calls = Counter[nn.Module]()
        self.readers = _Readers(network)
        self._first: Tensor | None = None
        self._alone: list[nn.Module] = []  # took the example itself for a single sample

    def begin(self, example: Inputs) -> None:
        """Prepare for a forward pass."""
        self._first = next(tensors(_arguments(example)), None)
        self._running.clear()
        self._within.clear()
        self._aside.clear()
        self._calls.clear()
        self.readers.forget()

    def enter(self, module: nn.Module, args: Any) -> None:
        self._within.append(module)
        if isinstance(module, _LAYERS):
            self._running.append((module, self._tally(module).macs))

    def _tally(self, module: nn.Module) -> _Tally:
        return self.tallies.setdefault(module, _Tally())

    def _use(self, name: str, use: WeightUse) -> None:
        for module, _ in reversed(self._running):  # it, or one that shares its weight
            if getattr(module, "weight", None) is self._layers[name].weight:
                self._tally(module).add_macs(use.macs)
                return
        self._tally(self._layers[name]).add_macs(use.macs, outside=True)

    def _use_other(self, operator: str, macs: int) -> None:
        module = self._within[-1] if self._within else None
        if isinstance(module, Product):
            self._tally(module).add_macs(macs)
            return
        held = self._aside if self._running and module is self._running[-1][0] else self.others
        held[module, operator] += macs

    def _use_elements(self, what: str, elements: int) -> None:
        self.elements[what] += elements

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._within:
            self._within.pop()
        if not isinstance(module, _LAYERS):
            return
        _, before = self._running.pop() if self._running else (module, 0)
        taken, given = next(tensors((args, kwargs)), None), next(tensors(output), None)
        if taken is None or given is None:
            return
        tally = self._tally(module)
        self._calls[module] += 1
        if isinstance(module, Product):
            tally.add_call(self._calls[module], sum(x.numel() for x in tensors((args, kwargs))))
            return
        self.readers.see(module, taken)
        tally.add_call(self._calls[module], taken.numel())
        if tally.macs == before:  # its weight took no part: another one is computed from it
            tally.add_macs(_macs_of_class(module, taken, given))
        else:
            self.others.update(self._aside)
        self._aside.clear()
        n_batched = 2 if isinstance(module, nn.Linear) else len(module.kernel_size) + 2  # type: ignore[arg-type]
        first = self._first
        if first is not None and taken.shape == first.shape and taken.dim() < n_batched:
            self._alone.append(module)

    def check_batch(self, example: Inputs) -> None:
        """Refuse an example that is a single sample; a list holds such on purpose."""
        if self._alone and self._first is not None and not isinstance(_arguments(example)[0], list):
            raise NetworkError(
                f"The example input {tuple(self._first.shape)} has no batch dimension: a "
                f"{type(self._alone[0]).__name__} took it for a single sample. Give example[None]."
            )


_LAYERS = (*QUANTIZABLE, Product)

MOST_READERS = 3
"""Layers that share an input's bits: the exact search enumerates all bits of those together."""


class _Readers:
    """Finds linear layers of one module that read the very same tensor in every call."""

    def __init__(self, network: nn.Module) -> None:
        self._parent: dict[nn.Module, str] = {
            module: name.rpartition(".")[0]
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear)
        }
        self._last: dict[str, tuple[tuple[Any, ...], Tensor, nn.Module]] = {}
        self._calls = Counter[nn.Module]()
        self._joined = Counter[tuple[nn.Module, nn.Module]]()

    def forget(self) -> None:
        """Prepare for a forward pass."""
        self._last.clear()

    def see(self, module: nn.Module, x: Tensor) -> None:
        """Take in what a layer was called with."""
        parent = self._parent.get(module)
        if parent is None or x.layout is not torch.strided or x.is_meta:
            return
        self._calls[module] += 1
        version = 0 if x.is_inference() else x._version
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, version)
        before = self._last.get(parent)
        if before is not None and before[0] == key:
            self._joined[before[2], module] += 1
        else:  # the tensor is held, so that no other comes to lie in its place
            self._last[parent] = key, x, module

    def told(self, layers: dict[nn.Module, LayerSpec]) -> dict[nn.Module, LayerSpec]:
        """Return the layers with whose input theirs is."""
        groups: dict[nn.Module, list[nn.Module]] = {}
        for (first, module), n in self._joined.items():
            always = self._calls[first] == self._calls[module] == n
            if always and first in layers and module in layers:
                groups.setdefault(first, []).append(module)
        first_of = {
            module: layers[first].name
            for first, others in groups.items()
            for module in others
            if len(others) < MOST_READERS
        }
        return {m: replace(x, input_of=first_of.get(m, "")) for m, x in layers.items()}


def _macs_of_class(module: Any, taken: Tensor, given: Tensor) -> int:
    """Return the multiply-accumulates of a call as its class computes."""
    # All axes of the weight but that of the channels that are not multiplied with.
    each: int = math.prod(module.weight.shape[1:])
    return each * (taken if isinstance(module, TRANSPOSED) else given).numel()


def _spec(module: nn.Module, names: list[str], tally: _Tally, n: int) -> LayerSpec:
    weight: Any = getattr(module, "weight", None)  # a product has none
    return LayerSpec(
        name=names[0],
        kind=type(module).__name__,
        weight_shape=() if weight is None else tuple(weight.shape),
        channel_axis=1 if isinstance(module, TRANSPOSED) else 0,
        macs=-(-tally.macs // n),
        n_calls=tally.n_calls,
        n_inputs=-(-tally.n_inputs // n),
        aliases=tuple(names[1:]),
    )


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _computed(module: nn.Module) -> bool:
    """Say whether the weight of a quantizable module is computed from other parameters."""
    return isinstance(module, QUANTIZABLE) and "weight" not in _own(module)


def _unfit(module: nn.Module) -> str:
    """Return why the weight of a quantizable module cannot be quantized, or nothing."""
    if _computed(module):
        return (
            "its weight is computed from other parameters (weight_norm, spectral_norm, pruning); "
            "make it a parameter first, with torch.nn.utils.parametrize.remove_parametrizations, "
            "remove_weight_norm or prune.remove"
        )
    weight: Any = getattr(module, "weight", None)
    if weight is not None and not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    return ""


def _reason(network: nn.Module, module: nn.Module, name: str, tally: _Tally | None, n: int) -> str:
    """Return why a module is not quantized, or nothing where nobody would ask."""
    if not isinstance(module, QUANTIZABLE):
        return _reason_of_kind(module)
    if tally is not None and tally.n_calls:
        if not tally.n_inputs:
            return "no calibration sample reaches it (an expert or a branch), so nothing tells bits"
        return _unfit(module) or "stays in float; register one module under both names"
    if isinstance(network.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "MultiheadAttention uses its weight without calling the layer"
    if tally is not None and tally.macs:
        return (
            f"functions use its weight ({-(-tally.macs // n)} MACs a sample) without calling the "
            "layer, which would round what enters"
        )
    return (
        "never called on the calibration data in evaluation mode (a branch not taken, or code "
        "that uses its weight without calling the layer)"
    )


def _reason_of_kind(module: nn.Module) -> str:
    """Return why modules of this class are not quantized, where it holds weights."""
    if isinstance(module, OTHER_NORMS):
        return ""
    # Vectors shaped for broadcasting, such as a layer scale (C, 1, 1), are no filters.
    held = [
        f"{key} {tuple(p.shape)}"
        for key, p in _own(module).items()
        if p.dim() >= 2 and ("weight" in key or sum(size > 1 for size in p.shape) >= 2)
    ]
    if not held:
        return ""
    why = next(why for kind, why in UNSUPPORTED if isinstance(module, kind))
    return f"{why}; holds {', '.join(held[:3])}{', …' if len(held) > 3 else ''}"


def _arguments(example: Inputs) -> tuple[Any, ...]:
    """Return the arguments that `forward` calls the network with, keywords last."""
    if not isinstance(example, (tuple, list, Mapping)):
        return (example,)
    return tuple(example.values() if isinstance(example, Mapping) else example)


def _n_samples(example: Inputs) -> int:
    for argument in _arguments(example):
        for tensor in tensors(argument):
            if isinstance(argument, list):
                return len(argument)
            if tensor.dim():
                return len(tensor)
    raise NetworkError(
        "The example input holds no tensor with a batch dimension. Give a tensor, a tuple of "
        "positional arguments or a mapping of keyword arguments."
    )
