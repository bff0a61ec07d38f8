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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from hq_optuna.curvature.estimate import TOLERANCE, Curvature, InputCurvature, MeanCurvatures
from hq_optuna.curvature.sweep import differentiable
from hq_optuna.errors import NetworkError
from hq_optuna.network.batches import Batches, forward
from hq_optuna.network.copies import graph_of
from hq_optuna.network.loss_weights import batch_loss
from hq_optuna.network.losses import LossFunction
from hq_optuna.rises.base import signs
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
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Curvature:
    """Return estimates of the Hessian's diagonal in weights and inputs.

    Their means over a layer are the estimates of its trace; single elements are noisy. The loss is
    twice differentiable. Stops at the relative standard error ``tolerance`` (0: never), or when
    each batch got ``most_sweeps`` probes. ``raw`` leaves means that are not above their standard
    error as they were measured. ``progress`` is called with (probes done, most probes); the last
    call may come early.

    Raises:
        NetworkError: The network or the loss has no second derivative.
    """
    if most_sweeps < 1:
        raise ValueError(f"most_sweeps is at least 1; got {most_sweeps}.")
    seen: list[tuple[str, Tensor]] = []
    mixed = data.in_random_order()
    with differentiable(network, layers, lambda name, x: seen.append((name, x))) as (net, weights):
        probes = _Probes(weights, seed)
        most = most_sweeps * len(data)
        for index in range(most):
            batch = mixed[index % len(data)]
            seen.clear()
            # Fused attention has no second derivative.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                loss = batch_loss(loss_fn, forward(net, batch.inputs), batch)
                inputs = tuple(seen)  # activation checkpointing calls layers again, going back
                at = [*weights.values(), *(x for _, x in inputs)]
                first: Sequence[Tensor | None] = [None] * len(at)
                _check_twice_differentiable(loss)
                with _explained():
                    if loss.requires_grad:
                        first = torch.autograd.grad(loss, at, create_graph=True, allow_unused=True)
                    probes.add(batch.n, weights, inputs, first)
            settled = tolerance > 0 and probes.means.settled(tolerance)
            progress(most if settled else index + 1, most)
            if settled:
                break
    return probes.curvature(data, raw)


def _check_twice_differentiable(loss: Tensor) -> None:
    """Refuse functions with a backward pass in Python: whether it has a gradient cannot be told.

    Where it has none, as in reentrant checkpoints, second derivatives come out as zero unsaid.
    """
    nodes = graph_of(loss)
    own = next((node for node in nodes if isinstance(node, BackwardCFunction)), None)
    if own is not None:
        name = type(own).__name__.removesuffix("Backward")
        raise NetworkError(_ONCE + f"the backward pass of {name} may have no gradient. " + _REMEDY)


@contextmanager
def _explained() -> Iterator[None]:
    """Say of an error in a backward pass that second derivatives were asked for."""
    try:
        yield
    except RuntimeError as error:
        raise NetworkError(f"{_ONCE}{str(error).splitlines()[0]} {_REMEDY}") from error


_ONCE = "The scorer 'hutchinson' needs second derivatives of the network and the loss: "
_REMEDY = (
    "Give the network without it (torch.utils.checkpoint with use_reentrant=False, a function of "
    "PyTorch's in place of one of your own), or use scorer 'fisher' or 'diagonal', which need one "
    "gradient."
)


class _Probes:
    """What probes measured of each layer's weights and inputs."""

    def __init__(self, weights: Mapping[str, Tensor], seed: int) -> None:
        self.means = MeanCurvatures()
        self._generator = torch.Generator().manual_seed(seed)
        self._sums = {  # in half precision small terms would be lost
            name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
            for name, w in weights.items()
        }
        self._inputs: dict[str, list[InputCurvature]] = {name: [] for name in weights}
        self._has_gradient = dict.fromkeys(weights, False)
        self._unreached: dict[str, frozenset[str]] = {}
        self._n = 0

    def add(
        self,
        n: int,
        weights: Mapping[str, Tensor],
        inputs: Sequence[tuple[str, Tensor]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Probe a batch of n samples, given the gradients of its weights and then its inputs."""
        row = {}
        for (name, weight), g in zip(weights.items(), gradients, strict=False):
            diagonal = _probe(weight, g, self._generator)
            # At an exact minimum the gradient is 0 and the curvature is not.
            self._has_gradient[name] |= g is not None and bool(g.detach().any() or diagonal.any())
            self._sums[name] += diagonal * n
            row[name] = (float(diagonal.double().mean()), 0.0)
        calls = dict.fromkeys(weights, 0)
        for place, ((name, x), g) in enumerate(zip(inputs, gradients[len(weights) :], strict=True)):
            if g is None and x.numel():
                before = frozenset(layer for layer, _ in inputs[:place])
                self._unreached[name] = self._unreached.get(name, before) | before
            if len(self._inputs[name]) == calls[name]:
                self._inputs[name].append(InputCurvature())
            # The loss is a batch mean, so a sample's own Hessian is n times as large.
            values = _probe(x, g, self._generator).double() * n
            mean = self._inputs[name][calls[name]].add_curvature(values, n)
            row[name] = (row[name][0], row[name][1] + mean)
            calls[name] += 1
        self.means.add(row)
        self._n += n

    def curvature(self, data: Batches, raw: bool) -> Curvature:
        """Return the means over the probes; raw, or not below their standard errors."""
        diagonals = {name: total / self._n for name, total in self._sums.items()}
        for name, (w, inner) in ({} if raw else self.means.unsure()).items():
            if w is not None and self._has_gradient[name]:
                diagonals[name] = torch.full_like(diagonals[name], w)
            if inner is not None:
                calls = self._inputs[name]
                for entry in calls:
                    entry.total, entry.per_element = inner * entry.count / len(calls), None
        return Curvature(
            weights=diagonals,
            inputs=self._inputs,
            batch_size=data[0].n,
            n_samples=min(self._n, data.n_samples),
            no_gradient=tuple(name for name, any_ in self._has_gradient.items() if not any_),
            unreached=self._unreached,
            errors=self.means.errors(),
        )


def _probe(x: Tensor, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return v ⊙ Hv; a loss that is linear in ``x`` has no curvature there."""
    v = signs(x, generator)
    if gradient is None or not gradient.requires_grad:
        return torch.zeros_like(x)
    product = (gradient * v).sum()
    (found,) = torch.autograd.grad(product, x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if found is None else (v * found).detach()
