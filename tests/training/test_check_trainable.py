"""What cannot be trained is refused before a search begins."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import hq_optuna as hq
from hq_optuna.errors import DataError
from hq_optuna.training import TrainingData, TrainingSettings
from hq_optuna.training.trainer import check_trainable
from tests.searches import Network
from tests.searches import data as small_data
from tests.small_networks import assert_unchanged, seeded, snapshot
from tests.training.examples import float_net, labelled
from tests.training.short import SHORT, flipped


class WithAux(nn.Module):
    """Returns two outputs in training mode, one otherwise, as Inception does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = float_net()

    def forward(self, x):
        z = self.net(x)
        return (z, z) if self.training else z


class WantsTargets(WithAux):
    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        return self.net(x)


def fails(x, generator):
    raise RuntimeError("no such crop")


def test_a_training_that_is_possible_is_tried_without_a_trace():
    net = float_net().train()
    kept, state = snapshot(net), torch.random.get_rng_state()
    for settings in (SHORT, TrainingSettings(teacher_views=3, blend=0.5, label_weight=0.0)):
        check_trainable(net, labelled(), settings, F.cross_entropy, flipped)
    assert_unchanged(net, kept)
    assert net.training and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (WithAux, {}, "in training mode the network returns tuple. Train on labels"),
        (WantsTargets, {}, "fails in training mode .* targets should not be none"),
        (float_net, {"augment": fails}, "read or augmented: RuntimeError: no such crop"),
        (float_net, {"augment": lambda x: x}, r"augment is called with \(inputs, generator\)"),
        (
            WithAux,
            {"settings": TrainingSettings(label_weight=1.0)},
            "loss fails on the first training batch.*may be others",
        ),
        (lambda: float_net(dtype=torch.float64), {}, "fails on the first .* prepared as the cal"),
        (lambda: float_net().half(), {}, r"half precision .* Give network.float\(\)"),
        (
            lambda: nn.Sequential(float_net(), nn.Unflatten(1, (1, 3))),
            {"settings": TrainingSettings(teacher_views=2)},
            "Give teacher_views=1",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(model, options, says):
    given = {"settings": SHORT, "augment": flipped, **options}
    trained = labelled(), given["settings"], F.cross_entropy, given["augment"]
    with pytest.raises(DataError, match=says):
        check_trainable(model().eval(), *trained)


def test_a_search_tries_its_trainings_before_it_begins():
    class Aux(Network):
        def forward(self, x):
            z = super().forward(x)
            return (z, z) if self.training else z

    final = hq.TrainingPlan(data=small_data(40, 5), final=TrainingSettings(batch_size=8))
    with pytest.raises(DataError, match="in training mode the network returns tuple"):
        hq.BitSearch(Aux(), small_data(), pin_first_last=None, training=final)


def test_a_loader_without_a_length_is_counted():
    class Stream(IterableDataset):
        def __iter__(self):
            x, y = labelled()
            return iter(zip(x, y, strict=True))

    loader = DataLoader(Stream(), 10)
    assert TrainingData(loader, 99).steps == 3
    assert len(list(TrainingData(loader, 99).epoch(seeded(0)))) == 3
