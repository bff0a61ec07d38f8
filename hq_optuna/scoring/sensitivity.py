"""Sensitivity: the predicted loss rise of each layer at each number of bits.

    weights:      ½ Σⱼ hⱼ · (Q_b(w)ⱼ − wⱼ)²
    activations:  ½ Σⱼ E[(∂ℓ/∂xⱼ)²] · E[(Q_b(x)ⱼ − xⱼ)²]

``diagonal`` takes these sums as they stand, so curvature and error meet element by element;
``trace`` takes the mean curvature of a layer times its squared error (HAWQ-V2's form, Dong et al.,
2020). ``output`` is ``trace`` with the weights' error as the layer's output feels it, which is less
where errors make up for each other (`WeightFakeQuantize.output_error`). The curvature may come from
any estimator of `hq_optuna.curvature`. The errors of the activations come from one pass of the
float network over the calibration set. All sums are in float64 and in a fixed order. The score of
an assignment is the sum over its layers, so lowering one layer changes one term of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hq_optuna.curvature import Curvature, InputCurvature
from hq_optuna.curvature.estimate import per_sample
from hq_optuna.errors import ScoreError, SpaceError
from hq_optuna.network.batches import Batches, forward
from hq_optuna.quantization.observers import watch_inputs
from hq_optuna.quantization.prepare import (
    float_weight,
    get_bits,
    input_quantizer,
    set_bits,
    weight_quantizer,
)
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec
from hq_optuna.space.search_space import SearchSpace, bits_needed

Form = Literal["trace", "diagonal", "output"]
"""How curvature and squared error of weights are brought together; inputs know the first two."""

Table = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Sensitivity:
    """Predicted loss rises, layer → bits → nats; float costs nothing."""

    weights: Table
    activations: Table

    def score(self, config: Mapping[str, LayerBits]) -> tuple[float, float]:
        """Return the weights' and the activations' part of an assignment's score, in nats.

        Summed exactly (`math.fsum`), so the order of the layers does not matter. Raises
        `SpaceError` for bits that were not measured, as they are none of the layer's choices.
        """

        def part(table: Table, what: str, bits: Iterable[tuple[str, int]]) -> float:
            values = []
            for name, b in bits:
                row = table.get(name, {})
                if b != FLOAT_BITS and b not in row:
                    known = ", ".join(map(str, sorted(row))) or "none"
                    raise SpaceError(
                        f"No loss rise is known of {b} bits for the {what} of layer {name!r}; its "
                        f"choices are: {known}."
                    )
                values.append(0.0 if b == FLOAT_BITS else row[b])
            return math.fsum(values)

        return (
            part(self.weights, "weights", ((n, b.weight_bits) for n, b in config.items())),
            part(self.activations, "inputs", ((n, b.activation_bits) for n, b in config.items())),
        )

    def to_json(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return ``{layer: {"weights": {bits: nats}, "activations": {bits: nats}}}``."""
        return {
            name: {
                "weights": {str(b): v for b, v in self.weights[name].items()},
                "activations": {str(b): v for b, v in self.activations[name].items()},
            }
            for name in self.weights
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sensitivity:
        """Rebuild from `to_json`'s data; floats come back exactly."""

        def table(part: str) -> Table:
            return {n: {int(b): float(v) for b, v in p[part].items()} for n, p in data.items()}

        return cls(table("weights"), table("activations"))


@torch.no_grad()
def measure_sensitivity(
    prepared: nn.Module,
    space: SearchSpace,
    curvature: Curvature,
    data: Batches,
    form: Form = "diagonal",
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Sensitivity:
    """Return the sensitivity of every layer at every number of bits the space allows.

    A layer without gradient has unknown curvature, not zero: it is taken to be as curved as the
    most curved layer, so it is never ranked as free (`measure_layer_sums` measures its rises). The
    network's bits are restored afterwards. ``progress`` is called with (batches done, batches).

    Raises:
        ScoreError: A value is NaN or infinite.
    """
    if form not in get_args(Form):
        raise ValueError(f"form is one of {', '.join(get_args(Form))}; got {form!r}.")
    needed = bits_needed(space)
    weights = {
        layer.name: _weight_rises(
            prepared.get_submodule(layer.name), layer, needed[layer.name][0], curvature, form
        )
        for layer in space.layers
    }
    activations = _activation_rises(
        prepared, {n: bits for n, (_, bits) in needed.items()}, curvature, data, form, progress
    )
    return check_finite(Sensitivity(weights, activations))


def check_finite(sensitivity: Sensitivity) -> Sensitivity:
    """Return the table; refuse one with a value that is NaN or infinite."""
    for table in (sensitivity.weights, sensitivity.activations):
        for name, row in table.items():
            for bits, value in row.items():
                if not math.isfinite(value):
                    raise ScoreError(
                        f"The predicted loss rise of layer {name!r} at {bits} bits is {value}. "
                        "Check the loss function and the scale of its gradients."
                    )
    return sensitivity


def _weight_rises(
    module: nn.Module, layer: LayerSpec, bits: set[int], curvature: Curvature, form: Form
) -> dict[int, float]:
    weight: Tensor = float_weight(module)
    h = curvature.weights[layer.name].double()
    mean: float | None = float(h.mean())
    if layer.name in curvature.unknown:
        mean = max(float(v.double().mean()) for v in curvature.weights.values())
    elif form == "diagonal":
        mean = None
    quantizer = weight_quantizer(module)
    rises = {}
    for b in sorted(bits):
        error = (quantizer.quantized(weight, b).double() - weight.double()).square()
        if form == "output":
            error = quantizer.output_error(weight, b)
        rises[b] = (
            0.5 * float((h * error).sum()) if mean is None else 0.5 * mean * float(error.sum())
        )
    return rises


def _activation_rises(
    prepared: nn.Module,
    bits: Mapping[str, set[int]],
    curvature: Curvature,
    data: Batches,
    form: Form,
    progress: Callable[[int, int], None],
) -> dict[str, dict[int, float]]:
    rises = {name: dict.fromkeys(sorted(b), 0.0) for name, b in bits.items()}
    watched = [name for name, b in bits.items() if b]
    if not watched:
        return rises
    before = get_bits(prepared)
    set_bits(prepared, {name: LayerBits(FLOAT_BITS, FLOAT_BITS) for name in before})
    largest = max((entry.mean for calls in curvature.inputs.values() for entry in calls), default=0)
    calls: dict[str, int] = {}
    n = 0

    def see(name: str, x: Tensor) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        entry = _entry(curvature.inputs[name], call)
        unknown = name in curvature.unknown or not entry.count
        rows = per_sample(x, n)
        for b in rises[name]:
            error = (input_quantizer(prepared.get_submodule(name)).quantized(x, b) - x).double()
            error.square_()
            if form == "diagonal" and not unknown and entry.per_element is not None:
                assert rows is not None
                mean = entry.per_element / entry.n_samples  # (elements,)
                rises[name][b] += 0.5 * float(error.reshape(n, -1).sum(0) @ mean)
            else:
                mean_curvature = largest if unknown else entry.mean
                rises[name][b] += 0.5 * mean_curvature * float(error.sum())

    try:
        with watch_inputs(prepared, watched, see):
            for index, batch in enumerate(data):
                n = batch.n
                calls.clear()
                forward(prepared, batch.inputs)
                progress(index + 1, len(data))
    finally:
        set_bits(prepared, before)
    samples = data.n_samples
    return {name: {b: v / samples for b, v in row.items()} for name, row in rises.items()}


def _entry(known: Sequence[InputCurvature], call: int) -> InputCurvature:
    """Return the curvature in one call's input; that of all calls for one that was never seen.

    A layer may be called more often in some batches, and curvature may stop before it reads them.
    """
    if call < len(known):
        return known[call]
    return InputCurvature(sum(entry.total for entry in known), sum(entry.count for entry in known))
