"""What users of other tools report of exported networks; each is right here, and stays so.

Names are those of the repositories and threads that tell of the symptom.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn

from hq_optuna import export
from hq_optuna.export.deployed import deployed, deployed_layers
from tests.export.answers import answer_of, data_of, everything, images, randomized, stored, written

LEVELS = onnxruntime.GraphOptimizationLevel


def run(model: onnx.ModelProto, x: torch.Tensor, *, optimize: bool = True, **entries: str):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS.ORT_ENABLE_ALL if optimize else LEVELS.ORT_DISABLE_ALL
    for key, value in entries.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    answer = answer_of(everything(), images(), (8, 8))
    path = tmp_path_factory.mktemp("eight") / "net.onnx"
    return answer, export.write(answer, path, data_of(images()), check=32), onnx.load(path)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    answer = answer_of(everything(), images(), (4, 4))
    path = tmp_path_factory.mktemp("four") / "net.onnx"
    return answer, export.write(answer, path, data_of(images()), check=32), onnx.load(path)


def expected(answer: nn.Module, x: torch.Tensor):
    with torch.no_grad():
        return answer(x).numpy()


def test_neural_compressor_1302_the_int4_file_is_still_float32(four):
    kinds = {i.name: (i.data_type, np.prod(i.dims)) for i in four[2].graph.initializer}
    weights = {n: kind for n, (kind, _) in kinds.items() if n.endswith(".weight_codes")}
    assert {*weights.values()} == {TensorProto.INT4} and len(weights) == 6
    floats = [n for n, (kind, size) in kinds.items() if kind == TensorProto.FLOAT and size > 16]
    assert floats == []


def test_onnxruntime_25631_four_bit_convolutions_are_rejected_at_load(four):
    x = images(4)
    np.testing.assert_allclose(run(four[2], x), expected(four[0], x), rtol=0, atol=1e-4)


def test_onnxruntime_32132_fused_integer_kernels_are_off_by_several_steps(eight):
    check = eight[1].check
    assert check.integer_layers
    assert check.optimized.furthest <= 1 and check.optimized.equal >= 0.999


@pytest.mark.parametrize("bits", [8, 6])
def test_onnxruntime_24711_convolutions_with_int32_biases_are_wrong_when_optimized(bits, tmp_path):
    x = images()
    answer = answer_of(everything(), x, (bits, bits))
    result = export.write(answer, tmp_path / "net.onnx", data_of(x), bias="int32", check=32)
    assert result.check.optimized.furthest <= 1 and result.check.plain.furthest <= 1


def test_onnxruntime_16105_the_cure_for_overflows_of_8_bit_products_can_be_turned_on(eight):
    """Products overflow on processors without VNNI alone; the file must allow the cure."""
    x = 3 * images(8)
    cured = run(eight[2], x, session__x64quantprecision="1")
    np.testing.assert_allclose(cured, run(eight[2], x), rtol=0, atol=1e-4)


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.b(nn.functional.relu6(self.a(x))).mean((2, 3))


def test_onnxruntime_22020_integer_biases_overflow_at_tiny_scales(tmp_path):
    x, network = images(), Clipped()
    with torch.no_grad():
        network.a.weight[3] *= 1e-9  # a channel that is as good as dead, with a bias
        network.a.bias[3] = 2.0
    answer = answer_of(network, x, (8, 8))
    for bias in ("float", "int32"):
        result = export.write(answer, tmp_path / f"{bias}.onnx", data_of(x), bias=bias, check=32)
        assert result.check.optimized.furthest <= 1
        found = run(onnx.load(result.path), x)
        np.testing.assert_allclose(found, expected(answer, x), rtol=0, atol=0.05)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_onnxruntime_19694_transposed_convolutions_have_scales_along_another_axis(groups, tmp_path):
    x = torch.randn(16, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    layers = nn.Sequential(nn.ConvTranspose2d(4, 8, 3, 2, groups=groups), nn.BatchNorm2d(8))
    network = randomized(nn.Sequential(layers, nn.ReLU(), nn.Conv2d(8, 2, 1)))
    with torch.no_grad():  # channels of very different sizes: a wrong axis would be seen
        network[0][0].weight.mul_(torch.logspace(-2, 1, 8 // groups).reshape(1, -1, 1, 1))
    answer = answer_of(network, x, (8, 8))
    model = written(answer, x, tmp_path / "net.onnx", check=16)
    assert not any(n.op_type == "BatchNormalization" for n in model.graph.node)
    np.testing.assert_allclose(run(model, x, optimize=False), expected(answer, x), atol=1e-3)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        return self.layer(torch.relu(self.layer(x)))


@pytest.mark.parametrize("bits", [(4, 32), (8, 32), (4, 8)])
def test_onnxruntime_28326_an_initializer_that_two_nodes_share_crashes_a_fusion(bits, tmp_path):
    """With inputs in float, as well: there a fusion would round them by itself."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    answer = answer_of(randomized(CalledTwice()), x, bits)
    model = written(answer, x, tmp_path / "net.onnx", check=16)
    largest = float(np.abs(expected(answer, x)).max())
    np.testing.assert_allclose(run(model, x), expected(answer, x), rtol=0, atol=1e-5 * largest)


class Resized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = nn.functional.interpolate(
            torch.relu(self.a(x)), scale_factor=2.0, mode="bilinear", align_corners=False
        )
        return self.head(torch.relu(self.b(x)).mean((2, 3)))


