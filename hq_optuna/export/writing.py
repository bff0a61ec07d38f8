"""Write the answer of a search as a file that another runtime reads, checked before it is there."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from hq_optuna._version import __version__
from hq_optuna.answer.result import SearchResult
from hq_optuna.atomic_files import write_atomically
from hq_optuna.errors import ExportError
from hq_optuna.export.deployed import (
    DeployedLayer,
    deployed,
    deployed_layers,
    deployed_products,
    round_biases_,
)
from hq_optuna.export.folding import fold_batch_norm_, widen_dead_scales_
from hq_optuna.export.job import Bias, Format, Job, Weights
from hq_optuna.export.tracing import traced
from hq_optuna.network.batches import read_batches
from hq_optuna.network.copies import copied
from hq_optuna.network.evaluation import Evaluate
from hq_optuna.network.modes import own_modes

if TYPE_CHECKING:  # of the extra "export"
    from hq_optuna.export.check import Check

CHECKED_SAMPLES = 512
EXTRA = "pip install 'hq_optuna[export]'"


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
        path: Where it is.
        format: Its format.
        bytes: Its size.
        stored_bytes: What its numbers take, each in its type; the rest is the graph and its text.
        check: What a run beside the network found, ``None`` where none was asked for.
        notes: What else there is to know, in sentences.
    """

    path: Path
    format: Format
    bytes: int
    stored_bytes: int
    check: Check | None
    notes: tuple[str, ...] = ()


@own_modes()
def write(
    answer: SearchResult | nn.Module,
    path: str | Path,
    data: Any,
    *,
    format: Format = "onnx",
    weights: Weights = "int4",
    bias: Bias = "float",
    check: int = CHECKED_SAMPLES,
    evaluate: Evaluate | None = None,
    about: Mapping[str, Any] | None = None,
) -> Written:
    """Write an answer as a file, and check it before it has its name.

    Args:
        answer: What `hq_optuna.BitSearch.result` returned, or a network with its bits
            (``result.network``, `hq_optuna.load`). Left as it is.
        path: The file. It appears whole, and only if the check passes.
        data: Calibration data, as `hq_optuna.BitSearch` takes them: shapes for the graph, and
            samples for the check.
        format: ``"onnx"``: QuantizeLinear and DequantizeLinear with integer weights;
            ``"encodings"``: bits and scales beside an ONNX file, as JSON; ``"qonnx"``: ONNX with
            QONNX's Quant; ``"pt2"``: a program of PyTorch.
        weights: The smallest type that weights may have in ONNX: ``"int8"`` for runtimes without
            4-bit integers, ``"int2"`` needs opset 25.
        bias: ``"int32"`` rounds biases to multiples of input scale × weight scale.
        check: How many samples to run beside the network; 0 for none.
        evaluate: What the study measures: asked of the file too, on ``data``.
        about: What else the file shall say of itself, as JSON data.

    Raises:
        ExportError: The network cannot be written in this format, the path cannot be written, the
            extra ``export`` is missing, or the file computes other numbers. Nothing is left
            under the path then, but for what was there before.
    """
    path = Path(path)
    for name, value, choices in (
        ("format", format, get_args(Format)),
        ("weights", weights, get_args(Weights)),
        ("bias", bias, get_args(Bias)),
    ):
        if value not in choices:
            raise ExportError(f"{name} is one of {', '.join(choices)}; got {value!r}.")
    if check < 0:
        raise ExportError(f"check is a number of samples, or 0 for no check; got {check}.")
    if format == "encodings" and path.suffix == ".onnx":
        raise ExportError(f"Encodings are JSON, beside an ONNX file: give {path.stem}.json.")
    writer = _writer(format)
    check_place(path)
    network = answer.network if isinstance(answer, SearchResult) else answer
    ready = deployed(network)
    batches = read_batches(data, labelled=False).to(torch.device("cpu"))
    fold_batch_norm_(ready, traced(ready, batches))
    widen_dead_scales_(ready)
    notes = []
    if bias == "int32" and (left := round_biases_(ready)):
        notes.append(f"Biases that stay in float: {', '.join(left)}.")
    away = any(x.device.type != "cpu" for x in (*network.parameters(), *network.buffers()))
    reference = copied(network).cpu() if away else network
    said = _about(answer, ready) | {f"hq_optuna.{k}": _json(v) for k, v in (about or {}).items()}
    job = Job(reference, ready, batches, weights, bias, check, evaluate, said, notes)
    content, stored, found = writer(job)
    if found is not None and found.failures:
        raise ExportError(
            f"The file computes other numbers than the network: {'; '.join(found.failures)}. It "
            f"was not written to {path}."
        )
    try:
        for ending, data in job.beside.items():
            other = beside(path, ending)
            write_atomically(other, data)
            job.notes.append(f"Beside it: {other}")
        write_atomically(path, content)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}.") from error
    return Written(path, format, len(content), stored, found, tuple(job.notes))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _about(answer: SearchResult | nn.Module, ready: nn.Module) -> dict[str, str]:
    """Return what a file says of itself."""
    layers, products = deployed_layers(ready), deployed_products(ready)
    bits = {name: [m.weight_bits, activation_bits(m)] for name, m in layers.items()}
    said: dict[str, Any] = {
        "bits": bits | {name: [m.input_quantizer.bits] * 2 for name, m in products.items()},
        "quantizers": {n: m.quantizer_name for n, m in layers.items()},
        "versions": {"hq_optuna": __version__, "torch": torch.__version__},
    }
    if isinstance(answer, SearchResult):
        said["cost"] = {"metric": answer.metric, "value": answer.cost}
        said["fingerprint"] = dict(answer.fingerprint)
    return {f"hq_optuna.{key}": _json(value) for key, value in said.items()}


def activation_bits(layer: DeployedLayer) -> int:
    """Return the bits of what enters a layer, 32 where it stays in float."""
    return 32 if layer.input_quantizer is None else layer.input_quantizer.bits


def beside(path: Path, ending: str) -> Path:
    """Return the name of a further file.

    Example:
        >>> [str(beside(Path("a/net.json"), ending)) for ending in (".float.onnx", ".v2")]
        ['a/net.float.onnx', 'a/net.v2.json']
    """
    return path.with_suffix(ending if ending.endswith(".onnx") else f"{ending}{path.suffix}")


def check_place(path: Path) -> None:
    """Refuse a path that no file can have, before any work.

    Raises:
        ExportError: It is a folder, or its folder cannot be made or written.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder. Give the name of a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error}. Give a file in a folder that can be made and "
            "written."
        ) from error


def _writer(format: Format) -> Callable[[Job], tuple[bytes, int, Any]]:
    """Return the writer of a format; refuse one whose packages are missing."""
    try:
        module = importlib.import_module(f"hq_optuna.export.{_HOME[format]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "hq_optuna":
            raise
        raise ExportError(f"Writing {format} needs the package {error.name!r}: {EXTRA}.") from error
    found: Callable[[Job], tuple[bytes, int, Any]] = module.content
    return found


_HOME = {"onnx": "onnx_file", "encodings": "encodings", "qonnx": "qonnx_file", "pt2": "pt2"}
