"""What tests of workers start from."""

import optuna
import pytest

from tests.runner.waiting import Clock
from tests.samplers.tables import new_study, sampler


@pytest.fixture
def study() -> optuna.Study:
    return new_study(sampler(6, encoding="compact"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)
