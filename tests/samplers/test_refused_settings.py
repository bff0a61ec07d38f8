"""What `ProgressiveBitSampler` refuses, and studies it must not mix up."""

from __future__ import annotations

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from hq_optuna.errors import BudgetError, ResumeError
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from tests.fake_search import fake_space
from tests.samplers.tables import (
    STORAGES,
    assigned,
    expected,
    fill_step,
    history,
    new_study,
    ours,
    sampler,
    states,
    update,
)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ("seed", {"seed": 1}),
        ("n_candidates", {"n_candidates": 4}),
        ("rule", {"rule": "min"}),
        ("refine", {"refine": False}),
        ("limit", {"budget": Budget.fraction(bops=0.5)}),
        ("space", {"space": fake_space(6, bits=(8, 4, 3))}),
    ],
)
@pytest.mark.parametrize("catch", [(), (Exception,)])
def test_other_settings_are_refused_in_words_and_leave_no_trial_running(changed, options, catch):
    study = new_study()
    study.optimize(assigned, n_trials=3)
    study.sampler = sampler(**options)
    with pytest.raises(ResumeError, match=rf"made with another sampler: {changed} \(study: ") as e:
        study.optimize(assigned, catch=catch)
    assert e.value.changed == (changed,)
    with pytest.raises(ResumeError, match="Use the same settings, or another study name"):
        study.ask()
    assert states(study)[3:] == [TrialState.FAIL] * 2
    study.sampler = sampler()
    study.optimize(assigned)
    assert history(study) == expected(study)


def test_all_changed_settings_are_named():
    study = new_study()
    study.optimize(assigned, n_trials=1)
    study.sampler = sampler(seed=3, rule="min")
    with pytest.raises(ResumeError, match=r"rule .*'ratio'.*'min'.*, seed .*0.*3") as error:
        study.ask()
    assert set(error.value.changed) == {"rule", "seed"}


def test_the_encoding_may_change_as_the_history_does_not_depend_on_it():
    study = new_study(sampler(6, encoding="layers"))
    study.optimize(assigned, n_trials=5)
    study.sampler = sampler(6, encoding="compact")
    study.optimize(assigned)
    assert history(study) == expected(study)


def test_a_study_that_maximizes_or_has_several_objectives_is_refused():
    study = optuna.create_study(direction="maximize", sampler=sampler())
    with pytest.raises(ValueError, match="direction='minimize'"):
        study.optimize(assigned, catch=(Exception,))
    assert states(study) == [TrialState.FAIL]
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler())
    with pytest.raises(ValueError, match="multi-objective"):
        study.optimize(lambda trial: (1.0, 2.0))
    assert states(study) == [TrialState.FAIL]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_candidates": 0}, "n_candidates is at least 1; got 0"),
        ({"n_candidates": "8"}, r"n_candidates is a whole number \(int\); got '8'"),
        ({"seed": "abc"}, r"seed is a whole number \(int\); got 'abc'"),
        ({"seed": None}, r"seed is a whole number \(int\); got None"),
        ({"seed": 1.5}, r"seed is a whole number \(int\); got 1\.5"),
        ({"rule": "best"}, "rule is one of min, ratio; got 'best'"),
        ({"encoding": "json"}, "encoding is one of layers, compact; got 'json'"),
    ],
)
def test_impossible_settings_are_refused_at_the_door(options, words):
    with pytest.raises(ValueError, match=words):
        sampler(**options)


def test_an_impossible_budget_is_refused_at_the_door_with_the_minimum():
    space = fake_space(6)
    minimum = CostModel(space.layers).cost(space.config(space.bottom))
    with pytest.raises(BudgetError, match="below the cheapest assignment") as error:
        sampler(space, budget=Budget.fraction(bops=0.001))
    assert error.value.minimum == minimum


def test_another_study_of_the_same_storage_is_not_mixed_up():
    storage = InMemoryStorage()
    first = new_study(sampler(6), storage)
    other = optuna.create_study(study_name="other", storage=storage, sampler=sampler(6, seed=4))
    for _ in range(3):
        first.optimize(assigned, n_trials=2)
        other.optimize(assigned, n_trials=2)
    first.optimize(assigned)
    other.optimize(assigned)
    assert history(first) == expected(first)
    assert history(other) == expected(other)


def test_the_record_in_memory_is_brought_up_to_date_by_what_others_did(tmp_path):
    storage = STORAGES["sqlite"](tmp_path)
    study = new_study(sampler(5, encoding="compact"), storage)
    study.optimize(assigned, n_trials=2)
    twin = optuna.load_study(
        study_name="table",
        storage=STORAGES["sqlite"](tmp_path),
        sampler=sampler(5, encoding="compact"),
    )
    twin.optimize(assigned, n_trials=3)
    log = ours(study).log(study)
    fill_step(study, log)
    assert update(study, log).open.complete
    study.optimize(assigned)
    assert history(twin) == expected(study)
