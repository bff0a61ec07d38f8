"""A training on a GPU: where its tensors are, and bfloat16."""

import copy
import math

import pytest
import torch

from hq_optuna.training import Trainer, TrainingSettings
from tests.training.examples import float_net, labelled, prepared_net
from tests.training.short import flipped


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_on_a_cuda_device_goes_on_from_its_checkpoint(tmp_path, precision):
    settings = TrainingSettings(
        epochs=2, batch_size=8, warmup_epochs=0, precision=precision, teacher_views=2, blend=0.5
    )
    network = prepared_net().cuda()
    fresh, path = copy.deepcopy(network), tmp_path / "training.safetensors"

    def trainer(net):
        return Trainer(
            net, labelled(), settings, teacher=float_net(), augment=flipped, checkpoint=path
        )

    first = next(trainer(network).epochs())
    (second,) = trainer(fresh).epochs()
    assert (first.epoch, second.epoch) == (1, 2)
    assert math.isfinite(first.loss) and math.isfinite(second.loss)
    assert {p.device.type for p in fresh.parameters()} == {"cuda"}
