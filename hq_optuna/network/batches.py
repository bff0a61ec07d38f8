"""Calibration and validation data as a fixed list of batches.

Whatever the user hands in (tensors, a dataset, a loader) is read once into memory, in order, and
checked: the score of an assignment must be the same number every time it is asked for.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import length_hint
from typing import Any, NamedTuple, get_args

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from hq_optuna.errors import DataError
from hq_optuna.network.containers import (
    clone,
    digest_of,
    is_plain,
    leaves,
    map_tensors,
    strided,
    tensors,
)
from hq_optuna.network.devices import preserve_rng_state
from hq_optuna.network.modes import without_fused_attention
from hq_optuna.settings import Precision

Inputs = Any
"""What a network is called with: a tuple or list of positional arguments, a mapping of keyword
arguments, or one tensor or object of the user's."""


def forward(network: nn.Module, inputs: Inputs) -> Any:
    """Call the network with its `arguments`, see also `without_fused_attention`."""
    args, kwargs = arguments(network, inputs)
    with without_fused_attention():
        return network(*args, **kwargs)


def arguments(network: nn.Module, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: a tuple or list is the former, a mapping the latter.

    Tuples and mappings of a class of the user's are one argument where the network takes no other
    number or other names. A detector that takes a list of images as its one argument is given
    ``([image, …],)``.
    """
    if isinstance(inputs, PackedSequence) or not isinstance(inputs, (tuple, list, Mapping)):
        return (inputs,), {}
    args, kwargs = () if isinstance(inputs, Mapping) else tuple(inputs), dict[str, Any]()
    if isinstance(inputs, Mapping):
        kwargs.update(inputs)
    if type(inputs) not in (tuple, list, dict):
        try:
            inspect.signature(network.forward).bind(*args, **kwargs)
        except TypeError:
            return (inputs,), {}
        except ValueError:  # a scripted network does not tell
            pass
    return args, kwargs


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


def move(tree: Any, device: torch.device) -> Any:
    """Return the tree with its tensors on ``device``, copies of those of inference mode."""
    return map_tensors(tree, lambda tensor: tensor.to(device, copy=tensor.is_inference()))


def outputs_in_single(tree: Any, precision: Precision) -> Any:
    """Return outputs in single precision where `autocast` made them bfloat16, for any loss."""
    if precision == "float32":
        return tree
    return map_tensors(tree, lambda x: x.float() if x.dtype == torch.bfloat16 else x)


def cloned(tree: Any) -> Any:
    """Return the tree with copies of its tensors, for a function that may write into them."""
    return map_tensors(tree, clone)


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs and labels of ``n`` samples.

    ``share`` is what a sample of this batch counts in the mean loss, 1 on average over the samples
    of all batches (`hq_optuna.network.loss_weights.weighed`).
    """

    inputs: Inputs
    labels: Any
    n: int
    share: float = 1.0


@dataclass(frozen=True, eq=False)
class FloatOutputs:
    """What the float network returns on ``n`` samples, in place of the labels that they lack."""

    outputs: Any
    n: int


class Batches(tuple[Batch, ...]):
    """A data set in memory: the same batches in the same order, each time.

    ``is_looked_over`` says that `hq_optuna.network.checks.LookOver` has seen them.
    """

    is_looked_over: bool

    def __new__(cls, batches: Iterable[Batch] = (), is_looked_over: bool = False) -> Batches:
        """Hold batches."""
        self = super().__new__(cls, batches)
        self.is_looked_over = is_looked_over
        return self

    @property
    def n_samples(self) -> int:
        """Samples in all batches (`N`)."""
        return sum(batch.n for batch in self)

    def in_random_order(self) -> Batches:
        """Return the same batches in a random order, the same one each time."""
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self), generator=generator, device="cpu")
        return Batches([self[place] for place in order.tolist()])

    def digest(self) -> str:
        """Return twelve hexadecimal digits that name the data, labels and batch sizes."""
        told = [None if isinstance(b.labels, FloatOutputs) else b.labels for b in self]
        pairs = zip(self, told, strict=True)
        return digest_of(("", leaf) for b, y in pairs for leaf in leaves((b.inputs, y)))

    def to(self, device: torch.device) -> Batches:
        """Return the same batches on ``device``."""
        moved = [Batch(move(b.inputs, device), move(b.labels, device), b.n, b.share) for b in self]
        return Batches(moved, self.is_looked_over)


