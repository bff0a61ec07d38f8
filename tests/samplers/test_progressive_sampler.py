"""`ProgressiveBitSampler` on additive tables, held against the plain sequential search."""

from __future__ import annotations

import copy
import pickle
import threading

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from hq_optuna.protocol.history import assignment
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.search import RULES
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from hq_optuna.space.search_space import SearchSpace
from tests.fake_search import fake_layers, fake_space, fake_study
from tests.samplers.tables import (
    BUDGET,
    STORAGES,
    assigned,
    expected,
    history,
    new_study,
    ours,
    sampler,
    states,
    suggesting,
    tickets,
)


def n_needed(study: optuna.Study) -> int:
    """Return how many trials the search takes when nothing is done twice."""
    log = ours(study).log(study)
    return len(log.results) + len(log.closed)


# The history


@pytest.mark.parametrize("encoding", ["layers", "compact"])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_history_is_that_of_the_sequential_search(tmp_path, storage, encoding):
    study = new_study(sampler(5, encoding=encoding), STORAGES[storage](tmp_path))
    study.optimize(suggesting(ours(study).space) if encoding == "layers" else assigned)
    assert history(study) == expected(study)
    assert len(history(study)) > 3
    assert history(study)[-1].cost <= ours(study).log(study).search.limit
    assert len(study.trials) == n_needed(study)
    assert set(states(study)) == {TrialState.COMPLETE}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize(("n_candidates", "seed"), [(1, 0), (2, 5), (4, 1), (99, 0)])
def test_every_setting_gives_the_history_of_the_sequential_search(rule, refine, n_candidates, seed):
    options = {"rule": rule, "refine": refine, "n_candidates": n_candidates, "seed": seed}
    study = new_study(sampler(8, **options))
    study.optimize(assigned)
    assert history(study) == expected(study)
    assert len(study.trials) == n_needed(study)


def test_the_seed_decides_which_layers_are_tried():
    tried = set()
    for seed in range(4):
        study = new_study(sampler(8, seed=seed, n_candidates=2))
        study.optimize(assigned, n_trials=4)
        tried.add(tuple(t.bits for t in tickets(study)))
    assert len(tried) > 1


def test_ask_and_tell_give_the_same_history_and_never_raise_at_the_end():
    study = new_study()
    while not ours(study).finished(study):
        trial = study.ask()
        study.tell(trial, assigned(trial))
    assert history(study) == expected(study)
    surplus = study.ask()  # one more does no harm
    study.tell(surplus, assigned(surplus))
    assert tickets(study)[-1].kind == "surplus"
    assert history(study) == expected(study)


@pytest.mark.parametrize("storage", ["memory", "sqlite"])
def test_three_threads_give_the_same_history(tmp_path, storage):
    study = new_study(sampler(7, encoding="compact"), STORAGES[storage](tmp_path))
    turn = threading.Semaphore(2)  # keep the threads from running in step

    def objective(trial: optuna.Trial) -> float:
        with turn:
            return assigned(trial)

    study.optimize(objective, n_jobs=3)
    assert history(study) == expected(study)
    assert TrialState.RUNNING not in states(study)
    assert TrialState.FAIL not in states(study)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_new_sampler_goes_on_where_the_study_stopped(tmp_path, storage):
    opened = STORAGES[storage](tmp_path)
    study = new_study(sampler(5, encoding="compact"), opened)
    while not ours(study).finished(study):
        study.optimize(assigned, n_trials=3)
        study = optuna.load_study(
            study_name="table", storage=opened, sampler=sampler(5, encoding="compact")
        )
    assert history(study) == expected(study)
    surplus = [ticket for ticket in tickets(study) if ticket.kind == "surplus"]
    assert len(study.trials) == n_needed(study) + len(surplus)
    assert not surplus


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_of_a_sampler_goes_on_with_the_study_of_the_original(copied):
    study = new_study()
    study.optimize(assigned, n_trials=5)
    study.sampler = copied(study.sampler)
    study.optimize(assigned)
    assert history(study) == expected(study)
    assert len(study.trials) == n_needed(study)


def test_one_sampler_serves_two_studies_of_the_same_id_in_two_storages():
    shared = sampler()
    first, second = new_study(shared, InMemoryStorage()), new_study(shared, InMemoryStorage())
    assert first._study_id == second._study_id
    first.optimize(assigned, n_trials=4)
    second.optimize(assigned)
    first.optimize(assigned)
    for study in (first, second):
        assert history(study) == expected(study)
        assert len(study.trials) == n_needed(study)


def test_a_search_whose_answer_is_trained_stops_after_that_training():
    study = fake_study(6, final=True)
    last = tickets(study)[-1]
    assert (last.kind, last.trains) == ("incumbent", True)
    assert ours(study).log(study).open is None


def test_the_search_stops_at_the_budget_by_itself_and_once_more_when_started_again():
    study = new_study()
    study.optimize(assigned)
    n = len(study.trials)
    study.optimize(assigned)
    assert len(study.trials) == n + 1  # Optuna asks before it can be told
    assert tickets(study)[-1].kind == "surplus"
    assert history(study) == expected(study)


def test_a_surplus_trial_shows_the_answer_once_more():
    study = new_study()
    objective = suggesting(ours(study).space)
    study.optimize(objective)
    answer = history(study)[-1]
    study.optimize(objective)
    assert study.trials[-1].value == answer.score
    assert assignment(study.trials[-1], study) == ours(study).space.config(answer.state)


def test_without_a_budget_everything_is_lowered():
    study = new_study(sampler(5, budget=None))
    study.optimize(assigned)
    assert history(study)[-1].state == ours(study).space.bottom
    assert history(study) == expected(study)


def test_the_budget_may_come_from_the_pruner():
    space = fake_space(6)
    pruner = CostBudgetPruner(space, BUDGET)
    study = new_study(sampler(space, budget=None), pruner=pruner)
    study.optimize(assigned)
    twin = new_study(sampler(space, budget=BUDGET))
    twin.optimize(assigned)
    assert history(study) == history(twin)


def test_the_budget_counts_in_its_own_metric():
    study = new_study(sampler(6, budget=Budget.fraction(size_bytes=0.3)))
    study.optimize(assigned)
    model = CostModel(ours(study).space.layers, "size_bytes")
    final = history(study)[-1]
    assert final.cost == model.cost(ours(study).space.config(final.state)) <= 0.3 * model.int8
    assert history(study) == expected(study)


def test_tied_layers_and_activations_of_their_own_are_lowered_as_one_and_apart():
    layers = fake_layers(7)
    space = SearchSpace.build(
        layers,
        bits=(8, 4, 2),
        activation_bits=(8, 6),
        tied=[(layers[2].name, layers[4].name)],
    )
    study = new_study(sampler(space))
    study.optimize(suggesting(space))
    assert history(study) == expected(study)
    names = {name for trial in study.trials for name in trial.params}
    tie = f"{layers[2].name}={layers[4].name}"
    assert {f"{tie}:weights", f"{tie}:activations"} <= names
    for trial, ticket in zip(study.trials, tickets(study), strict=True):
        config = assignment(trial, study)
        assert config == space.config(ticket.bits)
        assert config[layers[2].name] == config[layers[4].name]