def test_onnxruntime_28448_a_linear_resize_between_roundings_changes_values(tmp_path):
    x = images()
    answer = answer_of(randomized(Resized()), x, (8, 8))
    result = export.write(answer, tmp_path / "net.onnx", data_of(x), check=32)
    assert result.check.optimized.furthest <= 1


def test_onnxruntime_23602_and_model_optimizer_2418_versions_are_the_least_that_do(eight):
    assert (eight[2].ir_version, eight[2].opset_import[0].version) == (10, 21)


def test_tensorrt_4698_zero_points_of_weights_are_zero(eight, four):
    for _, _, model in (eight, four):
        zeros = {n: a for n, a in stored(model).items() if n.endswith("weight_codes_zero_point")}
        assert not any(array.any() for array in zeros.values())


def test_onnxruntime_qnn_728_negative_int4_codes_are_read_as_16_more(four):
    codes = stored(four[2])["head.weight_codes"].astype(np.int64)
    assert codes.min() < 0 and np.abs(codes).max() <= 7


def test_onnxsim_297_batch_norm_is_not_folded_across_roundings(eight):
    assert not any(node.op_type == "BatchNormalization" for node in eight[2].graph.node)


def test_aimet_4108_activation_bits_are_flipped(tmp_path):
    x = images()
    layers = ("stem", "depthwise", "up", "down", "tokens", "head")
    wanted = dict(zip(layers, ((3, 7), (7, 3), (2, 6), (6, 2), (5, 3), (3, 5)), strict=True))
    path = tmp_path / "net.onnx"
    model = written(answer_of(everything(), x, wanted), x, path)
    arrays = stored(model)
    for name, (_, bits) in wanted.items():
        rounding = next(n for n in model.graph.node if f"{name}.input_quantizer.scale" in n.input)
        clip = next(n for n in model.graph.node if n.input[:1] == rounding.output[:1])
        assert int(arrays[clip.input[2]]) == 2**bits - 1, name
    said = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert said["hq_optuna.bits"] == {name: [*bits] for name, bits in wanted.items()}


def test_onnxsim_1303_what_runs_in_integers_is_read_back_from_the_optimized_graph(eight, four):
    """A convolution with 8-bit integers before the next rounding does; 4-bit weights do not."""
    assert eight[1].check.integer_layers == ("tokens",)
    assert four[1].check.integer_layers == ()


def test_brevitas_1346_and_mct_960_the_file_is_as_large_at_fewer_bits(tmp_path):
    x, network = torch.randn(16, 256), randomized(nn.Sequential(nn.Linear(256, 512)))
    sizes = {}
    for bits in (8, 4, 2):
        answer, path = answer_of(network, x, (bits, 8)), tmp_path / f"{bits}.onnx"
        export.write(answer, path, data_of(x), weights="int2", check=0)
        sizes[bits] = path.stat().st_size
    for more, fewer in ((8, 4), (4, 2)):  # but for 512 scales, 512 biases, and the graph
        saved = 256 * 512 * (more - fewer) // 8
        assert abs(sizes[more] - sizes[fewer] - saved) < 1000


def test_pytorch_167063_the_exporter_fails_on_fake_quantize_modules(four):
    assert {node.domain for node in four[2].graph.node} == {""}
    kinds = {node.op_type for node in four[2].graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


def test_brevitas_1543_integer_weights_cannot_be_exported(eight):
    kinds = {i.name: i.data_type for i in eight[2].graph.initializer}
    for name, layer in deployed_layers(deployed(eight[0])).items():
        found = stored(eight[2])[f"{name}.weight_codes"].astype(np.int64)
        assert kinds[f"{name}.weight_codes"] == TensorProto.INT8
        codes = np.abs(layer.weight_codes.numpy().astype(np.int64))  # batch-norm may change signs
        assert any(np.array_equal(np.abs(found), c) for c in (codes, codes.T)), name


def test_aimet_4071_encodings_are_missing_or_name_what_is_not_in_the_file(four, tmp_path):
    export.write(four[0], tmp_path / "net.json", data_of(images()), format="encodings", check=0)
    graph = onnx.load(tmp_path / "net.float.onnx").graph
    names = {n for node in graph.node for n in (*node.input, *node.output)}
    first = json.loads((tmp_path / "net.json").read_text())
    second = json.loads((tmp_path / "net.v2.json").read_text())["encodings"]
    layers = [*deployed_layers(deployed(four[0]))]
    params = {entry["name"] for entry in first["param_encodings"]}
    activations = [entry["name"] for entry in first["activation_encodings"]]
    assert params == {f"{name}.weight" for name in layers}
    assert len(activations) == len({*activations}) == len(layers)
    assert {entry["name"] for entry in second} == {*activations, *params} <= names


@pytest.mark.parametrize(("bits", "weights"), [(2, "int2"), (4, "int4"), (8, "int8")])
def test_nncf_887_files_of_2_4_and_8_bits_run(bits, weights, tmp_path):
    x = images()
    answer, path = answer_of(everything(), x, (bits, 8)), tmp_path / "net.onnx"
    export.write(answer, path, data_of(x), weights=weights, check=32)
    found, wanted = run(onnx.load(path), x, optimize=False), expected(answer, x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * float(np.abs(wanted).max()))
