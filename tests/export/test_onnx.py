"""ONNX files: integers in their smallest type, and the network's own numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn

from hq_optuna import export
from hq_optuna.errors import ExportError
from hq_optuna.export import onnx_graph
from hq_optuna.export.check import check_file
from hq_optuna.export.deployed import deployed, deployed_layers
from hq_optuna.export.folding import factors_of
from hq_optuna.network.batches import Batch, Batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from tests.export.answers import (
    answer_of,
    data_of,
    everything,
    images,
    randomized,
    stored,
    written,
)

KINDS = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}


def run(model: onnx.ModelProto, *inputs: torch.Tensor, optimize: bool = False):
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [item.name for item in session.get_inputs()]
    return session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})


LAYERS = ("stem", "depthwise", "up", "down", "tokens", "head")


@pytest.mark.parametrize(
    "bits", [(1, 2, 3, 5, 6, 7), (4, 8, 9, 10, 11, 12), (13, 14, 15, 16, 1, 8)]
)
def test_every_number_of_bits_is_exact_in_the_smallest_type(bits, tmp_path):
    x = images()
    answer = answer_of(everything(), x, {n: (b, b) for n, b in zip(LAYERS, bits, strict=True)})
    model = written(answer, x, tmp_path / "net.onnx", check=32)  # raises unless codes are equal
    kinds = {item.name: item.data_type for item in model.graph.initializer}
    for name, b in zip(LAYERS, bits, strict=True):
        container = 4 if b <= 4 else 8 if b <= 8 else 16
        assert kinds[f"{name}.weight_codes"] == KINDS[container], name
        rounding = next(n for n in model.graph.node if f"{name}.input_quantizer.scale" in n.input)
        after = [n for n in model.graph.node if n.input[:1] == rounding.output[:1]]
        clipped = [n.op_type for n in after] == ["Clip"]
        assert clipped == (b < 8), name
    assert (model.ir_version, model.opset_import[0].version) == (10, 21)


QUANTIZERS = {
    "binary": ((1, 4),),
    "ternary": ((2, 4),),
    "midrise": ((1, 4), (2, 4), (3, 4), (4, 8), (7, 8), (8, 16)),
    "dorefa": ((1, 4), (2, 4), (3, 4), (4, 8), (7, 8), (8, 16)),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_is_exact(name, tmp_path):
    """Mid-rise codes are odd numbers up to 2ᵇ − 1, so they need one bit more than they count."""
    x, cases = images(), QUANTIZERS[name]
    chosen = {layer: cases[i % len(cases)] for i, layer in enumerate(LAYERS)}
    bits = {layer: (b, 8) for layer, (b, _) in chosen.items()}
    answer = answer_of(everything(), x, bits, dict.fromkeys(LAYERS, name))
    model = written(answer, x, tmp_path / "net.onnx", check=32)
    kinds, arrays = {i.name: i.data_type for i in model.graph.initializer}, stored(model)
    for layer, (b, container) in chosen.items():
        assert kinds[f"{layer}.weight_codes"] == KINDS[container], layer
        found = {*np.unique(np.abs(arrays[f"{layer}.weight_codes"].astype(np.int64)))}
        assert found <= ({0, 1} if name == "ternary" else {*range(1, 2**b, 2)}), layer


def test_initializers_are_the_answers_codes_and_scales(tmp_path):
    x, network = images(), everything()
    answer = answer_of(network, x, (5, 8))
    arrays = stored(written(answer, x, tmp_path / "net.onnx"))
    plain = deployed(answer)
    norms = {"stem": "norm", "depthwise": "norm_2", "up": "up_norm"}
    for name, layer in deployed_layers(plain).items():
        codes, scale = layer.weight_codes.numpy(), layer.weight_scale.numpy()
        found = arrays[f"{name}.weight_codes"].astype(np.int8)
        if name in norms:
            factor = factors_of(network.get_submodule(norms[name]))[0].numpy()
            codes = codes * np.sign(factor).astype(np.int8).reshape(-1, *[1] * (codes.ndim - 1))
            scale = np.float32(scale.astype(np.float64) * np.abs(factor))
        found = found if found.shape == codes.shape and (found == codes).all() else found.T
        assert (found == codes).all(), name
        np.testing.assert_array_max_ulp(arrays[f"{name}.weight_scale"], scale, maxulp=2)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_file_takes_batches_of_any_size_and_has_shapes(n, tmp_path):
    x = images()
    answer = answer_of(everything(), x, (4, 8))
    model = written(answer, x, tmp_path / "net.onnx")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    onnx.checker.check_model(inferred, full_check=True)
    assert inferred.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 4
    (y,) = run(model, x[:n])
    assert y.shape == (n, 4)
    with torch.no_grad():
        np.testing.assert_allclose(y, answer(x[:n]).numpy(), rtol=0, atol=1e-4)


def test_weights_can_be_larger_for_runtimes_without_small_ones_and_smaller_for_those_with(tmp_path):
    x = images()
    answer = answer_of(everything(), x, (2, 4))
    sizes = {}
    for kind, bits, opset in (("int8", 8, 21), ("int4", 4, 21), ("int2", 2, 25)):
        path = tmp_path / f"{kind}.onnx"
        model = written(answer, x, path, weights=kind, check=32)
        kinds = {i.name: i.data_type for i in model.graph.initializer}
        assert kinds["stem.weight_codes"] == KINDS[bits]
        assert model.opset_import[0].version == opset
        assert model.ir_version == (13 if opset == 25 else 10)
        inputs = {k for n, k in kinds.items() if n.endswith("quantizer.zero_point")}
        assert inputs == {TensorProto.UINT8}
        sizes[kind] = path.stat().st_size
    assert sizes["int2"] < sizes["int4"] < sizes["int8"]


def test_integer_biases_are_multiples_of_input_scale_times_weight_scale(tmp_path):
    x = images()
    answer = answer_of(everything(), x, (8, 8))
    model = written(answer, x, tmp_path / "net.onnx", bias="int32", check=32)
    arrays = stored(model)
    for name in ("stem", "depthwise", "up", "down", "tokens", "head"):
        codes, step = arrays[f"{name}.bias_codes"], arrays[f"{name}.bias_scale"]
        assert codes.dtype == np.int32
        inputs, weights = arrays[f"{name}.input_quantizer.scale"], arrays[f"{name}.weight_scale"]
        np.testing.assert_array_equal(step, inputs * weights)
    plain = answer.head.bias.detach().numpy()
    assert np.abs(arrays["head.bias_codes"] * arrays["head.bias_scale"] - plain).max() <= (
        arrays["head.bias_scale"].max() / 2 * 1.001
    )


def test_few_bits_keep_a_float_bias_when_optimized(tmp_path, monkeypatch):
    """onnxruntime rounds it to multiples of input scale × weight scale, unless it stands apart."""
    x = images()
    answer = answer_of(everything(), x, (3, 3))
    model = written(answer, x, tmp_path / "net.onnx")
    (plain,), (optimized,) = run(model, x), run(model, x, optimize=True)
    np.testing.assert_allclose(optimized, plain, rtol=0, atol=1e-4)
    monkeypatch.setattr(onnx_graph, "_set_biases_apart_", lambda *parts: None)
    with pytest.raises(ExportError, match="optimized"):
        export.write(answer, tmp_path / "other.onnx", data_of(x))


def test_a_file_says_its_bits_and_nothing_of_the_machine_it_was_written_on(tmp_path):
    x = images()
    answer = answer_of(everything(), x, (4, 8))
    path = tmp_path / "net.onnx"
    model = written(answer, x, path, about={"cost": {"metric": "bops", "value": 12.0}})
    said = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert said["hq_optuna.bits"]["stem"] == [4, 8]
    assert said["hq_optuna.cost"] == {"metric": "bops", "value": 12.0}
    assert "hq_optuna" in said["hq_optuna.versions"]
    content = path.read_bytes()
    assert b".py" not in content and b"site-packages" not in content


def test_a_file_is_as_small_as_its_integers(tmp_path):
    network = randomized(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)))
    x = torch.randn(16, 256)
    sizes = {}
    for bits in (8, 4, 2):
        answer = answer_of(network, x, (bits, 8))
        path = tmp_path / f"{bits}.onnx"
        result = export.write(answer, path, data_of(x), weights="int2", check=16)
        sizes[bits] = path.stat().st_size
        floats = 4 * 2 * (512 + 256)  # scales and biases
        zeros = 512 + 256 if bits == 8 else 0
        expected = 2 * 256 * 512 * bits / 8 + floats + zeros
        assert abs(result.stored_bytes - expected) < 0.01 * expected
        assert sizes[bits] < 1.05 * expected + 6000  # the graph, and what it says of itself
    assert sizes[4] < 0.55 * sizes[8] and sizes[2] < 0.6 * sizes[4]


@pytest.mark.parametrize("damage", ["scale", "codes", "bias", "zero_point", "clip"])
def test_a_file_with_other_numbers_fails_the_check(damage, tmp_path):
    x = images()
    answer = answer_of(everything(), x, (5, 5))
    model = written(answer, x, tmp_path / "net.onnx")
    ready = deployed(answer)
    assert not check_file(model, answer, ready, data_of(x), 32).failures
    arrays = stored(model)
    name = {
        "scale": "depthwise.weight_scale",
        "codes": "tokens.weight_codes",
        "bias": "head.bias",
        "zero_point": "stem.input_quantizer.zero_point",
        "clip": next(n for n in model.graph.node if n.op_type == "Clip").input[2],
    }[damage]
    array = arrays[name]
    changed = {"scale": lambda: array * 1.01, "codes": lambda: -array, "clip": lambda: array + 200}
    arrays[name] = changed.get(damage, lambda: array + 1)().astype(array.dtype)
    for item in model.graph.initializer:
        if item.name == name:
            item.CopyFrom(onnx.numpy_helper.from_array(arrays[name], name))
    assert check_file(model, answer, ready, data_of(2 * x), 32).failures


def test_a_file_that_fails_is_not_written_and_what_was_there_stays(tmp_path, monkeypatch):
    x = images()
    answer = answer_of(everything(), x, (4, 4))
    path = tmp_path / "net.onnx"
    path.write_text("before")
    from hq_optuna.export import writing as module

    def wrong(network, program):
        network.head.weight_scale.mul_(1.5)
        return {}

    monkeypatch.setattr(module, "fold_batch_norm_", wrong)
    with pytest.raises(ExportError, match="computes other numbers than the network"):
        export.write(answer, path, data_of(x))
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    export.write(answer, path, data_of(x), check=0)  # as asked for
    assert path.read_bytes() != b"before"


class Alike(nn.Module):
    """Scores of ten classes that differ by less than a flipped code moves them, or by much."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        with torch.no_grad():
            self.head.weight.copy_(self.head.weight[:1] + spread * torch.randn(10, 64))
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def checked(spread, tmp_path):
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
    answer = answer_of(Alike(spread), x, (8, 8))
    return export.write(answer, tmp_path / "net.onnx", data_of(x, 64)).check


