"""Which file a study's name means."""

import subprocess
import sys
from pathlib import Path

import pytest

from hq_optuna.errors import StudyFileError
from hq_optuna.study_files.study_file import find_study

CHECKOUT = Path(__file__).parents[2]

MINIMAL = """
import torch
def network():
    return torch.nn.Linear(3, 2)
def calibration():
    return torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
"""


def test_a_path_means_that_file_and_a_bare_name_the_current_folder_before_the_checkout(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert find_study("template") == CHECKOUT / "studies" / "template.py"
    (tmp_path / "studies").mkdir()
    for name in ("studies/template.py", "mine.py"):
        (tmp_path / name).write_text(MINIMAL)
    assert find_study("template") == tmp_path / "studies" / "template.py"
    assert find_study("mine.py") == tmp_path / "mine.py"
    assert find_study("./mine.py") == tmp_path / "mine.py"
    assert find_study(str(tmp_path / "mine.py")) == tmp_path / "mine.py"


def test_a_study_that_is_not_found_lists_what_was_tried_and_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "my_own.py").write_text(MINIMAL)
    (tmp_path / "studies" / "_private.py").write_text(MINIMAL)
    with pytest.raises(StudyFileError) as caught:
        find_study("digit")
    message = str(caught.value)
    assert "There is no study 'digit'" in message
    assert str(tmp_path / "studies" / "digit.py") in message
    assert str(CHECKOUT / "studies" / "digit.py") in message
    named = message.rsplit(": ", 1)[1].removesuffix(".").split(", ")
    assert {"cifar10_resnet20", "digits", "my_own", "template"} < set(named)
    assert named == sorted(named)
    assert "_private" not in named
    for name in ("digit.py", "studies", "no/digits", str(tmp_path), "", ".."):
        with pytest.raises(StudyFileError, match="There is no study"):
            find_study(name)


def test_reading_study_files_loads_no_torch():
    code = (
        "import sys; from hq_optuna.settings import SearchSettings; "
        "from hq_optuna.study_files.study_file import find_study; "
        "find_study('digits'); SearchSettings(budget='0.5'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKOUT)
