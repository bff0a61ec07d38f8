"""A deployed network as a graph: traced by `torch.export`, for batches of any size."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hq_optuna.errors import ExportError
from hq_optuna.network.batches import Batch, Batches, Inputs, arguments
from hq_optuna.network.containers import map_tensors, tensors
from hq_optuna.network.modes import own_modes, without_fused_attention

_FEW = 2
"""Samples that are traced: `torch.export` takes a size of 1 for a constant."""


def sample_axis(batch: Batch) -> int:
    """Return the axis of a batch's input tensors along which its samples lie.

    Raises:
        ExportError: There is none that all tensors have in common.
    """
    for axis in (0, 1):
        if all(x.dim() > axis and x.shape[axis] == batch.n for x in tensors(batch.inputs)):
            return axis
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors(batch.inputs))
    raise ExportError(
        f"A file takes tensors with samples along their first axis (or all along their second); a "
        f"batch of {batch.n} samples holds {shapes}. Wrap the network in a module that takes such "
        "tensors."
    )


def take(inputs: Inputs, axis: int, start: int, n: int) -> Inputs:
    """Return ``n`` samples from ``start`` on, going round where there are fewer."""

    def rows(x: Tensor) -> Tensor:
        return x.index_select(axis, torch.arange(start, start + n) % x.shape[axis])

    return map_tensors(inputs, rows)


def rows(data: Batches, samples: int, n: int = 32) -> Iterator[tuple[Inputs, int]]:
    """Yield inputs of up to ``n`` samples each, with how many they are, until there are enough."""
    for batch in data:
        axis = sample_axis(batch)
        for start in range(0, batch.n, n):
            size = min(n, batch.n - start, samples)
            if size < 1:
                return
            yield take(batch.inputs, axis, start, size), size
            samples -= size


def bound(
    network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Return a network's arguments by name, in the order of its signature."""
    return inspect.signature(network.forward).bind(*args, **kwargs)


def _varying(network: nn.Module, data: Sequence[Batch]) -> list[list[int]]:
    """Return the axes along which batches differ, of each tensor among a network's arguments."""
    called = (bound(network, *arguments(network, batch.inputs)).arguments for batch in data)
    shapes = [[x.shape for x in tensors(given)] for given in called]
    return [
        [axis for axis in range(len(of[0])) if len({shape[axis] for shape in of}) > 1]
        for of in zip(*shapes, strict=True)
    ]


@own_modes()
def traced(network: nn.Module, data: Sequence[Batch], *, fixed: bool = False) -> ExportedProgram:
    """Return the graph of a deployed network, with the number of samples left open.

    So are sizes in which batches differ, such as the length of sentences. With ``fixed`` it is for
    one sample of the first batch's sizes.

    Raises:
        ExportError: What the network computes depends on values or on the number of samples, or
            its arguments are no tensors.
    """
    axis = sample_axis(data[0])
    args, kwargs = arguments(network, take(data[0].inputs, axis, 0, 1 if fixed else _FEW))
    size = Dim("batch", min=1)

    def dynamic(value: Any) -> Any:
        if isinstance(value, Tensor):
            others = dict.fromkeys(next(varying), Dim.DYNAMIC)
            return None if fixed else {**others, axis: size}
        if isinstance(value, (tuple, list)):
            return [dynamic(item) for item in value]
        if isinstance(value, dict):
            return {key: dynamic(item) for key, item in value.items()}
        return None

    try:
        given, varying = bound(network, args, kwargs), iter(_varying(network, data))
        shapes = {name: dynamic(value) for name, value in given.arguments.items()}
        with torch.no_grad(), without_fused_attention():
            return torch.export.export(network, given.args, given.kwargs, dynamic_shapes=shapes)
    except Exception as error:  # of the tracer, or of what it traces
        said = " ".join(str(error).split())
        raise ExportError(
            f"The network cannot be written as a graph: torch.export stops with "
            f"{type(error).__name__}: {said[:600]} A graph can't branch on values, count samples "
            "in Python numbers, or call what is not PyTorch. Rewrite that part of forward "
            "(torch.where, shapes from x.shape), or leave it out of the network and do it outside."
        ) from error
