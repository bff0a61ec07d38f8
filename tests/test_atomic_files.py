"""Files appear whole, with the mode that any other new file would have."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hq_optuna.atomic_files import write_atomically


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, umask):
    path = tmp_path / "folder" / "new.json"
    write_atomically(path, b"{}")
    assert mode(path) == 0o666 & ~umask
    assert path.read_bytes() == b"{}"


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o664])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, umask, kept):
    path = tmp_path / "old.json"
    path.write_bytes(b"old")
    path.chmod(kept)
    write_atomically(path, b"new")
    assert (mode(path), path.read_bytes()) == (kept, b"new")


def test_nothing_is_left_beside_a_file_that_could_not_be_written(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys; from pathlib import Path; from hq_optuna import atomic_files\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_files.write_atomically(Path(sys.argv[1]), b'new')"
    )
    subprocess.run([sys.executable, "-c", program, str(path)])
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no devices here")
def test_a_device_stays_one():
    write_atomically(Path("/dev/null"), b"gone")
    assert Path("/dev/null").is_char_device()
