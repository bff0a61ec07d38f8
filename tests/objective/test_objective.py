"""`HessianObjective`: what a trial records, with our sampler and with Optuna's."""

from __future__ import annotations

import copy
import math

import optuna
import pytest
import torch
from optuna.trial import TrialState

import hq_optuna as hq
from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.errors import ResumeError
from hq_optuna.network.introspection import introspect
from hq_optuna.objective.preparation import Preparation
from hq_optuna.objective.publish import stored_sensitivity
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.history import assignment, read_history
from hq_optuna.space.cost import CostModel
from hq_optuna.space.search_space import SearchSpace
from tests.searches import BUDGET, Network, data

OF_THE_OBJECTIVE = {"score_weights", "score_activations"}
ALWAYS = {*OF_THE_OBJECTIVE, "cost", "seconds", "worker"}


def space(**choices) -> SearchSpace:
    layers = introspect(Network(), data()[0]).layers
    return SearchSpace.build(layers, **{"bits": (8, 4, 2), "pin_first_last": None, **choices})


def objective(searched: SearchSpace | None = None, **options) -> hq.HessianObjective:
    searched = space() if searched is None else searched
    return hq.HessianObjective(Network(), data(), searched, **{"scorer": "diagonal", **options})


def study(searched: SearchSpace | None = None, **options) -> optuna.Study:
    searched = space() if searched is None else searched
    chosen = {"budget": BUDGET, "n_candidates": 2, **options}
    sampler = hq.samplers.ProgressiveBitSampler(searched, **chosen)
    pruner = hq.pruners.CostBudgetPruner(searched, chosen["budget"])
    return optuna.create_study(study_name="s", sampler=sampler, pruner=pruner)


@pytest.fixture(scope="module")
def finished() -> optuna.Study:
    """A finished search by `study.optimize` alone."""
    done = study()
    done.optimize(objective())
    return done


def ticket(trial: optuna.trial.FrozenTrial) -> Ticket:
    found = Ticket.read(trial.system_attrs)
    assert found is not None
    return found


def candidates(of: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in of.trials if ticket(trial).kind == "candidate"]


def records(of: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in of.trials if ticket(trial).kind == "incumbent"]


def test_plain_optimize_stops_by_itself_at_the_budget(finished):
    assert {trial.state for trial in finished.trials} == {TrialState.COMPLETE}
    cost = [trial.user_attrs["cost"] for trial in records(finished)]
    limit = BUDGET.limit(space())
    assert cost[0] == CostModel(space().layers).int8
    assert cost[-1] <= limit
    assert sum(c > limit for c in cost) >= 2


def test_the_best_trial_is_the_final_record_with_the_bits_of_all_layers(finished):
    best = finished.best_trial
    final = read_history(finished).incumbent
    assert ticket(best).kind == "incumbent"
    assert set(best.params) == {"first", "middle", "last"}
    assert {name: pair.weight_bits for name, pair in final.config.items()} == best.params
    assert best.user_attrs[attributes.COST] <= BUDGET.limit(space())
    assert best.value == math.nextafter(final.winner.score, -math.inf)


def test_a_candidates_score_is_the_sum_of_the_stored_sensitivities(finished):
    table = stored_sensitivity(finished)
    assert table is not None
    for trial in candidates(finished):
        config = assignment(trial, finished)
        weights = math.fsum(table.weights[n][pair.weight_bits] for n, pair in config.items())
        inputs = math.fsum(table.activations[n][p.activation_bits] for n, p in config.items())
        assert trial.user_attrs["score_weights"] == weights
        assert trial.user_attrs["score_activations"] == inputs
        assert trial.value == weights + inputs > 0


def test_every_candidate_tells_where_it_comes_from(finished):
    closing = records(finished)
    model = CostModel(space().layers)
    first, *others = candidates(finished)
    assert set(first.user_attrs) == {"kind", "step", "slot", *ALWAYS}
    for trial in (first, *others):
        said = trial.user_attrs
        assert (said["kind"], said["step"], said["slot"]) == (
            "candidate",
            ticket(trial).step,
            ticket(trial).slot,
        )
        assert said["cost"] == model.cost(assignment(trial, finished))
        assert said["seconds"] >= 0
        assert said["worker"] == worker_identity.short_name(worker_identity.worker_id())
    n_moves = 0
    for trial in others:
        said = trial.user_attrs
        parent = closing[said["step"] - 1]
        assert said["parent"] == parent.number
        changed = {n for n, bits in trial.params.items() if parent.params[n] != bits}
        if "from_bits" in said:
            n_moves += 1
            assert changed == {said["layer"]}
            assert said["from_bits"] == parent.params[said["layer"]]
            assert said["to_bits"] == trial.params[said["layer"]] < said["from_bits"]
        else:  # a swap says all its changes in words
            assert len(changed) > 1
            assert all(name in said["layer"] for name in changed)
    assert n_moves >= 4


