"""Which layer hurts: signal-to-noise ratios, one layer quantized alone, and all but one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, cloned, forward
from hq_optuna.objective.hessian import HessianObjective
from hq_optuna.quantization import set_bits
from hq_optuna.quantization.statistics import statistics_places
from hq_optuna.rises import parts_of
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.layers import FLOAT_BITS

N_SAMPLES = 32
"""Samples at least: a ratio is a mean over all elements of an output, which are many."""

ERRORS = "own_alone", "output_alone", "own_in_answer", "output_without"
"""What is known of a layer; see `layer_errors`."""


@torch.no_grad()
def layer_errors(
    objective: HessianObjective, config: BitConfig, answer: nn.Module | None = None
) -> dict[str, Any]:
    """Measure the error of each layer of an assignment, on some of the calibration samples.

    Ratios are 10 · log10(Σ z² / Σ Δz²) of what the float network and the quantized one return, dB;
    ``None`` where they are the same. Takes two passes a layer.

    Args:
        objective: Of the search.
        config: The bits of all layers.
        answer: Its network, where it was trained.

    Returns:
        ``{"samples", "of", "output", "layers"}``: the ratio at the network's outputs with all
        layers quantized, and for each layer ``own_alone`` and ``output_alone``, at its own output
        and at the network's with this layer alone quantized (statistics are as in float);
        ``own_in_answer``, at its own output with all layers quantized; ``output_without``, at the
        network's with all others quantized. Several outputs count alike. Those of the network are
        ``None`` where they are no tensors of equal shapes, such as boxes that were selected, and no
        rise reads what is computed before.
    """
    names = [layer.name for layer in objective.space.layers]
    in_float = dict.fromkeys(names, LayerBits(FLOAT_BITS, FLOAT_BITS))
    alone = objective.quantized(BitConfig(in_float))
    answer = objective.quantized(config) if answer is None else answer
    rounded = [name for name in names if config[name] != in_float[name]]
    noise = _Noise()
    places = statistics_places(objective.data, 1, least_samples=N_SAMPLES, least_batches=1)
    for place in places:
        batch = objective.data[place]
        with _outputs_of(alone, names) as float_own:
            signal = _read(objective, alone, batch)
        with _outputs_of(answer, names) as own:
            noise.add(("", "output"), signal, _read(objective, answer, batch))
            for name in rounded:
                noise.add((name, "own_in_answer"), _calls(float_own[name]), _calls(own[name]))
        for name in rounded:
            set_bits(alone, {name: config[name]})
            with _outputs_of(alone, [name]) as own:
                noise.add((name, "output_alone"), signal, _read(objective, alone, batch))
            noise.add((name, "own_alone"), _calls(float_own[name]), _calls(own[name]))
            set_bits(alone, {name: in_float[name]})
            set_bits(answer, {name: in_float[name]})
            noise.add((name, "output_without"), signal, _read(objective, answer, batch))
            set_bits(answer, {name: config[name]})
    return {
        "samples": sum(objective.data[place].n for place in places),
        "of": config.digest,
        "output": noise.ratio(("", "output")),
        "layers": {name: {e: noise.ratio((name, e)) for e in ERRORS} for name in names},
    }


def _read(
    objective: HessianObjective, network: nn.Module, batch: Batch
) -> dict[str, Tensor] | None:
    """Return a network's outputs on a batch by name, ``None`` where they cannot be compared."""
    run = forward if objective.rise is None else objective.rise.run
    try:
        return parts_of(run(network, cloned(batch.inputs)), batch.n)
    except DataError:
        return None


class _Noise:
    """Sums of squares of signals and of their changes, by what they are of and by output."""

    def __init__(self) -> None:
        self._signal: defaultdict[tuple[Any, str], float] = defaultdict(float)
        self._noise: defaultdict[tuple[Any, str], float] = defaultdict(float)

    def add(
        self, key: Any, before: dict[str, Tensor] | None, after: dict[str, Tensor] | None
    ) -> None:
        """Add what was returned by the float network and by the other one."""
        for name, z in (before or {}).items():
            moved = (after or {}).get(name)
            if moved is not None and moved.shape == z.shape:
                change = torch.where(z == moved, 0.0, moved.double() - z.double())
                finite = z.double().nan_to_num(posinf=0.0, neginf=0.0)
                self._signal[key, name] += float(finite.square().sum())
                self._noise[key, name] += float(change.square().sum())

    def ratio(self, key: Any) -> float | None:
        """Return the signal-to-noise ratio, dB, outputs alike; ``None`` without noise."""
        shares = [
            self._noise[key, name] / power
            for (of, name), power in self._signal.items()
            if of == key and power > 0
        ]
        mean = math.fsum(shares) / max(len(shares), 1)
        return -10 * math.log10(mean) if 0 < mean < math.inf else None


def _calls(outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return a layer's outputs, all calls as one where they are in both networks."""
    return {"": torch.cat([z.flatten() for z in outputs])} if outputs else {}


@contextmanager
def _outputs_of(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Yield what the named layers return, by name, as they are called."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:

        def keep(_m: nn.Module, _args: Any, y: Any, name: str = name) -> None:
            if isinstance(y, Tensor):
                found[name].append(y.detach().clone())

        handles.append(network.get_submodule(name).register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
