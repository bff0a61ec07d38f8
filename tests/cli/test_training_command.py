"""`hq-optuna run --train-every`: what is trained, shown, recorded and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from typer.testing import Result

from hq_optuna.protocol.history import read_history

TRAIN = """

def train():
    return _data(64, 4)


def augment(inputs, generator):
    return inputs + 0.01 * torch.randn(inputs.shape, generator=generator)
"""


@pytest.fixture
def trained(study: Path) -> Path:
    study.write_text(study.read_text() + TRAIN)
    return study


def records(name: str):
    url = f"sqlite:///hq-optuna-runs/{name}/study.db"
    return read_history(optuna.load_study(study_name=name, storage=url)).records


def test_winners_and_answer_are_trained_and_the_report_says_so(
    trained: Path, command: Callable[..., Result]
) -> None:
    options = ("--train-every", "1", "--train-epochs", "1", "--final-epochs", "2")
    result = command("run", trained, *options, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout.strip().splitlines()[-1])
    kinds = [r.training["kind"] for r in records("tiny") if r.training is not None]
    assert kinds[-1] == "final" and set(kinds[:-1]) == {"step"}
    assert records("tiny")[-1].training["epochs"] == 2
    assert data["counts"]["trained"] == len(kinds)
    n_kept = sum(r.trained is not None for r in records("tiny"))
    kept = f", {n_kept} of these kept" if n_kept < len(kinds) else ""
    again = command("run", trained)  # what it was started with comes from the study
    assert again.exit_code == 0, again.output
    assert f" candidates, {len(kinds)} trained{kept};" in again.output
    assert "finished before; no candidate was scored anew" in again.output
    other = command("run", trained, "--train-epochs", "3")
    assert other.exit_code == 1
    assert "the training" in " ".join(other.output.split())


def test_training_without_data_is_refused_before_any_work(
    study: Path, command: Callable[..., Result]
) -> None:
    result = command("run", study, "--final-epochs", "2")
    assert result.exit_code == 1
    assert "define train()" in " ".join(result.output.split())
    assert not Path("hq-optuna-runs/tiny/study.db").exists()


def test_nothing_is_trained_unless_asked(trained: Path, command: Callable[..., Result]) -> None:
    assert command("run", trained).exit_code == 0
    assert all(record.training is None for record in records("tiny"))


@pytest.mark.parametrize(
    "when", [(), ("--train-every", "0"), ("--final-epochs", "0"), ("--final-epochs", "5")]
)
def test_epochs_without_saying_when_to_train_are_refused(
    trained: Path, command: Callable[..., Result], when: tuple[str, ...]
) -> None:
    result = command("run", trained, "--train-epochs", "3", *when)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "without --train-every none is trained" in said
    assert "--train-every 4" in said and "--final-epochs 20" in said
    assert not Path("hq-optuna-runs/tiny/study.db").exists()


def test_epochs_of_a_study_file_wait_for_a_run_that_trains(
    trained: Path, command: Callable[..., Result]
) -> None:
    trained.write_text(trained.read_text() + '\nSETTINGS["train_epochs"] = 3\n')
    result = command("run", trained)
    assert result.exit_code == 0, result.output
    assert "no training" in result.output
