"""What can be known of a search before any of it runs: a few passes, in under a minute."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from hq_optuna.curvature.sweep import differentiable
from hq_optuna.network.batches import Batches, cloned, forward
from hq_optuna.network.containers import strided, tensors
from hq_optuna.network.copies import copied
from hq_optuna.network.evaluation import Evaluate, mean_loss, measured_figures
from hq_optuna.objective.hessian import HessianObjective
from hq_optuna.rises import Rise, parts_of
from hq_optuna.settings import SearchSettings

PREPARE_PASSES = 15, 40
"""What preparation costs as a rule, in float passes over the calibration set."""

MOST_SECONDS = 20.0
"""Passes over data are cut off here, and the rest is extrapolated."""


@dataclass(frozen=True)
class Readiness:
    """What a check found.

    Attributes:
        outputs: The network's outputs by name, with the shape of one batch.
        rise: What moved outputs cost, in words.
        unreached: Layers that no gradient reaches; their rises are measured, which takes longer.
        figures: What was measured of the float network, and on how many validation samples.
        n_measured: Those samples; 0 without validation data.
        pass_s: Seconds of a pass over the calibration set.
        prepare_s: Seconds of preparation, from and to.
        search_s: Seconds of the steps, at most; ``None`` where scores are looked up in a table.
        memory_bytes: What this process held at most until now.
        free_bytes: What is free beside it.
    """

    outputs: dict[str, tuple[int, ...]]
    rise: str
    unreached: tuple[str, ...]
    figures: dict[str, float]
    n_measured: int
    pass_s: float
    prepare_s: tuple[float, float]
    search_s: float | None
    memory_bytes: int
    free_bytes: int

    @property
    def problems(self) -> list[str]:
        """What keeps the search from being ready, and what to change."""
        found = []
        bad = [name for name, value in self.figures.items() if not math.isfinite(value)]
        if bad:
            found.append(f"{bad[0]} of the float network is {self.figures[bad[0]]}: check evaluate")
        if self.memory_bytes > 2 * self.free_bytes:
            used, free = (value / 2**20 for value in (self.memory_bytes, self.free_bytes))
            found.append(
                f"{used:,.0f} MiB are in use and {free:,.0f} MiB free, and a search needs about as "
                "much again: give fewer calibration samples"
            )
        return found


def readiness(
    objective: HessianObjective,
    settings: SearchSettings,
    validation: Batches | None,
    evaluate: Evaluate,
) -> Readiness:
    """Run a few passes of the float network; see `Readiness`."""
    network, data = copied(objective.model), objective.data
    outputs, pass_s = _run(network, data)
    figures, n = dict[str, float](), 0
    if validation is not None:
        seconds_a_sample = pass_s / data.n_samples
        least = max(1, int(MOST_SECONDS / max(seconds_a_sample, 1e-9)))
        part = _first(validation, least)
        figures = measured_figures(evaluate, network, part)
        figures |= mean_loss(network, part, objective.loss_fn)
        n = part.n_samples
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
    """Return the outputs on the first batch, and the seconds of a pass over all data.

    As many batches run as fit into some seconds.
    """
    outputs, started, seen = None, time.perf_counter(), 0
    with torch.no_grad():
        for batch in data:
            z = forward(network, cloned(batch.inputs))
            outputs = z if outputs is None else outputs
            seen += batch.n
            if time.perf_counter() - started > MOST_SECONDS / 4:
                break
    return outputs, (time.perf_counter() - started) * data.n_samples / seen


def _first(data: Batches, least: int) -> Batches:
    """Return the first batches, of so many samples or more."""
    chosen, n = [], 0
    for batch in data:
        chosen.append(batch)
        n += batch.n
        if n >= least:
            break
    return Batches(chosen, data.is_looked_over)


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
