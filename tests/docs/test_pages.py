"""The site is whole: it builds without a broken link, and names nothing that does not exist."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hq_optuna
from tests.test_architecture import FACE, ROOMS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

NO_NAMES = {"network.cuda", "report.html"}
"""Dotted words of pages that look like names of the package: a call on a network, a file."""


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    # Slow, as it reads every docstring; a broken link shows only in the whole site.
    pytest.importorskip("mkdocs", reason="needs MkDocs, which .[docs] installs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        left = re.findall(r"<!-- ((?:cli|settings|names)[a-z ]*) -->", page.read_text("utf-8"))
        assert left == [], f"{page}: {left}"


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
    for name in hq_optuna.__all__:
        if name in ("__version__", "space"):
            continue
        shown = re.search(rf"::: hq_optuna\.([\w.]+\.)?{name}\b", text)
        room = f"<!-- names of {name} -->" in text or f"::: hq_optuna.{name}." in text
        assert shown or room, name


def test_the_drawing_is_that_of_the_table_of_rooms() -> None:
    from docs.drawing import TARGET, draw

    assert TARGET.read_text("utf-8") == draw(ROOMS), "run: python -m docs.drawing"


def test_the_page_of_the_house_has_every_room() -> None:
    text = (DOCS / "concepts" / "house.md").read_text("utf-8")
    rows = "".join(line for line in text.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`(\w+)`", rows))
    assert named == {room for room in ROOMS if room not in (FACE, "_version")}


@pytest.mark.parametrize("path", TEXTS, ids=ids)
def test_every_file_and_module_that_a_page_names_exists(path: Path) -> None:
    text = path.read_text("utf-8")
    tops = "hq_optuna|benchmarks|tests|studies|docs"
    for name in re.findall(rf"`((?:{tops})/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"-m ((?:benchmarks|docs)\.\w+)|`(benchmarks\.\w+)`", text):
        module = "".join(name)
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def exists(name: str) -> bool:
    """Return whether a dotted name is a module or something in one."""
    module, parts = "hq_optuna", name.removeprefix("hq_optuna.").split(".")
    while parts:
        try:
            importlib.import_module(f"{module}.{parts[0]}")
        except ModuleNotFoundError:
            break
        module += f".{parts.pop(0)}"
    found: object = sys.modules[module]  # a function may hide a module of its name
    for part in parts:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("path", TEXTS, ids=ids)
def test_every_name_of_the_package_that_a_page_uses_exists(path: Path) -> None:
    text = path.read_text("utf-8")
    names = set(re.findall(r"\bhq_optuna((?:\.[A-Za-z_]\w*)+)", text))
    names |= set(re.findall(rf"`({'|'.join(ROOMS)})((?:\.[A-Za-z_]\w*)+)[`(]", text))
    names |= {
        f"{module}.{name.strip(' (),')}"
        for module, listed in re.findall(r"from hq_optuna\.([\w.]+) import ([\w, ]+)", text)
        for name in listed.split(",")
    }
    dotted = {"".join(name).lstrip(".") for name in names} - NO_NAMES
    assert [name for name in sorted(dotted) if not exists(name)] == []


def test_every_new_name_in_the_changelogs_tables_exists() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    rows = re.findall(r"^  \| `.*` \| (`.*`) \|$", text, re.M)
    assert rows
    for cell in re.findall(r"`([^`]+)`", " ".join(rows)):
        start, _, listed = cell.rstrip("}").partition("{")
        for name in listed.split(","):
            assert "…" in cell or exists(start + name), start + name


@pytest.mark.parametrize("path", TEXTS, ids=ids)
def test_every_option_of_a_benchmark_that_a_page_names_is_one(path: Path) -> None:
    for line in re.findall(r"^    (python -m benchmarks\.[^#\n]+)", path.read_text("utf-8"), re.M):
        _, _, module, *words = shlex.split(line)
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text("utf-8")
        for word in words:
            if word.startswith("--"):
                assert f'"{word}"' in source, f"{module} has no {word}"


@pytest.mark.parametrize("path", TEXTS, ids=ids)
def test_no_page_names_what_was_deleted(path: Path) -> None:
    text = path.read_text("utf-8")
    gone = ("--memory", "--baselines 3", "benchmarks.candidate", "objective.prepare", "docs/speed")
    assert [word for word in gone if word in text] == []


def test_every_command_in_a_guide_is_one() -> None:
    from hq_optuna.cli.app import COMMANDS

    for path in TEXTS:
        named = re.findall(r"^hq-optuna (\w+)", path.read_text("utf-8"), re.M)
        assert set(named) <= set(COMMANDS), path
