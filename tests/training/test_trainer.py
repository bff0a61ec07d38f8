"""Training against torch.optim by hand, and what it leaves as found."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hq_optuna.errors import DataError, TrainingError
from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.prepare import input_quantizer, weight_quantizer
from hq_optuna.training import TrainingSettings
from hq_optuna.training.data import epoch_seed
from tests.small_networks import assert_unchanged, seeded, snapshot
from tests.training.examples import float_net, images, labelled, prepared_net
from tests.training.short import SHORT, same, trainer
from tests.training.test_learned import lsq


def test_a_trained_network_comes_nearer_to_its_teacher():
    net = prepared_net()
    net.dropout.p = 0.0
    settings = replace(SHORT, epochs=40, batch_size=30, frozen_statistics_epochs=40)
    run = trainer(net, settings, augment=None)
    x, target = images(), F.log_softmax(float_net()(images()).detach(), 1)

    def distance() -> float:
        own = F.log_softmax(net(x).detach(), 1)
        return float(F.kl_div(own, target, log_target=True, reduction="batchmean"))

    before = distance()
    losses = [epoch.loss for epoch in run.epochs()]
    assert losses[0] == pytest.approx(before, rel=1e-4)  # all 30 images are one batch
    assert distance() < 0.7 * before


def test_results_are_numbered_and_name_their_accuracy_by_what_it_is_over():
    run = trainer()
    results = list(run.epochs())
    assert [epoch.epoch for epoch in results] == [1, 2, 3, 4]
    assert run.history == results and list(run.epochs()) == []
    assert all(0 <= epoch.training_accuracy <= 1 and epoch.seconds > 0 for epoch in results)
    assert results[0].learning_rate > results[-1].learning_rate > 0


def test_blended_samples_are_trained_on_and_have_no_accuracy():
    settings = replace(SHORT, label_weight=0.0)
    plain, one, same_again = (prepared_net() for _ in range(3))
    list(trainer(plain, settings).epochs())
    for net in (one, same_again):
        results = list(trainer(net, replace(settings, blend=0.5)).epochs())
        assert all(epoch.training_accuracy is None for epoch in results)
    assert same(one, same_again) and not same(one, plain)


def test_the_teacher_may_look_at_several_views():
    seen = []

    def augment(x, generator):
        seen.append(x + torch.randn(x.shape, generator=generator))
        return seen[-1]

    net = prepared_net()
    net.dropout.p = 0.0
    settings = TrainingSettings(
        epochs=1, warmup_epochs=0, batch_size=30, learning_rate=1e-9, teacher_views=3,
        frozen_statistics_epochs=1, temperature=2.0,
    )  # fmt: skip
    (epoch,) = trainer(net, settings, augment=augment).epochs()
    assert len(seen) == 3
    teacher = float_net()
    mean = torch.stack([teacher(x).detach() for x in seen]).mean(0)
    own = net(seen[0]).detach()  # it is trained on the first
    target, log_q = (F.log_softmax(z / 2.0, 1) for z in (mean, own))
    loss = 4.0 * F.kl_div(log_q, target, log_target=True, reduction="batchmean")
    assert epoch.loss == pytest.approx(float(loss), rel=1e-4)
    alone = F.kl_div(
        log_q,
        F.log_softmax(teacher(seen[0]).detach() / 2.0, 1),
        log_target=True,
        reduction="batchmean",
    )
    assert float(alone) * 4.0 != pytest.approx(float(loss), rel=0.01)


def test_views_are_refused_where_they_mean_nothing():
    settings = replace(SHORT, teacher_views=2)
    with pytest.raises(ValueError, match="all views are alike: give augment"):
        trainer(settings=settings, augment=None)

    class Places(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)[:, :, None, None]

    x = images()
    net = Places(float_net()).eval()
    layers = introspect(net, x).layers
    data = read_batches(labelled())
    prepared = prepare(net, layers, observe_inputs(net, [layer.name for layer in layers], data))
    set_bits(prepared, {layer.name: (2, 4) for layer in layers})
    with pytest.raises(DataError, match="Give teacher_views=1"):
        next(trainer(prepared, settings, teacher=net).epochs())


def test_without_classes_there_is_no_accuracy():
    x, _ = labelled()
    data = (x, torch.randn(30, 3, generator=seeded(0)))
    run = trainer(data=data, settings=replace(SHORT, label_weight=1), loss_fn=F.mse_loss)
    assert next(run.epochs()).training_accuracy is None


def column(values):
    return values.reshape(-1, 1, 1)


def across(z, of):
    """Return a channel's mean, or its variance over as many values as there are."""
    return of(z, (0, 2, 3), **({"correction": 0} if of is torch.var else {}), keepdim=True)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("clip_norm", [None, 0.01])