def test_candidates_losses_are_measured_where_they_shall_be():
    done = study()
    done.optimize(objective(measure_candidates=True))
    plain = study()
    plain.optimize(objective())
    assert all(trial.user_attrs["calibration_loss"] > 0 for trial in done.trials)
    assert [trial.value for trial in done.trials] == [trial.value for trial in plain.trials]


def test_a_record_names_its_winner_and_repeats_what_it_scored(finished):
    for trial in records(finished):
        said = trial.user_attrs
        winner = finished.trials[said["winner"]]
        assert set(said) == {"kind", "step", "winner", *ALWAYS}
        assert winner.number == ticket(trial).origin
        assert trial.value == math.nextafter(winner.value, -math.inf)
        assert assignment(trial, finished) == assignment(winner, finished)
        for name in (*OF_THE_OBJECTIVE, "cost"):
            assert said[name] == winner.user_attrs[name]


def test_a_trial_is_feasible_if_and_only_if_it_is_within_the_budget(finished):
    limit = BUDGET.limit(space())
    for trial in finished.trials:
        excess = trial.user_attrs["cost"] / limit - 1
        assert trial.constraints["bops"] == excess
        assert (excess <= 0) == (trial.user_attrs["cost"] <= limit)
        # optuna-dashboard up to 0.21 reads the older form.
        assert trial.system_attrs["constraints"] == [excess]


def test_the_trials_dataframe_reads_well(finished):
    pytest.importorskip("pandas")
    frame = finished.trials_dataframe()
    user = {
        *("kind", "step", "slot", "parent", "layer", "from_bits", "to_bits", "winner"),
        *ALWAYS,
    }
    assert {f"user_attrs_{name}" for name in user} <= set(frame.columns)
    params = {f"params_{name}" for name in ("first", "middle", "last")}
    assert {"value_score_nats", *params} <= set(frame.columns)
    assert not any("hq:" in str(column) for column in frame.columns if "user_attrs" in str(column))
    assert len(frame) == len(finished.trials)
    kinds = frame["user_attrs_kind"].value_counts()
    assert kinds["incumbent"] == len(records(finished))


def test_ask_and_tell_work_as_well(finished):
    asked, score = study(), objective()
    while not asked.sampler.finished(asked):
        trial = asked.ask()
        asked.tell(trial, score(trial))
    assert [(t.params, t.value) for t in asked.trials] == [
        (t.params, t.value) for t in finished.trials
    ]


def test_compact_candidates_have_two_parameters_and_the_same_history(finished):
    compact = study(encoding="compact")
    compact.optimize(objective())
    assert [t.value for t in compact.trials] == [t.value for t in finished.trials]
    for one, other in zip(compact.trials, finished.trials, strict=True):
        assert assignment(one, compact) == assignment(other, finished)
        if ticket(one).kind == "incumbent":
            assert one.params == other.params
        else:
            assert set(one.params) in (set(), {"layer", "bits"})
    assert compact.best_trial.params == finished.best_trial.params


def test_the_callers_network_and_random_state_are_left_as_they_were():
    network = Network()
    network.first.weight.grad = torch.ones_like(network.first.weight)
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    searched, started = space(), study()
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    started.optimize(hq.HessianObjective(network, data(), searched), n_trials=6)
    assert torch.equal(torch.get_rng_state(), expected)
    assert [module.training for module in network.modules()] == modes
    assert modes[0]
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(network.first.weight.grad, torch.ones_like(network.first.weight))
    assert network.last.weight.grad is None


def test_curvature_is_measured_once_and_a_second_worker_takes_it_from_the_study(monkeypatch):
    calls = []
    real = Preparation.table

    def counting(self):
        calls.append(1)
        return real(self)

    monkeypatch.setattr(Preparation, "table", counting)
    shared = study()
    shared.optimize(objective(), n_trials=5)
    shared.optimize(objective(), n_trials=5)
    assert len(calls) == 1
    alone = study()
    alone.optimize(objective(), n_trials=10)
    assert [t.value for t in shared.trials] == [t.value for t in alone.trials]


