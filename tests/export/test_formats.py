"""Encodings, QONNX and PyTorch programs: each read back by someone else than who wrote it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from torch import nn

from hq_optuna import export
from hq_optuna.errors import ExportError
from hq_optuna.export.deployed import deployed_layers
from tests.export.answers import answer_of, data_of, everything, images, randomized, stored

LAYERS = ("stem", "depthwise", "up", "down", "tokens", "head")
BITS = dict(zip(LAYERS, ((8, 8), (4, 6), (3, 5), (2, 4), (5, 3), (8, 8)), strict=True))
QUANTIZERS = {"depthwise": "dorefa", "up": "midrise", "down": "ternary"}


@pytest.fixture(scope="module")
def answer():
    return answer_of(everything(), images(), BITS, QUANTIZERS, correct=True)


@pytest.fixture(scope="module")
def encoded(answer, tmp_path_factory):
    path = tmp_path_factory.mktemp("encodings") / "net.json"
    export.write(answer, path, data_of(images()), format="encodings", check=16)
    return {
        "first": json.loads(path.read_text()),
        "second": json.loads(path.with_suffix(".v2.json").read_text()),
        "model": onnx.load(path.with_suffix(".float.onnx")),
    }


def test_every_layer_has_encodings_of_its_own_bits_in_both_layouts(encoded):
    first, second = encoded["first"], encoded["second"]
    assert (first["version"], second["version"]) == ("1.0.0", "2.1.0")
    params = {e["name"]: e for e in first["param_encodings"]}
    assert params.keys() == {f"{name}.weight" for name in LAYERS}
    # Mid-rise codes are odd: with whole offsets they need the grid of one more bit.
    odd = {"depthwise", "up"}
    for name in LAYERS:
        assert params[f"{name}.weight"]["bw"] == BITS[name][0] + (name in odd), name
    assert [e["bw"] for e in first["activation_encodings"]] == [BITS[n][1] for n in LAYERS]
    types = {e["name"]: e["output_dtype"] for e in second["encodings"]}
    assert [types[f"{n}.weight"] for n in LAYERS] == [f"int{BITS[n][0]}" for n in LAYERS]
    zeros = {e["name"]: e.get("y_zero_point") for e in second["encodings"]}
    assert zeros["up.weight"] == -0.5 and zeros["head.weight"] is None


def test_encodings_name_tensors_of_the_file_beside_them(encoded):
    graph = encoded["model"].graph
    names = {n for node in graph.node for n in (*node.input, *node.output)}
    for version in ("first", "second"):
        said = encoded[version]
        entries = said.get("encodings", [])
        entries = entries or said["param_encodings"] + said["activation_encodings"]
        assert len(entries) == 2 * len(LAYERS)
        assert {entry["name"] for entry in entries} <= names
    assert not {n.op_type for n in graph.node} & {"QuantizeLinear", "DequantizeLinear"}


def test_rounding_by_either_layout_gives_the_networks_outputs(answer, encoded):
    """A reader of the JSON, written for this test: it knows nothing but the layouts."""
    x = images(16, seed=5)
    arrays = stored(encoded["model"])
    for layout in ("first", "second"):
        grids: dict[str, tuple] = {}
        said = encoded[layout]
        for e in said.get("param_encodings", []) + said.get("activation_encodings", []):
            low = e["offset"][0]
            zero = 0 if e["name"] in arrays else -low
            low = low if e["name"] in arrays else 0
            grids[e["name"]] = (e["scale"], zero, low, low + 2 ** e["bw"] - 1)
        for e in said.get("encodings", []):
            signed, bits = e["output_dtype"][0] == "i", int(e["output_dtype"].lstrip("uint"))
            low = -(2 ** (bits - 1)) if signed else 0
            grids[e["name"]] = (e["y_scale"], e.get("y_zero_point", 0), low, low + 2**bits - 1)
        model = onnx.ModelProto()
        model.CopyFrom(encoded["model"])
        for item in model.graph.initializer:
            if item.name in grids:
                scale, zero, low, high = grids[item.name]
                w, axis = arrays[item.name], 1 if item.name in ("down.weight",) else 0
                if w.shape[axis] != len(scale) or item.name in ("tokens.weight",):
                    axis = next(i for i, n in enumerate(w.shape) if n == len(scale))
                step = np.asarray(scale, np.float32).reshape(
                    [-1 if i == axis else 1 for i in range(w.ndim)]
                )
                codes = np.clip(np.rint(w / step + zero), low, high)
                rounded = ((codes - zero) * step).astype(np.float32)
                np.testing.assert_array_equal(rounded, w, err_msg=item.name)
        nodes = []
        for node in model.graph.node:
            nodes.append(node)
        for name in [n for n in grids if n not in arrays]:
            scale, zero, low, high = grids[name]
            for node in nodes:
                for i, read in enumerate(node.input):
                    if read == name:
                        node.input[i] = f"{name}_rounded"
            new = []
            floats = {"scale": scale if np.isscalar(scale) else scale[0], "zero": zero,
                      "low": low, "high": high}  # fmt: skip
            for key, value in floats.items():
                array = np.asarray(value, np.float32)
                model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}{key}"))
            steps = (("Div", "scale"), ("Round", None), ("Add", "zero"), ("Clip", "low"),
                     ("Sub", "zero"), ("Mul", "scale"))  # fmt: skip
            last = name
            for i, (kind, key) in enumerate(steps):
                inputs = [last] + ([f"{name}{key}"] if key else [])
                inputs += [f"{name}high"] if kind == "Clip" else []
                last = f"{name}_rounded" if i == len(steps) - 1 else f"{name}_step{i}"
                new.append(onnx.helper.make_node(kind, inputs, [last]))
            at = next((i for i, n in enumerate(nodes) if name in n.output), -1)
            nodes[at + 1 : at + 1] = new
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, answer(x).numpy(), rtol=0, atol=1e-4)


class Shared(nn.Module):
    """Two layers with other bits read one tensor, and so does a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = torch.relu(self.enter(x))
        return self.a(x) + self.b(x) + x


