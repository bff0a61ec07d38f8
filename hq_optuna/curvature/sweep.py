"""One backward sweep for weights and inputs together, on a frozen copy of the network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.curvature.estimate import Curvature, InputCurvature, MeanCurvatures
from hq_optuna.network.batches import Batch, forward
from hq_optuna.network.copies import copied
from hq_optuna.quantization.observers import first_input, with_first_input
from hq_optuna.space.layers import LayerSpec


@contextmanager
def differentiable(
    network: nn.Module, layers: Sequence[LayerSpec], on_input: Callable[[str, Tensor], None]
) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Yield a copy in eval mode, and the weights of its layers; all else is frozen.

    ``on_input(layer, x)`` is called whenever a layer is. ``x`` takes gradient and goes into this
    layer alone, so its gradient is not that of a shortcut or of another layer that reads the same
    tensor.
    """
    net = copied(network)
    layers = [layer for layer in layers if not layer.is_product]  # which have no weight
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    weights: dict[str, Tensor] = {}
    for layer in layers:  # a weight that others share is rounded in this layer alone
        own = nn.Parameter(net.get_parameter(f"{layer.name}.weight").detach().clone())
        net.get_submodule(layer.name).register_parameter("weight", own)
        weights[layer.name] = own

    for layer in layers:

        def hook(
            _module: nn.Module, args: Any, kwargs: Any, name: str = layer.name
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = first_input(args, kwargs)
            # A copy also lets the network go on to change its own tensor in place.
            if x.requires_grad and torch.is_grad_enabled():
                x = x.clone()
            else:  # the network's own input, or behind something without gradient
                x = x.detach().clone().requires_grad_(True)
            on_input(name, x)
            return with_first_input(args, kwargs, x)

        net.get_submodule(layer.name).register_forward_pre_hook(hook, with_kwargs=True)
    recurrent = any(isinstance(module, nn.RNNBase) for module in net.modules())
    enabled = torch.backends.cudnn.enabled
    try:
        # cuDNN's recurrent layers have no gradient in eval mode.
        torch.backends.cudnn.enabled = enabled and not recurrent
        yield net, weights
    finally:
        torch.backends.cudnn.enabled = enabled


@dataclass(eq=False)
class Call:
    """A call of a layer in a forward pass: its place among the layer's calls, and its gradient."""

    layer: str
    place: int
    shape: torch.Size
    trace: tuple[float, float] | None  # of an input that may come again, in the backward pass
    reached: bool

    def reach(self) -> None:
        """Say that a gradient came."""
        self.reached = True

    def repeated(self) -> Call:
        """Return the call, which is not taken for a repeated one again."""
        self.trace = None
        return self


class Calls:
    """The calls of layers in one forward pass, and those that its backward pass repeats.

    Checkpointing and functions with a backward pass of their own call layers without gradients, and
    once more while they go back. What is told of such a call belongs to the one that it repeats,
    which is known by its input.
    """

    def __init__(self) -> None:
        self.forward: list[Call] = []
        self._numbers = Counter[str]()
        self._going_back = False

    def add(self, layer: str, x: Tensor) -> Call | None:
        """Return the call that this is, or repeats; ``None`` for one that repeats nothing."""
        if self._going_back:
            return self._repeated(layer, x)
        trace = None if torch.is_grad_enabled() else _trace(x)
        call = Call(layer, self._numbers[layer], x.shape, trace, reached=x.numel() == 0)
        self._numbers[layer] += 1
        self.forward.append(call)
        return call

    def _repeated(self, layer: str, x: Tensor) -> Call | None:
        now, found, nearest = _trace(x), None, TRACE_TOLERANCE
        for call in reversed(self.forward):
            if call.layer == layer and call.shape == x.shape and call.trace is not None:
                scale = max(abs(now[1]), abs(call.trace[1]), 1e-300)
                off = max(abs(now[1] - call.trace[1]), (now[0] - call.trace[0]) ** 2 / x.numel())
                if off < nearest * scale:
                    found, nearest = call, off / scale
        return None if found is None else found.repeated()

    def unreached(self) -> dict[str, frozenset[str]]:
        """Return the layers of which a call got no gradient → the layers called before it."""
        names = [call.layer for call in self.forward]
        return {
            call.layer: frozenset(names[:place])
            for place, call in enumerate(self.forward)
            if not call.reached
        }

    @contextmanager
    def going_back(self) -> Iterator[None]:
        """Take calls in the body for repeated ones."""
        self._going_back = True
        try:
            yield
        finally:
            self._going_back = False


TRACE_TOLERANCE = 1e-6
"""How far two sums over an input and over its repetition may differ, relative to its squares."""


def _trace(x: Tensor) -> tuple[float, float]:
    values = x.detach().double()
    return float(values.sum()), float(values.square().sum())


class SquaredGradients:
    """Gathers squared gradients of inputs and weights from one backward pass a batch."""

    def __init__(self, layers: Sequence[LayerSpec]) -> None:
        self.inputs: dict[str, list[InputCurvature]] = {layer.name: [] for layer in layers}
        self.means = MeanCurvatures()
        self._calls = Calls()
        self._unreached: dict[str, frozenset[str]] = {}
        self._seen: dict[str, float] = {}
        self._n = 0

    def run(
        self,
        network: nn.Module,
        weights: dict[str, Tensor],
        batch: Batch,
        objective: Callable[[Any, Batch], Tensor],
    ) -> None:
        """Differentiate a batch's objective; leave the gradients in ``weights``."""
        self._n = batch.n
        self._calls = Calls()
        self._seen = dict.fromkeys(self.inputs, 0.0)
        network.zero_grad(set_to_none=True)
        try:
            with torch.enable_grad():
                loss = objective(forward(network, batch.inputs), batch)
                if loss.requires_grad:
                    with self._calls.going_back():
                        loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            # Written over in place what the way back needs, or an operator that has no way back.
            if not re.search("in-?place|derivative|not implemented", str(error)):
                raise
            network.zero_grad(set_to_none=True)
            for call in self._calls.forward:
                call.reached = False
        for layer, before in self._calls.unreached().items():
            self._unreached[layer] = self._unreached.get(layer, frozenset()) | before
        row = {}
        for name, weight in weights.items():
            g = weight.grad
            mean = 0.0 if g is None else self._n * float(g.double().square().mean())
            row[name] = (mean, self._seen[name])
        self.means.add(row)

    def see(self, name: str, x: Tensor) -> None:
        """Square the gradient of a layer's input when it comes."""
        call = self._calls.add(name, x)
        if call is None:
            return
        while len(self.inputs[name]) <= call.place:
            self.inputs[name].append(InputCurvature())
        entry = self.inputs[name][call.place]

        def square(gradient: Tensor) -> None:
            call.reached = True
            # The loss is a batch mean, so a sample's own gradient is n times as large.
            self._seen[name] += entry.add(gradient * self._n, self._n)

        x.register_hook(square)  # type: ignore[no-untyped-call]

    def curvature(self, weights: dict[str, Tensor], batch_size: int, n_samples: int) -> Curvature:
        """Return what was gathered, with the weights' curvature."""
        return Curvature(
            weights=weights,
            inputs=self.inputs,
            batch_size=batch_size,
            n_samples=n_samples,
            no_gradient=tuple(name for name, h in weights.items() if not bool(h.any())),
            unreached=self._unreached,
            errors=self.means.errors(),
        )
