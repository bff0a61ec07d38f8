"""Trainings inside a search that fail, do harm unseen, or meet networks of other kinds."""

from __future__ import annotations

import copy
import dataclasses
import math
from itertools import pairwise

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn

import hq_optuna as hq
from hq_optuna import attributes
from hq_optuna.dashboard.notes import trained as told
from hq_optuna.errors import TrainingError
from hq_optuna.objective import training_steps
from hq_optuna.protocol.history import read_history
from hq_optuna.report.data import report_data
from hq_optuna.report.text import render_markdown
from hq_optuna.storages import sqlite_url
from hq_optuna.training.plan import TrainingPlan
from tests.samplers.tables import new_study, ours, sampler, total
from tests.searches import Network, data
from tests.training_searches import SHORT, TRAIN, log_of, plan, search

WILD = dataclasses.replace(SHORT, learning_rate=1e30)


def test_a_training_that_diverges_is_not_kept_and_the_search_goes_on(tmp_path):
    study = search(training=plan(settings=WILD, final=None)).optimize(artifacts=tmp_path)
    plain = search(scorer="gauss_newton").optimize()
    history = read_history(study)
    trainings = [r.training for r in history.records if r.training is not None]
    assert trainings and log_of(study).open is None
    assert all(not said["kept"] and "epoch 1" in said["failed"] for said in trainings)
    assert [r.config for r in history.records] == [r.config for r in read_history(plain).records]
    assert "not kept, as it failed" in told(trainings[0])
    assert "not kept" in render_markdown(report_data(study))
    hq.visualization.plot_training(study)


def test_what_only_its_judging_cannot_bear_is_not_kept_either(tmp_path, monkeypatch):
    from hq_optuna.errors import DataError

    def judge(*_: object) -> float:
        raise DataError("Layer 'middle' receives NaN or infinity on the calibration data.")

    monkeypatch.setattr(training_steps.TrainedSteps, "_score", judge)
    study = search(training=plan(final=None)).optimize(artifacts=tmp_path)
    trainings = [r.training for r in read_history(study).records if r.training is not None]
    assert trainings and all("middle" in said["failed"] for said in trainings)


def test_the_answers_training_says_that_it_diverged(tmp_path):
    with pytest.raises(TrainingError, match="Lower learning_rate"):
        search(training=plan(every=0, final=WILD)).optimize(artifacts=tmp_path)


def test_a_sum_over_layers_does_not_hide_harm(tmp_path):
    """At its own bits a trained network has no sum, however much worse it is."""
    network = Network().eval()
    with torch.no_grad():
        right, images = network(data()[0]).argmax(1), TRAIN[0]
        wrong = (network(images).argmax(1) + 1) % 3
    found = search(
        model=network,
        calibration=(data()[0], right),
        scorer="diagonal",
        training=plan(
            data=(images, wrong),
            settings=dataclasses.replace(SHORT, label_weight=1.0),
            final=None,
        ),
    )
    history = read_history(found.optimize(artifacts=tmp_path))
    trained = [r for r in history.records if r.training is not None]
    assert all(r.training["score"] < r.winner.score for r in trained)
    assert not any(r.training["kept"] for r in trained)


class PreActivation(nn.Module):
    """Convolutions without bias that no batch-norm follows at once."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.stem = nn.Conv2d(1, 6, 3, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            for tensor in self.parameters():
                if tensor.dim() > 1:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
            for norm in (self.norm1, self.norm2):
                norm.weight.copy_(1 + torch.rand(6, generator=generator))
                norm.bias.copy_(torch.randn(6, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.conv1(self.norm1(x).relu())
        x = x + self.conv2(self.norm2(x).relu())
        return self.head(x.relu().mean((2, 3)))


def test_a_shift_that_no_bias_can_take_is_made_up_for_behind_it(tmp_path):
    network = PreActivation().eval()
    with torch.no_grad():  # statistics that fit
        network.train()(data(200, 4)[0])
    network.eval()
    still = dataclasses.replace(SHORT, learning_rate=1e-12)
    found = search(
        model=network, training=plan(every=0, final=still), validation=data(60, 2),
        budget=hq.Budget.fraction(bops=0.12),
    )  # fmt: skip
    study = found.optimize(artifacts=tmp_path)
    answer = read_history(study).records[-1]
    # Nothing was learned. The network "before" is the search's own, with its shifts,
    assert (
        answer.training["loss_before"]
        == pytest.approx(found.result(study).facts["loss_after"], rel=0.2)
        if "loss_after" in found.result(study).facts
        else True
    )
    untrained = found.objective.quantized(answer.config)
    trained = found.objective.answer(study, answer.config)
    x = data()[0]
    means: dict[str, dict[str, torch.Tensor]] = {}
    for name, net in (("float", network), ("untrained", untrained), ("trained", trained)):
        net = copy.deepcopy(net)
        seen: dict[str, torch.Tensor] = {}
        for norm in ("norm1", "norm2"):
            net.get_submodule(norm).register_forward_hook(
                lambda m, i, o, norm=norm, seen=seen: seen.__setitem__(norm, o.mean((0, 2, 3)))
            )
        with torch.no_grad():
            net(x)
        means[name] = seen
    # and each channel leaves batch-norm with the mean that it has in the float network.
    for norm in ("norm1", "norm2"):
        torch.testing.assert_close(
            means["trained"][norm], means["float"][norm], rtol=1e-3, atol=1e-3
        )
    assert answer.training["score"] < 1.5 * answer.winner.score


class Tied(nn.Module):
    """An embedding whose weight is that of the last layer too."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.out = nn.Linear(8, 6, bias=False)
        self.embedding = nn.Embedding(6, 8)
        self.middle = nn.Linear(8, 8)
        self.first = nn.Linear(8, 8)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
        self.embedding.weight = self.out.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.middle(self.first(self.embedding(x)).relu()).relu())


