"""``hq-optuna check``: what is known of a study before any of it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import Result

from hq_optuna.network.batches import read_batches
from hq_optuna.objective import readiness

Command = Callable[..., Result]


def said(result: Result) -> str:
    return " ".join(result.output.split())


def test_a_study_that_is_ready_is_said_to_be_and_nothing_is_stored(
    study: Path, command: Command
) -> None:
    result = command("check", study)
    assert result.exit_code == 0
    text = said(result)
    for words in ("3 found", "rise CrossEntropy", "reach every layer", "preparation", "ready"):
        assert words in text
    assert not Path("hq-optuna-runs/tiny/study.db").exists()


def test_the_check_as_data_holds_the_float_metric(study: Path, command: Command) -> None:
    metric = (
        "\n\nimport hq_optuna\n\ndef validation():\n    return calibration()\n\n"
        "evaluate = hq_optuna.Metric(name='sevens', unit='dB', "
        "per_sample=lambda net, data: [7.0] * data.n_samples)\n"
    )
    study.write_text(study.read_text() + metric)
    result = command("check", study, "--json")
    found = json.loads(result.stdout)
    assert found["ready"] is True
    assert found["figures"]["sevens"] == 7.0
    assert found["unreached"] == []
    assert found["layers"] == 3
    assert found["pass_s"] > 0


def test_a_slow_network_is_checked_on_a_part_of_the_data_and_durations_are_of_all(
    study: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads(command("check", study, "--json").stdout)
    assert whole["n_read"] == whole["n_calibration"]
    assert 0 < whole["needed_bytes"] < 2**30
    monkeypatch.setattr(readiness, "MOST_SECONDS", 1e-7)
    part = json.loads(command("check", study, "--json").stdout)
    assert 1 <= part["n_read"] < part["n_calibration"] == whole["n_calibration"]
    assert part["needed_bytes"] == whole["needed_bytes"]
    assert "samples were read" in said(command("check", study))


@pytest.mark.parametrize("kind", ["tensor", "pair", "batches", "stream"])
def test_a_part_of_the_data_is_taken_evenly(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.01 * len(x))
            return x

    monkeypatch.setattr(readiness, "MOST_SECONDS", 0.16)
    x = torch.arange(40.0)[:, None]
    pairs = [(x[at : at + 10], x[at : at + 10, 0].long()) for at in range(0, 40, 10)]
    data = {"tensor": x, "pair": (x, x[:, 0].long()), "batches": pairs, "stream": iter(pairs)}[kind]
    part = readiness.part_of(Slow(), data, "calibration")
    read = read_batches(part.data, labelled=False)
    assert (part.n_all, part.largest) == (40, 32 if kind in ("tensor", "pair") else 10)
    seen = torch.cat([batch.inputs for batch in read])[:, 0]
    assert 0 < len(seen) < 40
    assert seen[0] == 0
    assert seen[-1] >= 20


def test_a_layer_that_no_gradient_reaches_is_named(study: Path, command: Command) -> None:
    text = study.read_text()
    cut = text + (
        "\n\n_whole = network\n\n"
        "class Cut(nn.Module):\n"
        "    def __init__(self, net):\n        super().__init__()\n        self.net = net\n"
        "    def forward(self, x):\n"
        "        with torch.no_grad():\n            y = self.net[:2](x)\n"
        "        return self.net[2:](y)\n\n"
        "def network():\n    return Cut(_whole())\n"
    )
    study.write_text(cut)
    result = command("check", study, "--json")
    found = json.loads(result.stdout)
    assert found["unreached"] == ["net.0"]


def test_what_cannot_be_searched_ends_with_what_to_change(study: Path, command: Command) -> None:
    result = command("check", study, "--budget", "0.001 bops")
    assert result.exit_code == 1
    assert "below the cheapest" in said(result)