@pytest.mark.parametrize("batch_norm", ["matched", "batch"])
def test_a_step_is_that_of_torch_optim_on_the_composed_graph(optimizer, clip_norm, batch_norm):
    """The same network and loss written out with LSQ's own formulas, trained by torch.optim."""
    settings = TrainingSettings(
        epochs=1,
        optimizer=optimizer,
        learning_rate=0.02,
        step_rate=0.3,
        weight_decay=0.1,
        batch_size=30,
        warmup_epochs=0,
        label_weight=0.4,
        temperature=2.0,
        batch_norm=batch_norm,
        frozen_statistics_epochs=0,
        frozen_ranges_epochs=0,
        clip_norm=clip_norm,
        out_of_range="stop",
    )
    net = prepared_net(dtype=torch.float64)
    net.dropout.p = 0.0
    float_ = float_net(dtype=torch.float64)
    run = trainer(net, settings, teacher=float_, data=labelled(dtype=torch.float64), augment=None)
    # The hand-made twin. float32 scales, as the quantizers keep them.
    conv, head = net.conv, net.head
    p = {
        "conv": conv.parametrizations.weight.original,
        "conv_bias": conv.bias,
        "norm": net.norm.weight,
        "norm_bias": net.norm.bias,
        "head": head.parametrizations.weight.original,
        "head_bias": head.bias,
    }
    p = {n: v.detach().clone().requires_grad_() for n, v in p.items()}
    start = {
        "conv_w": weight_quantizer(conv).scales[2],
        "head_w": weight_quantizer(head).scales[3],
        "conv_x": torch.tensor(input_quantizer(conv).ranges[4].scale),
        "head_x": torch.tensor(input_quantizer(head).ranges[3].scale),
    }
    log = {n: v.double().log().requires_grad_() for n, v in start.items()}
    zero = {
        "conv": input_quantizer(conv).ranges[4].zero_point,
        "head": input_quantizer(head).ranges[3].zero_point,
    }
    # LSQ's gradient scale in terms of log s.
    n_conv, n_head = 2 * 9 * 1, 4 * 3
    factor = {
        "conv_w": 1 / (n_conv**0.5 * start["conv_w"].double() ** 2),
        "head_w": 1 / (n_head**0.5 * start["head_w"].double() ** 2),
        "conv_x": 1 / ((50 * 15) ** 0.5 * start["conv_x"].double() ** 2),
        "head_x": 1 / ((4 * 7) ** 0.5 * start["head_x"].double() ** 2),
    }
    x, y = labelled(dtype=torch.float64)
    order = torch.randperm(30, generator=seeded(epoch_seed(0, 0)))
    x, y = x[order], y[order]
    xq = lsq(x, log["conv_x"].exp(), -zero["conv"], 15 - zero["conv"], 1.0)
    wq = lsq(p["conv"], log["conv_w"].exp().reshape(4, 1, 1, 1), -1, 1, 1.0)
    z = F.conv2d(xq, wq, p["conv_bias"], padding=1)
    z = (z - across(z, torch.mean)) / (across(z, torch.var) + net.norm.eps).sqrt()
    if batch_norm == "matched":
        theirs, stored = float_.conv(x).detach(), (float_.norm.running_var + net.norm.eps).sqrt()
        mean, spread = across(theirs, torch.mean), (across(theirs, torch.var) + net.norm.eps).sqrt()
        z = (z * spread + mean - column(float_.norm.running_mean)) / column(stored)
    z = z * column(p["norm"]) + column(p["norm_bias"])
    z = z.relu().mean((2, 3))
    zq = lsq(z, log["head_x"].exp(), -zero["head"], 7 - zero["head"], 1.0)
    out = F.linear(zq, lsq(p["head"], log["head_w"].exp()[:, None], -3, 3, 1.0), p["head_bias"])
    target = F.softmax(float_(x) / 2, 1)
    kl = (target * (target.log() - F.log_softmax(out / 2, 1))).sum(1).mean() * 4
    loss = 0.4 * F.cross_entropy(out, y) + 0.6 * kl
    loss.backward()
    for name, value in log.items():
        value.grad *= factor[name]
    if clip_norm is not None:
        norm = torch.cat([v.grad.flatten() for v in p.values()]).norm()
        assert norm > clip_norm
        for v in p.values():
            v.grad *= clip_norm / norm
    matrices = [v for v in p.values() if v.dim() > 1]
    vectors = [v for v in p.values() if v.dim() == 1]
    if optimizer == "adamw":
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
            {"params": list(log.values()), "lr": 0.3 * 0.02, "weight_decay": 0.0},
        ]
        torch.optim.AdamW(groups, lr=0.02).step()
    else:
        with torch.no_grad():
            for v in matrices:
                v *= 1 - 0.02 * 0.1
        groups = [{"params": matrices + vectors}, {"params": list(log.values()), "lr": 0.3 * 0.02}]
        torch.optim.SGD(groups, lr=0.02, momentum=0.9).step()

    (result,) = run.epochs()
    # The network's losses are summed in single precision.
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(conv.parametrizations.weight.original, p["conv"], **close)
    torch.testing.assert_close(head.parametrizations.weight.original, p["head"], **close)
    torch.testing.assert_close(head.bias, p["head_bias"], **close)
    torch.testing.assert_close(net.norm.weight, p["norm"], **close)
    scales = weight_quantizer(conv).scales[2].double(), weight_quantizer(head).scales[3].double()
    torch.testing.assert_close(scales[0], log["conv_w"].detach().exp(), **close)
    torch.testing.assert_close(scales[1], log["head_w"].detach().exp(), **close)
    for module, bits, name in ((conv, 4, "conv_x"), (head, 3, "head_x")):
        found = input_quantizer(module).ranges[bits].scale
        assert found == pytest.approx(float(log[name].detach().exp()), rel=1e-5)
        assert found != float(start[name])


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    nets = [prepared_net() for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        list(trainer(net, replace(SHORT, seed=seed)).epochs())
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])


