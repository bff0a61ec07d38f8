"""Batch-norm that follows the teacher: against its formula, and against statistics correction."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hq_optuna.errors import TrainingError
from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.training import Trainer, TrainingSettings
from hq_optuna.training.matching import MatchedNorms
from tests.small_networks import seeded
from tests.training.examples import float_net, images, labelled, prepared_net
from tests.training.short import SHORT, trainer

IN_FLOAT = {"conv": (FLOAT_BITS, FLOAT_BITS), "head": (FLOAT_BITS, FLOAT_BITS)}


def followed(network: nn.Module, teacher: nn.Module, *batches):
    """Run batches through the teacher and the network in training mode; return the last output."""
    norms = MatchedNorms.of(network, teacher)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with norms.in_training():
        for x in batches:
            norms.next_batch()
            with torch.no_grad():
                teacher(x)
            out = network(x)
    network.eval()
    return out


def test_a_network_that_rounds_nothing_is_its_teacher_whatever_the_batch():
    teacher, net = float_net(), prepared_net(IN_FLOAT)
    x = 3 * images(8) + 1  # other statistics than the stored ones
    expected = teacher(x).detach()
    torch.testing.assert_close(followed(net, teacher, x), expected, rtol=1e-4, atol=1e-4)
    net.train()
    net.dropout.eval()
    assert (net(x) - expected).abs().max() > 0.1  # PyTorch's own


def test_training_a_network_that_rounds_nothing_has_no_loss():
    for batch_norm, has in (("matched", False), ("batch", True)):
        net = prepared_net(IN_FLOAT)
        net.dropout.p = 0.0
        settings = TrainingSettings(
            epochs=1,
            warmup_epochs=0,
            batch_size=6,
            learning_rate=1e-6,
            batch_norm=batch_norm,
        )
        (epoch,) = trainer(net, settings).epochs()
        assert (epoch.loss > 1e-3) is has
        assert abs(epoch.loss) < 1e-5 or has


def test_running_statistics_are_those_of_statistics_correction():
    teacher, net = float_net(dtype=torch.float64), prepared_net(dtype=torch.float64)
    x = images(dtype=torch.float64)
    corrected = copy.deepcopy(net)
    StatisticsCorrection(corrected, read_batches((x, x), batch_size=len(x))).apply()
    net.norm.momentum = 1.0
    followed(net, teacher, x)
    for name in ("running_mean", "running_var"):
        found, expected = getattr(net.norm, name), getattr(corrected.norm, name)
        # Statistics correction reads them in single precision.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert (found - getattr(teacher.norm, name)).abs().max() > 1e-3


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_move_by_the_momentum_or_are_a_mean(momentum):
    teacher = float_net()
    batches = images(24).split(8)
    alone = []
    for x in batches:
        net = prepared_net()
        net.norm.momentum = 1.0
        followed(net, teacher, x)
        alone.append(net.norm.running_mean.clone())
    net = prepared_net()
    net.norm.momentum = momentum
    net.norm.num_batches_tracked.zero_()
    expected = net.norm.running_mean.clone()
    for mean in alone:
        expected = expected.lerp(mean, 0.3)
    if momentum is None:
        expected = torch.stack(alone).mean(0)
    followed(net, teacher, *batches)
    torch.testing.assert_close(net.norm.running_mean, expected)
    assert net.norm.num_batches_tracked == 3


def test_gradients_are_those_of_the_formula():
    teacher, net = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    chance = seeded(1)
    with torch.no_grad():
        for norm in (teacher, net):
            norm.running_mean.copy_(torch.randn(3, generator=chance))
            norm.running_var.copy_(torch.rand(3, generator=chance) + 0.5)
            norm.weight.copy_(torch.randn(3, generator=chance))
            norm.bias.copy_(torch.randn(3, generator=chance))
    teacher.eval()
    theirs, x, g = (torch.randn(7, 3, generator=chance, dtype=torch.float64) for _ in range(3))
    x.requires_grad_()
    norms = MatchedNorms.of(net, teacher)
    with norms.in_training():
        teacher(theirs)
        out = net(x)
    found = torch.autograd.grad((out * g).sum(), [x, net.weight, net.bias])
    centred = (x - x.mean(0)) / (x.var(0, correction=0) + net.eps).sqrt()
    as_theirs = centred * (theirs.var(0, correction=0) + net.eps).sqrt() + theirs.mean(0)
    stored = (teacher.running_var + net.eps).sqrt()
    expected = net.weight * (as_theirs - teacher.running_mean) / stored + net.bias
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        found, torch.autograd.grad((expected * g).sum(), [x, net.weight, net.bias])
    )


class Twice(nn.Module):
    """One batch-norm layer without parameters, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2, affine=False)

    def forward(self, x):
        return self.norm(F.relu(self.norm(self.conv(x))) + 1)


