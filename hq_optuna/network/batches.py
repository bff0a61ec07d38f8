"""Calibration and validation data as a fixed list of batches.

Whatever the user hands in (tensors, a dataset, a loader) is read once into memory, in order, and
checked: the score of an assignment must be the same number every time it is asked for.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from hq_optuna.errors import DataError
from hq_optuna.settings import Precision

Inputs = Tensor | list[Any] | tuple[Any, ...] | Mapping[str, Any]
"""What a network is called with: one tensor, positional arguments, or keyword arguments."""


def forward(network: nn.Module, inputs: Inputs) -> Any:
    """Call the network: a tuple or list becomes positional, a mapping keyword arguments.

    A detector that takes a list of images as its one argument is given ``([image, …],)``.
    PyTorch's fused transformer layer is off: it uses weights of layers that it never calls.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if isinstance(inputs, Mapping):
            return network(**inputs)
        return network(inputs) if isinstance(inputs, Tensor) else network(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def check_precision(precision: str) -> None:
    """Raise ``ValueError`` for an unknown precision."""
    if precision not in get_args(Precision):
        raise ValueError(
            f"precision is one of {', '.join(get_args(Precision))}; got {precision!r}."
        )


def autocast(network: nn.Module, precision: Precision) -> torch.autocast:
    """Return the context in which a network's passes have a precision."""
    device = next(network.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (Mapping, tuple, list)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(value)


def move(tree: Any, device: torch.device) -> Any:
    """Return the tree with its tensors on ``device``."""
    return map_tensors(tree, lambda tensor: tensor.to(device))


def outputs_in_single(tree: Any, precision: Precision) -> Any:
    """Return outputs in single precision where `autocast` made them bfloat16, for any loss."""
    if precision == "float32":
        return tree
    return map_tensors(tree, lambda x: x.float() if x.dtype == torch.bfloat16 else x)


def cloned(tree: Any) -> Any:
    """Return the tree with copies of its tensors, for a function that may write into them."""
    return map_tensors(tree, Tensor.clone)


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the tree with ``change`` applied to each of its tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, list):  # some networks tell lists from tuples, detectors for example
        return [map_tensors(value, change) for value in tree]
    if isinstance(tree, tuple):
        return _like(tree, (map_tensors(value, change) for value in tree))
    return tree


def digest_of(named: Iterable[tuple[str, Tensor]], about: str = "", digits: int = 12) -> str:
    """Return hexadecimal digits that name these tensors, with their names, in this order."""
    sha = hashlib.sha256(about.encode())
    for name, tensor in named:
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()[:digits]


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs and labels of ``n`` samples."""

    inputs: Inputs
    labels: Any
    n: int


class Batches(tuple[Batch, ...]):
    """A data set in memory: the same batches in the same order, each time."""

    @property
    def n_samples(self) -> int:
        """Samples in all batches (`N`)."""
        return sum(batch.n for batch in self)

    def digest(self) -> str:
        """Return twelve hexadecimal digits that name the data, labels and batch sizes."""
        both = ((batch.inputs, batch.labels) for batch in self)
        return digest_of(("", tensor) for pair in both for tensor in tensors(pair))

    def to(self, device: torch.device) -> Batches:
        """Return the same batches on ``device``."""
        return Batches([Batch(move(b.inputs, device), move(b.labels, device), b.n) for b in self])


def read_batches(data: Any, *, batch_size: int = 32, what: str = "calibration") -> Batches:
    """Read data into memory as batches, twice over if they can be read twice.

    Data are ``(inputs, labels)`` tensors of equal length, a map-style ``Dataset`` of ``(input,
    label)`` pairs, or an iterable of batches, such as a ``DataLoader``, which keeps its own batch
    size. ``what`` names them in messages.

    Raises:
        DataError: Empty, unlabelled, NaN or inf, or not the same on a second reading (a shuffling
            loader, random augmentation).
    """
    if isinstance(data, Batches):
        return data
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1; got {batch_size}.")
    # A DataLoader draws a base seed from the global generator at each reading.
    with torch.random.fork_rng(devices=[]):
        first = _read(data, batch_size, what)
    _check(first, what)
    # Reading one batch again is enough to catch shuffling and random augmentation.
    if not isinstance(data, (tuple, Iterator)):
        with torch.random.fork_rng(devices=[]):
            torch.rand(1)  # another state than at the first reading, or shuffles would repeat
            again = _read(data, batch_size, what, limit=1)
        if again.digest() != Batches(first[:1]).digest():
            raise DataError(
                f"The {what} data come out differently on a second reading. Turn off shuffling "
                "(DataLoader(shuffle=False)) and random augmentation: scores must be repeatable."
            )
    return first


def merge(data: Batches, max_samples: int) -> Batches:
    """Return the same samples in the same order in batches of up to ``max_samples``.

    Batches whose tensors do not fit together (images of different sizes) stay apart.
    """
    merged: list[Batch] = []
    for batch in data:
        last = merged[-1] if merged else None
        if last is not None and last.n + batch.n <= max_samples:
            inputs = _joined(last.inputs, batch.inputs, last.n, batch.n)
            labels = _joined(last.labels, batch.labels, last.n, batch.n)
            if inputs is not None and labels is not None:
                merged[-1] = Batch(inputs, labels, last.n + batch.n)
                continue
        merged.append(batch)
    return Batches(merged)


def enlarge_first_batch(data: Batches, max_samples: int) -> Batches:
    """Return the same samples with the first batches merged up to ``max_samples``.

    Statistics are measured on the first batch and want many samples; the others stay as small as
    caches like them.
    """
    totals = itertools.accumulate(batch.n for batch in data)
    taken = max(1, sum(total <= max_samples for total in totals))
    return Batches([*merge(Batches(data[:taken]), max_samples), *data[taken:]])


def _joined(a: Any, b: Any, n: int, m: int) -> Any | None:
    """Return two trees of n and m samples as one, or ``None`` where they do not fit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _joined_tensors(a, b, n, m)
    keys = _keys(a)
    if keys is None or keys != _keys(b):
        return None
    parts = [_joined(a[key], b[key], n, m) for key in keys]
    if any(part is None for part in parts):
        return None
    return dict(zip(keys, parts, strict=True)) if isinstance(a, Mapping) else _like(a, parts)


def _joined_tensors(a: Tensor, b: Tensor, n: int, m: int) -> Tensor | None:
    """Join along the first axis where it holds samples; any other tensor must be the same."""
    if not (a.dim() and b.dim() and len(a) % n == 0 and len(b) % m == 0):
        return a if a.shape == b.shape and torch.equal(a, b) else None
    fit = a.shape[1:] == b.shape[1:] and len(a) // n == len(b) // m
    return torch.cat([a, b]) if fit else None


def _keys(tree: Any) -> Any:
    """Return the keys of a mapping, the places of a tuple, and ``None`` for anything else."""
    if isinstance(tree, Mapping):
        return tree.keys()
    return range(len(tree)) if isinstance(tree, tuple) else None


def _like(kind: tuple[Any, ...], values: Iterable[Any]) -> tuple[Any, ...]:
    """Return values in a tuple, of the same names where it has names."""
    return type(kind)(*values) if hasattr(kind, "_fields") else tuple(values)


def _read(data: Any, batch_size: int, what: str, limit: int | None = None) -> Batches:
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        inputs, labels = data
        n = len(labels)
        if any(len(tensor) != n for tensor in tensors(inputs)):
            raise DataError(
                f"The {what} data hold {len(next(tensors(inputs)))} inputs and {n} labels; "
                "give one label per input."
            )

        return Batches(
            _batch(map_tensors(data, operator.itemgetter(slice(at, at + batch_size))), what)
            for at in range(0, n, batch_size)
        )
    if isinstance(data, Tensor):
        raise DataError(f"The {what} data have no labels; give (inputs, labels).")
    if isinstance(data, Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        data = DataLoader(data, batch_size=batch_size, shuffle=False, collate_fn=default_collate)
    if not isinstance(data, Iterable):
        raise DataError(
            f"The {what} data are a {type(data).__name__}; give (inputs, labels) tensors, a "
            "Dataset, or an iterable of (inputs, labels) batches such as a DataLoader."
        )
    found = (_batch(item, what) for item in itertools.islice(_items(data, what), limit))
    if isinstance(data, (list, tuple)):
        return Batches(found)
    # A loader may fill the same memory anew each time.
    return Batches(Batch(cloned(b.inputs), cloned(b.labels), b.n) for b in found)


def _items(data: Iterable[Any], what: str) -> Iterator[Any]:
    """Yield what data hold; an error of their own says that they cannot be read."""
    try:
        yield from data
    except DataError:
        raise
    except Exception as error:  # of the user's dataset, or of collating what does not fit
        raise DataError(
            f"The {what} data cannot be read: {type(error).__name__}: {error}. Samples of a "
            "Dataset are tensors or numbers, each as large as the others; give batches otherwise."
        ) from error


def _batch(item: Any, what: str) -> Batch:
    inputs, labels = pair_of(item, what, " Unlabelled data cannot give a loss.")
    n = n_samples(inputs)
    if next(tensors(labels), None) is None:
        raise DataError(
            f"A {what} batch has labels of type {type(labels).__name__}; give tensors (a Dataset "
            "of (image, number) samples is batched for you, a plain list of samples is not)."
        )
    if isinstance(labels, Tensor) and (labels.dim() == 0 or (n and len(labels) % n)):
        shape = tuple(labels.shape)
        raise DataError(
            f"A {what} batch holds {n} inputs and labels of shape {shape}; "
            "give one label per input."
        )
    return Batch(inputs, labels, n)


def pair_of(item: Any, what: str, hint: str = "") -> tuple[Inputs, Any]:
    """Return the inputs and labels of a batch; several inputs that were collated as a tuple.

    Raises `DataError` where it is no pair, or has no tensor as input.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise DataError(
            f"A {what} batch is a pair (inputs, labels); got {type(item).__name__}{size}.{hint}"
        )
    inputs, labels = item
    if next(tensors(inputs), None) is None:
        raise DataError(f"A {what} batch holds no tensor as input.")
    return tuple(inputs) if isinstance(inputs, list) else inputs, labels


def n_samples(inputs: Inputs) -> int:
    """Return the samples in a batch of inputs: the first axis of the first tensor that has axes.

    A list of tensors as the first argument, as detectors take, holds one sample an entry.
    """
    if isinstance(inputs, Tensor):
        return len(inputs) if inputs.dim() else 0
    if isinstance(inputs, list):
        return len(inputs)
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    parts = (v for v in values if isinstance(v, (Tensor, list, tuple, Mapping)))
    return next((n for n in map(n_samples, parts) if n), 0)


def _check(batches: Batches, what: str) -> None:
    if not len(batches) or batches.n_samples == 0:
        raise DataError(f"The {what} data are empty. Give at least one labelled batch.")
    for index, batch in enumerate(batches):
        if not batch.n:
            raise DataError(f"A batch of the {what} data is empty (batch {index}). Leave it out.")
        for name, tree in (("inputs", batch.inputs), ("labels", batch.labels)):
            for tensor in tensors(tree):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise DataError(
                        f"The {what} {name} hold NaN or infinity (batch {index}). "
                        "Check the preprocessing."
                    )