def test_classes_are_compared_on_512_samples_and_all_that_are_no_ties_are_equal(tmp_path):
    check = checked(1.0, tmp_path)
    assert check.samples == 512
    assert check.clear_changes == 0
    assert check.optimized.agreement >= 0.995


def test_a_changed_class_fails_unless_float_rounding_alone_decides_it(tmp_path):
    found = checked(1.0, tmp_path)
    # On some processors float rounding happens to move nothing here.
    check = replace(found, plain=replace(found.plain, free_error=1e-7))
    ties = (check.plain.free_error, 2 * check.plain.free_error)
    clear = (2.1 * check.plain.free_error,) * 3

    def with_changes(plain, optimized, equal=1.0):
        plain = replace(check.plain, changed=plain)
        return replace(
            check, plain=plain, optimized=replace(check.optimized, changed=optimized, equal=equal)
        )

    assert with_changes((), ties).failures == []
    assert with_changes((), clear[:2]).failures == []  # 0.5 % of 512 samples
    (failure,) = with_changes((), clear).failures
    assert failure == "optimized, 3 of 512 samples get another class that are no ties"
    # Ties too change their class as often as without optimizations.
    assert with_changes(10 * ties, 14 * ties).failures == []
    (failure,) = with_changes(10 * ties, 30 * ties).failures
    assert failure == "optimized, 60 of 512 samples get another class, and 20 without optimizations"
    # Integer kernels round biases too, so more codes flip, and more ties with them.
    assert with_changes(10 * ties, 30 * ties, equal=0.999).failures == []
    (failure,) = with_changes((), clear, equal=0.999).failures
    assert "Of 2 that do not, float rounding alone decides" in with_changes((), ties).sentence


