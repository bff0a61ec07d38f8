"""``hq-optuna check``: what is known of a study before any of it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

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
