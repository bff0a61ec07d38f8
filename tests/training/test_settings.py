"""Settings: what is refused, what is written down, and the learning rate over time."""

import json
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch

from hq_optuna.training import TrainingSettings
from hq_optuna.training.plan import TrainingPlan

OTHER = {
    "epochs": 3,
    "optimizer": "sgd",
    "learning_rate": 0.02,
    "step_rate": 0.5,
    "weight_decay": 0.01,
    "beta2": 0.99,
    "batch_size": 7,
    "warmup_epochs": 1.5,
    "label_weight": 0.25,
    "temperature": 2.5,
    "blend": 0.0,
    "teacher_views": 1,
    "batch_norm": "batch",
    "frozen_statistics_epochs": 2,
    "frozen_ranges_epochs": 3,
    "clip_norm": 1.5,
    "out_of_range": "stop",
    "start": "rounded",
    "precision": "bfloat16",
    "channels_last": True,
    "seed": 9,
}


def test_settings_come_back_from_json():
    assert set(OTHER) == {f.name for f in fields(TrainingSettings)}
    settings = TrainingSettings(**OTHER)
    data = json.loads(json.dumps(settings.to_json()))
    assert data == OTHER
    assert TrainingSettings.from_json(data) == settings
    assert TrainingSettings.from_json({}) == TrainingSettings()


def test_what_is_written_down_tells_every_setting_from_its_default():
    default = TrainingSettings()
    digests = {written(replace(default, **{name: value})) for name, value in OTHER.items()}
    digests.add(written(default))
    same = [name for name, value in OTHER.items() if getattr(default, name) == value]
    assert len(digests) == len(OTHER) + 1 - len(same)
    assert written(TrainingSettings()) == written(default)


def written(settings):
    return json.dumps(settings.to_json(), sort_keys=True)


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"Unknown training settings: epoch\. Known are: batch_"):
        TrainingSettings.from_json({"epoch": 3})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("epochs", 0, "epochs is a whole number of 1 or more; got 0"),
        ("epochs", 2.0, "whole number"),
        ("batch_size", True, "whole number"),
        ("seed", -1, "seed is a whole number of 0 or more"),
        ("learning_rate", 0.0, "learning_rate is a number above 0; got 0.0"),
        ("learning_rate", float("nan"), "got nan"),
        ("learning_rate", "fast", "got 'fast'"),
        ("temperature", float("inf"), "temperature is a number above 0"),
        ("step_rate", -0.1, "step_rate is a number of 0 or more"),
        ("label_weight", 1.1, "label_weight is between 0 and 1; got 1.1"),
        ("beta2", 1.0, "beta2 is between 0 and 1, without these"),
        ("clip_norm", 0.0, "clip_norm is a number above 0"),
        ("warmup_epochs", 10, "warmup_epochs is less than epochs, 10; got 10"),
        ("optimizer", "adam", "optimizer is one of adamw, sgd; got 'adam'"),
        ("start", "nearest", "start is one of float, rounded, moved"),
        ("out_of_range", "clip", "out_of_range is one of pass, stop"),
        ("blend", 1.5, "blend is between 0 and 1; got 1.5"),
        ("teacher_views", 0, "teacher_views is a whole number of 1 or more; got 0"),
        ("batch_norm", "frozen", "batch_norm is one of matched, batch; got 'frozen'"),
        ("precision", "float16", "precision is one of"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(name, value, says):
    with pytest.raises(ValueError, match=says):
        TrainingSettings(**{"epochs": 10, name: value})


def test_channels_last_is_yes_or_no():
    with pytest.raises(TypeError, match="channels_last is True or False; got 'yes'"):
        TrainingSettings(channels_last="yes")


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        TrainingSettings().epochs = 3


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    settings = TrainingSettings(epochs=5, learning_rate=2.0, warmup_epochs=1)
    rates = [settings.learning_rate_at(step, 4) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0 and rates[12] == pytest.approx(1.0)  # half of the way down
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.02


def test_there_need_be_no_warmup():
    settings = TrainingSettings(epochs=1, learning_rate=2.0, warmup_epochs=0)
    assert settings.learning_rate_at(0, 3) == 2.0


def test_without_a_teacher_there_are_no_views_of_its():
    assert TrainingSettings(teacher_views=4, label_weight=0.5).teacher_views == 4
    with pytest.raises(ValueError, match="label_weight=1 leaves no teacher"):
        TrainingSettings(teacher_views=4, label_weight=1.0)


def test_blended_samples_have_no_labels():
    assert TrainingSettings(blend=1.0).blend == 1.0
    with pytest.raises(ValueError, match="Labels do not hold for blended samples"):
        TrainingSettings(blend=0.5, label_weight=0.1)


def test_numpys_numbers_are_settings_too_and_kept_as_plain_ones():
    given = TrainingSettings(
        epochs=np.int64(3), learning_rate=np.float32(0.5), blend=np.float64(0.25), seed=np.uint8(7)
    )
    plain = TrainingSettings(epochs=3, learning_rate=0.5, blend=0.25, seed=7)
    assert given == plain
    assert json.dumps(given.to_json()) == json.dumps(plain.to_json())
    assert TrainingPlan(data=(torch.zeros(4, 1), torch.zeros(4)), every=np.int64(2)).every == 2
