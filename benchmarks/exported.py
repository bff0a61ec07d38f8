"""Exported files beside the networks they were made from: codes, outputs, sizes, runtimes, latency.

    python -m benchmarks.exported --data DIR

Sixteen networks: the zoo, torchvision's ResNet-18 and MobileNetV2 and a small ViT with weights that
were drawn at random, an LSTM, a GRU, one with transposed convolutions, and super-resolution,
detection, segmentation and sentences with their own metrics; each at uniform 8 and 4 bits, at mixed
bits, and at 8 bits with rounded outputs. Each is written as ONNX, checked by `hq_optuna.export`
itself, and compared again here: initializers with the quantizers' codes and scales, classes on at
least 500 samples, and OpenVINO where it is installed. MiniLM needs HQ_OPTUNA_MINILM
(`studies/sentences.py`). Latency is processor time on one thread, beside onnxruntime's own
static quantization of the float file, in turns.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from benchmarks.fields import FIELDS
from benchmarks.outcome import Outcome
from benchmarks.zoo import data_folder, load_trained, unpacked
from hq_optuna import Metric
from hq_optuna.errors import ExportError, NetworkError
from hq_optuna.export import write
from hq_optuna.export.check import OnnxNetwork, session
from hq_optuna.export.deployed import deployed
from hq_optuna.export.folding import factors_of, foldable
from hq_optuna.export.tracing import bound, sample_axis, take, traced
from hq_optuna.network.batches import Batch, Batches, forward, read_batches
from hq_optuna.network.containers import tensors
from hq_optuna.network.introspection import introspect
from hq_optuna.network.unfused import unfused
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.outputs import add_output_quantizers_
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.space.layers import LayerSpec
from studies import super_resolution
from studies.sentences import MiniLM

MIXED = ((8, 8), (4, 6), (3, 5), (6, 4), (5, 8), (2, 7), (4, 4), (8, 3))
"""Weight and activation bits that layers take in turn; the first and the last have 8."""
KINDS = ("uniform_8", "uniform_8_outputs", "uniform_4", "mixed")
ZOO = ("digits", "kws", "vww", "resnet20", "resnet32", "efficientnet_lite0")


class Case(NamedTuple):
    """A network with data to calibrate on and data to compare on, and the metric of its field.

    Without a metric, labels are classes.
    """

    network: nn.Module
    calibration: Batches
    unseen: Batches
    metric: Metric | None = None


class Recurrent(nn.Module):
    """A recurrent layer, which stays in float, between linear ones."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.recurrent = kind(32, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, T, 8)`` to ``(N, 10)``."""
        hidden, _ = self.recurrent(torch.relu(self.embed(x)))
        return self.head(hidden.mean(1))  # type: ignore[no-any-return]


class Upsampling(nn.Module):
    """Transposed convolutions, in groups too, with batch-norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.ConvTranspose2d(16, 16, 2, 2, groups=4), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.ConvTranspose2d(16, 8, 3, padding=1), nn.Hardswish()),
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` to ``(N, 10)``."""
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


def drawn(name: str) -> Case:
    """Return a network with random weights, batch-norm statistics of its data, and its labels."""
    from torchvision import models

    torch.manual_seed(0)
    size = 32
    makers: dict[str, Callable[[], nn.Module]] = {
        "resnet18": lambda: models.resnet18(num_classes=10),
        "mobilenet_v2": lambda: models.mobilenet_v2(num_classes=10),
        "vit": lambda: models.VisionTransformer(
            image_size=size, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128,
            num_classes=10,
        ),
        "lstm": lambda: Recurrent(nn.LSTM),
        "gru": lambda: Recurrent(nn.GRU),
        "upsampling": Upsampling,
    }  # fmt: skip
    network = makers[name]()
    shape = (12, 8) if name in ("lstm", "gru") else (3, size, size)
    x = torch.randn(640, *shape)
    if name == "vit":
        nn.init.normal_(network.get_submodule("heads.head").weight, std=0.1)  # type: ignore[arg-type]
    with torch.no_grad():
        for _ in range(20):
            network.train()(x[:64])
        labels = torch.cat([network.eval()(part).argmax(1) for part in x.split(64)])
    return Case(network, in_batches(x[:128], labels[:128], 32), in_batches(x[128:], labels[128:]))


