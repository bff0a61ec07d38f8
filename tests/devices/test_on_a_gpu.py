"""On a GPU, and on one that is simulated."""

import json
import subprocess
import sys

import pytest
import torch

from tests.devices.scenarios import SCENARIOS
from tests.devices.simulated_gpu import CAN_BE

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NEEDS_STAND_IN = pytest.mark.skipif(not CAN_BE, reason="needs a later PyTorch")
DEVICES = [
    pytest.param("simulated", marks=NEEDS_STAND_IN),
    pytest.param("cuda", marks=NEEDS_CUDA),
]


@pytest.fixture(scope="module", params=DEVICES)
def went_wrong(request: pytest.FixtureRequest) -> dict[str, str]:
    """What went wrong on a device, by scenario; in another process: the simulation is for good."""
    command = [sys.executable, "-m", "tests.devices.scenarios", request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_a_gpu(name: str, went_wrong: dict[str, str]) -> None:
    assert not went_wrong[name], went_wrong[name]