def test_the_callers_random_state_the_teacher_and_the_data_are_left_as_found():
    teacher, data = float_net().train(), labelled()
    before, kept = snapshot(teacher), (data[0].clone(), data[1].clone())
    state = torch.get_rng_state()
    list(trainer(teacher=teacher, data=data).epochs())
    assert torch.equal(state, torch.get_rng_state())
    assert_unchanged(teacher, before)
    assert torch.equal(data[0], kept[0]) and torch.equal(data[1], kept[1])


def test_between_epochs_the_network_is_an_ordinary_prepared_one():
    net = prepared_net()
    names = list(net.state_dict())
    for _ in trainer(net).epochs():
        assert not any(module.training for module in net.modules())
        assert list(net.state_dict()) == names
        assert all(p.grad is None for p in net.parameters())
        assert torch.equal(copy.deepcopy(net)(images()), net(images()))


def test_frozen_statistics_and_ranges_stay_in_the_last_epochs():
    net = prepared_net()
    settings = replace(SHORT, frozen_statistics_epochs=2, frozen_ranges_epochs=1)
    seen = []
    for _ in trainer(net, settings).epochs():
        quantizer = weight_quantizer(net.conv)
        module = net.conv
        seen.append(
            (
                net.norm.running_mean.clone(),
                quantizer.scales[2].clone(),
                input_quantizer(module).ranges[4],
                net.norm.bias.detach().clone(),
            )
        )
    means, scales, ranges, biases = zip(*seen, strict=True)
    assert [torch.equal(a, b) for a, b in pairwise(means)] == [False, True, True]
    assert [torch.equal(a, b) for a, b in pairwise(scales)] == [False, False, True]
    assert [a == b for a, b in pairwise(ranges)] == [False, False, True]
    assert [torch.equal(a, b) for a, b in pairwise(biases)] == [False, False, False]