def test_an_enqueued_assignment_is_scored_and_left_out_of_the_search(finished):
    mine = study()
    score = objective()
    mine.optimize(score, n_trials=3)
    mine.enqueue_trial({"first": 2, "middle": 2, "last": 2})
    mine.optimize(score)
    free = next(trial for trial in mine.trials if ticket(trial).kind == "free")
    assert free.params == {"first": 2, "middle": 2, "last": 2}
    assert free.user_attrs["cost"] == CostModel(space().layers).uniform(2, 2)
    assert set(free.user_attrs) == ALWAYS
    assert [t.value for t in mine.trials if t.number != free.number] == [
        t.value for t in finished.trials
    ]


def test_what_is_no_longer_needed_is_pruned_before_it_is_scored(monkeypatch):
    done, score = study(), objective()
    done.optimize(score)
    scorer = score.prepare(done)
    monkeypatch.setattr(scorer, "score", lambda config: pytest.fail("scored"))
    done.optimize(score)
    assert done.trials[-1].state == TrialState.PRUNED
    assert done.trials[-1].params == {}


def test_an_objective_for_another_search_is_refused_and_leaves_no_trial_running():
    first = study()
    first.optimize(objective(), n_trials=2)
    other = hq.HessianObjective(Network(seed=5), data(), space(), scorer="diagonal")
    with pytest.raises(ResumeError, match="the network's weights or structure"):
        first.optimize(other)
    assert TrialState.RUNNING not in {trial.state for trial in first.trials}


SAMPLERS = {
    "TPE": lambda: optuna.samplers.TPESampler(seed=0, n_startup_trials=4),
    "NSGA-II": lambda: optuna.samplers.NSGAIISampler(seed=0, population_size=6),
    "random": lambda: optuna.samplers.RandomSampler(seed=0),
}


@pytest.mark.parametrize("by", SAMPLERS)
def test_other_samplers_search_the_same_space_under_the_same_constraint(by):
    searched = space()
    free = optuna.create_study(
        sampler=SAMPLERS[by](), pruner=hq.pruners.CostBudgetPruner(searched, BUDGET)
    )
    free.optimize(objective(searched), n_trials=14)
    limit, model = BUDGET.limit(searched), CostModel(searched.layers)
    assert {trial.state for trial in free.trials} == {TrialState.COMPLETE}
    for trial in free.trials:
        assert set(trial.params) == {"first", "middle", "last"}
        assert set(trial.user_attrs) == ALWAYS
        config = searched.config([trial.params[v.name] for v in searched.variables])
        assert trial.user_attrs["cost"] == model.cost(config)
        assert trial.constraints["bops"] == model.cost(config) / limit - 1
    feasible = [trial for trial in free.trials if trial.user_attrs["cost"] <= limit]
    assert 0 < len(feasible) < 14
    assert free.best_trial.value == min(trial.value for trial in feasible)


def test_without_a_budget_there_is_no_constraint():
    free = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    free.optimize(objective(), n_trials=2)
    assert all(trial.constraints == {} for trial in free.trials)


def test_tied_layers_and_activations_of_their_own_are_scored_as_shown():
    searched = space(tied=[("first", "last")], activation_bits=(8, 4))
    tied = study(searched)
    tied.optimize(objective(searched))
    best = tied.best_trial
    assert set(best.params) == {
        *("first=last:weights", "first=last:activations"),
        *("middle:weights", "middle:activations"),
    }
    config = assignment(best, tied)
    assert config["first"] == config["last"]
    assert config["first"].weight_bits == best.params["first=last:weights"]
    assert CostModel(searched.layers).cost(config) == best.user_attrs["cost"]


def test_pinned_layers_are_parameters_of_the_records():
    searched = space(pin_first_last=8)
    pinned = study(searched, budget=hq.Budget.fraction(bops=0.8))
    pinned.optimize(objective(searched))
    assert pinned.best_trial.params == {"first": 8, "middle": 4, "last": 8}


def test_one_objective_serves_two_studies_in_memory():
    score = objective()
    for _ in range(2):
        one = study()
        one.optimize(score, n_trials=2)
        read_history(one)


def test_the_precision_of_candidates_is_part_of_a_search() -> None:
    resumed = study()
    resumed.optimize(objective(), n_trials=1)
    with pytest.raises(ResumeError, match="precision of candidates' forward passes"):
        resumed.optimize(objective(precision="bfloat16"), n_trials=1)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="one of float32"):
        objective(precision="half")


def test_settings_that_an_objective_does_not_read_are_refused() -> None:
    with pytest.raises(TypeError, match="n_candidates is a setting of the search"):
        objective(n_candidates=3)
    with pytest.raises(TypeError, match="There is no setting 'memory'"):
        objective(memory=0)
