"""Databases that tests of opening start from."""

from pathlib import Path

import optuna
import pytest

from hq_optuna.storages import open_storage, sqlite_url


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


@pytest.fixture
def filled(path: Path) -> Path:
    """A database with the studies ``a`` and ``b``."""
    storage = open_storage(sqlite_url(path))
    for name in ("b", "a"):
        optuna.create_study(study_name=name, storage=storage)
    return path