def test_training_starts_from_corrected_statistics():
    net = prepared_net()
    StatisticsCorrection(net, read_batches(labelled(), batch_size=30)).apply()
    mean, shift = net.norm.running_mean.clone(), net.head.output_shift.clone()
    settings = replace(SHORT, frozen_statistics_epochs=4)
    list(trainer(net, settings).epochs())
    assert torch.equal(net.norm.running_mean, mean)
    assert torch.equal(net.head.output_shift, shift) and bool(shift.any())


def test_layers_in_float_are_trained_and_not_rounded():
    net = prepared_net({"conv": (32, 32), "head": (2, 32)})
    weight = net.conv.parametrizations.weight.original
    before = weight.detach().clone()
    list(trainer(net).epochs())
    assert not torch.equal(weight, before)
    assert torch.equal(net.conv.weight, weight)


def test_what_takes_no_gradient_is_not_trained():
    net = prepared_net()
    net.conv.parametrizations.weight.original.requires_grad_(False)
    before = net.conv.parametrizations.weight.original.clone()
    list(trainer(net).epochs())
    assert torch.equal(net.conv.parametrizations.weight.original, before)


def test_a_step_in_bfloat16_trains_single_precision_weights():
    net = prepared_net()
    losses = [e.loss for e in trainer(net, replace(SHORT, precision="bfloat16")).epochs()]
    plain = [e.loss for e in trainer().epochs()]
    assert losses != plain and losses[0] == pytest.approx(plain[0], rel=0.1)
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_channels_last_changes_the_layout_and_nothing_else():
    nets = [prepared_net(), prepared_net()]
    for net, last in zip(nets, (False, True), strict=True):
        settings = replace(SHORT, channels_last=last, optimizer="sgd", epochs=1, learning_rate=1e-4)
        list(trainer(net, settings).epochs())
    # Sums in another order, whose last digits training carries on.
    torch.testing.assert_close(nets[0](images()), nets[1](images()), rtol=0, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_with_a_sentence_and_the_checkpoint_goes_on(tmp_path):
    path = tmp_path / "training.safetensors"
    bad = False

    def loss_fn(z, y):
        return F.cross_entropy(z, y) * (float("nan") if bad else 1.0)

    settings = replace(SHORT, label_weight=1)
    run = trainer(settings=settings, loss_fn=loss_fn, checkpoint=path)
    next(run.epochs())
    bad = True
    with pytest.raises(TrainingError, match=r"loss became nan in epoch 2\. Lower learning_rate"):
        next(run.epochs())
    with pytest.raises(TrainingError, match="broken off half-way"):
        next(run.epochs())
    bad = False
    net, whole = prepared_net(), prepared_net()
    list(trainer(net, settings, checkpoint=path).epochs())
    list(trainer(whole, settings).epochs())
    assert same(net, whole)


def test_distillation_needs_a_teacher_and_labels_a_loss():
    with pytest.raises(ValueError, match=r"label_weight is 0\.0, .*give the float network"):
        trainer(teacher=None)
    with pytest.raises(ValueError, match=r"label_weight is 0\.5: give loss_fn"):
        trainer(settings=replace(SHORT, label_weight=0.5), loss_fn=None)
    list(trainer(settings=replace(SHORT, label_weight=1), teacher=None).epochs())


def test_a_network_that_is_not_prepared_is_refused():
    with pytest.raises(ValueError, match="not prepared"):
        trainer(float_net())


def test_distillation_of_outputs_that_are_no_class_scores_is_refused():
    class Pair(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            z = self.net(x)
            return z, z

    with pytest.raises(DataError, match="the network returns tuple"):
        next(trainer(Pair(prepared_net()), teacher=Pair(float_net())).epochs())
