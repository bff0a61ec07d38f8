"""What else finds bits: random draws and Optuna's own samplers, for honest comparison.

All get the same space, cost, limit and score as the search, and as many evaluations. None of them
is weakened: random draws are within the budget, where plain ones almost never are, and TPE and
NSGA-II are told by a constraint how far over it a trial is.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import Trial

from hq_optuna.search.moves import lowerable
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.search_space import SearchSpace

RANDOM, TPE, NSGA2 = "random", "TPE", "NSGA-II"
METHODS = (RANDOM, TPE, NSGA2)


@dataclass(frozen=True)
class Problem:
    """What is searched: a space, a cost with its limit, and a score to be small."""

    space: SearchSpace
    cost: Callable[[BitConfig], float]
    limit: float
    score: Callable[[BitConfig], float]


@dataclass(frozen=True)
class Found:
    """The best assignment within the limit that a method found.

    Attributes:
        config: ``None`` where it found none.
        score: Its score, nats (infinite where it found none).
        evaluations: Assignments that were scored.
        seconds: Wall-clock time, scoring included.
    """

    config: BitConfig | None
    score: float
    evaluations: int
    seconds: float


def random_search(problem: Problem, n: int, seed: int) -> Found:
    """Score ``n`` random assignments within the limit.

    Each starts from the widest bits and lowers randomly drawn variables until it is within.
    """
    space, draw = problem.space, random.Random(seed)
    started, best, best_score = time.perf_counter(), None, math.inf
    for _ in range(n):
        state = space.top
        while problem.cost(space.config(state)) > problem.limit:
            state = draw.choice(lowerable(space, state)).apply(state)
        config = space.config(state)
        score = problem.score(config)
        if score < best_score:
            best, best_score = config, score
    return Found(best, best_score, n, time.perf_counter() - started)


def sampler_search(problem: Problem, sampler: BaseSampler, n: int) -> Found:
    """Run an Optuna sampler for ``n`` trials: one parameter a variable, the cost a constraint."""
    started, best, best_score = time.perf_counter(), None, math.inf

    def objective(trial: Trial) -> float:
        nonlocal best, best_score
        bits = [trial.suggest_categorical(v.name, v.bits) for v in problem.space.variables]
        config = problem.space.config(bits)
        excess = problem.cost(config) / problem.limit - 1
        trial.set_constraint("cost", excess)
        score = problem.score(config)
        if excess <= 0 and score < best_score:
            best, best_score = config, score
        return score

    with _quiet():
        optuna.create_study(sampler=sampler).optimize(objective, n_trials=n)
    return Found(best, best_score, n, time.perf_counter() - started)


def run_method(method: str, problem: Problem, n: int, seed: int) -> Found:
    """Run one of `METHODS` with ``n`` evaluations.

    Raises:
        ValueError: Unknown method.
    """
    if method == RANDOM:
        return random_search(problem, n, seed)
    if method == TPE:
        return sampler_search(problem, TPESampler(seed=seed), n)
    if method == NSGA2:
        # Its default of 50 leaves few generations where evaluations are few.
        population = max(10, min(50, n // 10))
        return sampler_search(problem, NSGAIISampler(population_size=population, seed=seed), n)
    raise ValueError(f"method is one of {', '.join(METHODS)}; got {method!r}.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from logging every trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
