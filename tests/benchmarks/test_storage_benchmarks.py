"""The benchmarks of storages run, and their figures say what they shall."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "options", "figures"),
    [
        ("chaos", ["--kills", "3"], {"lost_sqlite": 0, "doubled_sqlite": 0}),
        ("many", [], {"same_history_sqlite": 1, "evaluated_again_sqlite": 0}),
        ("overhead", ["--layers", "20"], {}),
    ],
)
def test_a_benchmark_runs_quickly_and_prints_its_figures_last(tmp_path, name, options, figures):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--storages", "sqlite", *options]
        + ["--out", str(tmp_path / "out.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["benchmark"] == name
    assert figures.items() <= last["figures"].items()
    if name == "chaos":
        assert last["figures"]["same_history_sqlite"] == 1
        assert last["figures"]["kills_sqlite"] >= 3
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["figures"] == last["figures"]
    if name == "overhead":  # what takes the time; how much that is depends on the machine
        assert last["figures"]["ratio_to_random_sqlite_20"] > 0
        found = written["details"]["sqlite_20"]
        for ours, what in itertools.product(("early", "late"), ("statements", "commits")):
            assert found[ours][what] < found["random"][what] / 2