def test_the_trained_network_is_scored_also_where_a_weight_is_shared(tmp_path):
    tokens = torch.randint(0, 6, (30,), generator=torch.Generator().manual_seed(0))
    labels = (tokens + 1) % 6
    found = search(
        model=Tied().eval(), calibration=(tokens, labels),
        training=TrainingPlan(data=(tokens, labels), every=1, settings=SHORT, final=SHORT),
    )  # fmt: skip
    study = found.optimize(artifacts=tmp_path)
    record = read_history(study).records[-1]
    network = found.objective.answer(study, record.config)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(network(tokens), labels))
    assert record.trained.calibration_loss == pytest.approx(loss, rel=1e-5)


class TwoNames(Network):
    """One module under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.again(self.inner(x).relu()).relu()
        return self.last(self.middle(x).relu().flatten(1))


@pytest.mark.parametrize("training", [None, plan()])
def test_a_layer_with_two_names_is_trained_saved_and_loaded(tmp_path, training):
    torch.manual_seed(0)  # of some weights no unit is ever on
    found = search(model=TwoNames().eval(), training=training)
    study = found.optimize(artifacts=tmp_path / "artifacts")
    result = found.result(study)
    result.save(tmp_path / "answer")
    loaded = hq.load(tmp_path / "answer", TwoNames())
    x = data(50, 8)[0]
    with torch.no_grad():
        assert torch.equal(loaded(x), result.network(x))
    if training is not None:
        record = read_history(study).records[-1]
        assert result.score == record.training["score"]


def test_who_was_taken_for_dead_while_it_trained_goes_on(tmp_path, alone):
    """Others ended its trial in the first epoch; what they go on with counts."""
    url, ended = sqlite_url(tmp_path / "s.db"), []
    found = search(training=plan(), validation=data(30, 2))

    def end(what: str, done: int, of: int) -> None:
        if what == "training" and not ended:
            study = found.open(url, "s", artifacts=tmp_path / "artifacts")
            running = study.get_trials(states=[TrialState.RUNNING])
            ended.extend(t.number for t in running)
            for trial in running:
                study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    study = found.optimize(url, "s", artifacts=tmp_path / "artifacts", progress=end)
    assert len(ended) == 1 and log_of(study).open is None
    assert study.trials[ended[0]].state == TrialState.FAIL
    ours, theirs = (read_history(s).records for s in (study, alone[1]))
    assert [r.config for r in ours] == [r.config for r in theirs]
    assert [r.current.score for r in ours] == [r.current.score for r in theirs]


def test_an_incumbent_that_stays_has_the_score_that_its_training_gave():
    """On a table: each training halves the score; a swap that brings nothing leaves it there."""
    study = new_study(sampler(8, train_every=1, seed=2, encoding="compact"))

    def objective(trial: optuna.Trial) -> float:
        ticket = ours(study).ticket(study, trial)
        assert ticket is not None
        for name, (_, choices) in ours(study).parameters(ticket).items():
            trial.suggest_categorical(name, choices)
        return total(ours(study).space, ticket.bits) * (0.5 if ticket.trains else 1.0)

    study.optimize(objective, n_trials=400)
    closed = log_of(study).closed
    stayed = [
        (before, after)
        for before, after in pairwise(closed)
        if before.incumbent.origin == after.incumbent.origin
    ]
    assert stayed
    for before, after in stayed:
        assert before.trained and not after.trained  # the second brought nothing more
        assert after.incumbent.score == before.incumbent.score
        assert before.incumbent.score == total(ours(study).space, before.incumbent.state) / 2


def test_the_answer_is_told_with_the_score_that_it_has(alone):
    found, study = alone
    record = read_history(study).records[-1]
    result = found.result(study)
    assert result.score == record.training["score"] != record.winner.score
    said = report_data(study)
    assert said["score"]["total"] == result.score
    assert said["score"]["untrained"] == record.winner.score
    assert f"{result.score:.3g} nats" in said["headline"]
    assert said["compared"][0]["score"] == result.score
    assert not math.isnan(result.score_weights)
    assert attributes.TRAINING in study.trials[record.number].user_attrs
