"""Calibration Adam: the Hessian's diagonal from Adam's second moment, without training.

Adam's second moment v̂ is a running mean of the squared gradient of the *mini-batch mean*. Near a
minimum the batch gradient is noise around zero, so v̂ ≈ F / B with F the diagonal of the empirical
Fisher matrix and B the batch size, and F approximates the Hessian's diagonal: h = B · v̂. The
optimizer runs with learning rate 0 on a frozen copy in eval mode, so nothing is trained.

The same backward passes give each layer's input curvature, the mean over samples of the squared
gradient (∂ℓᵢ/∂x)², through this layer alone: it is this layer's input that will be rounded, not
what a shortcut or a neighbour reads of the same tensor. Both are in units of the loss: ½ Σ h Δ² is
a loss rise.

Sources: Kingma & Ba 2015 (Adam, eqs. in Algorithm 1); patent CN112183742B; for inputs FIT
(Zandonati et al., 2022). Where a batch is smaller than the first one its gradient is scaled by
√(Bᵢ/B), so that its square has the same expectation F / B.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.batches import Batches, forward
from hq_optuna.errors import ScoreError
from hq_optuna.layers import LayerSpec
from hq_optuna.quantization.observers import first_input

LossFunction = Callable[[Any, Any], Tensor]
BETA2 = 0.999


@dataclass
class InputCurvature:
    """Squared gradients of one call's input, per sample.

    Attributes:
        total: Sum over samples and elements of (∂ℓᵢ/∂xᵢⱼ)².
        count: Number of terms in it.
        n_samples: Samples seen.
        per_element: Sum over samples for each element of a sample's input, shape ``(elements,)``,
            or ``None`` where inputs differ in size or have no axis of samples.
    """

    total: float = 0.0
    count: int = 0
    n_samples: int = 0
    per_element: Tensor | None = None

    @property
    def mean(self) -> float:
        """Mean squared gradient over samples and elements."""
        return self.total / max(self.count, 1)

    def add(self, gradient: Tensor, n: int) -> None:
        """Take in the per-sample gradients of one batch of ``n`` samples."""
        squared = gradient.detach().double().square_()
        first = self.count == 0
        self.total += float(squared.sum())
        self.count += squared.numel()
        self.n_samples += n
        rows = per_sample(squared, n)
        if rows is None or (not first and self.per_element is None):
            self.per_element = None
        elif first:
            self.per_element = rows.sum(0)
        elif self.per_element is not None and self.per_element.shape == rows.shape[1:]:
            self.per_element += rows.sum(0)
        else:
            self.per_element = None


def per_sample(x: Tensor, n: int) -> Tensor | None:
    """Return ``x`` as ``(n, elements)``, or ``None`` where its first axis is not of samples.

    A layer may see the samples' positions flattened into the first axis, as ``(n · T, D)``.
    """
    return x.reshape(n, -1) if x.dim() > 0 and x.shape[0] % n == 0 else None


@dataclass(frozen=True)
class Curvature:
    """Curvature of every layer.

    Attributes:
        weights: Layer → h, the weight's shape, loss per weight².
        inputs: Layer → one entry per call of a forward pass.
        batch_size: The factor B in h = B · v̂.
        n_samples: Samples seen (`N`).
        no_gradient: Layers whose weight got no gradient at all: their curvature is unknown.
    """

    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Sequence[InputCurvature]]
    batch_size: int
    n_samples: int
    no_gradient: tuple[str, ...]


def calibration_adam(
    network: nn.Module,
    layers: Sequence[LayerSpec],
    data: Batches,
    loss_fn: LossFunction,
    *,
    beta2: float = BETA2,
    progress: Callable[[int, int], None] | None = None,
) -> Curvature:
    """Return the curvature of the loss in weights and inputs, from one pass over the data.

    Args:
        network: Left as it is; a copy is differentiated.
        layers: Layers to look at (`L`).
        data: Calibration batches on the network's device.
        loss_fn: Mean loss of a batch from outputs and labels.
        beta2: Adam's second decay; its window 1 / (1 − β₂) should exceed the number of batches.
        progress: Called with (batches done, batches).

    Raises:
        ScoreError: The loss does not depend on the network through any gradient.
    """
    copied = copy.deepcopy(network).eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    weights = {layer.name: copied.get_parameter(f"{layer.name}.weight") for layer in layers}
    parameters = list(weights.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=0.0, betas=(0.0, beta2))
    inputs: dict[str, list[InputCurvature]] = {layer.name: [] for layer in layers}
    calls: dict[str, int] = {}
    n = 0

    def watch(
        name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_input(args, kwargs)
        call = calls[name] = calls.get(name, -1) + 1
        while len(inputs[name]) <= call:
            inputs[name].append(InputCurvature())
        entry, samples = inputs[name][call], n
        # A copy, so that the gradient is that of this layer alone and not of a shortcut or another
        # layer that reads the same tensor, and so that the network may go on to change its own.
        if x.requires_grad and torch.is_grad_enabled():
            x = x.clone()
        else:  # the network's own input, or behind something without gradient
            x = x.detach().clone().requires_grad_(True)

        def see(gradient: Tensor) -> None:
            # The loss is a batch mean, so a sample's own gradient is n times as large.
            entry.add(gradient * samples, samples)

        x.register_hook(see)  # type: ignore[no-untyped-call]
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})

    handles = []
    for layer in layers:

        def hook(
            _module: nn.Module, args: Any, kwargs: Any, name: str = layer.name
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            return watch(name, args, kwargs)

        module = copied.get_submodule(layer.name)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        for index, batch in enumerate(data):
            n = batch.n
            calls.clear()
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss = loss_fn(forward(copied, batch.inputs), batch.labels)
                if not loss.requires_grad:
                    raise ScoreError(
                        "The loss has no gradient: the network or the loss function detaches it "
                        "(torch.no_grad, detach, argmax?). Curvature needs a differentiable loss."
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad *= math.sqrt(n / data[0].n)
                else:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            if progress is not None:
                progress(index + 1, len(data))
    finally:
        for handle in handles:
            handle.remove()

    correction = 1 - beta2 ** len(data)  # Adam's bias correction
    moments = {
        name: optimizer.state[weight]["exp_avg_sq"] / correction * data[0].n
        for name, weight in weights.items()
    }
    return Curvature(
        weights=moments,
        inputs=inputs,
        batch_size=data[0].n,
        n_samples=data.n_samples,
        no_gradient=tuple(name for name, h in moments.items() if not bool(h.any())),
    )
