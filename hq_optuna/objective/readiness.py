"""What can be known of a search before any of it runs: a few passes, in under a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from hq_optuna.curvature.sweep import differentiable
from hq_optuna.network.batches import Batches, Whole, cloned, forward, is_whole, read_batches
from hq_optuna.network.containers import strided, tensors
from hq_optuna.network.copies import copied
from hq_optuna.network.devices import device_of
from hq_optuna.network.evaluation import Evaluate, mean_loss, measured_figures
from hq_optuna.objective.hessian import HessianObjective
from hq_optuna.rises import Rise, parts_of
from hq_optuna.settings import SearchSettings

PREPARE_PASSES = 15, 40
"""What preparation costs as a rule, in float passes over the calibration set."""

MOST_SECONDS = 2.0
"""What a pass over the calibration set may take in a check: about a dozen are needed."""

HELD = 10, 13, 2**29
"""What a search holds: so many times the inputs of all layers on a batch, and the weights, and
bytes beside. Fitted to the peaks of the networks of ``benchmarks/fields.py``."""


@dataclass(frozen=True)
class Readiness:
    """What a check found.

    Attributes:
        outputs: The network's outputs by name, with the shape of one batch.
        rise: What moved outputs cost, in words.
        unreached: Layers that no gradient reaches; their rises are measured, which takes longer.
        figures: What was measured of the float network, and on how many validation samples.
        n_measured: Those samples, of ``n_validation``; 0 without validation data.
        pass_s: Seconds of a pass over the calibration set.
        prepare_s: Seconds of preparation, from and to.
        search_s: Seconds of the steps, at most; ``None`` where scores are looked up in a table.
        n_read: Calibration samples that the check read, of ``n_calibration``.
        memory_bytes: What this process holds now.
        needed_bytes: What a search is expected to need more.
        free_bytes: What is free.
    """

    outputs: dict[str, tuple[int, ...]]
    rise: str
    unreached: tuple[str, ...]
    figures: dict[str, float]
    n_measured: int
    pass_s: float
    prepare_s: tuple[float, float]
    search_s: float | None
    n_read: int
    n_calibration: int
    n_validation: int
    memory_bytes: int
    needed_bytes: int
    free_bytes: int

    @property
    def problems(self) -> list[str]:
        """What keeps the search from being ready, and what to change."""
        found = []
        bad = [name for name, value in self.figures.items() if not math.isfinite(value)]
        if bad:
            found.append(f"{bad[0]} of the float network is {self.figures[bad[0]]}: check evaluate")
        if self.needed_bytes > self.free_bytes:
            needed, free = (value / 2**20 for value in (self.needed_bytes, self.free_bytes))
            found.append(
                f"a search needs about {needed:,.0f} MiB more and {free:,.0f} MiB are free: give "
                "batches of fewer samples"
            )
        return found


class Part(NamedTuple):
    """Some of the data, how many samples there are in all, and in the largest batch."""

    data: Any
    n_all: int
    largest: int


def part_of(network: nn.Module, data: Any, what: str, *, labelled: bool = False) -> Part:
    """Return as much of the data as a pass reads in `MOST_SECONDS`, evenly from all of them.

    ``what`` names the data in messages. What is given as tensors is cut by samples, all else by
    batches.

    Raises:
        DataError: As `read_batches`.
    """
    read = read_batches(data, what=what, labelled=labelled)
    part = Part(
        read if isinstance(data, Iterator) else data, read.n_samples, max(b.n for b in read)
    )
    started = time.perf_counter()
    try:
        with torch.no_grad():
            forward(copied(network), cloned(read.to(device_of(network))[0].inputs))
    except Exception:  # what is wrong with it is said by the search itself
        return part
    seconds = (time.perf_counter() - started) / read[0].n * read.n_samples
    every = math.ceil(seconds / MOST_SECONDS)
    if every < 2:
        return part
    if isinstance(data, Tensor):
        return part._replace(data=data[::every])
    if is_whole(data):
        return part._replace(data=Whole.of(data, what).take(slice(None, None, every)))
    return part._replace(data=Batches([*read][::every], read.is_looked_over))


def readiness(
    objective: HessianObjective,
    settings: SearchSettings,
    validation: Batches | None,
    evaluate: Evaluate,
    part: Part | None = None,
    judges: Part | None = None,
) -> Readiness:
    """Run a few passes of the float network; see `Readiness`.

    ``part`` is what the objective's data are of, ``judges`` what the validation data are of; by
    default they are all.
    """
    network, data = copied(objective.model), objective.data
    part = part or Part(data, data.n_samples, max(batch.n for batch in data))
    outputs, pass_s = _run(network, data)
    pass_s *= part.n_all / data.n_samples
    figures, n = dict[str, float](), 0
    if validation is not None:
        figures = measured_figures(evaluate, network, validation)
        figures |= mean_loss(network, validation, objective.loss_fn)
        n = validation.n_samples
    low, high = (passes * pass_s for passes in PREPARE_PASSES)
    scorer = objective.settings.scorer
    moves = sum(len(v.bits) - 1 for v in objective.space.variables)
    candidates = moves * settings.n_candidates
    looked_up = scorer not in ("gauss_newton", "loss")
    return Readiness(
        outputs={name: (*z.shape,) for name, z in _named(outputs, data[0].n).items()},
        rise="none" if objective.rise is None else described(objective.rise),
        unreached=_unreached(objective, data),
        figures=figures,
        n_measured=n,
        pass_s=pass_s,
        prepare_s=(low, high),
        search_s=None if looked_up else candidates * pass_s,
        n_read=data.n_samples,
        n_calibration=part.n_all,
        n_validation=n if judges is None else judges.n_all,
        needed_bytes=_needed(objective, part.largest),
        memory_bytes=psutil.Process().memory_info().rss,
        free_bytes=psutil.virtual_memory().available,
    )


def described(rise: Rise) -> str:
    """Return a rise in words: its class, and those of its heads."""
    heads = getattr(rise, "rises", None)
    if not heads:
        return type(rise).__name__
    each = ", ".join(f"{name or 'output'}: {described(one)}" for name, one in heads.items())
    return f"{type(rise).__name__}({each})"


def _named(outputs: object, n: int) -> dict[str, torch.Tensor]:
    try:
        return parts_of(outputs, n)
    except ValueError:  # lists of boxes, which a rise of modules does not need
        return {str(place): z for place, z in enumerate(tensors(outputs))}


def _run(network: nn.Module, data: Batches) -> tuple[Any, float]:
    """Return the outputs on the first batch, and the seconds of a pass over the data."""
    outputs, started = None, time.perf_counter()
    with torch.no_grad():
        for batch in data:
            z = forward(network, cloned(batch.inputs))
            outputs = z if outputs is None else outputs
    return outputs, time.perf_counter() - started


def _needed(objective: HessianObjective, batch: int) -> int:
    """Return the bytes that a search is expected to need, with batches of so many samples."""
    layers = objective.space.layers
    of_inputs, of_weights, beside = HELD
    inputs = of_inputs * batch * sum(layer.n_inputs for layer in layers)
    return 4 * (inputs + of_weights * sum(layer.n_weights for layer in layers)) + beside


def _unreached(objective: HessianObjective, data: Batches) -> tuple[str, ...]:
    """Return the layers whose weights get no gradient from the first batch that counts."""
    rise = objective.rise
    if rise is None or not rise.can_draw:
        return ()
    batch = next((batch for batch in data if batch.share), data[0])
    generator = torch.Generator().manual_seed(0)
    with differentiable(objective.model, objective.space.layers, lambda name, x: None) as made:
        network, weights = made
        with torch.no_grad():
            fitted = rise.fitted([rise.run(network, batch.inputs)], [batch])
        with torch.enable_grad():
            told = fitted.projected(rise.run(network, batch.inputs), batch, generator)
            if told.requires_grad:
                told.backward()  # type: ignore[no-untyped-call]
    none = [name for name, w in weights.items() if w.grad is None or not _any(w.grad)]
    return tuple(none)


def _any(gradient: torch.Tensor) -> bool:
    return any(bool(part.any()) for part in strided(gradient))
