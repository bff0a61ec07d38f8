"""On a GPU, and on one that is simulated where there is none."""

import subprocess
import sys

import pytest
import torch

from tests.devices.scenarios import SCENARIOS

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["simulated", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("name", SCENARIOS)
def test_on_a_gpu(name, device):
    # In a process of its own: the simulation is for good.
    command = [sys.executable, "-m", "tests.devices.scenarios", name, device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
