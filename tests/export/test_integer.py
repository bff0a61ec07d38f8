"""With output quantizers every layer runs in integers, with the same numbers."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch

from hq_optuna import export
from hq_optuna.export.check import session
from hq_optuna.export.deployed import deployed
from hq_optuna.export.folding import fold_batch_norm_
from hq_optuna.export.tracing import traced
from hq_optuna.quantization import set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.outputs import output_quantizers
from tests.export.answers import data_of, images
from tests.quantization.test_outputs import rounded


@pytest.fixture(scope="module")
def answer():
    prepared = rounded()[1]
    StatisticsCorrection(prepared, data_of(images())).apply()
    return prepared


def test_every_layer_addition_product_and_concatenation_runs_in_integers(answer, tmp_path):
    """With integer biases: in float some of these would be added apart."""
    path, data = tmp_path / "net.onnx", data_of(images())
    written = export.write(answer, path, data, bias="int32", check=32)
    assert written.check.integer_layers == written.check.layers
    session(path.read_bytes(), optimize=True, keep=tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    kinds = Counter(node.op_type for node in graph.node)
    assert (kinds["QLinearConv"], kinds["QLinearAdd"], kinds["QLinearMul"]) == (5, 1, 1)
    assert not {"Conv", "Gemm", "Add", "Mul"} & {*kinds}


def test_the_file_holds_each_output_quantizer_once_by_its_name(answer, tmp_path):
    export.write(answer, tmp_path / "net.onnx", data_of(images()), check=32)
    model = onnx.load(tmp_path / "net.onnx")
    read = Counter(n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear")
    assert {f"{name}.scale": 1 for name in output_quantizers(answer)}.items() <= read.items()


@pytest.mark.parametrize("format", ["encodings", "qonnx", "pt2"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 6)])
def test_every_format_has_them(format, bits, tmp_path):
    prepared = rounded(bits=bits[1], layer_bits=(bits[0], bits[0]))[1]
    path = tmp_path / f"net.{format}"
    written = export.write(prepared, path, data_of(images()), format=format, check=8)
    assert written.check.failures == []


@torch.no_grad()
def test_a_folded_batch_norm_is_rounded_where_it_was(answer):
    x = images(16, seed=3)
    ready = deployed(answer)
    assert torch.allclose(ready(x), answer(x), atol=1e-4)
    assert fold_batch_norm_(ready, traced(ready, data_of(x))) == {"stem": "norm"}
    step, _ = output_quantizers(answer)["head.output_1"].range(8)
    steps = (ready(x) - answer(x)).abs() / step
    assert float((steps > 0.5).double().mean()) < 0.05  # a code may flip, and moves others
    assert float(steps.max()) < 3.5


def test_a_layer_with_fewer_bits_rounds_again_what_it_reads(tmp_path):
    prepared = rounded()[1]
    set_bits(prepared, {"a": (4, 4)})
    path, data = tmp_path / "net.onnx", data_of(images())
    written = export.write(prepared, path, data, bias="int32", check=32)
    assert set(written.check.layers) - set(written.check.integer_layers) == {"a"}
