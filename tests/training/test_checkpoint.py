"""Checkpoints: training that goes on from one ends as if never interrupted; which are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hq_optuna.errors import CheckpointError
from hq_optuna.training import TrainingSettings, trained_tensors
from tests.training.examples import BITS, float_net, images, labelled, prepared_net
from tests.training.short import SHORT, same, trainer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("done", [1, 2, 3])
def test_training_that_goes_on_from_its_checkpoint_ends_in_the_same_weights(
    tmp_path, optimizer, done
):
    settings = replace(SHORT, optimizer=optimizer, frozen_statistics_epochs=2)
    whole = prepared_net()
    through = list(trainer(whole, settings).epochs())
    path = tmp_path / "deep" / "training.safetensors"
    first = trainer(settings=settings, checkpoint=path).epochs()
    for _ in range(done):
        next(first)
    torch.rand(7)  # the global random state moves on
    net = prepared_net()  # what another process would begin with
    run = trainer(net, settings, checkpoint=path)
    assert [epoch.epoch for epoch in run.history] == list(range(1, done + 1))
    rest = list(run.epochs())
    assert [epoch.loss for epoch in rest] == [epoch.loss for epoch in through[done:]]
    assert same(net, whole)
    assert torch.equal(net(images()), whole(images()))


def test_the_second_moments_survive_a_checkpoint(tmp_path):
    path = tmp_path / "training.safetensors"
    run = trainer(checkpoint=path)
    next(run.epochs())
    again = trainer(checkpoint=path)
    one, other = run.second_moments(), again.second_moments()
    assert one.n_steps == other.n_steps == 3
    assert all(torch.equal(one.moments[n], other.moments[n]) for n in one.moments)


def written(tmp_path: Path) -> Path:
    path = tmp_path / "training.safetensors"
    next(trainer(checkpoint=path).epochs())
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": replace(SHORT, learning_rate=0.5)}, "learning_rate: 0.01 there, 0.5 here"),
        ({"settings": replace(SHORT, seed=1)}, "seed: 0 there, 1 here"),
        ({"teacher": float_net(1)}, "teacher differ"),
        ({"net": prepared_net(seed=1)}, "network differ"),
        ({"net": prepared_net(BITS | {"head": (2, 3)})}, "network, bits differ"),
        ({"data": labelled(29)}, "data differ"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_by_what_differs(tmp_path, change, says):
    path = written(tmp_path)
    with pytest.raises(CheckpointError, match=says) as caught:
        trainer(checkpoint=path, **change)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_checkpoint_is_refused_with_what_to_do(tmp_path, damage):
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-100]
    elif damage == "flipped":
        content[-3] ^= 1
    else:
        content = bytearray(b"" if damage == "empty" else b"not a checkpoint, only some text")
    path.write_bytes(content)
    net = prepared_net()
    before = trained_tensors(net)
    with pytest.raises(CheckpointError, match="train from the start"):
        trainer(net, checkpoint=path)
    assert all(torch.equal(v, before[n]) for n, v in trained_tensors(net).items())


def test_a_checkpoint_is_one_safetensors_file_with_its_settings_readable(tmp_path):
    path = written(tmp_path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["hq_optuna"])
        assert "step.weight_step.conv" in file.keys()  # noqa: SIM118
    assert TrainingSettings.from_json(about["belongs"]["settings"]) == SHORT
    assert [epoch["epoch"] for epoch in about["epochs"]] == [1]
