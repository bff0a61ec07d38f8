"""What every rise can do: say what moved outputs cost, and draw probes of that cost's Hessian."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Inputs, cloned, forward
from hq_optuna.network.containers import tensors

Sums = tuple[Any, ...]
"""What is summed over the float network's outputs: tensors in float64, or tuples of such."""


class Probe(NamedTuple):
    """A tensor made of the outputs, and random numbers u of its shape."""

    z: Tensor
    u: Tensor


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs of a tensor's shape, type and device; the same ones on all devices."""
    drawn = torch.randint(0, 2, like.shape, generator=generator, device="cpu")
    return (2 * drawn - 1).to(like)


class Rise(ABC):
    """The loss rise that outputs predict when they move from z to z + Δz.

    To second order that is ½ Δzᵀ H̄ Δz a sample, with H̄ the mean over samples of the Hessian in the
    outputs. A rise gives the left side (`of_samples`), and random u with E[u uᵀ] = H̄ (`draw`), so
    that the mean of ½ ⟨u, Δz⟩² is the right side. What it must know of all outputs first, such as
    their variance, is summed batch by batch (`sums`); `fitted` returns the rise that knows it.
    """

    can_draw = True
    """Whether `draw` is there, which the scorer ``hessian_trace`` needs."""

    reads_outputs = True
    """Whether what `run` returns is what the network returns."""

    def run(self, network: nn.Module, inputs: Inputs) -> Any:
        """Return what this rise reads of a forward pass: the network's outputs."""
        return forward(network, inputs)

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """Return what `with_sums` wants to know of a batch; sums of batches are added."""
        return ()

    def with_sums(self, sums: Sums) -> Rise:
        """Return the rise that knows the sums over all batches."""
        return self

    def fitted(self, outputs: Iterable[Any], data: Iterable[Batch] | None = None) -> Rise:
        """Return the rise that knows the float network's outputs on all batches.

        Without the batches all samples count alike, one a row of the first tensor.
        """
        total: Sums | None = None
        batches = iter(()) if data is None else iter(data)
        for z in outputs:
            batch = Batch((), None, len(first_float(z))) if data is None else next(batches)
            found = self.sums(z, batch)
            total = found if total is None else added(total, found)
        return self.with_sums(total or ())

    @abstractmethod
    def of_samples(self, outputs: Any, moved: Any, batch: Batch) -> Tensor:
        """Return the rise of each sample, ``(n,)`` in float64, from outputs that moved."""

    @abstractmethod
    def draw(self, outputs: Any, batch: Batch, generator: torch.Generator) -> list[Probe]:
        """Return tensors of the outputs with random u, whose covariance is H̄ for each sample."""

    def averaged(self) -> Rise:
        """Return the rise by H̄ itself, once fitted, and not by each sample's own Hessian.

        It tells assignments of equal cost apart with fewer samples.
        """
        return self

    def of_batch(self, outputs: Any, moved: Any, batch: Batch) -> float:
        """Return the rise summed over a batch's samples, each counted by the batch's share."""
        return batch.share * float(self.of_samples(outputs, moved, batch).sum())

    def __call__(self, outputs: Any, moved: Any) -> Tensor:
        """Return the rise summed over samples, which lie along axis 0 of the first tensor."""
        n = len(first_float(outputs))
        return self.of_samples(outputs, moved, Batch((), None, n)).sum()

    def projected(self, outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return ⟨u, z⟩ summed over the batch, for one random u: what is differentiated.

        Where u is 0 outputs may be −inf, the score of a masked class.
        """
        total = torch.zeros((), device="cpu")
        for z, u in self.draw(outputs, batch, generator):
            total = total.to(z.device) + (u * torch.where(u != 0, z, 0.0)).sum()
        return total


class Given(Rise):
    """A function of the user's: the rise summed over samples, from (outputs, moved)."""

    can_draw = False

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function

    def of_samples(self, outputs: Any, moved: Any, batch: Batch) -> Tensor:
        """Return one number: the function tells the sum alone."""
        found = torch.as_tensor(self.function(cloned(outputs), cloned(moved)))
        if found.numel() != 1:
            raise ValueError(f"expected one number, summed over samples; got {(*found.shape,)}")
        return found.detach().double().reshape(-1)

    def of_batch(self, outputs: Any, moved: Any, batch: Batch) -> float:
        """Return what the function returned, one number."""
        return float(self.of_samples(outputs, moved, batch))

    def draw(self, outputs: Any, batch: Batch, generator: torch.Generator) -> list[Probe]:
        """Raise `DataError`: nothing is known of the function's Hessian."""
        raise DataError(
            "A rise that is a function tells no Hessian, which 'hessian_trace' needs. Give one of "
            "hq_optuna.rises, or a class derived from hq_optuna.rises.Rise."
        )


def as_rise(given: Rise | Callable[[Any, Any], Any] | None) -> Rise | None:
    """Return a rise that was given as such, or as a function."""
    return given if given is None or isinstance(given, Rise) else Given(given)


def added(a: Sums, b: Sums) -> Sums:
    """Return the sums of two parts of the data together."""
    pairs = zip(a, b, strict=True)
    return tuple(added(x, y) if isinstance(x, tuple) else x + y for x, y in pairs)


def first_float(outputs: Any) -> Tensor:
    """Return the first tensor of floating-point numbers in the outputs."""
    for tensor in tensors(outputs):
        if tensor.is_floating_point():
            return tensor
    raise DataError("The network returns no tensor of floating-point numbers to compare.")


def only_tensor(outputs: Any) -> Tensor:
    """Return the one tensor of floating-point numbers in the outputs.

    Raises `DataError` where there are several: which one is meant?
    """
    if isinstance(outputs, Tensor):
        return outputs
    found = [tensor for tensor in tensors(outputs) if tensor.is_floating_point()]
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"The network returns {len(found)} tensors of floating-point numbers, and this rise reads "
        "one. Say which rise reads which: hq_optuna.rises.Heads({'name': rise, …}), by names of "
        "the outputs or places in a tuple."
    )


def rows_of(z: Tensor, n: int) -> int:
    """Return how many rows of outputs a sample has, such as its tokens.

    Raises `DataError` where rows cannot be told from samples.
    """
    if not z.dim() or n < 1 or len(z) % n:
        raise DataError(
            f"An output of shape {tuple(z.shape)} does not have its {n} samples along axis 0. "
            "Return tensors with samples first."
        )
    return len(z) // n


def root_of_mean(weights: Tensor, n: int) -> Tensor:
    """Return √(weight of each place over the number of places of a sample), ``(places,)``."""
    return (weights.clamp_min(0) / max(len(weights) // n, 1)).sqrt()