def in_batches(x: Tensor, labels: Tensor, n: int = 64) -> Batches:
    """Return samples in batches of ``n``."""
    pairs = zip(x.split(n), labels.split(n), strict=True)
    return Batches([Batch(inputs, y, len(y)) for inputs, y in pairs])


OTHER_FIELDS = ("rlfn", "fastestdet", "espnet", "minilm")
DRAWN = ("resnet18", "mobilenet_v2", "vit", "lstm", "gru", "upsampling")

ALL = (*ZOO, *DRAWN, *OTHER_FIELDS)


class Cropped(NamedTuple):
    """A metric's data of one size, as a file takes one: the corners of images, ``scale`` larger."""

    size: tuple[int, int]
    scale: int

    def of(self, data: Batches) -> Batches:
        """Return the upper left corners of inputs and labels."""
        h, w = self.size
        big = slice(None, h * self.scale), slice(None, w * self.scale)
        large = (b for b in data if b.inputs.shape[-2] >= h and b.inputs.shape[-1] >= w)
        return Batches(Batch(b.inputs[..., :h, :w], b.labels[..., *big], b.n) for b in large)


class Paired(nn.Module):
    """A network of sentences, given pairs of them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Map ``(N, 2, T)`` to ``(N, 2, 384)``."""
        found = self.network(ids.flatten(0, 1), mask.flatten(0, 1))
        return found.unflatten(0, ids.shape[:2])  # type: ignore[no-any-return]


def of_field(name: str, folder: Path, quick: bool) -> Case:
    """Return a network of a field, with its own metric."""
    one = FIELDS[name]
    given = dict(one.network)
    if "data" in inspect.signature(one.study.network).parameters:
        given["data"] = folder
    data = read_batches(one.study.calibration(folder), labelled=False)
    unseen = read_batches(getattr(one.study, one.final)(folder), batch_size=64)
    if one.study is super_resolution:
        size = tuple(data[0].inputs.shape[-2:])
        unseen = Cropped(size, super_resolution.SCALE).of(unseen)
    return Case(
        one.study.network(**given), data, Batches(unseen[:1]) if quick else unseen, one.metric
    )


def load(name: str, data: Path, quick: bool) -> Case:
    """Return a network of the zoo, of a field, or a drawn one."""
    if name in DRAWN:
        return drawn(name)
    if name in OTHER_FIELDS:
        with unpacked(data) as folder:
            return of_field(name, folder, quick)
    found = load_trained(name, data, n_calibration=32 if quick else 128)
    return Case(found.network, in_batches(*found.calibration, 32), in_batches(*found.unseen))


