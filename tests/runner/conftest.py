"""What tests of workers and of trainings start from."""

import optuna
import pytest

import hq_optuna as hq
from hq_optuna.storages import sqlite_url
from tests.runner.searches import data
from tests.runner.training_searches import plan, search
from tests.runner.waiting import Clock
from tests.samplers.tables import new_study, sampler


@pytest.fixture
def study() -> optuna.Study:
    return new_study(sampler(6, encoding="compact"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[hq.BitSearch, optuna.Study]:
    """A search that trains, by one worker that was never interrupted. Only looked at."""
    folder = tmp_path_factory.mktemp("alone")
    found = search(training=plan(), validation=data(30, 2))
    study = found.optimize(sqlite_url(folder / "study.db"), "s", artifacts=folder / "artifacts")
    return found, study
