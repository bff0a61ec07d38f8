"""Rises of several outputs: each head has its own, and they add up by weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Inputs, forward
from hq_optuna.network.containers import tensors
from hq_optuna.rises.base import Probe, Rise, Sums, only_tensor
from hq_optuna.rises.places import Binary, CrossEntropy, SquaredError


def parts_of(outputs: Any, n: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of floating-point numbers in the outputs, by name.

    Names are keys of mappings, fields of dataclasses and named tuples, attributes, and places in
    tuples and lists, joined by dots: ``"boxes"``, ``"features.0"``. One tensor has the name ``""``.
    A list with an entry for each of ``n`` samples is one sample a row: its tensors are stacked.

    Raises:
        DataError: The samples of such a list have tensors of different shapes.

    Example:
        >>> {name: tuple(z.shape) for name, z in parts_of({"a": (torch.ones(2, 3),)}).items()}
        {'a.0': (2, 3)}
    """
    if isinstance(outputs, (list, tuple)) and n is not None and _one_a_sample(outputs, n):
        return _stacked([parts_of(entry) for entry in outputs])
    found = {name: z for name, z in _walk(outputs, "") if z.is_floating_point()}
    if not found:  # a class that shows no attributes; its order is all there is
        known = (z for z in tensors(outputs) if z.is_floating_point())
        found = {str(place): z for place, z in enumerate(known)}
    return found


