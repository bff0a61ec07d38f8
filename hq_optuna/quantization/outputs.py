"""Output quantizers: they round what no layer rounds at its input, so that all runs in integers.

A layer rounds its own input. What it returns stays in float where an addition, a pool or the user
reads it, and a runtime then computes the layer in float. An output quantizer stands

- behind a layer, with the batch-norm and the clipping that a runtime fuses into it,
- behind an addition, a product or a concatenation of two activations, and behind a pool,
- behind an activation function whose result such a join reads,

unless one layer alone reads the result: that layer's input quantizer is the rounding then. Places
are found by recording one forward pass, and are found again by counting calls (`Counting`).

In float (32 bits for all layers) a network does not round its outputs either.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hq_optuna.errors import NetworkError
from hq_optuna.network.batches import Batches, Inputs, forward
from hq_optuna.network.containers import tensors
from hq_optuna.quantization.calls import (
    CLIPS,
    COUNTED,
    JOINS,
    MAX_POOLS,
    NORMS,
    POOLS,
    Counting,
    counted_kind,
    uncounted,
)
from hq_optuna.quantization.modules import InputFakeQuantize
from hq_optuna.quantization.observers import Histograms, first_input
from hq_optuna.quantization.ranges import AffineRange
from hq_optuna.settings import Observer
from hq_optuna.space.layers import FLOAT_BITS

LAYER = "layer"
_FOLLOWED = (*NORMS, *CLIPS, *MAX_POOLS)
"""What is fused into the layer before it, or passes its integers on."""
_PASSING = (
    *MAX_POOLS,
    *("flatten", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "contiguous"),
    *("getitem", "dropout", "get", "movedim", "unflatten", "expand", "detach"),
)
"""What only moves integers."""


class Place(NamedTuple):
    """Where an output is rounded.

    Attributes:
        kind: Name of the function that returns it; ``"layer"``: the layer that the quantizer is a
            child of, whose output is rounded after all that corrects it.
        call: Which call of that function, or layer, in a forward pass, from 0.
        name: Name of the quantizer, a child of the layer called last.
    """

    kind: str
    call: int
    name: str


class RoundsOutputs(nn.Module):
    """A network whose forward pass rounds outputs; its class comes before the network's own.

    Attributes:
        output_bits: What outputs are rounded to.
        output_places: Where.
        output_calls: Calls of each kind in a forward pass.
        outputs_always: Whether they are rounded, or not, whatever bits layers have; ``None``: they
            are unless all layers are in float.
    """

    output_bits: int
    output_places: tuple[Place, ...]
    output_calls: Mapping[str, int]
    outputs_always: bool | None


def _with_rounding(own: type[nn.Module]) -> type[nn.Module]:
    def rounding(self: Any, *args: Any, **kwargs: Any) -> Any:
        quantizers = {p: self.get_submodule(p.name) for p in self.output_places}
        at = {p: q for p, q in quantizers.items() if q.bits != FLOAT_BITS}
        if not at:
            return own.forward(self, *args, **kwargs)
        with _replacing(self, at) as counting:
            found = own.forward(self, *args, **kwargs)
        counting.check(self.output_calls)
        return found

    functools.update_wrapper(rounding, own.forward)
    return type(own.__name__, (RoundsOutputs, own), {"forward": rounding})


@contextmanager
def _replacing(
    network: nn.Module, at: Mapping[Place, Callable[[Tensor], Tensor]]
) -> Iterator[Counting]:
    """Replace what is returned at these places in the body's forward pass of this thread."""
    counting = Counting({(p.kind, p.call): f for p, f in at.items() if p.kind != LAYER})
    calls = Counter[str]()
    by_layer: dict[str, dict[int, Callable[[Tensor], Tensor]]] = {}
    for place, function in at.items():
        if place.kind == LAYER:
            by_layer.setdefault(place.name.rpartition(".")[0], {})[place.call] = function
    with ExitStack() as stack:
        for name, functions in by_layer.items():

            def hook(
                m: nn.Module, args: Any, output: Any, name: str = name, functions: Any = functions
            ) -> Any:
                if not counting.is_running():  # of another thread
                    return None
                calls[name] += 1
                function = functions.get(calls[name] - 1)
                with uncounted():
                    return None if function is None else function(output)

            # Registered last, so that it comes after what shifts the output.
            stack.callback(network.get_submodule(name).register_forward_hook(hook).remove)
        yield stack.enter_context(counting)