def test_a_layer_that_is_called_twice_follows_each_call():
    teacher = Twice()
    for _ in range(5):
        teacher(images())
    teacher.eval()
    net = copy.deepcopy(teacher)
    x = 2 * images(6) + 1
    torch.testing.assert_close(followed(net, teacher, x), teacher(x).detach(), rtol=1e-4, atol=1e-4)
    assert net.norm.num_batches_tracked == teacher.norm.num_batches_tracked + 2


def test_a_layer_made_for_several_processes_is_matched_in_one():
    teacher, net = float_net(), prepared_net(IN_FLOAT)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert isinstance(net.norm, nn.SyncBatchNorm)
    x = 3 * images(8) + 1
    torch.testing.assert_close(followed(net, teacher, x), teacher(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_dead_channel_stays_finite():
    teacher, net = float_net(), prepared_net(IN_FLOAT)
    for network in (teacher, net):
        weight = network.conv.weight if network is teacher else None
        if weight is None:
            weight = network.conv.parametrizations.weight.original
        with torch.no_grad():
            weight[1].zero_()
    out = followed(net, teacher, images(8))
    assert out.isfinite().all() and net.norm.running_var.isfinite().all()
    torch.testing.assert_close(out, teacher(images(8)), rtol=1e-4, atol=1e-4)


def test_only_plain_layers_with_stored_statistics_are_matched():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    def net():
        return nn.ModuleDict(
            {
                "plain": nn.BatchNorm2d(2),
                "own": Own(2),
                "none": nn.BatchNorm2d(2, track_running_stats=False),
                "instance": nn.InstanceNorm2d(2, track_running_stats=True),
            }
        )

    assert list(MatchedNorms.of(net(), net()).pairs) == ["plain"]
    assert list(MatchedNorms.of(net(), nn.ModuleDict({"own": Own(2)})).pairs) == []


def test_afterwards_both_networks_are_as_they_were():
    teacher, net = float_net(), prepared_net()
    with pytest.raises(RuntimeError, match="stop"), MatchedNorms.of(net, teacher).in_training():
        raise RuntimeError("stop")
    assert "forward" not in net.norm.__dict__ and not teacher.norm._forward_pre_hooks
    copy.deepcopy(net)(images())


def test_without_a_teacher_batch_norm_is_pytorchs():
    labels_only = TrainingSettings(epochs=2, warmup_epochs=0, label_weight=1.0)
    nets = prepared_net(), prepared_net()
    for net, batch_norm in zip(nets, ("matched", "batch"), strict=True):
        run = trainer(
            net,
            TrainingSettings.from_json({**labels_only.to_json(), "batch_norm": batch_norm}),
            teacher=None,
        )
        list(run.epochs())
    assert torch.equal(nets[0].norm.running_mean, nets[1].norm.running_mean)


def test_frozen_layers_use_their_statistics_even_of_a_single_value():
    teacher, net = nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3).eval()
    x = torch.randn(1, 3)  # has no spread
    with MatchedNorms.of(net, teacher).in_training():
        assert torch.equal(teacher(x), net(x))
        net.train()
        assert torch.equal(teacher(x), net(x))


class Checkpointed(Twice):
    """Computes its norms anew on the way back."""

    def forward(self, x):
        return (
            checkpoint(super().forward, x, use_reentrant=False)
            if self.training
            else super().forward(x)
        )


def test_activation_checkpointing_changes_nothing_but_the_count_of_batches():
    runs = []
    for kind in (Twice, Checkpointed):
        torch.manual_seed(0)
        teacher, net = kind().eval(), kind()
        x = images(6).requires_grad_()
        with MatchedNorms.of(net, teacher).in_training():
            teacher(x.detach())
            out = net(x)
            out.square().sum().backward()
        runs.append((out, x.grad, net.conv.weight.grad))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


class ByName(Twice):
    def forward(self, x):
        return self.norm(input=F.relu(self.norm(input=self.conv(x))) + 1)


def test_norms_may_be_called_by_keyword():
    torch.manual_seed(0)
    teacher = ByName().eval()
    x = 2 * images(6) + 1
    out = followed(copy.deepcopy(teacher), teacher, x)
    torch.testing.assert_close(out, teacher(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_norm", ["matched", "batch"])
def test_a_last_batch_of_one_sample(batch_norm):
    settings = dataclasses.replace(SHORT, epochs=1, batch_norm=batch_norm)
    pooled = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Flatten()
    )
    x, y = labelled(9)
    pooled.eval()
    layers = introspect(pooled, x).layers
    prepared = prepare(pooled, layers)
    set_bits(prepared, {"1": (3, 32)})
    run = Trainer(
        prepared,
        [(x[:8], y[:8]), (x[8:], y[8:])],
        settings,
        teacher=pooled,
        loss_fn=F.cross_entropy,
    )
    if batch_norm == "batch":
        with pytest.raises(TrainingError, match=r"batch of one sample: .*drop_last"):
            list(run.epochs())
    else:
        assert math.isfinite(next(run.epochs()).loss)