def read_batches(
    data: Any,
    *,
    batch_size: int | None = None,
    what: str = "calibration",
    sample_axis: int | None = None,
    labelled: bool = True,
) -> Batches:
    """Read data into memory as batches, twice over if they can be read twice.

    A batch has 32 samples if ``batch_size`` does not say otherwise, and fewer where a sample of one
    tensor is large: what a pass keeps of a batch then needs less memory, and workers have more
    batches to share.

    Data are ``(inputs, labels)`` of equal length, a map-style ``Dataset`` of ``(input, label)``
    pairs, or an iterable of batches, such as a ``DataLoader``, which keeps its own batch size.
    ``what`` names them in messages.

    ``sample_axis`` is the axis of the input tensors along which samples lie: 1 in ``(T, N, …)``.
    By default it is told by the labels, whose first axis is always of samples.

    With ``labelled=False`` data may also have none: one tensor of all samples, or batches that are
    tensors, mappings of arguments, or ``(input,)`` alone; a pair is always inputs and labels.

    Raises:
        DataError: Empty, unlabelled, NaN or inf, without end, or not the same on a second reading
            (a shuffling loader, random augmentation); or it is unclear where samples lie.
    """
    if isinstance(data, Batches):
        return data
    if batch_size is None:
        batch_size = _batch_size(data, sample_axis)
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1; got {batch_size}.")
    with preserve_rng_state([]), own_chance(data):  # a DataLoader draws a base seed
        read = _read(data, batch_size, what, sample_axis, labelled=labelled)
        first = counted(read, what, sample_axis)
    _check(first, what)
    # Reading one batch again is enough to catch shuffling and random augmentation.
    if not isinstance(data, (tuple, Tensor, Iterator)):
        with preserve_rng_state([]), own_chance(data):
            torch.rand(1, device="cpu")  # another state than at first, or shuffles would repeat
            again = [*_read(data, batch_size, what, sample_axis, limit=1, labelled=labelled)]
        # Nothing comes again of a stream that can be read once, whatever its class.
        second = Batches(Batch(inputs, labels, first[0].n) for inputs, labels, _ in again)
        if again and second.digest() != Batches(first[:1]).digest():
            raise DataError(
                f"The {what} data come out differently on a second reading. Turn off shuffling "
                "(DataLoader(shuffle=False)) and random augmentation: scores must be repeatable."
            )
    return first


BATCH_SIZE, LEAST_BATCH_SIZE = 32, 4
MOST_IN_BATCH = 2**20
"""Numbers that enter a network with a batch: 32 images of 96² pixels are fewer."""


def _batch_size(data: Any, axis: int | None) -> int:
    """Return the default size of batches: a power of two, smaller where samples are large."""
    inputs = data[0] if isinstance(data, tuple) and data else data
    if not isinstance(inputs, Tensor) or not inputs.dim() or not inputs.numel():
        return BATCH_SIZE
    fit = MOST_IN_BATCH * inputs.shape[axis or 0] // inputs.numel()
    return max(LEAST_BATCH_SIZE, min(BATCH_SIZE, 1 << max(0, fit.bit_length() - 1)))


