"""Hutchinson's estimator: the true Hessian's diagonal and trace from random signs.

With random signs v, E[v ⊙ Hv] is the diagonal of H and E[vᵀHv] its trace. Hv costs a backward pass
through a backward pass. For each batch the gradient is taken once, and each layer's weights and
inputs are probed one after the other: signs in all of them at once would cost one such pass instead
of two a layer, but what couples the layers, with mean 0, is so much noise that more than a hundred
times as many would be needed (ResNet-20). Batches are taken in order, over and over with new signs,
until no layer's standard error is above the tolerance or the limit of sweeps is reached.

The Hessian in a layer's inputs is that of the loss in small changes added to what this layer is
given, per sample: at the same point and in the same unit as the weights', so both add up.

A Hessian need not be positive. A layer whose mean curvature is not above its own standard error is
unknown at this number of probes, and gets that standard error, so that it is never ranked as free.

Sources: Hutchinson 1989; Pearlmutter 1994 (Hv); HAWQ-V2 (Dong et al., 2020), which measures one
layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hq_optuna.curvature.estimate import TOLERANCE, Curvature, InputCurvature, MeanCurvatures
from hq_optuna.curvature.sweep import check_differentiable, differentiable, signs
from hq_optuna.network.batches import Batches, forward
from hq_optuna.network.losses import LossFunction
from hq_optuna.space.layers import LayerSpec

MOST_SWEEPS = 8


def hutchinson(
    network: nn.Module,
    layers: Sequence[LayerSpec],
    data: Batches,
    loss_fn: LossFunction,
    *,
    tolerance: float = TOLERANCE,
    most_sweeps: int = MOST_SWEEPS,
    seed: int = 0,
    raw: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Curvature:
    """Return estimates of the Hessian's diagonal in weights and inputs.

    Their means over a layer are the estimates of its trace; single elements are noisy.

    Args:
        network: Left as it is; a copy is differentiated.
        layers: Layers to look at (`L`).
        data: Calibration batches on the network's device.
        loss_fn: Mean loss of a batch from outputs and labels; twice differentiable.
        tolerance: Relative standard error at which it stops (`MeanCurvatures`); 0 for never.
        most_sweeps: Probes that a batch gets at most.
        seed: Seed of the signs.
        raw: Leaves means that are not above their standard error as they were measured.
        progress: Called with (probes done, most probes); the last call may come early.

    Raises:
        ScoreError: The loss does not depend on the network through any gradient.
    """
    if most_sweeps < 1:
        raise ValueError(f"most_sweeps is at least 1; got {most_sweeps}.")
    generator = torch.Generator().manual_seed(seed)
    entries: dict[str, list[InputCurvature]] = {layer.name: [] for layer in layers}
    means, used, gradient = MeanCurvatures(), 0, dict.fromkeys(entries, False)
    seen: list[tuple[str, Tensor]] = []
    with differentiable(network, layers, lambda name, x: seen.append((name, x))) as (net, weights):
        sums = {  # in half precision small terms would be lost
            name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
            for name, w in weights.items()
        }
        for index in range(most_sweeps * len(data)):
            batch = data[index % len(data)]
            seen.clear()
            # Fused attention has no second derivative.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                loss = loss_fn(forward(net, batch.inputs), batch.labels)
                check_differentiable(loss)
                inputs = tuple(seen)  # activation checkpointing calls layers again, going back
                at = [*weights.values(), *(x for _, x in inputs)]
                first = torch.autograd.grad(loss, at, create_graph=True, allow_unused=True)
            row = {}
            for (name, weight), g in zip(weights.items(), first, strict=False):
                diagonal = _probe(weight, g, generator)
                # At an exact minimum the gradient is 0 and the curvature is not.
                gradient[name] |= g is not None and bool(g.detach().any() or diagonal.any())
                sums[name] += diagonal * batch.n
                row[name] = (float(diagonal.double().mean()), 0.0)
            calls = dict.fromkeys(entries, 0)
            for (name, x), g in zip(inputs, first[len(weights) :], strict=True):
                if len(entries[name]) == calls[name]:
                    entries[name].append(InputCurvature())
                # The loss is a batch mean, so a sample's own Hessian is n times as large.
                values = _probe(x, g, generator).double() * batch.n
                mean = entries[name][calls[name]].add_curvature(values, batch.n)
                row[name] = (row[name][0], row[name][1] + mean)
                calls[name] += 1
            means.add(row)
            used += batch.n
            settled = tolerance > 0 and means.settled(tolerance)
            if progress is not None:
                of = most_sweeps * len(data)
                progress(of if settled else index + 1, of)
            if settled:
                break
    diagonals = {name: total / used for name, total in sums.items()}
    for name, (w, inner) in ({} if raw else means.unsure()).items():
        if w is not None and gradient[name]:
            diagonals[name] = torch.full_like(diagonals[name], w)
        if inner is not None:
            for entry in entries[name]:
                entry.total, entry.per_element = inner * entry.count / len(entries[name]), None
    return Curvature(
        weights=diagonals,
        inputs=entries,
        batch_size=data[0].n,
        n_samples=min(used, data.n_samples),
        no_gradient=tuple(name for name, any_gradient in gradient.items() if not any_gradient),
        errors=means.errors(),
    )


def _probe(x: Tensor, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return v ⊙ Hv; a loss that is linear in ``x`` has no curvature there."""
    v = signs(x, generator)
    if gradient is None or not gradient.requires_grad:
        return torch.zeros_like(x)
    product = (gradient * v).sum()
    (found,) = torch.autograd.grad(product, x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if found is None else (v * found).detach()
