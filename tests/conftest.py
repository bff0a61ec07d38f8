from __future__ import annotations

import os
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch is imported: tests share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what ends with an `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the processes that we start inherit

import pytest
from hypothesis import HealthCheck, settings

from tests.real_data import shared_data

# A machine that stands still for a moment, as a busy one does, says nothing against a property.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the size of what is drawn at random."""
    told = "random networks that tests/reported/test_random_networks.py draws"
    parser.addoption("--networks", type=int, default=40, metavar="N", help=told)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of any scope
def pytest_runtest_setup() -> None:
    """A command run in this process, on two threads, must not change the next test's last bits."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # tiny tensors, too: threads only cost time


@pytest.fixture(scope="session")
def subset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of CIFAR-10's published training and test batches, unpacked once."""
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(shared_data("cifar10_subset.tar")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "cifar10_subset"


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A search that trains, by one worker that was never interrupted. Only looked at."""
    from hq_optuna.storages import sqlite_url
    from tests.searches import data
    from tests.training_searches import plan, search

    folder = tmp_path_factory.mktemp("alone")
    found = search(training=plan(), validation=data(30, 2))
    study = found.optimize(sqlite_url(folder / "study.db"), "s", artifacts=folder / "artifacts")
    return found, study
