"""What the trials of a `ProgressiveBitSampler` show: parameters, attributes, encodings."""

from __future__ import annotations

import json

import optuna
import pytest
from optuna.distributions import CategoricalDistribution

from hq_optuna import attributes
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace
from tests.fake_search import fake_layers, fake_space
from tests.samplers.tables import (
    assigned,
    expected,
    history,
    new_study,
    ours,
    sampler,
    suggesting,
    tickets,
)


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
    for name, (_, choices) in by.parameters(by.ticket(trial.study, trial)).items():
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
        assert set(trial.system_attrs) == {attributes.TICKET, "constraints", "constraints:bops"}
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
