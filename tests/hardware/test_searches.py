"""Searches over pairs of bits within several limits: what trials show, and where they end."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.hardware import space_on
from hq_optuna.hardware.description import parse_hardware
from hq_optuna.protocol.history import assignment
from hq_optuna.protocol.tickets import facts
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.search import Additive, ProgressiveSearch
from hq_optuna.settings import SearchSettings
from hq_optuna.space.budget import Budget
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace
from tests import training_searches

# Where weights are narrow, inputs are wide: what one limit saves, the other pays for.
CROSSED = "name: crossed\nsource: here\nlayers: {'*': [W4A8, W8A2]}\n"


def crossed(seed: int, n: int = 7) -> tuple[SearchSpace, dict, Budget]:
    """Return a space, a table, and limits that only some states meet together."""
    rng = np.random.default_rng(seed)
    layers = [
        LayerSpec(f"l{k}", "Linear", (8, int(w)), 0, int(m), 1, 8)
        for k, (w, m) in enumerate(rng.integers(1, 1000, (n, 2)))
    ]
    settings = SearchSettings(pin_first_last=None)
    space = space_on(parse_hardware(CROSSED, "crossed"), layers, settings)
    drawn = {layer.name: rng.lognormal(0, 2, 4) for layer in layers}
    table = {
        name: {"weights": {4: w4 + w8, 8: w8}, "activations": {8: a8, 2: a8 + a2}}
        for name, (w4, w8, a8, a2) in drawn.items()
    }
    state = [int(rng.choice(v.bits)) for v in space.variables]
    costs = {m: space.costs(m).cost(space.config(state)) for m in ("bops", "size_bytes")}
    limits = [Budget.absolute(**{metric: 1.02 * cost}) for metric, cost in costs.items()]
    return space, table, Budget.together(*limits)


def lowered(space: SearchSpace, table: dict, budget: Budget) -> tuple[ProgressiveSearch, Additive]:
    first, *beside = budget.bounds(space)
    sums = Additive(space, table, first.model, beside)
    search = ProgressiveSearch(
        *(space, sums.cost, first.limit), beside=tuple(beside), n_candidates=9, refine=True
    )
    return search, sums


def test_limits_that_lowering_misses_are_met_by_the_exact_optimum_among_the_finalists() -> None:
    for seed in range(40):
        space, table, budget = crossed(seed)
        search, sums = lowered(space, table, budget)
        if not search.met(search.run(sums.score)[-1]):
            break
    else:
        pytest.fail("lowering met all of them")
    optimum = sums.exact(search.limit)
    assert optimum is not None
    sampler = ProgressiveBitSampler(space, budget=budget, n_candidates=9, verify=4)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler)
    for key, value in attributes.split(attributes.SENSITIVITY, table).items():
        study._storage.set_study_system_attr(study._study_id, key, value)

    def objective(trial: optuna.Trial) -> float:
        for v in space.variables:
            assert trial.suggest_categorical(v.name, tuple(map(v.shown, v.bits))) in (
                "W4A8",
                "W8A2",
            )
        return sums.score(assignment(trial))

    study.optimize(objective)
    best = study.best_trial
    answer = assignment(best, study)
    assert sums.fits(answer, search.limit)
    assert sums.score(answer) == pytest.approx(optimum.score)
    assert set(best.params.values()) <= {"W4A8", "W8A2"}
    assert {"bops", "size_bytes"} <= set(best.constraints)
    for trial in study.trials:
        bits = assignment(trial, study)
        for metric, limit in search.limits.items():
            over = space.costs(metric).cost(bits) / limit - 1
            assert trial.constraints[metric] == pytest.approx(over, abs=1e-12)
    assert sampler.finished(study)


def test_a_trial_says_pairs_in_words_and_its_ticket_keeps_them_as_numbers() -> None:
    space, table, budget = crossed(0)
    search, sums = lowered(space, table, budget)
    sampler = ProgressiveBitSampler(space, budget=budget, n_candidates=9)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: _scored(trial, space, sums))
    tickets = [Ticket.read(trial.system_attrs) for trial in study.trials]
    lowering = [t for t in tickets if t is not None and t.from_bits is not None]
    assert lowering
    for ticket in lowering:
        assert ticket.from_bits == 408
        shown = facts(ticket, space, {"bops": 8.0, "size_bytes": 2.0})
        assert (shown["from_bits"], shown["to_bits"]) == ("W4A8", "W8A2")
        assert (shown["cost"], shown["cost:size_bytes"]) == (8.0, 2.0)
    ends = search.run(sums.score)
    assert sampler.log(study).incumbent.state == ends[-1].state
    assert math.isfinite(ends[-1].score)


def _scored(trial: optuna.Trial, space: SearchSpace, sums: Additive) -> float:
    for v in space.variables:
        trial.suggest_categorical(v.name, tuple(map(v.shown, v.bits)))
    return sums.score(assignment(trial))


def test_training_is_refused_where_scales_are_powers_of_two() -> None:
    with pytest.raises(ValueError, match=r"which are powers of two on imx500\. Search without"):
        training_searches.search(
            hardware="imx500", training=training_searches.plan(), budget="0.9 bops"
        )
