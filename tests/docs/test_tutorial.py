"""The tutorial's chapters run, block by block, and print what they show."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hq_optuna.cli.app import app

FOLDER = Path(__file__).parents[2] / "docs" / "tutorial"
CHAPTERS = sorted(FOLDER.glob("[1-9]-*.md"))
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.S)
KINDS = {"sh", "python", "text"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the comment above it, what it holds."""

    kind: str
    mark: str
    text: str


def blocks(text: str) -> list[Block]:
    return [Block(m["kind"], m["mark"] or "", m["text"]) for m in BLOCK.finditer(text)]


HOME = "/home/me/tutorial"
"""What the pages show instead of the folder in which they run."""


def shape_of(text: str) -> list[str]:
    """Return the lines with every figure replaced: networks are trained on the spot.

    Left out are lines, and cells, that come and go with the clock or with the answer's details.
    """
    text = re.sub(r"\b[0-9a-f]{12,16}\b", "#", text)  # digests, of weights trained on this machine
    text = re.sub(r"\b[\w.-]+:\d+\b", "host:#", text)
    text = re.sub(r"[-+−]?\d[\d,]*(\.\d+)?(e[-+]\d+)?|\b0\.0\b", "#", text)
    text = re.sub(r"\b[kKMG](?=BOPs|iB)|W#A#", "", text).replace("# bytes", "# iB")
    text = text.replace("# worker\n", "# workers\n")  # what runs here is alive afterwards
    fleeting = "search|rounding|curvature|sensitivity|Warning|Worker #[^:]*host"
    text = re.sub(rf"^({fleeting}):.*\n", "", text, flags=re.M)
    return sorted(re.sub(r"[ \t]+", " ", line).strip() for line in text.strip().splitlines())


def run_line(line: str) -> str:
    """Run one line of a shell block; return what it printed.

    Most run as processes of their own. Those of the small network run here, as importing PyTorch
    takes longer than their search.
    """
    words = shlex.split(line)
    if words[0] == "hq-optuna" and "rings.py" in words:
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.output
        return result.stdout
    line = re.sub(r"^hq-optuna ", f"{shlex.quote(sys.executable)} -m hq_optuna ", line)
    line = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", line)
    found = {"PYTHONPATH": os.pathsep.join(map(str, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-ec", line], capture_output=True, text=True, env={**os.environ, **found}
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def run_chapter(path: Path) -> Iterator[tuple[Block, str]]:
    """Run a chapter's blocks in order; yield each output block and what was printed instead."""
    printed, names = "", {"__name__": "tutorial"}
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.mark.startswith("file: "):
            Path(block.mark.removeprefix("file: ")).write_text(block.text)
        elif block.kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, path.name, "exec"), names)
            printed = out.getvalue()
        elif block.kind == "sh" and block.mark != "in the clone":
            printed = "".join(run_line(line) for line in block.text.strip().splitlines())
        elif block.kind == "text":
            yield block, printed.replace(str(Path.cwd()), HOME)
            printed = ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the reader works, for all chapters."""
    place, before = tmp_path_factory.mktemp("tutorial"), Path.cwd()
    os.chdir(place)
    sys.path.insert(0, str(place))
    try:
        yield place
    finally:
        os.chdir(before)
        sys.path.remove(str(place))
        for name in ("train", "rings"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_runs_and_prints_what_it_shows(folder: Path, path: Path) -> None:
    n = 0
    for block, printed in run_chapter(path):
        n += 1
        if block.mark == "exact output":
            assert printed == block.text
            continue
        assert shape_of(block.text), f"block {n} of {path.name} shows nothing"
        assert shape_of(printed) == shape_of(block.text), f"block {n} of {path.name}"
    assert n


def test_the_reader_begins_with_the_environment_in_a_folder_of_its_own(tmp_path: Path) -> None:
    clone, home = tmp_path / "clone", tmp_path / "me"
    activate = clone / ".venv" / "bin" / "activate"
    for folder in (activate.parent, home):
        folder.mkdir(parents=True)
    activate.write_text("ACTIVE=yes\n")
    first = blocks(CHAPTERS[0].read_text(encoding="utf-8"))[0]
    assert (first.kind, first.mark) == ("sh", "in the clone")
    script = first.text + 'echo "$ACTIVE" "$PWD"'
    for _ in range(2):  # and again, another day
        done = subprocess.run(
            ["bash", "-ec", script],
            capture_output=True,
            text=True,
            cwd=clone,
            env={**os.environ, "HOME": str(home)},
        )
        assert done.stdout.split() == ["yes", str(home / Path(HOME).name)], done.stderr


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_block_is_of_a_kind_that_is_run_or_compared(path: Path) -> None:
    found = blocks(path.read_text(encoding="utf-8"))
    assert path.read_text(encoding="utf-8").count("```") == 2 * len(found)
    assert {block.kind for block in found} <= KINDS
    for block in found:
        assert (block.kind == "text") == (block.mark in ("output", "exact output")), block


def test_there_are_six_chapters_and_the_list_names_them_all() -> None:
    listed = re.findall(r"\]\((\d-[^)]+)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert listed == [path.name for path in CHAPTERS]
    assert len(CHAPTERS) == 6


@pytest.mark.parametrize("path", [*CHAPTERS, FOLDER / "README.md"], ids=lambda path: path.stem)
def test_every_file_a_chapter_names_exists(path: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (FOLDER / target).exists(), target
