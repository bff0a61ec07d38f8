"""A study read back as a search agrees with the sampler's own record of it."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.errors import ResumeError
from hq_optuna.protocol.history import Reference, assignment, read_history
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.worker_identity import short_name, worker_id
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from hq_optuna.space.search_space import SearchSpace
from tests.fake_search import fake_layers, fake_study, fake_table
from tests.samplers.tables import (
    add,
    fill_step,
    history,
    new_study,
    open_ticket,
    ours,
    record_ticket,
    sampler,
    tickets,
    total,
    update,
)


@pytest.mark.parametrize("encoding", ["layers", "compact"])
@pytest.mark.parametrize("rule", ["min", "ratio"])
def test_the_records_are_the_incumbents_of_the_step_log(encoding, rule):
    study = fake_study(8, encoding=encoding, rule=rule)
    found = read_history(study)
    log = ours(study).log(study)
    assert [r.step for r in found.records] == [c.incumbent.step for c in log.closed]
    assert [r.number for r in found.records] == [c.number for c in log.closed]
    for record, closed in zip(found.records, log.closed, strict=True):
        winner, incumbent = record.winner, closed.incumbent
        assert (winner.state, winner.score, winner.cost, (winner.step, winner.slot)) == (
            incumbent.state,
            incumbent.score,
            incumbent.cost,
            incumbent.origin,
        )
        assert record.config == found.space.config(incumbent.state)
        assert winner.number == closed.winner
    assert {(c.step, c.slot) for c in found.candidates if c.counted} == set(log.results)
    assert found.met
    assert found.incumbent == found.records[-1]


def test_a_step_is_judged_against_what_was_trained_last_or_the_start():
    study = fake_study(6, train_every=1, final=True)
    found = read_history(study)
    (start,) = found.step(0)
    assert found.reference(1) == Reference(
        *(0, start.score, start.score_weights, start.score_activations, start.calibration_loss)
    )
    # A training of a fake search takes 0.1 nats; a trained network's own score is 0.
    assert found.reference(2) == Reference(1, 0.0, 0.0, 0.0, 0.4)
    last = found.records[-1]
    assert last.training["kind"] == "final"
    assert found.reference(last.step).step == last.step - 2  # the answer's own is trained last


def test_before_the_start_is_scored_there_is_nothing_to_judge_against():
    assert read_history(fake_study(6, n_trials=0)).reference(0) is None


def test_candidates_say_what_was_changed_and_what_it_scored():
    study = fake_study(6)
    found = read_history(study)
    names = [v.name for v in found.space.variables]
    model = CostModel(found.space.layers)
    assert found.candidates[0].variable is None
    for candidate in found.candidates:
        trial = study.trials[candidate.number]
        assert candidate.score == trial.value == total(found.space, candidate.state)
        assert candidate.score == candidate.score_weights + candidate.score_activations
        assert candidate.calibration_loss == trial.user_attrs[attributes.CALIBRATION_LOSS]
        assert candidate.cost == model.cost(found.space.config(candidate.state))
        assert (candidate.seconds, candidate.worker) == (0.25, "box:1234")
        if candidate.variable in names:
            parent = found.records[candidate.step - 1].winner.state
            place = names.index(candidate.variable)
            assert parent[place] == candidate.from_bits
            assert candidate.state[place] == candidate.to_bits
            assert sum(a != b for a, b in zip(parent, candidate.state, strict=True)) == 1
    for step in range(len(found.records)):
        assert [c.slot for c in found.step(step)] == list(range(len(found.step(step))))


def test_info_facts_and_sensitivity_come_back_as_they_were_written():
    facts = {"accuracy_before": 0.98, "accuracy_after": 1 / 3}
    study = fake_study(
        5, budget=Budget.fraction(bops=0.5), facts=facts, skipped=(("emb", "Embedding", "why"),)
    )
    found = read_history(study)
    assert found.facts == facts
    assert found.sensitivity == fake_table(found.space)
    assert found.info.limit == 0.5 * found.info.int8
    assert found.info.skipped == (("emb", "Embedding", "why"),)
    assert found.space == ours(study).space


def test_a_study_without_the_objectives_attributes_is_readable():
    study = fake_study(5, bare=True, sensitivity=False)
    found = read_history(study)
    assert found.sensitivity == {}
    assert all(math.isnan(c.score_weights) for c in found.candidates)
    assert all(c.seconds >= 0 for c in found.candidates)
    assert {c.worker for c in found.candidates} == {short_name(worker_id())}


def test_an_unfinished_search_has_the_records_so_far():
    study = fake_study(6, n_trials=4)
    found = read_history(study)
    assert len(found.records) == 1
    assert not found.met
    assert len(found.candidates) == 3
    empty = read_history(fake_study(6, n_trials=0))
    assert (empty.incumbent, empty.candidates, empty.met) == (None, (), False)


def test_trials_are_counted_by_how_they_ended():
    study = fake_study(6, n_trials=3)
    study.ask()
    for state in (TrialState.FAIL, TrialState.FAIL, TrialState.PRUNED):
        study.tell(study.ask(), state=state)
    found = read_history(study)
    assert (found.n_running, found.n_failed, found.n_pruned) == (1, 2, 1)


def test_what_does_not_belong_to_the_search_is_shown_and_not_counted():
    """Stale tickets with low numbers, duplicates, second records: read as the step log does."""
    study = fake_study(6, n_trials=0)
    bottom = ours(study).space.bottom
    for kind in ("candidate", "incumbent"):
        stale = Ticket(kind, 0, 0, "0" * 12, bottom, origin=0, worker="away/1/2/3")
        add(study, stale, -5.0)
    full = fake_study(6, n_trials=0)
    for s in (study, full):
        s.optimize(lambda trial: total(ours(trial.study).space, _bits(trial)))
    found = read_history(study)
    assert [(r.step, r.winner.state) for r in found.records] == [
        (r.step, r.winner.state) for r in read_history(full).records
    ]
    assert [c.number for c in found.candidates if not c.counted] == [0]
    assert found.step(0)[0].number == 2
    again = next(t for t in tickets(study) if t.kind == "candidate" and t.step == 2)
    number = add(study, replace(again, worker="away/1/2/3"), -9.0)
    record = next(t for t in tickets(study) if t.kind == "incumbent" and t.step == 2)
    add(study, record, -9.0)
    later = read_history(study)
    assert [(r.number, r.winner.number) for r in later.records] == [
        (r.number, r.winner.number) for r in found.records
    ]
    assert [c.number for c in later.candidates if not c.counted] == [0, number]


def _bits(trial):
    return [trial.suggest_categorical(v.name, v.bits) for v in ours(trial.study).space.variables]


def test_a_record_that_names_no_candidate_is_passed_over():
    study = fake_study(6, n_trials=0)
    log = StepLog(ours(study).log(study).search)
    study.optimize(lambda trial: 1.0, n_trials=1)
    update(study, log)
    add(study, record_ticket(log, origin=77), 0.0)
    assert read_history(study).records == ()
    add(study, record_ticket(log), 0.0)
    assert len(read_history(study).records) == len(history(study)) == 1


def test_what_scored_other_bits_than_its_slot_has_is_shown_and_not_counted():
    """A damaged ticket, or one from another view of the record: right step, wrong bits."""
    study = fake_study(6, n_trials=2)
    log = update(study, StepLog(ours(study).log(study).search))
    wrong = open_ticket(log, 0, bits=log.search.space.bottom)
    number = add(study, wrong, -5.0)
    record = replace(wrong, kind="incumbent", origin=number)
    add(study, record, -5.0)
    found = read_history(study)
    assert [r.step for r in found.records] == [0]
    assert [c.number for c in found.candidates if not c.counted] == [number]
    assert found.step(1) == ()
    fill_step(study, log)
    add(study, record, -5.0)  # a complete step does not make it right
    assert [r.step for r in read_history(study).records] == [0]
    assert history(study) == history(study)[:1]


def test_a_record_of_a_step_that_is_not_complete_is_passed_over_until_it_is():
    study = fake_study(6, n_trials=2)
    log = update(study, StepLog(ours(study).log(study).search))
    ticket = open_ticket(log, 0)
    number = add(study, ticket, 1.0)
    add(study, replace(ticket, kind="incumbent", origin=number), 1.0)
    assert [r.step for r in read_history(study).records] == [0]
    assert len(history(study)) == 1
    for slot in range(1, len(log.open.states)):
        add(study, open_ticket(log, slot), 2.0)
    assert [r.step for r in read_history(study).records] == [0, 1]
    assert len(history(study)) == 2


def test_it_is_read_the_same_whatever_sampler_the_study_is_opened_with():
    study = fake_study(6)
    plain = optuna.load_study(study_name=study.study_name, storage=study._storage)
    assert read_history(plain) == read_history(study)


@pytest.mark.parametrize("layers", [5, 9])
def test_what_another_search_scored_in_the_same_new_study_is_passed_over(layers):
    study = fake_study(6, n_trials=5)
    before = read_history(study)
    # Two searches may both find a study empty; the one that is refused may have scored by then.
    ticket = replace(tickets(study)[0], parent="other", bits=(8,) * layers)
    add(study, ticket, 0.5)
    after = read_history(study)
    assert (after.candidates, after.records) == (before.candidates, before.records)


def test_a_search_that_is_being_prepared_is_not_called_another_kind_of_study():
    study = optuna.create_study(study_name="mine")
    study.set_user_attr(attributes.FINGERPRINT, {"network": "0" * 12})
    with pytest.raises(ResumeError, match="'mine' is being prepared"):
        read_history(study)


def test_a_study_of_another_kind_is_refused_by_name():
    with pytest.raises(ResumeError, match="'mine' is not a bit search of hq_optuna") as error:
        read_history(optuna.create_study(study_name="mine"))
    assert error.value.changed == ("kind of study",)


@pytest.mark.parametrize("encoding", ["layers", "compact"])
def test_assignment_gives_all_layers_of_any_trial(encoding):
    study = fake_study(7, encoding=encoding)
    space = ours(study).space
    seen = 0
    for trial, ticket in zip(study.get_trials(), tickets(study), strict=True):
        config = assignment(trial, study)
        assert config == space.config(ticket.bits)
        assert list(config) == [layer.name for layer in space.layers]
        seen += 1
    assert seen > 10


def test_assignment_of_a_running_trial_needs_no_study():
    study = fake_study(6, n_trials=2)
    trial = study.ask()
    assert assignment(trial) == ours(study).space.config(tickets(study)[-1].bits)


def test_assignment_works_in_a_study_that_only_the_sampler_wrote():
    layers = fake_layers(4)
    space = SearchSpace.build(layers, bits=(8, 4))
    study = new_study(sampler(space, encoding="compact", budget=Budget.fraction(bops=0.9)))
    trial = study.ask()
    assert assignment(trial) == space.start


def test_assignment_says_what_is_missing():
    study = fake_study(5, n_trials=1)
    study.enqueue_trial({v.name: 4 for v in ours(study).space.variables})
    free = study.ask()
    with pytest.raises(ValueError, match="Trial 1 is not a candidate or step record"):
        assignment(free)
    with pytest.raises(ValueError, match=r"call assignment\(trial, study\)"):
        assignment(study.trials[0])
    other = optuna.create_study(study_name="other")
    with pytest.raises(ValueError, match="'other' does not hold a search space"):
        assignment(study.trials[0], other)
    with pytest.raises(ValueError, match="Trial 0 is not a candidate"):
        assignment(other.ask())


def test_users_get_the_functions_whatever_was_imported_before():
    program = (
        "import hq_optuna as hq; hq.BitSearch;"
        "print([name for name in ('assignment', 'introspect') if not callable(getattr(hq, name))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
