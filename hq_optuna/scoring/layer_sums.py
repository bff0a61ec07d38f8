"""Scores that are sums over layers, by name: which curvature meets which form of the error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from torch import Tensor, nn

from hq_optuna.curvature import Curvature, calibration_adam, hutchinson, output_curvature, probe_of
from hq_optuna.network.batches import Batches
from hq_optuna.network.loss_weights import counting
from hq_optuna.network.losses import LossFunction
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.rises import Rise, rise_of_loss
from hq_optuna.scoring.hessian_trace import hessian_trace
from hq_optuna.scoring.measured import with_measured
from hq_optuna.scoring.sensitivity import Form, Sensitivity, check_finite, measure_sensitivity
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace

LayerSumName = Literal["hessian_trace", "diagonal", "trace", "fisher", "hutchinson"]
"""``hessian_trace``: what each layer's error does to the outputs, by probes of their Hessian.
``diagonal`` and ``trace``: calibration Adam, element by element or by its mean over a layer.
``fisher``: the mean of the Gauss-Newton diagonal from softened outputs, with weight errors as the
layer's output feels them. ``hutchinson``: the true Hessian's."""
LAYER_SUMS: tuple[LayerSumName, ...] = get_args(LayerSumName)

Progress = Callable[[str, int, int], None]


class LayerSums(NamedTuple):
    """Predicted loss rises by layer and bits, and the curvature they were made from.

    Those of the layers ``measured`` were measured.
    """

    sensitivity: Sensitivity
    curvature: Curvature
    measured: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """A sentence for each layer whose rises were measured."""
        return [
            f"Layer {name!r} gets no gradient on the calibration data, in a call or at all, or "
            "feeds one that gets none (under no_grad, detached, written over in place, without "
            "effect), so its loss rises are measured, by a forward pass for each number of bits."
            for name in self.measured
        ]


def measure_layer_sums(
    name: LayerSumName,
    network: nn.Module,
    prepared: nn.Module,
    space: SearchSpace,
    data: Batches,
    loss_fn: LossFunction,
    *,
    progress: Progress = lambda what, done, of: None,
    moments: Mapping[str, Tensor] | None = None,
    correction: StatisticsCorrection | None = None,
    rise: Rise | None = None,
    whole: Batches | None = None,
) -> LayerSums:
    """Return the predicted loss rise of every layer at every number of bits, by a named score.

    ``network`` is in float, ``prepared`` the same network prepared; its bits are restored
    afterwards. ``moments`` are curvature of weights, nats per weight², that is known already: the
    second moments of a training, by layer; ``hutchinson`` and ``hessian_trace`` do not take them.
    ``correction`` is what will correct the network's statistics: ``hessian_trace`` counts only what
    it leaves. ``rise`` is that of the outputs, by default the loss's own. ``progress`` is called
    with (what, done, of).

    Rises of layers whose curvature is unknown are measured, on the ``whole`` data where ``data``
    are a part of them.

    Raises:
        ValueError: ``fisher`` or ``hessian_trace`` with a loss whose Hessian in the outputs is not
            known.
        DataError: The loss does not depend on the network.
        ScoreError: A value that is NaN or infinite.
    """
    rise = rise_of_loss(loss_fn) if rise is None else rise
    if name == "hessian_trace":
        if rise is None:
            raise ValueError("'hessian_trace' knows no rise of this loss; give one of them.")
        sensitivity, curvature = hessian_trace(
            *(prepared, space, counting(data), rise, correction),
            progress=lambda i, of: progress("sensitivity", i, of),
        )
        check_finite(sensitivity)
    else:
        curvature = measure_curvature(
            name, network, space.layers, data, loss_fn, lambda i, of: progress("curvature", i, of)
        )
        if moments and name in ("diagonal", "trace", "fisher"):
            curvature = curvature.with_weights(moments)
        forms: dict[str, Form] = {"diagonal": "diagonal", "fisher": "output"}
        sensitivity = measure_sensitivity(
            *(prepared, space, curvature, data, forms.get(name, "trace")),
            progress=lambda i, of: progress("sensitivity", i, of),
        )
    return completed(sensitivity, curvature, prepared, whole or data, loss_fn, rise)


def completed(
    sensitivity: Sensitivity,
    curvature: Curvature,
    prepared: nn.Module,
    data: Batches,
    loss_fn: LossFunction,
    rise: Rise | None,
) -> LayerSums:
    """Return sums in which rises of layers whose curvature is unknown are measured on the data."""
    measured: tuple[str, ...] = ()
    if curvature.unknown:
        sensitivity, measured = with_measured(
            *(sensitivity, curvature, prepared, data, loss_fn, rise)
        )
    return LayerSums(sensitivity, curvature, measured)


def measure_curvature(
    name: LayerSumName,
    network: nn.Module,
    layers: Sequence[LayerSpec],
    data: Batches,
    loss_fn: LossFunction,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Curvature:
    """Return the curvature that a named score is made from; see `measure_layer_sums`.

    ``hessian_trace`` is made from none.
    """
    if name not in LAYER_SUMS:
        raise ValueError(f"A sum over layers is one of {', '.join(LAYER_SUMS)}; got {name!r}.")
    data = counting(data)
    if name == "fisher":
        probe = probe_of(loss_fn)
        if probe is None:
            raise ValueError("'fisher' knows cross-entropy and squared error, not this loss.")
        return output_curvature(network, layers, data, probe, progress=progress)
    if name == "hutchinson":
        return hutchinson(network, layers, data, loss_fn, progress=progress)
    return calibration_adam(network, layers, data, loss_fn, progress=progress)
