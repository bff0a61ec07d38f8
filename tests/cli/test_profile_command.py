"""``hq-optuna profile``: a table of latencies that a search then stays within."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from hq_optuna.space.latency import read_latency

pytest.importorskip("onnxruntime")


@pytest.fixture
def study(study: Path) -> Path:
    """The study with two widths, as each is exported."""
    study.write_text(study.read_text().replace("(8, 4, 2)", "(8, 4)"))
    return study


Command = Callable[..., Result]
QUICK = ("--turns", 4, "--fit", 1, "--check", 1)


def test_a_profile_is_a_table_that_a_search_stays_within(study: Path, command: Command) -> None:
    result = command("profile", study, "--out", "latency.csv", *QUICK)
    assert result.exit_code == 0, result.output
    assert "different pieces" in result.output
    assert "1 mixed assignments: predicted within" in result.output
    table = read_latency("latency.csv")
    pairs = {(row.layer, row.weight_bits, row.activation_bits) for row in table.rows}
    assert pairs == {(name, bits, bits) for name in ("0", "2", "4") for bits in (8, 4)}
    assert all(row.seconds > 0 for row in table.rows)
    given = (
        "--bits",
        "8,4",
        "--latency",
        "latency.csv",
        "--budget",
        "150% latency",
        "--budget",
        "0.3 bops",
    )
    found = json.loads(command("run", study, *given, "--json").stdout)
    limits = {row["metric"]: row for row in found["limits"]}
    assert limits["latency_s"]["answer"] <= limits["latency_s"]["limit"]
    assert limits["bops"]["answer"] <= limits["bops"]["limit"]


def test_json_holds_the_table_and_what_was_checked(study: Path, command: Command) -> None:
    result = command("profile", study, "--out", "latency.json", *QUICK, "--json")
    said = json.loads(result.stdout)
    assert said["table"] == json.loads(Path("latency.json").read_text())
    assert len(said["checked"]) == 1


def test_a_file_of_another_kind_is_refused(study: Path, command: Command) -> None:
    result = command("profile", study, "--out", "latency.xlsx")
    assert result.exit_code == 1
    assert ".csv or .json file" in result.output
