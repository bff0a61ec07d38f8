"""Loss rises that are measured: of layers whose curvature no gradient tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from hq_optuna.curvature import Curvature
from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batches
from hq_optuna.network.loss_weights import counting
from hq_optuna.network.losses import LossFunction
from hq_optuna.quantization.outputs import outputs_always
from hq_optuna.quantization.prepare import get_bits, set_bits
from hq_optuna.quantization.statistics import statistics_places
from hq_optuna.rises.base import Rise
from hq_optuna.scoring.scorer import Scorer
from hq_optuna.scoring.sensitivity import Sensitivity
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import FLOAT_BITS


def outputs_rise(
    prepared: nn.Module, data: Batches, loss_fn: LossFunction, output_rise: Rise | None
) -> float:
    """Return what rounded outputs alone cost, nats, with all layers in float.

    It is the same whatever bits layers have. The bits of the prepared network are restored.
    """
    told = output_rise if output_rise is not None and output_rise.reads_outputs else None
    nothing, before = Sensitivity({}, {}), get_bits(prepared)
    scorer = Scorer(prepared, nothing, data, loss_fn, output_rise=told)
    float_loss = scorer.float_loss()
    with outputs_always(prepared, True):
        in_float = LayerBits(FLOAT_BITS, FLOAT_BITS)
        loss, found = scorer.measure(dict.fromkeys(before, in_float))
    set_bits(prepared, before)
    return max(loss - float_loss if found is None else found, 0.0)


def with_outputs(table: Sensitivity, layers: Sequence[str], rise: float) -> Sensitivity:
    """Return a table to which the rise of rounded outputs is added, behind these layers.

    Layers share it by how many outputs are rounded behind them: it counts with what enters a layer,
    or with its weights where that stays in float.
    """
    weights, activations = dict(table.weights), dict(table.activations)
    for name, n in Counter(layers).items():
        side = activations if activations[name] else weights
        share = rise * n / len(layers)
        side[name] = {bits: value + share for bits, value in side[name].items()}
    return Sensitivity(weights, activations)


def with_measured(
    table: Sensitivity,
    curvature: Curvature,
    prepared: nn.Module,
    data: Batches,
    loss_fn: LossFunction,
    output_rise: Rise | None,
) -> tuple[Sensitivity, tuple[str, ...]]:
    """Return a table in which rises without curvature are measured, and the layers they are of.

    Where a layer that no gradient reaches has an effect, the layers before it have lost a part of
    theirs and are measured too. Each number of bits costs a forward pass over a random part of the
    data, and over all of them where that part shows no effect: few samples may come to a layer.
    A rise is that of the loss when this layer alone is rounded, its weights or what enters it: told
    by the outputs where there is a rise of them, else the change of the loss itself. The bits of
    the prepared network are restored.

    Raises:
        DataError: No layer of the network moves the loss at all.
    """
    data = counting(data)
    part = counting(Batches(data[place] for place in statistics_places(data, 1)))
    told = output_rise if output_rise is not None and output_rise.reads_outputs else None
    scorers = [Scorer(prepared, table, some, loss_fn, output_rise=told) for some in (part, data)]
    scorers = scorers[: 1 + (len(part) < len(data))]
    before = get_bits(prepared)
    in_float = dict.fromkeys(before, LayerBits(FLOAT_BITS, FLOAT_BITS))

    def rise(scorer: Scorer, name: str, bits: LayerBits) -> float:
        loss, found = scorer.measure({**in_float, name: bits})
        return abs(loss - scorer.float_loss()) if found is None else max(found, 0.0)

    weights, activations = dict(table.weights), dict(table.activations)
    try:
        todo = [name for name in weights if name in curvature.unknown]
        for name in todo:
            for s in scorers:
                weights[name] = {b: rise(s, name, LayerBits(b, FLOAT_BITS)) for b in weights[name]}
                inputs = {b: rise(s, name, LayerBits(FLOAT_BITS, b)) for b in activations[name]}
                activations[name] = inputs
                if any((*weights[name].values(), *inputs.values())):
                    break
            if any((*weights[name].values(), *activations[name].values())):
                todo += sorted(curvature.unreached.get(name, frozenset()) - set(todo))
    finally:
        set_bits(prepared, before)
    found = Sensitivity(weights, activations)
    rows = (*found.weights.values(), *found.activations.values())
    if not any(value for row in rows for value in row.values()):
        raise DataError(
            "Nothing that is rounded in the network moves the loss on the calibration data, by "
            "gradient or measured, so layers cannot be compared. Check that the loss depends on "
            "the network's outputs, and that it is not exactly zero."
        )
    return found, tuple(todo)
