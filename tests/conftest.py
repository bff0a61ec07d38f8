from __future__ import annotations

import os
import tarfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch is imported: tests share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from tests.real_data import shared_data

# A machine that stands still for a moment, as a busy one does, says nothing against a property.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def subset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of CIFAR-10's published training and test batches, unpacked once."""
    folder = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(shared_data("cifar10_subset.tar")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "cifar10_subset"
