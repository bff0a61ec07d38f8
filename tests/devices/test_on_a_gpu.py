"""On a GPU, and on one that is simulated."""

import json
import subprocess
import sys

import pytest
import torch

from tests.devices.scenarios import SCENARIOS

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", params=["simulated", pytest.param("cuda", marks=NEEDS_CUDA)])
def went_wrong(request: pytest.FixtureRequest) -> dict[str, str]:
    """What went wrong on a device, by scenario; in another process: the simulation is for good."""
    command = [sys.executable, "-m", "tests.devices.scenarios", request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_a_gpu(name: str, went_wrong: dict[str, str]) -> None:
    assert not went_wrong[name], went_wrong[name]
