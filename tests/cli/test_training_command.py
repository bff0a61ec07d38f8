"""`hq-optuna run --train-every`: what is trained, shown, recorded and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from typer.testing import Result

from hq_optuna.cli.session import plan_of
from hq_optuna.protocol.history import read_history
from hq_optuna.settings import SearchSettings
from tests.training_searches import TRAIN as DATA

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


def test_settings_of_a_study_file_make_a_plan():
    assert plan_of(SearchSettings(**{}), lambda: DATA, None) is None
    assert plan_of(SearchSettings(**{"train_every": 0, "final_epochs": 0}), None, None) is None
    with pytest.raises(ValueError, match=r"define\s+train\(\)"):
        plan_of(SearchSettings(**{"train_every": 2}), None, None)
    with pytest.raises(ValueError, match="learning_rate"):
        plan_of(
            SearchSettings(**{"final_epochs": 2, "training": {"learning_rate": -1}}),
            lambda: DATA,
            None,
        )
    with pytest.raises(ValueError, match="train_epochs and final_epochs"):
        plan_of(
            SearchSettings(**{"final_epochs": 2, "training": {"epochs": 1}}), lambda: DATA, None
        )
    with pytest.raises(ValueError, match="give augment"):
        plan_of(
            SearchSettings(**{"final_epochs": 2, "training": {"teacher_views": 2}}),
            lambda: DATA,
            None,
        )
    with pytest.raises(ValueError, match=r"final_training\['epochs'\]"):
        plan_of(
            SearchSettings(**{"final_epochs": 2, "final_training": {"epochs": 1}}),
            lambda: DATA,
            None,
        )
    given = {"train_every": 2, "training": {"blend": 0.5, "temperature": 2.0}}
    given["final_training"] = {"blend": 0.25, "learning_rate": 1e-4}
    found = plan_of(SearchSettings(**given), lambda: DATA, None)
    assert (found.settings.blend, found.settings.learning_rate) == (0.5, 5e-4)
    assert (found.final.blend, found.final.learning_rate) == (0.25, 1e-4)
    assert found.settings.temperature == found.final.temperature == 2.0
    found = plan_of(
        SearchSettings(train_every=2, train_epochs=1, training={"learning_rate": 0.5}),
        lambda: DATA,
        None,
    )
    assert found is not None and found.final is not None
    assert (found.every, found.settings.epochs, found.final.epochs) == (2, 1, 20)
    assert found.settings.learning_rate == found.final.learning_rate == 0.5
