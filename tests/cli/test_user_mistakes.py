"""What users meet who change their study file, share a folder, or hand in data that do not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Command = Callable[..., Result]


def said(result: Result) -> str:
    return " ".join(result.output.split())


def test_a_folder_that_two_studies_share_holds_the_result_of_the_one_that_is_named(
    study: Path, command: Command
) -> None:
    folder = ("--folder", "out")
    assert command("run", study, *folder).exit_code == 0
    assert command("run", study, *folder, "--name", "other", "--budget", "0.2 bops").exit_code == 0
    for name, budget in (("tiny", 30), ("other", 20), ("tiny", 30)):
        result = command("run", study, *folder, "--name", name)
        assert "no candidate was scored anew" in said(result)
        recipe = json.loads(Path("out/result/recipe.json").read_text())
        assert f"{budget} %" in recipe["fingerprint"]["budget"]


def test_figures_that_are_measured_no_more_are_gone(study: Path, command: Command) -> None:
    first = command("run", study)
    assert "accuracy" in said(first) and "(32 validation samples)" in said(first)
    text = study.read_text().replace("return _data(32, 2)", "return _data(20, 2)")
    study.write_text(text + "\n\ndef evaluate(network, batches):\n    return {'dice': 0.5}\n")
    result = command("run", study, "--json")
    facts = json.loads(result.stdout)["facts"]
    assert facts["validation_samples"] == 20
    assert facts["dice_after"] == 0.5
    assert not any(name.startswith("accuracy") for name in facts)
    status = said(command("status", study))
    assert "dice" in status and "(32 validation" not in status


def test_a_search_that_a_limit_stopped_says_how_to_go_on(study: Path, command: Command) -> None:
    limit = ("--max-evaluations", 3)
    assert command("run", study, *limit).exit_code == 0
    result = command("run", study, *limit)
    assert "was stopped before" in said(result) and "Raise the limit to go on" in said(result)


def test_a_limit_that_comes_before_the_first_step_is_named(study: Path, command: Command) -> None:
    result = command("run", study, "--max-trials", 1)
    assert result.exit_code == 1
    assert "no closed step yet. If a limit ended it" in said(result)


def test_a_search_that_trains_goes_on_from_another_folder(
    study: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.write_text(study.read_text() + "\n\ndef train():\n    return _data(24, 4)\n")
    options = ("--train-every", 1, "--train-epochs", 1, "--artifacts", "kept")
    first = command("run", study, *options, "--folder", "run", "--max-evaluations", 4)
    assert first.exit_code == 0, first.output
    Path("below").mkdir()
    monkeypatch.chdir("below")
    result = command("run", study, "--folder", "../run", "--max-evaluations", 400)
    assert result.exit_code == 0, result.output
    assert not Path("kept").exists()


def test_an_option_that_the_study_file_has_no_more_is_named(study: Path, command: Command) -> None:
    assert command("run", study, "--n", 12).exit_code == 0
    text = study.read_text()
    study.write_text(
        text.replace("calibration(n: int = 16)", "calibration(m: int = 16)").replace(
            "_data(n, 1)", "_data(m, 1)"
        )
    )
    result = command("run", study)
    assert result.exit_code == 1
    assert "was started with --n 12, and tiny.py has no such option any more" in said(result)


@pytest.mark.parametrize(
    ("what", "labels", "says"),
    [
        ("validation", "torch.arange(32) % 3 + 1", "Validation labels run from 1 to 3"),
        ("validation", "(torch.arange(32) % 3).int()", "failed on the first validation batch"),
        ("validation", "torch.zeros(32, 2).long()", "failed on the first validation batch"),
        ("test", "torch.zeros(7).long()", "The test data hold 48 inputs and 7 labels"),
    ],
)
def test_labels_that_do_not_fit_are_told_of(
    what: str, labels: str, says: str, study: Path, command: Command
) -> None:
    study.write_text(
        study.read_text()
        + f"\n\n_{what} = {what}\ndef {what}():\n    return _{what}()[0], {labels}\n"
    )
    result = command("run", study)
    assert result.exit_code == 1
    assert says in said(result)
    assert "Traceback" not in result.output
    assert Path("hq-optuna-runs/tiny/study.db").exists() is (what == "test")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "for i in range(2):\n        yield _data(8, i)\n    raise KeyError('image')",
            "cannot be read: KeyError: 'image'",
        ),
        (
            "y = torch.arange(4) % 3\n    return [(torch.randn(4, c, 6, 6), y) for c in (1, 2)]",
            "does not run on batch 1 of the calibration data",
        ),
    ],
)
def test_data_that_fail_are_told_of(code: str, says: str, study: Path, command: Command) -> None:
    study.write_text(study.read_text() + f"\n\ndef calibration():\n    {code}\n")
    result = command("run", study)
    assert result.exit_code == 1
    assert says in said(result)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise KeyError('x')", "rise failed on the first calibration batch: KeyError"),
        ("return (moved - outputs).square()", "returns one number"),
        ("return (moved - outputs).sum() / 0", "is nan"),
    ],
)
def test_a_rise_is_tried_before_the_search(
    code: str, says: str, study: Path, command: Command
) -> None:
    loss = (
        "\n\ndef loss(outputs, labels):\n    return nn.functional.cross_entropy(outputs, labels)\n"
    )
    study.write_text(study.read_text() + loss + f"\n\ndef rise(outputs, moved):\n    {code}\n")
    result = command("run", study)
    assert result.exit_code == 1
    assert says in said(result)
    assert not Path("hq-optuna-runs/tiny/study.db").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ('"tied": ("0", "2")', "tied holds groups of layers"),
        ('"pins": {0: 8}', "names of layers are text; got 0. Write '0'"),
    ],
)
def test_settings_that_would_be_without_effect_are_refused(
    settings: str, says: str, study: Path, command: Command
) -> None:
    study.write_text(study.read_text().replace('"pin_first_last": None', settings))
    result = command("run", study)
    assert result.exit_code == 1
    assert says in said(result)


def test_a_report_may_be_written_into_a_pipe(study: Path, command: Command) -> None:
    assert command("run", study).exit_code == 0
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        result = command("resolve", study, "--budget", "0.5 bops", "--out", "pipe")
        assert result.exit_code == 0, result.output
        assert Path("pipe").is_fifo()
        assert json.loads(os.read(reader, 2**16))["format"] == "hq_optuna assignment"
    finally:
        os.close(reader)