def _read(
    data: Any,
    batch_size: int,
    what: str,
    axis: int | None,
    limit: int | None = None,
    *,
    labelled: bool = True,
) -> Iterator[tuple[Inputs, Any, int | None]]:
    """Yield inputs, labels, and the number of samples where that was said."""
    if isinstance(data, Tensor) and not labelled and data.dim():
        along = (axis or 0) % data.dim()
        for part in torch.split(data, batch_size, along):
            yield part, None, part.size(along)
        return
    if isinstance(data, Tensor):
        raise DataError(f"The {what} data have no labels; give (inputs, labels).")
    if is_whole(data):
        whole = Whole.of(data, what, axis)
        for at in range(0, whole.n, batch_size):
            yield *whole.take(slice(at, at + batch_size)), min(batch_size, whole.n - at)
        return
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size, shuffle=False, collate_fn=default_collate)
    if not isinstance(data, Iterable):
        raise DataError(
            f"The {what} data are a {type(data).__name__}; give (inputs, labels) tensors, a "
            "Dataset, or an iterable of (inputs, labels) batches such as a DataLoader."
        )
    in_memory = isinstance(data, (list, tuple))
    most_bytes = None if in_memory else psutil.virtual_memory().available // 2
    for item in itertools.islice(bounded(data, what, MOST_BATCHES, most_bytes), limit):
        given = (item.inputs, item.labels, item.n) if isinstance(item, Batch) else None
        alone = None if labelled else _unlabelled(item, axis)
        inputs, labels, n = given or alone or (*pair_of(item, what, _UNLABELLED), None)
        # A loader may fill the same memory anew each time.
        yield (inputs, labels, n) if in_memory else (cloned(inputs), cloned(labels), n)


MOST_BATCHES = 2**16
"""What says no length and goes on beyond this has no end."""


def bounded(
    data: Iterable[Any], what: str, most: int, most_bytes: int | None = None
) -> Iterator[Any]:
    """Yield what data hold, up to so many batches where they say no length, and so many bytes.

    An error of their own says that they cannot be read.
    """
    endless = DataError(
        f"The {what} data have no end, or do not fit into memory: cut them off, "
        "itertools.islice(data, 100), or give the Dataset a length."
    )
    has_length, n_bytes = length_hint(data, -1) >= 0, 0
    if isinstance(data, (itertools.cycle, itertools.repeat)) and not has_length:
        raise endless
    try:
        for index, item in enumerate(data):
            if most_bytes is not None:
                n_bytes += sum(part.nbytes for x in tensors(item) for part in strided(x))
            if (index >= most and not has_length) or n_bytes > (most_bytes or n_bytes):
                raise endless
            yield item
    except DataError:
        raise
    except Exception as error:  # of the user's dataset, or of collating what does not fit
        raise DataError(
            f"The {what} data cannot be read: {type(error).__name__}: {error}. Samples of a "
            "Dataset are tensors or numbers, each as large as the others; give batches otherwise."
        ) from error


