"""What a user of the command line sees."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

import hq_optuna
from hq_optuna.cli.options import place_of
from hq_optuna.cli.progress import SearchProgress
from hq_optuna.cli.session import sensible_threads
from hq_optuna.errors import StudyFileError
from hq_optuna.settings import RunSettings
from hq_optuna.space.budget import Budget

Command = Callable[..., Result]
RUN = Path("hq-optuna-runs/tiny")


def contents(path: Path) -> list[str]:
    """Return everything a SQLite database says, as text."""
    with sqlite3.connect(path) as connection:
        return list(connection.iterdump())


def test_run_shows_layers_costs_and_accuracy_and_writes_report_and_result(
    study: Path, command: Command
) -> None:
    result = command("run", study)
    assert result.exit_code == 0, result.output
    for words in (
        f"3 layers, {4 * 9 * 16 + 16 * 9 * 4 + 48:,} MACs",
        "budget",
        "W bits",
        "% of all-8-bit",
        "% of float",
        "float -> ",
        "(32 validation samples)",
        "(48 test samples)",
    ):
        assert words in result.output, result.output
    assert (RUN / "report.html").stat().st_size > 1_000_000  # plotly.js is inside
    assert (RUN / "study.db").exists()
    recipe = json.loads((RUN / "result/recipe.json").read_text())
    assert recipe["cost"]["budget_met"]
    assert recipe["cost"]["value"] <= 0.3 * recipe["cost"]["all_8_bit"]


def test_json_is_one_object_on_standard_output_and_progress_stays_off_it(
    study: Path, command: Command
) -> None:
    result = command("run", study, "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["result"] == str(RUN / "result")
    assert json.loads(command("status", study, "--json").stdout)["layers"] == data["layers"]


def test_a_finished_search_says_so_and_changes_nothing(study: Path, command: Command) -> None:
    command("run", study)
    before = contents(RUN / "study.db")
    files = {
        p: p.read_bytes() for p in sorted(RUN.rglob("*")) if p.is_file() and ".db" not in p.name
    }
    result = command("run", study)
    assert "This search was finished before; no candidate was scored anew." in result.output
    assert contents(RUN / "study.db") == before
    again = {
        p: p.read_bytes() for p in sorted(RUN.rglob("*")) if p.is_file() and ".db" not in p.name
    }
    assert again == files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed-of-weights", "1"], "the network's weights"),
        (["--n", "12"], "the calibration data"),
        (["--bits", "8,4"], "the search space"),
        (["--budget", "0.5 bops"], r"the budget \(study: 30 % of the all-8-bit BOPs, now: 50 %"),
        (["--seed", "3"], "the seed"),
        (["--rule", "min"], "the winner rule"),
        (["--candidates", "3"], "the number of candidates"),
        (["--scorer", "trace"], "the scorer"),
    ],
)
def test_a_changed_search_is_refused_in_words_and_leaves_the_study_alone(
    study: Path, command: Command, change: list[str], words: str
) -> None:
    command("run", study)
    before = contents(RUN / "study.db")
    result = command("run", study, *change)
    assert result.exit_code == 1
    assert re.search(words, result.output), result.output
    assert "--name" in result.output
    assert contents(RUN / "study.db") == before


def test_another_name_is_another_search(study: Path, command: Command) -> None:
    command("run", study)
    result = command("run", study, "--seed", 5, "--name", "second")
    assert result.exit_code == 0, result.output
    assert Path("hq-optuna-runs/second/report.html").exists()


def test_the_saved_result_is_the_network_that_was_measured(study: Path, command: Command) -> None:
    data = json.loads(command("run", study, "--json").stdout)
    from hq_optuna.study_files.study_file import StudyFile

    parts = StudyFile.load(study).build(Path("other"), {})
    loaded = hq_optuna.load(data["result"], parts.network)
    images, labels = parts.validation
    with torch.no_grad():
        accuracy = float((loaded(images).argmax(1) == labels).double().mean())
    recipe = json.loads(Path(data["result"], "recipe.json").read_text())
    assert accuracy == recipe["measured"]["accuracy_after"]


def test_status_shows_the_bits_and_the_way_to_the_budget(study: Path, command: Command) -> None:
    command("run", study)
    result = command("status", study)
    assert "finished" in result.output
    assert re.search(r"^bits +\d\d\d$", result.output, re.MULTILINE)
    assert "100 % of the way" in result.output


def test_status_and_report_find_a_study_by_storage_and_name(study: Path, command: Command) -> None:
    url = f"sqlite:///{study.parent / 'elsewhere.db'}"
    assert command("run", study, "--storage", url, "--name", "s").exit_code == 0
    assert "finished" in command("status", "--storage", url, "--name", "s").output
    out = study.parent / "deep" / "r.md"
    result = command(
        "report", "--storage", url, "--name", "s", "--format", "markdown", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert "|" in out.read_text()
    as_json = command("report", "--storage", url, "--name", "s", "--format", "json")
    assert json.loads(as_json.stdout)["layers"]


def test_report_writes_html_where_told(study: Path, command: Command) -> None:
    command("run", study)
    result = command("report", study, "--out", "here/r.html")
    assert result.exit_code == 0
    assert Path("here/r.html").read_text().startswith("<!")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nothing_of_this_name"], "There is no study"),
        (["run", "tiny.py", "--bogus", "1"], "bogus"),
        (["run", "tiny.py", "--budget", "much"], "budget"),
        (["run", "tiny.py", "--budget", "0.01 bops"], "is below the cheapest assignment"),
        (["run", "tiny.py", "--bits", "8,99"], "whole numbers from 1 to 16"),
        (["run", "tiny.py", "--bits", "few"], "are no bits"),
        (["run", "tiny.py", "--rule", "best"], "rule is one of min, ratio"),
        (["run", "tiny.py", "--scorer", "magic"], "scorer is one of gauss_newton, loss"),
        (["run", "tiny.py", "--candidates", "0"], "n_candidates is at least 1"),
        (["run", "tiny.py", "--storage", "nonsense"], "is no storage URL"),
        (["run", "tiny.py", "--name", "a/b"], "is no name for a study"),
        (["status", "tiny.py"], "There is no database"),
        (["report", "tiny.py"], "There is no database"),
    ],
)
def test_bad_input_ends_in_one_sentence_before_any_work(
    study: Path, command: Command, arguments: list[str], words: str
) -> None:
    result = command(*arguments)
    assert result.exit_code == 1
    assert "Error:" in result.output
    assert words in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output
    assert not RUN.joinpath("study.db").exists()


def test_errors_are_json_too(study: Path, command: Command) -> None:
    result = command("run", study, "--budget", "0.01 bops", "--json")
    assert json.loads(result.stdout)["error"] == "BudgetError"
    assert result.exit_code == 1


def test_a_password_in_the_storage_url_is_never_shown(study: Path, command: Command) -> None:
    url = "postgresql+psycopg://me:hunter2@127.0.0.1:1/none"
    for arguments in (["run", study], ["status", study], ["report", study]):
        result = command(*arguments, "--storage", url)
        assert result.exit_code == 1
        assert "hunter2" not in result.output
        assert "***" in result.output


def test_a_study_of_another_kind_is_refused(study: Path, command: Command) -> None:
    import optuna

    url = f"sqlite:///{study.parent / 'other.db'}"
    other = optuna.create_study(storage=url, study_name="tiny")
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    result = command("run", study, "--storage", url)
    assert result.exit_code == 1
    assert "belongs to another kind of study" in " ".join(result.output.split())
    assert len(other.trials) == 1
    assert "is not a bit search" in command("status", study, "--storage", url).output


def test_an_option_of_the_study_that_run_would_swallow_is_refused(
    study: Path, command: Command
) -> None:
    study.write_text(
        study.read_text()
        .replace("n: int = 16", "seed: int = 16")
        .replace("_data(n, 1)", "_data(seed, 1)")
    )
    result = command("run", study)
    assert "the option 'seed' is one of hq-optuna run's own" in " ".join(result.output.split())


def test_ctrl_c_says_that_everything_recorded_stays(
    study: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hq_optuna.scoring import Scorer

    score, calls = Scorer.measure, []

    def interrupted(self: Scorer, config: object, incumbent: object = None) -> object:
        calls.append(config)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, config, incumbent)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "measure", interrupted)
        result = command("run", study)
    assert result.exit_code == 130
    assert "start the same command again" in result.output
    assert "1 failed or given back" in command("status", study).output
    result = command("run", study)
    assert "Went on at step" in result.output
    went_on = json.loads((RUN / "result/recipe.json").read_text())
    command("run", study, "--name", "undisturbed")
    other = json.loads(Path("hq-optuna-runs/undisturbed/result/recipe.json").read_text())
    assert went_on["layers"] == other["layers"]
    assert went_on["score_nats"] == other["score_nats"]


def test_version_and_help(command: Command) -> None:
    assert command("--version").output.strip() == hq_optuna.__version__
    shown = command("run", "--help").output
    assert all(option in shown for option in ("--storage", "--budget", "--rule", "--json"))


def test_a_run_keeps_its_files_in_a_folder_of_its_name() -> None:
    place = place_of("studies/digits.py", RunSettings())
    assert (place.name, place.folder) == ("digits", Path("hq-optuna-runs/digits"))
    assert place.storage == "sqlite:///hq-optuna-runs/digits/study.db"
    with pytest.raises(StudyFileError, match="is no name"):
        place_of("x", RunSettings(name="../up"))


def test_small_networks_get_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hq_optuna.cli.session.n_cores", lambda: 4)
    assert [sensible_threads(m) for m in (0, 9_000_000, 10_000_000, 10**9)] == [1, 1, 2, 4]


def test_progress_is_plain_lines_where_there_is_no_terminal(study: Path, command: Command) -> None:
    output = command("run", study).output
    assert re.search(r"search: \d+ %  preparing, 100 %", output)
    assert re.search(r"search: 100 %  step \d+  \d+ candidates  score [\d.e-]+ nats", output)
    assert "\x1b" not in output


def test_progress_ends_at_the_whole(study: Path) -> None:
    from rich.console import Console

    from hq_optuna.study_files.study_file import StudyFile

    parts = StudyFile.load(study).build(Path("here"), {})
    search = hq_optuna.BitSearch(
        parts.network,
        parts.calibration,
        bits=(8, 4, 2),
        budget=Budget.fraction(bops=0.3),
        pin_first_last=None,
    )
    seen: list[float] = []
    progress = SearchProgress(Console(quiet=True), search.space, search.budget)
    progress._show = lambda what, share, says, always=False: seen.append(share)  # type: ignore[method-assign]
    search.optimize(n_candidates=2, on_progress=progress.search)
    assert seen[-1] == 1.0
    assert all(0 <= share <= 1 for share in seen)


def test_table_and_report_are_artifacts_of_the_study(study: Path, command: Command) -> None:
    import optuna

    from hq_optuna import load_assignment
    from hq_optuna.artifacts.store import attached, open_artifacts
    from hq_optuna.optuna_internals import id_of, storage_of
    from hq_optuna.protocol.pieces import read_pieces

    assert command("run", study).exit_code == 0
    found = optuna.load_study(study_name="tiny", storage=f"sqlite:///{RUN / 'study.db'}")
    store = open_artifacts(RUN / "artifacts")
    names = {m.filename for m in optuna.artifacts.get_all_artifact_meta(found)}
    files = {"sensitivity.json", "sensitivity.csv", "report.html", "assignment.json", "recipe.json"}
    assert names == files
    page = attached(found, "report")
    assert page is not None
    assert store.get(page) == (RUN / "report.html").read_bytes()
    bits = attached(found, "assignment")
    assert bits is not None
    (RUN / "bits.json").write_bytes(store.get(bits))
    assert load_assignment(RUN / "bits.json") == load_assignment(RUN / "result" / "recipe.json")
    recipe = attached(found, "recipe")
    assert recipe is not None
    assert store.get(recipe) == (RUN / "result/recipe.json").read_bytes()
    assert f"SHA-256 {recipe.sha256}" in (RUN / "report.html").read_text()
    command("run", study, "--name", "second", "--artifacts", "shared")
    second = optuna.load_study(
        study_name="second", storage=f"sqlite:///{RUN.parent / 'second' / 'study.db'}"
    )
    system = storage_of(second).get_study_system_attrs(id_of(second))
    pieces = [piece.name for piece in read_pieces(system)]
    assert pieces == ["layers:0", "statistics", "table:0"]
    assert len(list(Path("shared").iterdir())) == 5 + len(pieces)
    refused = command("run", study, "--name", "third", "--artifacts", "ftp://host")
    assert "is no artifact store" in " ".join(refused.output.split())
    assert not Path("hq-optuna-runs/third").exists()


def test_uniform_bits_stand_beside_the_answer(study: Path, command: Command) -> None:
    result = command("run", study)
    assert re.search(r"uniform   4 bits cost .*: accuracy [\d.]+ % \(32 validation", result.output)
    before = contents(RUN / "study.db")
    page = (RUN / "report.html").read_text()
    command("run", study)
    assert contents(RUN / "study.db") == before
    assert (RUN / "report.html").read_text() == page
    rows = json.loads(command("report", study, "--format", "json").stdout)["compared"]
    assert [r["method"] for r in rows] == ["answer", "uniform", "8 bits"]