def _walk(node: Any, name: str, above: tuple[Any, ...] = ()) -> list[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        return [(name, node)]
    if any(node is one for one in above):  # an object that holds itself
        return []
    if isinstance(node, Mapping):
        children = [(str(key), value) for key, value in node.items()]
    elif hasattr(node, "_fields"):
        children = [(key, getattr(node, key)) for key in node._fields]
    elif isinstance(node, (tuple, list)):
        children = [(str(place), value) for place, value in enumerate(node)]
    elif is_dataclass(node) and not isinstance(node, type):
        children = [(f.name, getattr(node, f.name)) for f in fields(node)]
    elif hasattr(node, "__dict__") and not isinstance(node, (type, nn.Module)):
        children = list(vars(node).items())
    else:
        return []
    prefix = f"{name}." if name else ""
    above = (*above, node)
    return [pair for key, child in children for pair in _walk(child, prefix + key, above)]


def _one_a_sample(outputs: Any, n: int) -> bool:
    """Return whether a list holds one entry a sample, and not one output of all samples each."""
    found = [*tensors(outputs)]
    apart = not all(isinstance(entry, Tensor) for entry in outputs) or any(
        not z.dim() or len(z) != n for z in found
    )
    return len(outputs) == n and len(found) > 0 and apart and not _of_all(found, n)


def _of_all(found: list[Tensor], n: int) -> bool:
    return n > 1 and all(z.dim() and len(z) == n for z in found)


def _stacked(entries: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    shapes = [{name: tuple(z.shape) for name, z in entry.items()} for entry in entries]
    if any(shape != shapes[0] for shape in shapes):
        differ = next(shape for shape in shapes if shape != shapes[0])
        raise DataError(
            "The network returns a list with an entry for each sample, and their tensors have "
            f"different shapes ({shapes[0]} and {differ}): what is left after a selection, such as "
            "non-maximum suppression, cannot be compared number by number. Compare what is "
            "computed before it: rise=hq_optuna.rises.At({'head': …}), by the names of the modules "
            "that return it."
        )
    return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}


class Heads(Rise):
    """Several outputs, each with its own rise, and how much each counts in the sum.

    Args:
        rises: By name of the output, see `parts_of`; outputs that are not named are left out.
        weights: By name; 1 where none is given.

    Example:
        >>> rise = Heads({"boxes": SquaredError(), "scores": CrossEntropy()}, {"boxes": 0.5})
        >>> z = {"boxes": torch.zeros(1, 4), "scores": torch.zeros(1, 2), "mask": torch.zeros(1)}
        >>> rise(z, {**z, "boxes": torch.ones(1, 4)})
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, rises: Mapping[str, Rise], weights: Mapping[str, float] = {}) -> None:
        unknown = [name for name in weights if name not in rises]
        if unknown or not rises:
            raise ValueError(
                f"weights name the outputs of rises ({', '.join(map(repr, rises)) or 'none'}); got "
                f"{', '.join(map(repr, unknown)) or 'no rises'}."
            )
        if any(weight < 0 for weight in weights.values()):
            raise ValueError(f"weights are 0 or more; got {dict(weights)}.")
        self.rises = dict(rises)
        self.weights = {name: float(weights.get(name, 1.0)) for name in rises}

    def _parts(self, outputs: Any, n: int) -> dict[str, Tensor]:
        found = parts_of(outputs, n)
        missing = [name for name in self.rises if name not in found]
        if missing:
            raise DataError(
                f"The network's outputs have no {missing[0]!r}, which the rise names. They have "
                f"{', '.join(map(repr, found))}."
            )
        return {name: found[name] for name in self.rises}

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """Return the sums of each head."""
        parts = self._parts(outputs, batch.n)
        return tuple(rise.sums(parts[name], batch) for name, rise in self.rises.items())

    def with_sums(self, sums: Sums) -> Self:
        """Return the rise with heads that know their sums."""
        if not sums:
            return self
        pairs = zip(self.rises.items(), sums, strict=True)
        return self._with(rises={name: rise.with_sums(own) for (name, rise), own in pairs})

    def averaged(self) -> Self:
        """Return the rise with each head's averaged one."""
        return self._with(rises={name: rise.averaged() for name, rise in self.rises.items()})

    def _with(self, **changes: Any) -> Self:
        found = copy.copy(self)
        vars(found).update(changes)
        return found

    def of_samples(self, outputs: Any, moved: Any, batch: Batch) -> Tensor:
        """Return the weighted sum of the heads' rises."""
        z, other = (self._parts(each, batch.n) for each in (outputs, moved))
        found = [
            self.weights[name]
            * rise.of_samples(z[name], other[name], batch, **self._weights_of(name, z))
            for name, rise in self.rises.items()
        ]
        return torch.stack(found).sum(0)

    def draw(self, outputs: Any, batch: Batch, generator: torch.Generator) -> list[Probe]:
        """Return the probes of all heads, times the roots of their weights."""
        parts = self._parts(outputs, batch.n)
        return [
            Probe(z, u * self.weights[name] ** 0.5)
            for name, rise in self.rises.items()
            for z, u in rise.draw(parts[name], batch, generator, **self._weights_of(name, parts))
        ]

    def _weights_of(self, name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return how much each place of a head counts, if not all alike, as a keyword."""
        return {}


class At(Heads):
    """Several heads that are what *modules* return, whatever the network makes of it.

    For networks whose outputs cannot be compared number by number, as those of a detector that
    returns the boxes it selected.

    Args:
        rises: By qualified name of a module, ``"head.classification_head"``. What it returns is one
            tensor, or has a rise for several (`Heads`).
        weights: By name; 1 where none is given.
    """

    reads_outputs = False

    def run(self, network: nn.Module, inputs: Inputs) -> Any:
        """Return what the modules returned, by name; calls of one module are joined as a tuple."""
        seen: dict[str, list[Any]] = {name: [] for name in self.rises}
        modules = dict(network.named_modules(remove_duplicate=False))
        with ExitStack() as stack:
            for name, calls in seen.items():
                if name not in modules:
                    raise DataError(
                        f"The rise reads module {name!r}, and the network has none of this name. "
                        f"It has {', '.join([repr(n) for n in modules if n][:20])}, …"
                    )

                def keep(_m: nn.Module, _args: Any, y: Any, calls: list[Any] = calls) -> None:
                    calls.append(y)

                stack.callback(modules[name].register_forward_hook(keep).remove)
            forward(network, inputs)
        missing = [name for name, calls in seen.items() if not calls]
        if missing:
            raise DataError(
                f"The network did not call module {missing[0]!r}, which the rise reads."
            )
        return {name: calls[0] if len(calls) == 1 else tuple(calls) for name, calls in seen.items()}

    def _parts(self, outputs: Any, n: int) -> dict[str, Any]:
        return dict(outputs)


class Detection(Heads):
    """Objectness, boxes and classes along one axis of one tensor, as dense detectors return them.

    Boxes and classes count where objects are: each place by the objectness that the float network
    gives it, relative to the mean.

    Args:
        objectness: Place of the objectness along the axis.
        boxes: First place of the box's numbers, and the one behind their last.
        classes: First place of the classes, and the one behind the last.
        axis: Along which all these lie.
        probabilities: Whether objectness and classes are probabilities, and not scores.
        weights: Of ``"objectness"``, ``"boxes"`` and ``"classes"``; 1 where none is given.
        floor: Least objectness that a place counts with, from 0 to 1.
    """

    def __init__(
        self,
        objectness: int,
        boxes: tuple[int, int],
        classes: tuple[int, int],
        *,
        axis: int = 1,
        probabilities: bool = False,
        weights: Mapping[str, float] = {},
        floor: float = 0.01,
    ) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"floor is from 0 to 1; got {floor}.")
        rises = {
            "objectness": Binary(axis, probabilities=probabilities),
            "boxes": SquaredError(axis, relative=True),
            "classes": CrossEntropy(axis, probabilities=probabilities),
        }
        super().__init__(rises, weights)
        self.axis, self.floor, self.mean = axis, floor, 1.0
        spans = (objectness, objectness + 1), boxes, classes
        self.spans = dict(zip(rises, spans, strict=True))

    def _parts(self, outputs: Any, n: int) -> dict[str, Tensor]:
        z = only_tensor(outputs)
        last = max(end for _, end in self.spans.values())
        if not -z.dim() < self.axis < z.dim() or z.shape[self.axis] < last:
            raise DataError(
                f"The rise reads {last} numbers along axis {self.axis} of the output, which has "
                f"the shape {tuple(z.shape)}."
            )
        return {
            name: z.narrow(self.axis, first, end - first)
            for name, (first, end) in self.spans.items()
        }

    def _presence(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return how much of an object there is at each place, at least the floor."""
        rise = self.rises["objectness"]
        assert isinstance(rise, Binary)
        z = rise.places(rise.view(parts["objectness"]).detach().double())
        return torch.sigmoid(z).squeeze(1).clamp_min(self.floor)

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """Return the sums of each head, where objects are, and how many places there are."""
        parts = self._parts(outputs, batch.n)
        w, weighed = self._presence(parts), dict[str, Any]()
        if float(w.sum()):
            weighed = {"weights": w / w.mean()}
        found = (
            rise.sums(parts[name], batch, **({} if name == "objectness" else weighed))
            for name, rise in self.rises.items()
        )
        return (*found, (w.sum(), w.new_tensor(float(len(w)))))

    def with_sums(self, sums: Sums) -> Self:
        """Return the rise with heads that know their sums, and the mean presence of objects."""
        if not sums:
            return self
        mean = float(sums[-1][0] / sums[-1][1]) or 1.0
        return super().with_sums(sums[:-1])._with(mean=mean)

    def _weights_of(self, name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {} if name == "objectness" else {"weights": self._presence(parts) / self.mean}
