"""`CostBudgetPruner` prunes what is no longer needed, and nothing else."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna.errors import BudgetError
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from tests.fake_search import fake_space
from tests.samplers.tables import (
    BUDGET,
    add,
    assigned,
    expected,
    history,
    new_study,
    open_ticket,
    ours,
    record_ticket,
    sampler,
    states,
    suggesting,
    tickets,
)


@pytest.fixture
def study() -> optuna.Study:
    """A study in step 1, which has three slots."""
    space = fake_space(6)
    study = new_study(sampler(space), pruner=CostBudgetPruner(space, BUDGET))
    study.optimize(assigned, n_trials=2)
    return study


def pruning(trial: optuna.Trial) -> float:
    if trial.should_prune():
        raise optuna.TrialPruned
    return assigned(trial)


def test_a_candidate_that_is_needed_is_not_pruned(study):
    assert not any(study.ask().should_prune() for _ in range(3))


def test_a_candidate_is_pruned_once_another_worker_completed_its_slot(study):
    mine, *others = (study.ask() for _ in range(3))
    add(study, open_ticket(ours(study).log(study), 0), 1.0)
    assert mine.should_prune()
    assert not any(trial.should_prune() for trial in others)


def test_a_candidate_of_a_step_that_is_closed_is_pruned(study):
    late = [study.ask() for _ in range(3)]
    while ours(study).log(study).open.step == 1:
        trial = study.ask()  # backs up a slot of the three, then records
        study.tell(trial, assigned(trial))
    assert all(trial.should_prune() for trial in late)


def test_a_step_record_is_needed_until_there_is_one(study):
    for _ in range(3):
        trial = study.ask()
        study.tell(trial, assigned(trial))
    record = study.ask()
    assert tickets(study)[-1].kind == "incumbent"
    assert not record.should_prune()
    add(study, record_ticket(ours(study).log(study)), 0.0)
    assert record.should_prune()


def test_what_is_asked_for_after_the_end_is_pruned(study):
    study.optimize(pruning)
    assert history(study) == expected(study)
    assert TrialState.PRUNED not in states(study)
    study.optimize(pruning)
    assert states(study)[-1] == TrialState.PRUNED
    assert tickets(study)[-1].kind == "surplus"


def test_an_enqueued_trial_is_not_pruned_even_after_the_end(study):
    study.optimize(pruning)
    study.enqueue_trial({v.name: 8 for v in ours(study).space.variables})
    study.optimize(suggesting(ours(study).space), n_trials=1)
    assert states(study)[-1] == TrialState.COMPLETE
    study.enqueue_trial({v.name: 8 for v in ours(study).space.variables})
    assert not study.ask().should_prune()


@pytest.mark.parametrize(
    "foreign",
    [
        optuna.samplers.RandomSampler(seed=0),
        optuna.samplers.TPESampler(seed=0),
        optuna.samplers.NSGAIISampler(seed=0),
    ],
    ids=lambda by: type(by).__name__,
)
def test_trials_of_other_samplers_are_left_alone_even_over_budget(foreign):
    space = fake_space(6)
    study = optuna.create_study(sampler=foreign, pruner=CostBudgetPruner(space, BUDGET))
    limit, model = BUDGET.limit(space), CostModel(space.layers)
    over = []

    def objective(trial: optuna.Trial) -> float:
        bits = [trial.suggest_categorical(v.name, v.bits) for v in space.variables]
        over.append(model.cost(space.config(bits)) > limit)
        assert not trial.should_prune()
        return 0.0

    study.optimize(objective, n_trials=12)
    assert set(over) == {True, False}
    assert set(states(study)) == {TrialState.COMPLETE}


def test_a_budget_below_the_cheapest_assignment_is_refused_with_the_minimum():
    space = fake_space(6)
    model = CostModel(space.layers)
    minimum = model.cost(space.config(space.bottom))
    with pytest.raises(BudgetError, match="is below the cheapest assignment") as error:
        CostBudgetPruner(space, Budget.absolute(bops=minimum - 1))
    assert (error.value.limit, error.value.minimum) == (minimum - 1, minimum)
    CostBudgetPruner(space, Budget.absolute(bops=minimum))  # just reachable