def test_outputs_without_classes_have_no_agreement(tmp_path):
    x = torch.randn(32, 16)
    answer = answer_of(Alike(1.0), x, (8, 8))
    found = export.write(answer, tmp_path / "net.onnx", [x[:16], x[16:]], check=32)
    assert found.check.plain.agreement is None and found.check.optimized.changed == ()


class Sentences(nn.Module):
    """Two inputs, tokens and which of them count, in sentences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.mix, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, ids, mask):
        weights = mask.to(torch.float32)[..., None]
        x = torch.relu(self.mix(self.embed(ids)))
        return self.head((x * weights).sum(1) / weights.sum(1))


def test_sizes_in_which_batches_differ_stay_open_and_inputs_go_by_name(tmp_path):
    torch.manual_seed(0)
    network = randomized(Sentences())

    def batch(n, length):
        ids = torch.randint(0, 50, (n, length))
        lengths = torch.randint(1, length + 1, (n, 1))
        return {"mask": torch.arange(length) < lengths, "ids": ids}

    data = Batches([Batch(batch(4, length), None, 4) for length in (5, 9, 7)])
    layers = introspect(network, data).layers
    names = [layer.name for layer in layers]
    answer = prepare(network, layers, observe_inputs(network, names, data))
    set_bits(answer, dict.fromkeys(names, (8, 8)))
    result = export.write(answer, tmp_path / "net.onnx", data)
    assert result.check.samples == 12 and result.check.plain.agreement is None
    given = batch(3, 11)
    model = onnx.load(result.path)
    assert [item.name for item in model.graph.input] == ["ids", "mask"]
    (found,) = run(model, given["ids"], given["mask"])
    with torch.no_grad():
        np.testing.assert_allclose(found, answer(**given).numpy(), rtol=0, atol=1e-5)
