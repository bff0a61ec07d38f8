"""What cannot be written is refused with the cause, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hq_optuna import export
from hq_optuna.errors import ExportError
from tests.export.answers import answer_of, data_of, randomized

ROOT = Path(__file__).parents[2]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 1e6 else self.b(torch.relu(x))


class CountsSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) * torch.tensor([float(i) for i in range(len(x))])[:, None]


class NoOnnx(nn.Module):
    """A function that ONNX has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return torch.special.bessel_j0(self.a(x))


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (Branches, "cannot be written as a graph: torch.export stops with"),
        (CountsSamples, "cannot be written as a graph"),
        (NoOnnx, "ONNX can't express the network"),
    ],
)
def test_what_no_graph_or_no_onnx_has_is_refused(kind, match, tmp_path):
    x = torch.randn(8, 4)
    answer = answer_of(randomized(kind()), x, (8, 8))
    with pytest.raises(ExportError, match=match):
        export.write(answer, tmp_path / "net.onnx", data_of(x))
    assert list(tmp_path.iterdir()) == []


def linear() -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    return answer_of(randomized(nn.Sequential(nn.Linear(4, 4))), x, (8, 8)), x


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": "tflite"}, "format is one of onnx, encodings, qonnx, pt2; got 'tflite'"),
        ({"weights": "int3"}, "weights is one of int2, int4, int8; got 'int3'"),
        ({"bias": "int8"}, "bias is one of float, int32; got 'int8'"),
        ({"check": -1}, "check is a number of samples"),
    ],
)
def test_wrong_options_are_refused(options, match, tmp_path):
    answer, x = linear()
    with pytest.raises(ExportError, match=match):
        export.write(answer, tmp_path / "net.onnx", data_of(x), **options)


def test_paths_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    answer, x = linear()
    with pytest.raises(ExportError, match="is a folder"):
        export.write(answer, tmp_path, data_of(x))
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        export.write(answer, tmp_path / "file" / "net.onnx", data_of(x))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    answer, x = linear()
    for name in [name for name in sys.modules if name.startswith("hq_optuna.export.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(ExportError, match=r"needs the package 'onnx_ir': pip install 'hq_optuna"):
        export.write(answer, tmp_path / "net.onnx", data_of(x))
    assert list(tmp_path.iterdir()) == []


def test_samples_along_no_common_axis_are_refused(tmp_path):
    answer, x = linear()
    data = data_of(x)
    odd = type(data)([type(data[0])(x, data[0].labels, 3)])
    with pytest.raises(ExportError, match="samples along their first axis"):
        export.write(answer, tmp_path / "net.onnx", odd)


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from hq_optuna import atomic_files, export
from tests.export.test_refused import linear
from tests.export.answers import data_of
real = os.fsync
def die(fd):
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = die
answer, x = linear()
export.write(answer, Path(sys.argv[1]), data_of(x))
"""


def test_a_killed_export_leaves_nothing_under_the_name(tmp_path):
    path = tmp_path / "net.onnx"
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not path.exists()


def test_the_command_line_loads_no_onnx_before_it_is_asked_to():
    code = "import sys, hq_optuna.cli.app, hq_optuna; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "typer" in loaded
    assert not loaded & {"onnx", "onnxruntime", "onnxscript", "onnx_ir", "qonnx", "torch"}
