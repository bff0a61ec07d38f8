"""Networks, losses and data that are not quite usual, trained all the same."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.prepare import float_weight
from hq_optuna.training.trainer import check_trainable
from tests.small_networks import seeded
from tests.training.examples import float_net, labelled, prepared_net
from tests.training.short import SHORT, trainer


def test_a_network_that_was_frozen_for_inference_is_trained():
    teacher, net = float_net(), prepared_net().requires_grad_(False)
    before = float_weight(net.conv).clone()
    run = trainer(net, replace(SHORT, epochs=2), teacher=teacher)
    assert len(list(run.epochs())) == 2  # the last one with frozen ranges
    assert not torch.equal(float_weight(net.conv), before)


@pytest.mark.parametrize("loss_fn", [F.huber_loss, F.mse_loss])
def test_any_loss_takes_outputs_of_bfloat16_passes(loss_fn):
    x, _ = labelled()
    data = (x, torch.randn(30, 3, generator=seeded(0)))
    seen = []

    def loss(outputs, labels):
        seen.append(outputs.dtype)
        return loss_fn(outputs, labels)

    settings = replace(SHORT, epochs=1, label_weight=0.5, precision="bfloat16")
    check_trainable(float_net(), data, settings, loss, None)
    next(trainer(settings=settings, data=data, loss_fn=loss, augment=None).epochs())
    assert set(seen) == {torch.float32}


class Experts(nn.Module):
    """Two layers, of which the second gets the samples that the first likes: none at times."""

    def __init__(self, above):
        super().__init__()
        self.above = above
        self.first, self.expert = nn.Linear(4, 3), nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        z = self.first(x)
        taken = (x[:, 0] > self.above).nonzero()[:, 0]
        return z.index_add(0, taken, self.norm(self.expert(z[taken])))


@pytest.mark.parametrize("above", [9.0, 0.0])
def test_a_layer_that_gets_no_sample_is_trained_beside(above):
    network, x = Experts(above).eval(), torch.randn(16, 4, generator=seeded(0))
    data = read_batches((x, torch.zeros(16, dtype=torch.long)))
    layers = introspect(network, torch.full((2, 4), 10.0)).layers
    prepared = prepare(network, layers, observe_inputs(network, ["first", "expert"], data))
    set_bits(prepared, {"first": (3, 3), "expert": (3, 3)})
    StatisticsCorrection(prepared, data).apply()
    run = trainer(
        prepared, replace(SHORT, epochs=1), teacher=network, data=(x, data[0].labels), augment=None
    )
    assert math.isfinite(next(run.epochs()).loss)
    assert bool(prepared(x).isfinite().all())
