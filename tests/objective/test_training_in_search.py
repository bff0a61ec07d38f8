"""Winners that are trained inside a search: what is recorded, kept, and gone on from."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import hq_optuna as hq
from hq_optuna import attributes
from hq_optuna.artifacts.store import Reference, open_artifacts
from hq_optuna.errors import ArtifactError, DataError, ResumeError
from hq_optuna.objective.scorer_setup import ScorerSetup
from hq_optuna.objective.tensors import get_tensors
from hq_optuna.optuna_internals import database_of
from hq_optuna.protocol.history import read_history
from hq_optuna.rises import CrossEntropy
from hq_optuna.storages import sqlite_url
from hq_optuna.training import TrainingSettings
from hq_optuna.training.plan import TrainingPlan
from tests.searches import Network, data
from tests.training_searches import SHORT, TRAIN, log_of, plan, search


def test_winners_and_answer_are_trained_and_recorded(alone):
    found, study = alone
    records = read_history(study).records
    trained = [record.training["kind"] for record in records if record.training is not None]
    # Every step but step 0, and not the last winner just before the answer is.
    assert trained == ["step"] * (len(records) - 3) + ["final"]
    last = records[-1].training
    assert last["epochs"] == 2
    assert {"accuracy_before", "accuracy_after", "loss_before", "loss_after"} <= last.keys()
    assert last["samples"] == 40
    assert records[-1].config == records[-2].config
    assert study.best_trial.number == records[-1].number
    assert log_of(study).open is None
    # The record's value is the rise of the trained network's outputs over the float network's.
    network = found.objective.answer(study, records[-1].config)
    with torch.no_grad():
        outputs, expected = network(data()[0]), Network().eval()(data()[0])
    rise = CrossEntropy().fitted([expected])(expected, outputs)
    assert float(rise) / 24 == pytest.approx(records[-1].training["score"], rel=0.05)
    assert study.best_value <= records[-1].training["score"]


def test_what_the_next_steps_are_judged_against_is_the_trained_network(alone):
    found, study = alone
    history = read_history(study)
    trained = [record for record in history.records if record.trained is not None]
    assert len(trained) > 2
    for record in trained:
        kept, trial = record.trained, study.trials[record.number]
        assert kept.step == record.step
        assert kept.score == record.training["score"]
        assert kept.calibration_loss == trial.user_attrs[attributes.CALIBRATION_LOSS]
        assert kept.score_weights == 0.0  # its weights are the rounded ones
        scorer = found.objective.scorer_at(study, record.number)
        assert kept.score == scorer.score(record.config).total
    assert history.records[0].trained is None


def test_one_search_on_two_studies_keeps_their_networks_apart(tmp_path):
    found = search(training=plan())
    one, other = (found.optimize("sqlite://", name, artifacts=tmp_path) for name in "ab")
    numbers = [record.number for record in read_history(one).records if record.trained is not None]
    first = found.objective.scorer_at(one, numbers[-1])
    assert found.objective.scorer_at(one, numbers[-1]) is first
    assert found.objective.scorer_at(other, numbers[-1]) is not first


def test_an_answer_that_training_made_worse_is_still_the_best_trial(tmp_path):
    worse = dataclasses.replace(SHORT, learning_rate=0.3)
    study = search(training=plan(every=0, final=worse)).optimize(
        "sqlite://", "s", artifacts=tmp_path
    )
    before, last = read_history(study).records[-2:]
    assert study.best_trial.number == last.number
    assert study.best_value < before.winner.measured + 1e-9 < last.training["score"]


def test_a_trained_networks_statistics_are_corrected(alone, tmp_path):
    found, study = alone
    inputs = data()[0]
    with torch.no_grad():
        expected = Network().eval()(inputs).mean(0)
        means = found.result(study).network(inputs).mean(0)
        plain = search(training=plan(every=0), correction=False)
        other = plain.optimize("sqlite://", "s", artifacts=tmp_path)
        uncorrected = plain.result(other).network(inputs).mean(0)
        labels = dataclasses.replace(SHORT, label_weight=1.0)
        by_labels = search(training=plan(every=0, final=labels))
        other = by_labels.optimize("sqlite://", "s", artifacts=tmp_path)
        of_labels = by_labels.result(other).network(inputs).mean(0)
    torch.testing.assert_close(means, expected, rtol=1e-4, atol=1e-5)
    assert (uncorrected - expected).abs().max() > 1e-3
    assert (of_labels - expected).abs().max() > 1e-2  # labels have means of their own


def test_a_training_that_does_not_lower_the_score_changes_nothing(alone):
    found, study = alone
    history = read_history(study)
    trained = [record for record in history.records[:-1] if record.training is not None]
    for record in trained:
        lowered = record.training["score"] < record.winner.score
        assert record.training["kept"] == (record.trained is not None) == lowered
    lost = next(record for record in trained if not record.training["kept"])
    trial, winner = study.trials[lost.number], study.trials[lost.winner.number]
    assert trial.value == math.nextafter(winner.value, -math.inf)
    assert (
        trial.user_attrs[attributes.SCORE_ACTIVATIONS]
        == winner.user_attrs[attributes.SCORE_ACTIVATIONS]
    )
    assert lost.training.keys().isdisjoint({"weights", "sensitivity"})
    # The step after it is made from the network that the steps before it were made from.
    closed = log_of(study).closed
    assert not closed[lost.step].trained
    before = history.reference(lost.step)
    assert history.reference(lost.step + 1) == before
    base = next((c.number for c in reversed(closed[: lost.step]) if c.trained), None)
    scorer = found.objective.scorer_at(study, base)
    for candidate in history.step(lost.step + 1):
        config = history.space.config(candidate.state)
        assert scorer.score(config).total == pytest.approx(candidate.score, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"scorer": "loss"}, {"correction": False}])
def test_what_is_not_kept_is_known_before_a_scorer_is_built(options, tmp_path, monkeypatch):
    built, told = [], []
    build, tell = ScorerSetup.build, ScorerSetup.score_of_trained

    def counted(setup, *given, base=None, **named):
        if base is not None:
            built.append(base)
        return build(setup, *given, base=base, **named)

    def noted(setup, *given):
        told.append(tell(setup, *given))
        return told[-1]

    monkeypatch.setattr(ScorerSetup, "build", counted)
    monkeypatch.setattr(ScorerSetup, "score_of_trained", noted)
    study = search(training=plan(), **options).optimize(artifacts=tmp_path)
    trained = [r.training for r in read_history(study).records if r.training is not None]
    kept = [training["kept"] for training in trained]
    assert {True, False} <= set(kept)
    assert len(built) == sum(kept)
    # To the last digit what the scorer says that is built where it is kept.
    assert told == [training["score"] for training in trained if training["kind"] == "step"]


def test_a_sum_over_layers_cannot_be_told_before_a_scorer_is_built(tmp_path):
    found = search(training=plan(), scorer="diagonal")
    study = found.optimize(artifacts=tmp_path)
    trained = [r for r in read_history(study).records if r.training is not None]
    steps = [r for r in trained if r.training["kind"] == "step"]
    kept = [r for r in steps if r.trained is not None]
    assert kept and len(kept) < len(steps)
    for record in kept:
        assert record.training["score"] < record.winner.score
        before, after = (record.training[f"calibration_loss_{end}"] for end in ("before", "after"))
        assert after < before


def test_the_answer_is_the_trained_network_and_is_saved_bit_for_bit(alone, tmp_path):
    found, study = alone
    result = found.result(study)
    record = read_history(study).records[-1]
    assert result.facts["accuracy_after"] == record.training["accuracy_after"]
    result.save(tmp_path / "answer")
    loaded = hq.load(tmp_path / "answer", Network())
    inputs = data(64, 9)[0]
    assert torch.equal(loaded(inputs), result.network(inputs))
    untrained = found.objective.quantized(record.config)
    assert not torch.equal(untrained(inputs), result.network(inputs))


def test_curvature_of_the_next_step_is_the_optimizers(alone):
    found, study = alone
    record = next(r for r in read_history(study).records if r.trained is not None)
    store = found.objective.training.artifacts
    tensors = get_tensors(store, Reference.from_json(record.training["weights"]))
    curvature = tensors["curvature.middle"].double()
    table = store.get_json(Reference.from_json(record.training["sensitivity"]))
    bits = record.config["middle"].weight_bits
    assert record.training["curvature"] == "second moments of training"
    assert bool((curvature >= 0).all()) and bool(curvature.any())
    # At its own bits a trained layer does no harm.
    assert table["middle"]["weights"][str(bits)] == 0.0
    fewer = [b for b in (4, 2) if b < bits]
    assert all(table["middle"]["weights"][str(b)] > 0 for b in fewer)
    scorer = found.objective.scorer_at(study, record.number)
    weight = scorer.prepared.get_submodule("middle").parametrizations.weight.original
    assert sorted(scorer.sensitivity.to_json()) == sorted(table)
    assert scorer.sensitivity.to_json() == table
    assert weight.detach().unique().numel() <= 4 * 2**bits  # it is the rounded weight


def test_training_only_at_the_end(tmp_path):
    found = search(training=plan(every=0))
    study = found.optimize(artifacts=tmp_path)
    plain = search().optimize()
    assert [r.config for r in read_history(study).records[:-1]] == [
        r.config for r in read_history(plain).records
    ]
    assert [r.training is not None for r in read_history(study).records].count(True) == 1


def test_sgd_keeps_no_second_moments_and_curvature_is_measured(tmp_path):
    settings = TrainingSettings.from_json({**SHORT.to_json(), "optimizer": "sgd"})
    found = search(training=plan(settings=settings, final=None))
    study = found.optimize(artifacts=tmp_path)
    record = next(r for r in read_history(study).records if r.trained is not None)
    assert record.training["curvature"] == "calibration"
    tensors = get_tensors(open_artifacts(tmp_path), Reference.from_json(record.training["weights"]))
    assert not [name for name in tensors if name.startswith("curvature.")]


def test_a_resume_with_another_training_is_refused(alone):
    _, study = alone
    url = sqlite_url(Path(database_of(study._storage.wrapped).engine.url.database))
    other = TrainingSettings.from_json({**SHORT.to_json(), "learning_rate": 0.5})
    with pytest.raises(ResumeError, match="the training"):
        search(training=plan(settings=other), validation=data(30, 2)).open(
            url, "s", artifacts="artifacts"
        )
    with pytest.raises(ResumeError):
        search(validation=data(30, 2)).open(url, "s")


def test_bad_plans_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="trains nothing"):
        TrainingPlan(data=TRAIN, every=0, final=None)
    with pytest.raises(ValueError, match="0 or more"):
        TrainingPlan(data=TRAIN, every=-1)
    with pytest.raises(DataError, match="empty"):
        TrainingPlan(data=(torch.empty(0, 1, 7, 7), torch.empty(0, dtype=torch.long)))
    with pytest.raises(ArtifactError, match="artifact store"):
        search(training=plan()).optimize()


def test_the_record_says_how_the_study_trains(alone):
    _, study = alone
    info = read_history(study).info
    assert info.training["every"] == 1
    assert info.training["settings"]["epochs"] == 2
    assert attributes.INFO in study.user_attrs