@contextmanager
def own_chance(data: Any, seed: int | None = None) -> Iterator[None]:
    """Seed the generators that a loader has of its own, if told; put their states back."""
    samplers = (getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    found = (getattr(holder, "generator", None) for holder in (data, *samplers))
    kept = {g: g.get_state() for g in found if isinstance(g, torch.Generator)}
    try:
        for generator in kept if seed is not None else ():
            generator.manual_seed(seed or 0)
        yield
    finally:
        for generator, state in kept.items():
            generator.set_state(state)


_UNLABELLED = " Unlabelled data cannot give a loss; leave the loss out to search without labels."


def _unlabelled(item: Any, axis: int | None) -> tuple[Inputs, None, int] | None:
    """Return inputs that come without labels, and how many samples they are."""
    if isinstance(item, (tuple, list)) and len(item) == 1:
        item = item[0] if isinstance(item[0], Tensor) else tuple(item)
    elif not isinstance(item, (Tensor, Mapping)):
        return None
    sizes = {*_sizes(item, axis or 0)} | _lengths(item)
    return (item, None, sizes.pop()) if len(sizes) == 1 else None


def pair_of(item: Any, what: str, hint: str = "") -> tuple[Inputs, Any]:
    """Return the inputs and labels of a batch; several inputs that were collated as a tuple.

    Raises `DataError` where it is no pair, holds NumPy arrays, or no tensor as input or labels.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise DataError(
            f"A {what} batch is a pair (inputs, labels); got {type(item).__name__}{size}.{hint}"
        )
    inputs, labels = item
    if any(isinstance(leaf, np.ndarray) for leaf in leaves(item)):
        raise DataError(
            f"A {what} batch holds NumPy arrays. Give tensors: torch.from_numpy(array)."
        )
    if any(x.is_mkldnn or (x.is_nested and x.layout == torch.strided) for x in tensors(item)):
        raise DataError(
            f"A {what} batch holds a tensor without sizes or strides. Give x.to_dense(), and "
            "nested tensors with layout=torch.jagged."
        )
    if next(tensors(inputs), None) is None:
        raise DataError(f"A {what} batch holds no tensor as input.")
    if isinstance(labels, (bool, int, float)) or (isinstance(labels, Tensor) and not labels.dim()):
        raise DataError(
            f"A {what} batch has one number as its label: these look like samples. Give them as a "
            "Dataset, or as batches; a plain list of samples is not batched for you."
        )
    if next(tensors(labels), None) is None:
        raise DataError(
            f"A {what} batch has labels of type {type(labels).__name__}; give tensors (a Dataset "
            "of (image, number) samples is batched for you, a plain list of samples is not)."
        )
    return tuple(inputs) if type(inputs) is list else inputs, labels


def is_whole(data: Any) -> bool:
    """Return whether data are the inputs and labels of all samples, and not two batches."""
    if type(data) is not tuple or len(data) != 2:
        return False
    batches = [isinstance(p, Batch) or (isinstance(p, (tuple, list)) and len(p) == 2) for p in data]
    return isinstance(data[1], Tensor) or not all(batches)


class Whole(NamedTuple):
    """Inputs and labels of all ``n`` samples, which lie along ``axis`` of all input tensors."""

    inputs: Inputs
    labels: Any
    n: int
    axis: int

    @classmethod
    def of(cls, data: tuple[Any, Any], what: str, axis: int | None = None) -> Whole:
        """Raise `DataError` where a tensor, or a list beside them, has not one entry a sample."""
        inputs, labels = pair_of(data, what, _UNLABELLED)
        rows = {*_sizes(labels, 0)}
        n = max(rows, default=0)
        axes = [axis] if axis is not None else [0, 1] if _may_be_second(inputs) else [0]
        fits = [a for a in axes if {*_sizes(inputs, a)} == rows == {n}]
        if not fits or any(not x.dim() for x in tensors(data)):
            single = {"single numbers" for x in tensors(data) if not x.dim()}
            said = " or ".join([*map(str, sorted({*_sizes(inputs, axis or 0)})), *single])
            raise DataError(
                f"The {what} data hold {said} inputs and {n} labels; give one label per input, "
                "along one axis of all tensors, or batches: [(inputs, labels), …]."
            )
        nodes = [*_nodes(inputs), *_nodes(labels)]
        packed = any(isinstance(node, PackedSequence) for node in nodes)
        if packed or not all(map(is_plain, tensors(data))):
            raise DataError(
                f"The {what} data hold tensors that cannot be cut into batches (sparse, nested, "
                "packed). Give batches: [(inputs, labels), …]."
            )
        plain = (node for node in nodes if isinstance(node, (tuple, list)) and len(node) == n)
        if n > 1 and any(next(tensors(node), None) is None for node in plain):
            raise DataError(
                f"The {what} data hold a list of {n} values that are no tensors. Give a tensor, "
                "or batches: [(inputs, labels), …]."
            )
        return cls(inputs, labels, n, fits[0])

    def take(self, index: Any) -> tuple[Inputs, Any]:
        """Return the inputs and labels of samples, by a slice or a tensor of indices."""

        def along(axis: int, x: Tensor) -> Tensor:
            of_x = index.to(x.device) if isinstance(index, Tensor) else index
            return x[(*[slice(None)] * (axis % x.dim()), of_x)]

        inputs = map_tensors(self.inputs, lambda x: along(self.axis, x))
        return inputs, map_tensors(self.labels, lambda x: along(0, x))


def _nodes(tree: Any) -> Iterator[Any]:
    """Yield the tuples, lists and mappings of a tree; what is in other classes is left out."""
    if isinstance(tree, (tuple, list, Mapping)):
        yield tree
        if not isinstance(tree, PackedSequence):
            for value in tree.values() if isinstance(tree, Mapping) else tree:
                yield from _nodes(value)


def _sizes(tree: Any, axis: int) -> list[int]:
    """Return the sizes along an axis of the tensors in a tree that have it."""
    packed = [node for node in _nodes(tree) if isinstance(node, PackedSequence)]
    inside = {id(x) for node in packed for x in tensors(node)}
    found = [x for x in tensors(tree) if id(x) not in inside and -x.dim() <= axis < x.dim()]
    sizes = [int(node.batch_sizes[0]) for node in packed if axis == 0]
    return sizes + [x.size(axis) for x in found if axis == 0 or not x.is_nested]


def _lengths(tree: Any) -> set[int]:
    """Return the lengths of lists of what holds tensors, one entry a sample, as detectors take."""
    lists = (node for node in _nodes(tree) if isinstance(node, list))
    return {len(node) for node in lists if next(tensors(node), None) is not None}


def _may_be_second(inputs: Inputs) -> bool:
    """Return whether inputs may be ``(T, N, …)``, and not samples of features ``(N, D)``."""
    return all(x.dim() > 2 or not x.is_floating_point() for x in tensors(inputs) if x.dim() > 1)


def _ways(inputs: Inputs, labels: Any) -> dict[int, tuple[int, bool]]:
    """Return axes of the inputs that may hold samples: how many, and whether each has one label."""
    ways: dict[int, tuple[int, bool]] = {}
    rows, lengths, told = {*_sizes(inputs, 0)}, _lengths(inputs), {*_sizes(labels, 0)}
    common = rows & told
    paired = lengths & (told if isinstance(labels, Tensor) else _lengths(labels))
    if paired and isinstance(labels, list) and not isinstance(labels[0], Tensor):
        common = set()  # a dictionary of boxes an image
    elif len(common) == 1 and rows == told:
        paired = set()  # lists of several inputs and labels of all samples
    exact = common | paired
    if len(exact) == 1:
        ways[0] = exact.pop(), True
    elif not exact and isinstance(labels, Tensor) and len(rows) == 1:
        several = {n for n in rows | lengths if 0 < n < len(labels) and len(labels) % n == 0}
        if len(several) == 1:
            ways[0] = several.pop(), False
    second = {*_sizes(inputs, 1)} & told if _may_be_second(inputs) else set[int]()
    if len(second) == 1:
        ways[1] = second.pop(), True
    return ways


def counted(
    read: Iterable[tuple[Inputs, Any, int | None]], what: str, axis: int | None = None
) -> Batches:
    """Return batches with their numbers of samples, along one axis in all of them.

    Raises `DataError` where shapes leave several axes open, or none.
    """
    found = [*read]
    ways = [_ways(inputs, labels) for inputs, labels, n in found if n is None]
    axes = set.intersection(*(set(way) for way in ways)) if ways else {0}
    if axis is None and axes == {0, 1} and all(way[0][1] for way in ways):
        axes = {0}
    batches = []
    for inputs, labels, n in found:
        if n is None and axis is not None:
            rows, told = {*_sizes(inputs, axis)} | _lengths(inputs), {*_sizes(labels, 0)}
            fits = rows if len(rows) == 1 else rows & told
            n = fits.pop() if len(fits) == 1 else None
        elif n is None and len(axes) == 1:
            n = _ways(inputs, labels)[min(axes)][0]
        if n is None:
            shapes = [
                ", ".join(str((*x.shape,)) if not x.is_nested else "nested" for x in tensors(tree))
                for tree in (inputs, labels)
            ]
            raise DataError(
                f"The samples of a {what} batch cannot be counted: inputs have the shapes "
                f"{shapes[0]}, labels {shapes[1]}. Give one label per input. Or say along which "
                "axis of the inputs samples lie, sample_axis=0 or 1 of BitSearch or read_batches, "
                "or how many there are: hq_optuna.network.batches.Batch(inputs, labels, n)."
            )
        batches.append(Batch(inputs, labels, n))
    return Batches(batches)


@torch.no_grad()
def check_sample_axis(network: nn.Module, batch: Batch) -> None:
    """Refuse inputs ``(T, N, …)`` whose N samples shapes alone do not tell from T.

    That is so where labels are ``(T, N, …)`` or ``(T·N, …)``. What is computed of the other samples
    does not hang on the first one, that of the other time steps does. ``network`` is called in up
    to three passes, and only where both axes fit; raises `DataError`. Batch-norm by the batch's own
    statistics mixes samples too, so that nothing can be told there.
    """
    own = (m for m in network.modules() if getattr(m, "track_running_stats", None) is False)
    if any("BatchNorm" in type(m).__name__ for m in own):
        return
    if not all(map(is_plain, tensors((batch.inputs, batch.labels)))):
        return
    shapes = {x.shape[:2] for x in tensors(batch.inputs) if x.dim() > 1}
    labels = [x.shape for x in tensors(batch.labels) if x.dim()]
    if len(shapes) != 1 or min(shape := shapes.pop()) < 2 or shape[0] != batch.n:
        return
    if not labels or any(y[:2] != shape and y[0] != shape.numel() for y in labels):
        return

    def first_changed(x: Tensor, axis: int) -> Tensor:
        if x.dim() < 2 or x.shape[:2] != shape:
            return x
        return torch.cat([x.narrow(axis, -1, 1), x.narrow(axis, 1, shape[axis] - 1)], axis)

    def others(tree: Any, axis: int) -> list[Tensor]:
        """Return the outputs without those of what lies first along an axis of the inputs."""
        found = [x for x in tensors(tree) if x.is_floating_point() and x.dim()]
        found = [x.reshape(*shape, -1) if len(x) == shape.numel() else x for x in found]
        kept = [x for x in found if axis < x.dim() and x.size(axis) == shape[axis]]
        return [x.narrow(axis, 1, shape[axis] - 1) for x in kept]

    def keeps(axis: int) -> bool:
        changed = map_tensors(batch.inputs, lambda x: first_changed(x, axis))
        pairs = zip(others(straight, axis), others(forward(network, changed), axis), strict=False)
        return all(bool((x - y).abs().max() <= 1e-3 * x.abs().max()) for x, y in pairs)

    straight = forward(network, cloned(batch.inputs))
    if not keeps(0) and keeps(1):
        raise DataError(
            f"Inputs of shape {tuple(shape)} and more were read as {batch.n} samples, but the "
            f"network mixes what lies along axis 0, and not what lies along axis 1: {shape[1]} "
            "samples seem to lie there. Say which: sample_axis=1 (or 0) of BitSearch or "
            "read_batches."
        )


def _check(batches: Batches, what: str) -> None:
    if not len(batches) or batches.n_samples == 0:
        raise DataError(f"The {what} data are empty. Give at least one labelled batch.")
    for index, batch in enumerate(batches):
        if not batch.n:
            raise DataError(f"A batch of the {what} data is empty (batch {index}). Leave it out.")
        for name, tree in (("inputs", batch.inputs), ("labels", batch.labels)):
            for part in (part for tensor in tensors(tree) for part in strided(tensor)):
                if not bool(torch.isfinite(part).all()) and (name == "labels" or not _masks(part)):
                    raise DataError(
                        f"The {what} {name} hold NaN or infinity (batch {index}). "
                        "Check the preprocessing."
                    )


def _masks(part: Tensor) -> bool:
    """Return whether a tensor is added to attention scores: it holds 0 and −inf alone."""
    return not part.is_complex() and bool(((part == 0) | (part == -torch.inf)).all())
