"""A short training to test with."""

import torch
from torch import nn
from torch.nn import functional as F

from hq_optuna.training import Trainer, TrainingSettings, trained_tensors
from tests.training.examples import float_net, labelled, prepared_net

SHORT = TrainingSettings(
    epochs=4, batch_size=8, learning_rate=0.01, frozen_ranges_epochs=1, temperature=1.0
)


def flipped(x, generator):
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)


def trainer(net=None, settings=SHORT, **changes) -> Trainer:
    arguments = {"teacher": float_net(), "loss_fn": F.cross_entropy, "augment": flipped, **changes}
    data = arguments.pop("data", labelled())
    return Trainer(prepared_net() if net is None else net, data, settings, **arguments)


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = trained_tensors(a), trained_tensors(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
