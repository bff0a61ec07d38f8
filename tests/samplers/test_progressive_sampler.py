"""`ProgressiveBitSampler` on additive tables, held against the plain sequential search."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections import Counter

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import InMemoryStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from hq_optuna import attrs, workers
from hq_optuna.attrs import Ticket
from hq_optuna.cost import Budget, CostModel
from hq_optuna.errors import BudgetError, ResumeError
from hq_optuna.history import assignment
from hq_optuna.layers import LayerSpec
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.search import RULES
from hq_optuna.space import SearchSpace
from tests.fake_search import fake_layers, fake_score, fake_space, fake_study, fake_table
from tests.samplers.tables import (
    BUDGET,
    STORAGES,
    add,
    assigned,
    expected,
    fill_step,
    history,
    new_study,
    open_ticket,
    ours,
    sampler,
    states,
    suggesting,
    tickets,
    total,
    update,
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
    assert ours(study).log(study).finished


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


# What a trial shows


def test_layers_shows_the_bits_of_every_variable_and_they_are_the_tickets():
    study = new_study(sampler(6, encoding="layers"))
    study.optimize(suggesting(ours(study).space))
    names = [variable.name for variable in ours(study).space.variables]
    for trial, ticket in zip(study.trials, tickets(study), strict=True):
        assert trial.params == dict(zip(names, ticket.bits, strict=True))
        for name, variable in zip(names, ours(study).space.variables, strict=True):
            assert trial.distributions[name] == CategoricalDistribution(variable.bits)


def showing(trial: optuna.Trial) -> float:
    """Ask for whatever the sampler shows of the trial, as `HessianObjective` does."""
    by = ours(trial.study)
    for name, (_, choices) in by.parameters(by.ticket(trial.study, trial._trial_id)).items():
        trial.suggest_categorical(name, choices)
    return assigned(trial)


def test_compact_shows_the_changed_layer_and_records_show_all_layers():
    study = new_study(sampler(6, encoding="compact", refine=False))
    study.optimize(showing)
    log = ours(study).log(study)
    by_record = {closed.number: closed for closed in log.closed}
    before = None
    for trial, ticket in zip(study.trials, tickets(study), strict=True):
        if ticket.kind == "incumbent":
            before = by_record[trial.number].incumbent.state
            shown = ours(study).space.parameters(ticket.bits)
            assert trial.params == {name: bits for name, (bits, _) in shown.items()}
            assert len(trial.params) == 6  # pinned layers too
        elif ticket.step == 0:
            assert trial.params == {}
        else:
            assert set(trial.params) == {"layer", "bits"}
            names = [variable.name for variable in ours(study).space.variables]
            place = names.index(trial.params["layer"])
            changed = [
                i for i, (a, b) in enumerate(zip(before, ticket.bits, strict=True)) if a != b
            ]
            assert changed == [place]
            assert ticket.bits[place] == trial.params["bits"]
            assert ticket.from_bits == before[place]
    assert before == history(study)[-1].state


def test_a_candidate_names_the_record_its_step_started_from():
    study = new_study()
    study.optimize(assigned)
    numbers = [closed.number for closed in ours(study).log(study).closed]
    for ticket in tickets(study):
        if ticket.kind == "candidate":
            assert ticket.origin == (numbers[ticket.step - 1] if ticket.step else None)


def test_more_than_thirty_variables_are_written_compactly_unless_asked_otherwise():
    assert ProgressiveBitSampler(fake_space(32)).encoding == "layers"  # two layers are pinned
    assert ProgressiveBitSampler(fake_space(33)).encoding == "compact"
    assert ProgressiveBitSampler(fake_space(33), encoding="layers").encoding == "layers"


@pytest.mark.parametrize("name", ["layer", "bits"])
def test_a_layer_with_the_name_of_a_compact_parameter_is_written_in_full(name):
    layers = [*fake_layers(33), LayerSpec(name, "Linear", (4, 4), 0, 16, 1, 4)]
    space = SearchSpace.build(layers, bits=(8, 4))
    assert ProgressiveBitSampler(space).encoding == "layers"
    with pytest.raises(ValueError, match=f"a layer is named '{name}'. Use encoding='layers'"):
        ProgressiveBitSampler(space, encoding="compact")


def test_a_candidate_costs_one_small_attribute_whatever_the_number_of_layers():
    study = new_study(sampler(62, encoding="compact", n_candidates=8))
    study.optimize(assigned, n_trials=12)
    for trial in study.trials:
        assert set(trial.system_attrs) == {attrs.TICKET}
        assert trial.user_attrs == {}
        assert trial.params == {}
        assert len(json.dumps(trial.system_attrs)) < 2045  # Optuna's own habit of small attributes


def test_parameters_outside_the_space_are_drawn_at_random_and_change_nothing():
    study = new_study()

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("temperature", 0, 1)
        return suggesting(ours(trial.study).space)(trial)

    study.optimize(objective)
    assert history(study) == expected(study)
    assert len({trial.params["temperature"] for trial in study.trials}) == len(study.trials)


def test_an_objective_with_other_choices_than_the_space_fails_in_words():
    study = new_study()
    name = ours(study).space.variables[0].name
    with pytest.raises(ValueError, match="dynamic value space"):  # Optuna's words
        study.optimize(lambda trial: trial.suggest_categorical(name, (8, 4)))
    trial = study.ask()
    frozen = study._storage.get_trial(trial._trial_id)
    with pytest.raises(ValueError, match="Give both the same space"):
        study.sampler.sample_independent(study, frozen, name, CategoricalDistribution((1, 2)))


# Slots


def test_workers_that_ask_one_after_the_other_get_different_slots():
    study = new_study(sampler(8, n_candidates=4))
    study.optimize(assigned, n_trials=2)
    asked = [study.ask() for _ in range(4)]
    assert [ticket.slot for ticket in tickets(study)[2:]] == [0, 1, 2, 3]
    study.ask()  # nothing is free: the slot with the fewest runners is backed up
    study.ask()
    assert [ticket.slot for ticket in tickets(study)[6:]] == [0, 1]
    study.tell(asked[2], 1.0)
    study.ask()
    assert tickets(study)[-1].slot == 3


def test_a_running_trial_without_a_ticket_yet_reserves_one_free_slot():
    study = new_study(sampler(8, n_candidates=4))
    study.optimize(assigned, n_trials=2)
    for _ in range(2):
        study._storage.create_new_trial(study._study_id)
    study.ask()
    assert tickets(study)[-1].slot == 2


def test_trials_that_lost_their_worker_before_their_ticket_do_not_stop_the_search():
    study = new_study()
    for _ in range(5):
        study._storage.create_new_trial(study._study_id)
    study.optimize(assigned)
    assert history(study) == expected(study)


def test_who_does_not_back_up_others_gets_nothing_to_do_where_nothing_is_left():
    study = new_study(sampler(8, n_candidates=3))
    study.optimize(assigned, n_trials=2)
    ours(study).backs_up = False
    asked = [study.ask() for _ in range(4)]
    assert [t.kind for t in tickets(study)[2:]] == ["candidate"] * 3 + ["surplus"]
    for trial in asked:
        study.tell(trial, assigned(trial))
    asked = [study.ask() for _ in range(3)]  # the step is complete, one of them records it
    assert [t.kind for t in tickets(study)[6:]] == ["incumbent", "surplus", "surplus"]
    for trial in asked:
        study.tell(trial, assigned(trial))
    study.optimize(assigned)
    assert history(study) == expected(study)


def test_who_does_not_back_up_others_leaves_what_a_lower_ticket_is_about_to_take():
    study = new_study(sampler(8, n_candidates=2))
    study.optimize(assigned, n_trials=2)
    ours(study).backs_up = False
    study._storage.create_new_trial(study._study_id)  # no ticket yet
    mine = [study.ask() for _ in range(2)]
    assert [(t.kind, t.slot) for t in tickets(study)[3:]] == [("candidate", 1), ("surplus", 0)]
    study.tell(mine[0], 1.0)
    add(study, open_ticket(ours(study).log(study), 0), 1.0)
    study.ask()
    assert tickets(study)[-1].kind == "surplus"  # the step is complete, and is recorded by them


def test_a_stale_ticket_is_ignored_and_its_trial_changes_nothing():
    study = new_study()
    study.optimize(assigned, n_trials=2)
    stale = Ticket("candidate", 1, 0, "0" * 12, ours(study).space.bottom)
    add(study, stale, -1.0)
    study.optimize(assigned)
    assert history(study) == expected(study)


def test_duplicates_and_second_records_by_hand_change_nothing():
    study = new_study(sampler(7))
    while not ours(study).finished(study):
        log = ours(study).log(study)
        add(study, open_ticket(log, 0), total(log.search.space, log.open.states[0]))
        study.optimize(assigned, n_trials=2)
    assert history(study) == expected(study)


class Broken(Exception):
    """What an objective may raise."""


def test_an_exception_gives_the_slot_back_and_the_history_is_the_same():
    study = new_study(sampler(7))
    n_calls = Counter()

    def objective(trial: optuna.Trial) -> float:
        ticket = ours(trial.study).ticket(trial.study, trial._trial_id)
        n_calls[ticket.kind, ticket.step, ticket.slot] += 1
        if n_calls[ticket.kind, ticket.step, ticket.slot] == 1:
            raise Broken
        return assigned(trial)

    study.optimize(objective, catch=(Broken,))
    assert history(study) == expected(study)
    assert Counter(states(study))[TrialState.FAIL] == n_needed(study)
    assert set(n_calls.values()) == {2}


@pytest.mark.parametrize("end", ["nan", "pruned"])
def test_a_candidate_without_a_result_is_tried_again(end):
    study = new_study()

    def objective(trial: optuna.Trial) -> float:
        if trial.number in (0, 2, 3):
            if end == "pruned":
                raise optuna.TrialPruned
            return float("nan")
        return assigned(trial)

    study.optimize(objective)
    assert history(study) == expected(study)
    assert len(study.trials) == n_needed(study) + 3


def test_ctrl_c_gives_the_trial_back_and_the_next_optimize_goes_on():
    study = new_study()

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 4:
            raise KeyboardInterrupt
        return assigned(trial)

    with pytest.raises(KeyboardInterrupt):
        study.optimize(objective)
    assert states(study)[-1] == TrialState.FAIL
    lost = tickets(study)[-1]
    study.optimize(assigned)
    assert (tickets(study)[5].step, tickets(study)[5].slot) == (lost.step, lost.slot)
    assert history(study) == expected(study)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_whatever_interrupts_the_ticket_leaves_no_trial_running(monkeypatch, error):
    study = new_study()
    study.optimize(assigned, n_trials=3)

    def interrupt(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(study._storage, "set_trial_system_attr", interrupt)
        with pytest.raises(error):
            study.optimize(assigned, n_trials=1)
    assert states(study)[-1] == TrialState.FAIL
    study.optimize(assigned)
    assert history(study) == expected(study)


def test_a_retried_trial_keeps_its_parameters_and_its_slot():
    """As Optuna retries trials whose heartbeat stopped: a copy that waits with its parameters."""
    study = new_study()
    objective = suggesting(ours(study).space)
    study.optimize(objective, n_trials=2)
    asked = [study.ask() for _ in range(3)]
    objective(asked[1])
    storage = study._storage
    dead = {**tickets(study)[3].to_json(), "worker": "away/1/2/3"}
    storage.set_trial_system_attr(asked[1]._trial_id, attrs.TICKET, dead)
    study.tell(asked[1], state=TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback()(study, study.trials[3])
    study.optimize(objective, n_trials=1)
    retried = study.trials[-1]
    assert retried.params == study.trials[3].params
    assert tickets(study)[-1].slot == 1
    assert tickets(study)[-1].worker == workers.worker_id()
    for trial in (asked[0], asked[2]):
        study.tell(trial, objective(trial))
    study.optimize(objective)
    assert history(study) == expected(study)


@pytest.mark.parametrize("how", ["enqueue", "add"])
def test_trials_that_somebody_put_in_the_queue_are_left_alone(how):
    study = new_study()
    space = ours(study).space
    objective = suggesting(space)
    study.optimize(objective, n_trials=3)
    mine = {variable.name: 4 for variable in space.variables}
    if how == "enqueue":
        study.enqueue_trial(mine)
    else:
        dists = {v.name: CategoricalDistribution(v.bits) for v in space.variables}
        waiting = optuna.create_trial(state=TrialState.WAITING, params=mine, distributions=dists)
        study.add_trial(waiting)
    study.optimize(objective)
    free = [
        trial for trial, t in zip(study.trials, tickets(study), strict=True) if t.kind == "free"
    ]
    assert [trial.params for trial in free] == [mine]
    assert free[0].value == sum(fake_score(fake_table(space), space.config([4] * len(mine))))
    assert history(study) == expected(study)


# What is refused


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
