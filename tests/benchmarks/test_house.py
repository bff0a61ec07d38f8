"""The figures of the house are computed, and each counts what it says."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("radon", reason="needs radon, which .[dev] installs")

from benchmarks import house

ROOT = Path(__file__).parents[2]
FIGURES = {
    *("lines", "largest_room", "import_cycles", "functions_over_60", "complexity_over_15"),
    *("setting_places", "help_cpu_ratio", "documented_share", "annotated_share", "readme_lines"),
}


def test_the_benchmark_prints_its_figures_last_and_writes_what_they_count(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.house", "--quick", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["benchmark"] == "house"
    assert set(last["figures"]) == FIGURES
    assert last["figures"]["lines"] > 10_000
    assert last["figures"]["help_cpu_ratio"] > 0
    details = json.loads(out.read_text())["details"]
    assert len(details["functions_over_60"]) == last["figures"]["functions_over_60"]
    assert max(details["rooms"].values()) == last["figures"]["largest_room"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(correction=True): ...", True),
        ("def f(a, *, correction: bool = True): ...", True),
        ("class A:\n    correction: bool = True", True),
        ("KEYS = {'correction': bool}", True),
        ("option('--correction/--no-correction')", True),
        ("def f(correction): ...", False),
        ("def f(a=1, *, correction: bool): ...", False),
        ("def f(correction: StatisticsCorrection | None = None): ...", False),
        ("f(correction=settings.correction)", False),
        ("print(info.correction)", False),
        ("print(settings['correction'])", False),
        ("'''Explains --no-correction, which turns the correction off.'''", False),
        ("correction = 1 - beta2 ** n", False),
    ],
)
def test_a_place_defines_a_setting_and_does_not_just_use_it(source: str, found: bool) -> None:
    assert house.defines(source, "correction") is found


def test_public_definitions_leave_out_private_and_nested_ones_and_overloads() -> None:
    source = """
def f(): ...
def _g(): ...
@overload
def h(): ...
class A:
    def m(self):
        def inner(): ...
    def _n(self): ...
class _B:
    def m(self): ...
"""
    names = [node.name for node in house.public_definitions(ast.parse(source).body)]
    assert names == ["f", "A", "m"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(self, a: int, *b: int, **c: int) -> None: ...", True),
        ("def f(a) -> None: ...", False),
        ("def f(*a) -> None: ...", False),
        ("def f(a: int): ...", False),
    ],
)
def test_a_function_is_annotated_when_each_parameter_and_the_result_are(
    source: str, expected: bool
) -> None:
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    assert house.annotated(node) is expected


def test_a_value_is_found_two_levels_down_in_objects_of_the_package() -> None:
    from hq_optuna.training import TrainingSettings

    settings = TrainingSettings(epochs=house.SEED)
    assert house.holds(house.SEED, house.SEED)
    assert house.holds({"a": settings}, house.SEED)
    assert not house.holds({"a": {"b": settings}}, house.SEED)
    assert not house.holds([house.SEED], house.SEED)
    assert not house.holds(TrainingSettings, house.SEED)
