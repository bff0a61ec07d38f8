"""resolve and pareto, as a user sees them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import Result

import hq_optuna

Command = Callable[..., Result]


@pytest.fixture
def searched(study: Path, command: Command) -> Iterator[Path]:
    assert command("run", study).exit_code == 0
    study.unlink()  # neither network nor data from here on
    yield study


def test_resolve_prints_the_layers_and_saves_what_loads(searched: Path, command: Command) -> None:
    result = command("resolve", searched, "--budget", "0.2 bops")
    assert result.exit_code == 0, result.output
    words = (
        "layer",
        "W bits",
        "the least sum over layers",
        "% of all-8-bit",
        "the search's answer",
    )
    for word in words:
        assert word in result.output, result.output
    config = hq_optuna.load_assignment("assignment.json")
    data = json.loads(
        command("resolve", searched, "--budget", "0.2 bops", "--out", "b/c.json", "--json").stdout
    )
    assert {n: tuple(b) for n, b in data["assignment"].items()} == dict(config)
    assert data["cost"]["value"] <= 0.2 * data["cost"]["all_8_bit"]
    assert hq_optuna.load_assignment(data["out"]) == config


def test_resolve_measures_for_another_budget_and_saves_the_network(
    study: Path, command: Command
) -> None:
    assert command("run", study).exit_code == 0
    arguments = ("resolve", study, "--budget", "0.2 bops", "--measure", 4, "--result", "found")
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    assert "measured  " in result.output
    assert "Result: found" in result.output
    data = json.loads(command(*arguments, "--json").stdout)
    rows = data["measured_end"]["rows"]
    assert 1 <= len(rows) <= 4
    assert rows[0]["name"] == "uniform bits"
    assert sum(row["chosen"] for row in rows) == 1
    assert all(row["cost"] <= 0.2 * data["cost"]["all_8_bit"] for row in rows)
    saved = json.loads(Path("found/recipe.json").read_text())
    bits = {n: [e["weight_bits"], e["activation_bits"]] for n, e in saved["layers"].items()}
    assert bits == data["assignment"]
    assert saved["measured"]["measured_end"]["rows"] == rows


def test_resolve_measures_nothing_without_the_study_file(searched: Path, command: Command) -> None:
    result = command("resolve", searched, "--budget", "0.2 bops", "--measure", 4)
    assert result.exit_code == 1
    assert "There is no study" in result.output
    storage = "sqlite:///hq-optuna-runs/tiny/study.db"
    result = command(
        *("resolve", "--storage", storage, "--name", "tiny"),
        *("--budget", "0.2 bops", "--measure", 4),
    )
    assert result.exit_code == 1
    assert "give the study file too" in result.output


def test_pareto_prints_costs_and_sums_and_draws(searched: Path, command: Command) -> None:
    result = command("pareto", searched, "--points", 4, "--out", "p/curve.html")
    assert result.exit_code == 0, result.output
    assert "least sum, nats" in result.output
    assert "100.0 %" in result.output
    assert "Plotly.newPlot" in Path("p/curve.html").read_text()
    curve = json.loads(command("pareto", searched, "--metric", "size_bytes", "--json").stdout)
    scores = [row["score_nats"] for row in curve["pareto"]]
    assert curve["metric"] == "size_bytes"
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resolve", "--budget", "0.01 bops"], "is below the cheapest assignment"),
        (["resolve", "--budget", "much"], "is no budget"),
        (["pareto", "--metric", "joules"], "--metric is one of bops, size_bytes"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    searched: Path, command: Command, arguments: list[str], words: str
) -> None:
    result = command(arguments[0], searched, *arguments[1:])
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
    assert not Path("assignment.json").exists()


def test_a_study_that_was_never_started_is_refused(study: Path, command: Command) -> None:
    result = command("resolve", study, "--budget", "0.5 bops")
    assert result.exit_code == 1
    assert "There is no database" in result.output


TARGET = ("--target", "kl 0.05")


def test_run_meets_a_target_in_place_of_a_search(study: Path, command: Command) -> None:
    result = command("run", study, *TARGET, "--bits", "8,6,4")
    assert result.exit_code == 0, result.output
    for word in ("budget    target kl 0.05", "measured  kl", "assignments measured", "Result: "):
        assert word in result.output
    saved = Path("hq-optuna-runs/tiny/result/recipe.json")
    told = json.loads(saved.read_text())["measured"]["target"]
    assert told["at_most"] <= 0.05
    config = hq_optuna.load_assignment(saved)
    # The study's table is there: the same answer without a run.
    data = json.loads(command("resolve", study, *TARGET, "--json").stdout)
    assert {n: tuple(b) for n, b in data["assignment"].items()} == dict(config)
    again = json.loads(command("run", study, *TARGET, "--json").stdout)
    assert again["target"] == data["target"]
    assert again["assignment"] == data["assignment"]


def test_limits_hold_beside_a_target(study: Path, command: Command) -> None:
    limits = ("--budget", "0.9 size_bytes", "--budget", "0.9 bops")
    data = json.loads(command("run", study, *TARGET, *limits, "--json").stdout)
    assert data["cost"]["metric"] == "size_bytes"
    assert data["cost"]["value"] <= 0.9 * data["cost"]["all_8_bit"]
    data = json.loads(command("resolve", study, *TARGET, *limits, "--json").stdout)
    assert data["cost"]["metric"] == "size_bytes"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target", "accuracy"), "is no target"),
        (("--target", "mAP -0.4"), "the metric is one of accuracy, kl"),
        ((*TARGET, "--max-trials", 4), "runs no search, which is what --max-trials is for"),
        ((*TARGET, "--layer-errors"), "what --layer-errors is for"),
        (("--target", "kl 1e-9", "--budget", "0.2 bops"), "best bits within"),
    ],
)
def test_what_contradicts_a_target_is_refused(
    options: tuple[str, ...], said: str, study: Path, command: Command
) -> None:
    result = command("run", study, *options)
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())


def test_a_target_is_of_networks_that_are_not_trained(study: Path, command: Command) -> None:
    study.write_text(study.read_text() + "\n\ndef train():\n    return _data(16, 4)\n")
    result = command("run", study, *TARGET, "--final-epochs", 1)
    assert result.exit_code == 1
    assert "this run trains them" in result.output
    result = command("launch", study, *TARGET)  # where it is not an option
    assert result.exit_code == 1
    assert "one of hq-optuna run" in result.output


def test_pareto_trades_two_costs_among_what_is_as_good(searched: Path, command: Command) -> None:
    given = ("pareto", searched, "--metric", "bops", "--against", "activation_bytes")
    data = json.loads(command(*given, "--points", 5, "--out", "two.html", "--json").stdout)
    rows = data["pareto"]
    costs, others = ([row[key] for row in rows] for key in ("cost", "other"))
    assert costs == sorted(costs)
    assert others == sorted(others, reverse=True)
    answer = json.loads(command("pareto", searched, "--json").stdout)
    assert min(row["score_nats"] for row in answer["pareto"]) <= rows[0]["score_nats"]
    assert "Plotly.newPlot" in Path("two.html").read_text()
    wide = json.loads(command(*given, "--points", 5, "--within", 1e9, "--json").stdout)["pareto"]
    assert wide[0]["cost"] < costs[0]  # the cheapest bits are as good as any here
    for arguments, said in (
        ((*given[:-1], "bops"), "bops twice"),
        ((*given, "--within", "1e-12"), "No assignment has a sum"),
        ((*given[:-2], "--within", "0.1"), "--within says what is as good"),
        ((*given[:-1], "latency_s"), "No latency is known"),
    ):
        result = command(*arguments)
        assert result.exit_code == 1
        assert said in " ".join(result.output.split())


def test_pareto_measures_points(study: Path, command: Command) -> None:
    assert command("run", study).exit_code == 0
    given = ("pareto", study, "--points", 5, "--measure", 3)
    data = json.loads(command(*given, "--json").stdout)
    measured = [row["measured"]["accuracy"] for row in data["pareto"] if "measured" in row]
    assert len(measured) == 3
    assert 0 <= data["float"]["accuracy"] <= 1
    result = command(*given[:-2], "--against", "accuracy", "--out", "seen.html")
    assert result.exit_code == 0, result.output
    assert "float: accuracy" in result.output
    assert "Plotly.newPlot" in Path("seen.html").read_text()
    result = command(*given, "--against", "mAP")
    assert result.exit_code == 1
    assert "activation_bytes, latency_s, accuracy; got" in " ".join(result.output.split())
