"""``hq-optuna export``: from a finished search to a checked file."""

from __future__ import annotations

import json
from pathlib import Path

import onnx


def test_a_finished_search_is_exported_and_checked(study, command):
    assert command("run", study).exit_code == 0
    result = command("export", study, "--out", "net.onnx", "--check", "16")
    assert result.exit_code == 0, result.output
    assert "Written: net.onnx" in result.output
    assert "The file rounds 100.0000 %" in result.output
    model = onnx.load("net.onnx")
    said = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert said["hq_optuna.bits"].keys() == {"0", "2", "4"}
    assert said["hq_optuna.cost"]["metric"] == "bops"
    assert said["hq_optuna.fingerprint"]["network"]


def test_json_says_what_was_checked(study, command):
    assert command("run", study).exit_code == 0
    result = command("export", study, "--out", "net.onnx", "--check", "16", "--json")
    said = json.loads(result.stdout)
    assert said["check"]["plain"]["equal"] == 1.0
    assert said["check"]["figures"].keys() == {"accuracy"}
    assert said["bytes"] > said["stored_bytes"] > 0


def test_a_search_that_does_not_exist_and_a_network_that_changed_are_refused(study, command):
    result = command("export", study, "--out", "net.onnx")
    assert result.exit_code == 1
    assert "holds no study 'tiny'" in " ".join(result.output.split())
    assert command("run", study).exit_code == 0
    result = command("export", study, "--seed-of-weights", "1", "--out", "net.onnx")
    assert result.exit_code == 1
    assert "network" in result.output
    assert not Path("net.onnx").exists()


def test_the_report_has_a_section_of_what_was_written_and_none_before(study, command):
    assert command("run", study).exit_code == 0
    before = command("report", study, "--format", "markdown").output
    assert "Deploy" not in before
    for name, check in (("net.onnx", 16), ("other.onnx", 0), ("net.onnx", 8)):
        assert command("export", study, "--out", name, "--check", check).exit_code == 0
    text = command("report", study, "--format", "markdown").output
    section = text.partition("## Deploy")[2].partition("## ")[0]
    assert section.count("| net.onnx | onnx |") == 1
    assert "| other.onnx | onnx |" in section and "not measured" in section
    assert f"{Path('net.onnx').stat().st_size:,}" in section