def assignments(layers: tuple[LayerSpec, ...]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield uniform and mixed bits by name."""
    names = [layer.name for layer in layers]
    for bits in (8, 4):
        yield f"uniform_{bits}", dict.fromkeys(names, (bits, bits))
    mixed = {name: MIXED[i % len(MIXED)] for i, name in enumerate(names)}
    yield "mixed", {**mixed, names[0]: (8, 8), names[-1]: (8, 8)}


def equal_weights(answer: nn.Module, data: Batches, path: Path) -> tuple[int, int]:
    """Return how many layers' codes and scales a file holds as the quantizers say, and of how many.

    Codes bit for bit, scales within 2 ulp of scale × |γ/σ| where a batch-norm was folded.
    """
    arrays = {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    ready = deployed(answer)
    norms = foldable(ready, traced(ready, data))
    right = of = 0
    for name, module in ready.named_modules():
        if f"{name}.weight_codes" not in arrays:
            continue
        holder = weight_quantizer(answer.get_submodule(name))
        scale = holder.scale(float_weight(answer.get_submodule(name)), holder.bits).double()
        codes = module.weight_codes.double()  # laid out by output in groups
        if not module.by_output:
            weight = holder.quantized(float_weight(answer.get_submodule(name)), holder.bits)
            shape = [1] * weight.dim()
            shape[holder.channel_axis] = -1
            codes = (weight.double() / scale.reshape(shape)).round()
        if name in norms:
            factor = factors_of(answer.get_submodule(norms[name]))[0]
            shape = [1] * codes.dim()
            shape[module.channel_axis] = -1
            codes, scale = codes * factor.sign().reshape(shape), scale * factor.abs()
        found = arrays[f"{name}.weight_codes"].astype(np.float64)
        same = [np.array_equal(found, c) for c in (codes.numpy(), codes.numpy().T)]
        alive = codes.movedim(module.channel_axis, 0).flatten(1).any(1).numpy()
        stored = arrays[f"{name}.weight_scale"]
        ulp = np.spacing(np.float32(scale.numpy()))
        near = np.abs(stored.astype(np.float64) - scale.numpy())[alive] <= 2 * ulp[alive]
        of += 1
        right += any(same) and bool(near.all())
    return right, of


def expected_bytes(answer: nn.Module, path: Path) -> int:
    """Return what the containers of all numbers take: weights in theirs, all else as it is."""
    bits = {2: 2, 4: 4, 8: 8, 16: 16}
    total = 0.0
    model = onnx.load(path)
    for item in model.graph.initializer:
        n = int(np.prod(item.dims, dtype=np.int64))
        if item.name.endswith(".weight_codes"):
            name = item.name.removesuffix(".weight_codes")
            holder = weight_quantizer(answer.get_submodule(name))
            needed = holder.bits
            total += n * next(b for b in bits if b >= max(needed, 4)) / 8
        else:
            array = numpy_helper.to_array(item)
            total += array.nbytes if array.dtype.itemsize > 1 else n
    return int(total)


@torch.no_grad()
def outputs_of(network: Any, data: Batches) -> Tensor:
    """Return a network's first outputs of all samples, one after the other."""
    found = [next(tensors(forward(network, batch.inputs))).flatten(1) for batch in data]
    return torch.cat(found)


class OpenVino(nn.Module):
    """A file in OpenVINO, called as the network it was made from.

    By default OpenVINO computes in bfloat16 where the processor can, and rounds what enters layers
    with weights of 4 bits again, to 8 bits.
    """

    def __init__(self, path: Path, like: nn.Module) -> None:
        super().__init__()
        import openvino

        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
        hints["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        core = openvino.Core()
        self._compiled = core.compile_model(core.read_model(path), "CPU", hints)
        self._like = [like]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the file's first output."""
        given = tensors(bound(self._like[0], args, kwargs).arguments)
        return torch.from_numpy(self._compiled([x.numpy() for x in given])[0].copy())


def openvino_outputs(path: Path, answer: nn.Module, data: Batches) -> Tensor | str:
    """Return what OpenVINO computes of a file, or why it refuses."""
    try:
        return outputs_of(OpenVino(path, answer), data)
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:  # of OpenVINO's, of many kinds
        return " ".join(str(error).split())[-200:]


class Benchmark:
    """Writes and compares files, and keeps the worst of each figure."""

    def __init__(self, folder: Path, quick: bool, kinds: Sequence[str]) -> None:
        self.folder, self.quick, self.kinds = folder, quick, kinds
        self.rows: list[dict[str, Any]] = []

    @torch.no_grad()
    def run(self, name: str, case: Case) -> None:
        """Write and compare a network at each assignment, and with rounded outputs."""
        data = case.calibration
        layers = introspect(case.network, data).layers
        names = [layer.name for layer in layers]
        inputs = observe_inputs(unfused(case.network), names, data)
        for kind, bits in assignments(layers):
            for rounds in (False, True) if kind == "uniform_8" else (False,):
                row = {"network": name, "bits": kind + "_outputs" * rounds}
                if row["bits"] not in self.kinds:
                    continue
                prepared = prepare(case.network, layers, inputs)
                try:
                    if rounds:
                        add_output_quantizers_(prepared, names, data, 8)
                    set_bits(prepared, bits)
                    StatisticsCorrection(prepared, data).apply()
                    row |= self.compared(f"{name}_{row['bits']}", prepared, case)
                except (ExportError, NetworkError) as error:
                    row["refused"] = str(error)
                self.rows.append(row)
                print(row, flush=True)

    def compared(self, name: str, answer: nn.Module, case: Case) -> dict[str, Any]:
        """Write one file, and return its figures."""
        path = self.folder / f"{name}.onnx"
        started = time.process_time()
        written = write(answer, path, case.calibration, check=32 if self.quick else 64)
        seconds = time.process_time() - started
        check = written.check
        assert check is not None
        file = OnnxNetwork(path.read_bytes(), answer)
        right, of = equal_weights(answer, case.calibration, path)
        result = {
            "weights_equal": right,
            "weights": of,
            "codes_equal": check.plain.equal,
            "codes_equal_free": check.plain.equal_free,
            "codes_furthest": check.plain.furthest,
            "codes_furthest_optimized": check.optimized.furthest,
            "output_error": check.plain.given_error / max(check.largest, 1e-30),
            "output_steps_optimized": check.optimized.given_error / max(check.step, 1e-30),
            "output_error_free": check.plain.free_error / max(check.largest, 1e-30),
            "any_batch": batches_fit(file, answer, case.calibration[0]),
            "bytes": written.bytes,
            "size_overhead": written.stored_bytes / expected_bytes(answer, path) - 1,
            "integer_layers": len(check.integer_layers),
            "layers": len(check.layers),
            "seconds": round(seconds, 1),
        }
        if case.metric is None:
            return result | self.of_classes(answer, file, path, case.unseen)
        return result | self.of_metric(answer, file, path, case)

    def of_classes(
        self, answer: nn.Module, file: nn.Module, path: Path, unseen: Batches
    ) -> dict[str, Any]:
        """Return how many samples keep their class, ties apart, and what accuracy does."""
        unseen = Batches(unseen[:2]) if self.quick else unseen
        outputs, labels = outputs_of(answer, unseen), torch.cat([b.labels for b in unseen])
        found, expected = outputs_of(file, unseen), outputs.argmax(1)
        plain = outputs_of(OnnxNetwork(path.read_bytes(), answer, optimize=False), unseen)
        by_rounding = float((plain - outputs).abs().max())
        margins = outputs.topk(2, 1).values
        clear = margins[:, 0] - margins[:, 1] > 2 * by_rounding
        same = found.argmax(1) == expected
        right = [float((y == labels).double().mean()) for y in (expected, found.argmax(1))]
        result = {
            "samples": len(labels),
            "agreement": float(same.double().mean()),
            "agreement_plain": float((plain.argmax(1) == expected).double().mean()),
            "ties": int((~clear).sum()),
            "agreement_clear": 1 - float((clear & ~same).double().mean()),
            "accuracy": right[0],
            "accuracy_of_file": right[1],
            "accuracy_points": 100 * abs(right[0] - right[1]),
        }
        other = openvino_outputs(path, answer, unseen)
        if isinstance(other, str):
            return {**result, "openvino": other}
        same = other.argmax(1) == expected
        return {
            **result,
            "openvino": float(same.double().mean()),
            "openvino_clear": 1 - float((clear & ~same).double().mean()),
            "openvino_error": relative(other, outputs),
        }

    def of_metric(
        self, answer: nn.Module, file: nn.Module, path: Path, case: Case
    ) -> dict[str, Any]:
        """Return what the field's own metric says of file and network."""
        metric, data = case.metric, case.unseen
        assert metric is not None
        pairs = Paired if isinstance(case.network, MiniLM) else lambda network: network
        figures = [metric(pairs(n), data)[metric.name] for n in (answer, file)]
        result = {
            "samples": data.n_samples,
            "metric": metric.name,
            "in_network": figures[0],
            "in_file": figures[1],
            "metric_points": abs(figures[0] - figures[1]),
        }
        part = Batches(case.calibration[:1])
        other = openvino_outputs(path, answer, part)
        if isinstance(other, str):
            return {**result, "openvino": other}
        return {**result, "openvino_error": relative(other, outputs_of(answer, part))}

    def speed(self, name: str, case: Case) -> dict[str, float]:
        """Return the share of layers in integers and the latency, without and with outputs."""
        found, x = dict[str, float](), torch.cat([batch.inputs for batch in case.calibration])
        for kind, ending in (("uniform_8", "_without"), ("uniform_8_outputs", "")):
            row = next(r for r in self.rows if (r["network"], r["bits"]) == (name, kind))
            found[f"integer_layers_{name}{ending}"] = row["integer_layers"] / row["layers"]
            path = self.folder / f"{name}_{kind}.onnx"
            ratio = latency(case.network, self.folder, x, path, self.quick)
            found[f"latency_ratio_{name}{ending}"] = ratio
        return found

    def figures(self) -> dict[str, float | None]:
        """Return the worst of each figure."""
        rows = [row for row in self.rows if "refused" not in row]
        classed = [row for row in rows if "agreement" in row]
        told = [row for row in rows if "openvino_error" in row]

        def worst(choose: Any, key: str, of: list[dict[str, Any]] = rows) -> float | None:
            return choose((float(row[key]) for row in of if key in row), default=None)  # type: ignore[no-any-return]

        return {
            "networks": len({row["network"] for row in rows}),
            "files": len(rows),
            "refused": len(self.rows) - len(rows),
            "weights_equal_share": sum(r["weights_equal"] for r in rows)
            / sum(r["weights"] for r in rows),
            "codes_equal_share_min": worst(min, "codes_equal"),
            "codes_equal_share_free_min": worst(min, "codes_equal_free"),
            "output_error_max": worst(max, "output_error"),
            "output_steps_optimized_max": worst(max, "output_steps_optimized"),
            "top1_agreement_min": worst(min, "agreement", classed),
            "top1_agreement_plain_min": worst(min, "agreement_plain", classed),
            "top1_agreement_clear_min": worst(min, "agreement_clear", classed),
            "accuracy_points_max": worst(max, "accuracy_points", classed),
            "metric_points_max": worst(max, "metric_points"),
            "any_batch": sum(r["any_batch"] for r in rows) / len(rows),
            "size_overhead_max": worst(max, "size_overhead"),
            "openvino_files": len(told),
            "openvino_networks": len({row["network"] for row in told}),
            "openvino_agreement_clear_min": worst(min, "openvino_clear", told),
            "openvino_error_max": worst(max, "openvino_error", told),
        }


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest magnitude."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@torch.no_grad()
def batches_fit(file: nn.Module, answer: nn.Module, batch: Batch) -> bool:
    """Say whether a file takes batches of 1 and of 7."""
    for n in (1, 7):
        inputs = take(batch.inputs, sample_axis(batch), 0, n)
        a, b = (next(tensors(forward(network, inputs))) for network in (file, answer))
        if a.shape != b.shape:
            return False
    return True


def latency(network: nn.Module, folder: Path, x: Tensor, ours: Path, quick: bool) -> float:
    """Return the median of our time over that of onnxruntime's static quantization, in turns."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    program = torch.onnx.export(network, (x[:2],), dynamo=True, verbose=False)
    assert program is not None
    program.save(folder / "float.onnx")
    name = program.model.graph.inputs[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts = iter(x[:64].split(2))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.parts, None)
            return None if part is None else {str(name): part.numpy()}

    quantize_static(
        *(folder / "float.onnx", folder / "static.onnx", Reader()),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    files = (ours, folder / "static.onnx")
    sessions = [session(path.read_bytes(), optimize=True) for path in files]
    times: list[list[float]] = [[], []]
    for _ in range(20 if quick else 200):
        for one, kept in zip(sessions, times, strict=True):
            feed = {one.get_inputs()[0].name: x[:2].numpy()}
            started = time.process_time()
            one.run(None, feed)
            kept.append(time.process_time() - started)
    return statistics.median(times[0]) / statistics.median(times[1])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--networks", nargs="+", default=ALL, choices=ALL)
    parser.add_argument("--bits", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--quick", action="store_true", help="three networks, few samples")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    outcome = Outcome("exported")
    networks = ["digits", "kws", "lstm"] if given.quick else given.networks
    with tempfile.TemporaryDirectory() as temporary:
        benchmark = Benchmark(Path(temporary), given.quick, given.bits)
        for name in networks:
            case = load(name, given.data, given.quick)
            benchmark.run(name, case)
            if name == "resnet20" and set(KINDS[:2]) <= set(given.bits):
                outcome.figures |= benchmark.speed(name, case)
        outcome.figures |= benchmark.figures()
        outcome.details["rows"] = benchmark.rows
    outcome.finish(given.out)


if __name__ == "__main__":
    main()
