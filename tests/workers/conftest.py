"""What tests of workers and of trainings start from."""

import optuna
import pytest

from tests.samplers.tables import new_study, sampler
from tests.workers.waiting import Clock


@pytest.fixture
def study() -> optuna.Study:
    return new_study(sampler(6, encoding="compact"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)
