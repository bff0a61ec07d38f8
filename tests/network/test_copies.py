"""Networks that override `train` as many do, and forget what it returns."""

import pytest
import torch
from torch import nn

import hq_optuna as hq
from hq_optuna.errors import NetworkError
from hq_optuna.network.copies import copied
from hq_optuna.storages import sqlite_url
from hq_optuna.training import TrainingSettings
from tests.small_networks import assert_unchanged, seeded, snapshot


class Frozen(nn.Module):
    """Keeps its batch-norm in evaluation mode, as fine-tuning often does."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
def test_a_copy_has_the_mode_that_is_asked_for(training):
    network = Frozen()
    before = snapshot(network)
    found = copied(network, training=training)
    assert found.head.training is training
    assert not found.norm.training
    assert_unchanged(network, before)


def test_a_network_whose_train_returns_nothing_is_searched_trained_and_loaded(tmp_path):
    torch.manual_seed(0)
    network = Frozen()
    x = torch.randn(24, 2, 5, 5, generator=seeded(0))
    data = x, torch.arange(24) % 3
    plan = hq.TrainingPlan(data=data, settings=TrainingSettings(epochs=1), every=1)
    search = hq.BitSearch(
        network, data, bits=(8, 4), pin_first_last=None, validation=data, training=plan
    )
    study = search.optimize(sqlite_url(tmp_path / "s.db"), "s", artifacts=tmp_path / "artifacts")
    result = search.result(study)
    result.save(tmp_path / "result")
    assert torch.equal(hq.load(tmp_path / "result", network)(x), result.network(x))


def test_what_cannot_be_copied_is_told_in_words():
    network = Frozen()
    network.last = network(torch.randn(2, 2, 5, 5))  # with its graph
    with pytest.raises(NetworkError, match=r"cannot be copied: .* can be detached"):
        copied(network)
