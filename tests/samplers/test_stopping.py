"""Loops of Optuna's own end with the search, and not before."""

from __future__ import annotations

import optuna
import pytest

from tests.samplers.tables import expected, history, new_study, ours, suggesting

MANY = 200
"""More trials than a search of these tests takes, so that a loop without end fails."""


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_loop_ends_with_the_search_under_hyperband(n_jobs):
    study = new_study(pruner=optuna.pruners.HyperbandPruner())
    study.optimize(suggesting(ours(study).space), n_trials=MANY, n_jobs=n_jobs)
    assert history(study) == expected(study)
    n = len(study.trials)
    assert n < MANY
    study.optimize(suggesting(ours(study).space), n_trials=MANY)
    assert len(study.trials) == n + 1  # Optuna asks before it can be told


def test_an_ordinary_study_is_its_own():
    assert not hasattr(new_study(), "_study")