def test_a_tensor_that_several_read_gets_a_name_for_each_encoding(tmp_path):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    bits = {"enter": (8, 8), "a": (8, 3), "b": (8, 6)}
    answer = answer_of(randomized(Shared()), x, bits)
    path = tmp_path / "net.json"
    export.write(answer, path, data_of(x), format="encodings", check=16)
    entries = json.loads(path.read_text())["activation_encodings"]
    assert len({e["name"] for e in entries}) == 3
    assert [e["bw"] for e in entries] == [8, 3, 6]


def test_one_bit_inputs_have_no_encoding_and_are_refused(tmp_path):
    answer = answer_of(everything(), images(), (8, 1))
    with pytest.raises(ExportError, match=r"'stem.input_quantizer' rounds to 1 bit"):
        export.write(answer, tmp_path / "net.json", data_of(images()), format="encodings")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExportError, match=r"give net\.json"):
        export.write(answer, tmp_path / "net.onnx", data_of(images()), format="encodings")


def test_qonnx_executes_what_was_written_and_finds_the_networks_outputs(answer, tmp_path):
    path = tmp_path / "net.onnx"
    export.write(answer, path, data_of(images()), format="qonnx", check=2)
    model = ModelWrapper(str(path))
    quants = [n for n in model.graph.node if n.op_type == "Quant"]
    assert len(quants) == 2 * len(LAYERS)
    bits = {n.input[3]: float(model.get_initializer(n.input[3])) for n in quants}
    assert [bits[f"{n}.weight.bits"] for n in LAYERS] == [BITS[n][0] for n in LAYERS]
    assert [bits[f"{n}.input_quantizer.quant.bits"] for n in LAYERS] == [BITS[n][1] for n in LAYERS]
    x = images(1, seed=7)
    feed = {model.graph.input[0].name: x.numpy()}
    found = execute_onnx(model, feed)[model.graph.output[0].name]
    with torch.no_grad():
        np.testing.assert_allclose(found, answer(x).numpy(), rtol=0, atol=1e-4)


def test_one_bit_weights_are_bipolar_in_qonnx(tmp_path):
    path = tmp_path / "net.onnx"
    answer = answer_of(everything(), images(), (1, 4), dict.fromkeys(LAYERS, "binary"))
    export.write(answer, path, data_of(images()), format="qonnx", check=2)
    kinds = [n.op_type for n in onnx.load(path).graph.node]
    assert kinds.count("BipolarQuant") == len(LAYERS)


READER = """
import sys, torch
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2], weights_only=True)
found = program.module()(x)
assert "hq_optuna" not in sys.modules
print(float((found - expected).abs().max()))
"""


def test_a_pytorch_program_runs_without_this_package_and_holds_integers(answer, tmp_path):
    path = tmp_path / "net.pt2"
    export.write(answer, path, data_of(images()), format="pt2", check=16)
    x = images(7, seed=9)
    with torch.no_grad():
        torch.save((x, answer(x)), tmp_path / "expected.pt")
    run = subprocess.run(
        [sys.executable, "-c", READER, str(path), str(tmp_path / "expected.pt")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 1e-5
    program = torch.export.load(io.BytesIO(path.read_bytes()))
    codes = {k: v for k, v in program.state_dict.items() if k.endswith("weight_codes")}
    assert len(codes) == len(LAYERS)
    assert {v.dtype for v in codes.values()} == {torch.int8}
    assert program.example_inputs is None  # samples stay with their owner
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


def test_layers_that_stay_in_float_are_written_as_they_are(tmp_path):
    x, network = images(), everything()
    bits = {**BITS, "down": (32, 32), "tokens": (32, 8), "head": (8, 32)}
    answer = answer_of(network, x, bits)
    for name in ("onnx", "qonnx", "pt2", "encodings"):
        path = tmp_path / f"net.{name}"
        export.write(answer, path, data_of(x), format=name, check=4)
    assert len(deployed_layers(export.deployed(answer))) == 6
    arrays = stored(onnx.load(tmp_path / "net.onnx"))
    assert "down.weight_codes" not in arrays and "head.weight_codes" in arrays
