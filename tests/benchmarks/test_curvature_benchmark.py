"""PyHessian as the benchmark runs it, against the exact Hessian; and the benchmark's smoke mode."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.curvature import pyhessian_by_layer, pyhessian_shared
from hq_optuna.network.batches import read_batches
from tests.real_data import shared_data
from tests.reference import curvature as slow
from tests.small_networks import Residual, assert_unchanged, make, seeded, snapshot

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("measure", [pyhessian_by_layer, pyhessian_shared])
def test_pyhessian_gives_the_average_trace_of_each_layer(measure):
    pytest.importorskip("pyhessian")
    network = make(Residual)
    x = torch.randn(16, 3, generator=seeded(0), dtype=torch.float64)
    y = torch.arange(16) % 3
    names = ["first", "a", "b", "head"]
    before = snapshot(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runs = [measure(network, names, read_batches((x, y), batch_size=16), 60) for _ in range(30)]
    assert_unchanged(network, before)
    for name in names:
        exact = float(slow.hessian_diagonal(network, name, x, y, F.cross_entropy).mean())
        values = torch.tensor([run[name] for run in runs])
        # Its stopping rule favours runs that happen to stand still: a rough agreement.
        assert abs(float(values.mean()) - exact) < 6 * float(values.std()) / 30**0.5 + 1e-3


def test_the_smoke_mode_prints_one_json_line_last(subset):
    pytest.importorskip("pyhessian")
    command = [sys.executable, "-m", "benchmarks.curvature", "--quick"]
    command += ["--data", str(subset)]
    command += ["--checkpoint", str(shared_data("resnet20_cifar10.pt"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "curvature"
    assert line["figures"]["speedup_over_pyhessian"] > 1
    assert {"spearman_ours", "spearman_pyhessian"} <= line["figures"].keys()
