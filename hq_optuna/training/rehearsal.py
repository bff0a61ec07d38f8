"""A rehearsal of a training, before the search that ends with it has begun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hq_optuna.errors import DataError, HqOptunaError
from hq_optuna.network.batches import autocast, forward, move, outputs_in_single
from hq_optuna.network.copies import copied
from hq_optuna.network.losses import LossFunction
from hq_optuna.training.data import Augment, epoch_seed, seeded
from hq_optuna.training.losses import mean_of_views, right_and_counted, training_loss
from hq_optuna.training.settings import TrainingSettings


def rehearse(
    model: nn.Module,
    data: Any,
    settings: TrainingSettings,
    loss_fn: LossFunction,
    augment: Augment | None,
) -> None:
    """Run the first batch through the float network in training mode, and compute the loss.

    A search may work for hours before it trains. What cannot be trained is refused before.

    Args:
        model: The float network; left as it is.
        data: Training data.
        settings: How it will be trained.
        loss_fn: Mean loss of a batch from outputs and labels.
        augment: Changes a batch's inputs.

    Raises:
        DataError: The data, the augmentation, the network in training mode, or the loss fail.
        ValueError: The settings need an augmentation.
    """
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise DataError(
            "Steps of the optimizer vanish in half precision (float16), so this network cannot be "
            "trained. Give network.float(), and precision='bfloat16' for speed."
        )
    reader = settings.data(data, augment)
    device = next(model.parameters()).device
    network, teacher = copied(model, training=True), copied(model)
    seed = epoch_seed(settings.seed, 0)
    with seeded(seed, device), torch.no_grad():
        with _explained("The first training batch cannot be read or augmented", _AUGMENT):
            batch, views = next(reader.epoch(torch.Generator().manual_seed(seed)))
        inputs, labels = move(batch.inputs, device), move(batch.labels, device)
        targets = None
        with autocast(network, settings.precision):
            if settings.label_weight < 1:
                others = [move(view, device) for view in views]
                with _explained("The network fails on the first training batch", _INPUTS):
                    targets = mean_of_views([forward(teacher, view) for view in (inputs, *others)])
            with _explained(f"{_FAILS} on the first training batch", _MODE):
                outputs = outputs_in_single(forward(network, inputs), settings.precision)
        with _explained("The loss fails on the first training batch", _LOSS):
            training_loss(
                outputs, labels, targets, loss_fn, settings.label_weight, settings.temperature
            )
        with _explained("The classes of the first training batch cannot be counted", _LOSS):
            right_and_counted(outputs, labels, loss_fn)


_AUGMENT = "Training data are (inputs, labels), and augment is called with (inputs, generator)."
_INPUTS = "Give training inputs that are prepared as the calibration data are."
_FAILS = "The network fails in training mode"
_MODE = "What wants more than its inputs to be trained cannot be trained here."
_LOSS = "It is called with (outputs, labels); in training mode outputs may be others."


@contextmanager
def _explained(what: str, hint: str) -> Iterator[None]:
    try:
        yield
    except HqOptunaError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise DataError(f"{what}: {type(error).__name__}: {error}. {hint}") from error