def add_output_quantizers_(
    prepared: nn.Module,
    layers: Sequence[str],
    data: Batches,
    bits: int,
    observer: Observer = "squared_error",
) -> None:
    """Give a prepared network in float its output quantizers, with ranges of what ``data`` show.

    Raises:
        NetworkError: Nothing would be rounded, or the network branches on its data.
        DataError: An output is NaN or infinite.
    """
    places, calls = find_places(prepared, layers, data[0].inputs)
    histograms = Histograms([place.name for place in places])

    def seen(name: str, x: Tensor) -> Tensor:
        histograms.see(name, x)
        return x

    at = {place: functools.partial(seen, place.name) for place in places}
    with torch.no_grad():
        for batch in data:
            with _replacing(prepared, at) as counting:
                forward(prepared, batch.inputs)
            counting.check(calls)
    first: Any = prepared.get_submodule(layers[0])
    grid = first.input_fake_quantize.grid  # what the target takes
    ranges = {name: h.range(bits, observer, grid) for name, h in histograms.found().items()}
    put_output_quantizers_(prepared, places, calls, bits, ranges)


def put_output_quantizers_(
    prepared: nn.Module,
    places: Sequence[Place],
    calls: Mapping[str, int],
    bits: int,
    ranges: Mapping[str, AffineRange],
) -> None:
    """Give a prepared network output quantizers of known ranges, by their names."""
    if "forward" in vars(prepared):
        raise NetworkError(
            "The network has a function in the place of its class's forward, so its outputs cannot "
            "be rounded. Make it a method of a class, or search without output_bits."
        )
    for place in places:
        owner, _, name = place.name.rpartition(".")
        quantizer = InputFakeQuantize(None, ranges={bits: ranges[place.name]})
        prepared.get_submodule(owner).add_module(name, quantizer)
    module: Any = prepared
    module.__class__ = _with_rounding(type(prepared))
    module.output_bits, module.outputs_always = bits, None
    module.output_places, module.output_calls = tuple(places), dict(calls)


def output_quantizers(network: nn.Module) -> dict[str, Any]:
    """Return a network's output quantizers by name, in the order of its forward pass."""
    if not isinstance(network, RoundsOutputs):
        return {}
    return {p.name: network.get_submodule(p.name) for p in network.output_places}


def set_outputs(network: nn.Module, *, rounded: bool) -> None:
    """Round outputs, or leave them in float; `set_bits` does so as layers have bits or none."""
    assert isinstance(network, RoundsOutputs)
    always = network.outputs_always
    bits = network.output_bits if (rounded if always is None else always) else FLOAT_BITS
    for module in output_quantizers(network).values():
        module.bits = bits


@contextmanager
def outputs_always(module: nn.Module, rounded: bool) -> Iterator[None]:
    """Round a network's outputs in the body, or leave them, whatever bits layers get there."""
    if not isinstance(module, RoundsOutputs):
        yield
        return
    module.outputs_always = rounded
    try:
        yield
    finally:
        module.outputs_always = None


@dataclass
class _Call:
    """A call of the recorded pass, or an input of the network (kind ``""``).

    Attributes:
        kind: Name of its function.
        number: Which call of that kind.
        sources: Calls whose results it reads, one entry for each argument.
        owner: The layer that was called last.
        inside: Whether that layer made the call itself.
        of_layer: If its result is what a layer returns, which call of that layer.
        readers: What reads its result: calls, names of layers that round it, ``None`` for the user.
    """

    kind: str
    number: int
    sources: list[_Call]
    owner: str
    inside: bool
    readers: list[_Call | str | None] = field(default_factory=list)
    of_layer: int | None = None

    def is_returned(self, n: int) -> None:
        """Note that the result is what a layer returns from its n-th call."""
        self.of_layer = n

    @property
    def can_be_rounded(self) -> bool:
        """Whether the call can be found again in another pass."""
        return self.of_layer is not None or (self.kind in COUNTED and not self.inside)


