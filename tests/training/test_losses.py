"""What distillation compares: classes by divergence, all else by squared error."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hq_optuna.errors import DataError
from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.training import Trainer, TrainingSettings
from hq_optuna.training.losses import class_axis, distillation, right_and_counted, training_loss
from tests.small_networks import seeded


def whole(*shape):
    return torch.zeros(shape, dtype=torch.long)


def one_logit(z, y):
    return F.binary_cross_entropy_with_logits(z[:, 0], y.float())


@pytest.mark.parametrize(
    ("outputs", "labels", "loss_fn", "axis"),
    [
        ((5, 3), whole(5), None, 1),
        ((5, 3), whole(5), lambda z, y: z.sum(), 1),  # a loss of one's own
        ((5, 3, 4, 2), whole(5, 4, 2), None, 1),  # a class for each pixel
        ((5, 7, 3), whole(5, 7), None, -1),  # a class for each token
        ((5, 3, 3), whole(5, 3), None, 1),  # as PyTorch's cross-entropy would take it
        ((5, 3), torch.zeros(5, 3), F.cross_entropy, 1),  # probabilities as labels
        ((5, 3), torch.zeros(5, 3), nn.CrossEntropyLoss(), 1),
        ((5, 3), torch.zeros(5, 3), F.mse_loss, None),
        ((5, 3), torch.zeros(5, 3), F.l1_loss, None),
        ((5, 3, 8, 8), torch.zeros(5, 3, 8, 8), F.mse_loss, None),  # an image
        ((5, 1), whole(5), F.binary_cross_entropy_with_logits, None),  # one logit
        ((5,), torch.zeros(5), F.mse_loss, None),
        ((5, 3), [{"boxes": 1}], None, None),
    ],
)
def test_class_scores_are_told_by_loss_and_labels(outputs, labels, loss_fn, axis):
    assert class_axis(torch.zeros(outputs), labels, loss_fn) == axis
    assert class_axis({"logits": torch.zeros(outputs)}, labels, loss_fn) is None


@pytest.mark.parametrize(
    ("outputs", "labels", "loss_fn", "found"),
    [
        ((5, 3), whole(5), F.cross_entropy, (5, 5)),
        ((5, 7, 3), whole(5, 7), lambda z, y: z.sum(), (35, 35)),  # a class for each token
        ((5, 3, 3), whole(5, 3), lambda z, y: z.sum(), (0, 0)),  # one cannot tell
        ((5, 3, 3), whole(5, 3), F.cross_entropy, (15, 15)),
        ((5, 3, 2, 2), whole(5, 2, 2).fill_(-100), F.cross_entropy, (0, 0)),  # ignored
        ((5, 1), whole(5), one_logit, (0, 0)),
        ((5, 3), torch.zeros(5, 3), F.cross_entropy, (0, 0)),  # probabilities
        ((5, 3), whole(5) + 1, F.cross_entropy, (0, 5)),
    ],
)
def test_right_classes_are_counted_where_there_are_classes(outputs, labels, loss_fn, found):
    assert right_and_counted(torch.zeros(outputs), labels, loss_fn) == found


def test_ignored_labels_are_not_counted():
    z = F.one_hot(torch.arange(6) % 3, 3).float()
    labels = torch.tensor([0, 1, 2, 1, 9, 9])
    assert right_and_counted(z, labels, nn.CrossEntropyLoss(ignore_index=9)) == (3, 4)


def test_the_divergence_is_over_the_axis_of_the_classes():
    z, t = torch.randn(2, 4, 5, 3, generator=seeded(0))
    found = distillation(z, t, 2.0, axis=-1)
    assert torch.allclose(found, distillation(z.movedim(-1, 1), t.movedim(-1, 1), 2.0))
    p, q = ((x / 2.0).softmax(-1) for x in (t, z))
    assert float(found) == pytest.approx(4 * float((p * (p / q).log()).sum()) / 20, rel=1e-5)


def test_other_outputs_are_compared_by_their_squared_error():
    z, t = torch.randn(2, 4, 3, 6, 6, generator=seeded(0))
    labels = torch.zeros(4, 3, 6, 6)
    found = training_loss(z, labels, t, F.l1_loss, 0.0, 4.0)
    assert torch.equal(found, F.mse_loss(z, t))
    # A brighter image is another image: no softmax takes it for the same.
    assert training_loss(t + 1, labels, t, F.l1_loss, 0.0, 4.0) == pytest.approx(1.0)
    half = training_loss(z, labels, t, F.l1_loss, 0.5, 4.0)
    assert torch.allclose(half, 0.5 * F.l1_loss(z, labels) + 0.5 * F.mse_loss(z, t))


@pytest.mark.parametrize(
    ("outputs", "got"), [({"out": torch.zeros(2, 3)}, "dict"), (whole(2, 3), "int64")]
)
def test_what_cannot_be_compared_is_refused(outputs, got):
    with pytest.raises(DataError, match=f"returns .*{got}. Train on labels"):
        distillation(outputs, outputs, 4.0)


def test_a_regression_network_learns_from_its_teacher():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).eval()
    x = torch.randn(64, 4, generator=seeded(1))
    data = (x, net(x).detach())
    layers, names = introspect(net, x).layers, ["0", "2"]
    prepared = prepare(net, layers, observe_inputs(net, names, read_batches(data)))
    set_bits(prepared, dict.fromkeys(names, (2, 4)))
    before = float(F.mse_loss(prepared(x).detach(), data[1]))
    settings = TrainingSettings(epochs=20, batch_size=16, learning_rate=5e-3)
    trainer = Trainer(prepared, data, settings, teacher=net, loss_fn=F.mse_loss)
    losses = [epoch.loss for epoch in trainer.epochs()]
    assert losses[0] > 0
    assert float(F.mse_loss(prepared(x).detach(), data[1])) < 0.5 * before
