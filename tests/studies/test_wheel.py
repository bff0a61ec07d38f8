"""The built wheel, installed in a folder of its own, brings the studies along."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="needs hatchling, which .[dev] installs")

ROOT = Path(__file__).parents[2]


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        words, cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = run(*build, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    done = run(*install, "--target", str(folder), str(wheel), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_package_with_its_data_and_all_studies(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "studies").glob("*.py"):
        assert f"hq_optuna/studies/{file.name}" in names
    kept = [path for path in (ROOT / "hq_optuna").rglob("*") if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in kept if path.suffix != ".pyc"}
    assert expected <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hq_optuna"}


def test_an_installed_wheel_searches_the_digits_in_an_empty_folder(
    site: Path, tmp_path: Path
) -> None:
    # Slow, as it trains and searches; nothing shorter shows that the command works as installed.
    command = str(site / "bin" / "hq-optuna")
    done = run(
        *(command, "run", "digits", "--epochs", "2", "--bits", "8,4,2", "--candidates", "2"),
        cwd=tmp_path,
        PYTHONPATH=str(site),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert "Report: hq-optuna-runs/digits/report.html" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["hq-optuna-runs"]
    where = "import hq_optuna; print(hq_optuna.__file__)"
    used = run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(used.stdout.strip()).is_relative_to(site)


def test_without_scikit_learn_the_study_says_what_to_install(site: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sklearn.py").write_text("raise ImportError('No module named sklearn')")
    done = run(
        *(str(site / "bin" / "hq-optuna"), "run", "digits"),
        cwd=tmp_path,
        PYTHONPATH=os.pathsep.join([str(hidden), str(site)]),
    )
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "pip install 'hq_optuna[studies]'" in said
    assert "Traceback" not in said


def test_a_study_of_the_current_folder_is_found_before_the_shipped_one(
    site: Path, tmp_path: Path
) -> None:
    code = (
        "from hq_optuna.study_files.study_file import find_study; print(find_study('digits'));"
        "print(find_study('template'))"
    )
    (tmp_path / "studies").mkdir()
    mine = tmp_path / "studies" / "digits.py"
    mine.write_text("")
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    shipped = site / "hq_optuna" / "studies" / "template.py"
    assert done.stdout.split() == [str(mine), str(shipped)]