class _Recording(Counting):
    """Records which call reads the result of which."""

    def __init__(self) -> None:
        super().__init__({})
        self.calls: list[_Call] = []
        self.layer, self.owner = "", ""
        self._layer_calls = Counter[str]()
        self._made: dict[int, _Call] = {}  # by the tensor's id, which names it while it lives
        self._alive: list[Any] = []

    def maker(self, tensor: Tensor) -> _Call | None:
        """Return the call that made a tensor."""
        return self._made.get(id(tensor))

    def make(self, kind: str, number: int, sources: list[_Call], made: list[Tensor]) -> None:
        """Note a call and what it returned."""
        call = _Call(kind, number, sources, self.owner, bool(self.layer))
        self.calls.append(call)
        if not self.layer:
            for source in {id(s): s for s in sources}.values():
                source.readers.append(call)
        self._alive.append(made)
        for tensor in made:
            self._made[id(tensor)] = call

    def called(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Any:
        """Note what a call reads and returns."""
        kind = counted_kind(function)
        read = [call for t in tensors((args, kwargs)) if (call := self.maker(t)) is not None]
        if isinstance(result, Tensor) and result.is_floating_point() and kind in COUNTED:
            self.counts[kind] += 1
        if read and (made := list(tensors(result))):
            self.make(kind, self.counts[kind] - 1, read, made)
        return result

    def enter(self, name: str, x: Tensor) -> None:
        """Note that a layer reads a tensor, which it rounds."""
        call = self.maker(x)
        if call is not None:
            call.readers.append(name)
        self.layer = self.owner = name

    def leave(self, output: Any) -> None:
        """Note that a layer is done."""
        call = self.maker(output) if isinstance(output, Tensor) else None
        if call is not None:
            call.is_returned(self._layer_calls[self.layer])
        self._layer_calls[self.layer] += 1
        self.layer = ""


@torch.no_grad()
def find_places(
    prepared: nn.Module, layers: Sequence[str], inputs: Inputs
) -> tuple[tuple[Place, ...], dict[str, int]]:
    """Return where a network's outputs are rounded, and its calls of each kind.

    Raises:
        NetworkError: There is no such place.
    """
    recording = _Recording()
    with ExitStack() as stack:
        for name in layers:
            module = prepared.get_submodule(name)

            def enter(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                with uncounted():
                    recording.enter(name, first_input(args, kwargs))

            def leave(m: nn.Module, args: Any, output: Any) -> None:
                with uncounted():
                    recording.leave(output)

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        for tensor in tensors(inputs):
            recording.make("", 0, [], [tensor])
        with recording:
            outputs = forward(prepared, inputs)
    for tensor in tensors(outputs):
        call = recording.maker(tensor)
        if call is not None:
            call.readers.append(None)
    chosen = _chosen(recording.calls)
    if not chosen:
        raise NetworkError(
            "output_bits: every output in the network is read by one layer alone, which rounds it, "
            "or by nothing that can be rounded. Search without output_bits."
        )
    numbers, places = Counter[str](), list[Place]()
    for call in chosen:
        owner = call.owner or layers[0]
        numbers[owner] += 1
        kind, n = (call.kind, call.number) if call.of_layer is None else (LAYER, call.of_layer)
        places.append(Place(kind, n, f"{owner}.output_{numbers[owner]}"))
    return tuple(places), dict(recording.counts)


def _chosen(calls: Sequence[_Call]) -> list[_Call]:
    """Return the calls whose results are rounded, in their order."""
    chosen = set[int]()
    outside = [c for c in calls if not c.inside]
    joins = [c for c in outside if c.kind in JOINS and len(c.sources) > 1]
    starts = [c for c in calls if c.of_layer is not None]
    starts += [c for c in outside if c.kind in (*POOLS, *MAX_POOLS)]
    for call in (*starts, *joins):
        last = _last_followed(call)
        if last.can_be_rounded and last.readers and not _is_for_one_layer(last):
            chosen.add(id(last))
    for join in joins:
        for source in join.sources:
            while source.kind in _PASSING and not source.can_be_rounded and source.sources:
                source = source.sources[0]
            if source.can_be_rounded:
                chosen.add(id(source))
    return [call for call in calls if id(call) in chosen]


def _last_followed(call: _Call) -> _Call:
    """Return the last call of those that are fused into one, each the only reader of the other."""
    while len(call.readers) == 1:
        (reader,) = call.readers
        fused = isinstance(reader, _Call) and reader.kind in _FOLLOWED
        if not fused or reader.sources[0] is not call:  # type: ignore[union-attr]
            break
        assert isinstance(reader, _Call)
        call = reader
    return call


def _is_for_one_layer(call: _Call) -> bool:
    """Say whether one layer alone reads a result, and so rounds it."""
    while len(call.readers) == 1:
        (reader,) = call.readers
        if isinstance(reader, str):
            return True
        if reader is None or reader.kind not in _PASSING:
            return False
        call = reader
    return False
