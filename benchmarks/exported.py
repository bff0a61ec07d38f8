"""Exported files beside the networks they were made from: codes, outputs, sizes, runtimes, latency.

    python -m benchmarks.exported --data DIR

Twelve networks: the zoo, torchvision's ResNet-18 and MobileNetV2 and a small ViT with weights that
were drawn at random, an LSTM, a GRU, and one with transposed convolutions; each at uniform 8 and 4
bits and at mixed bits. Each is written as ONNX, checked by `hq_optuna.export` itself, and compared
again here: initializers with the quantizers' codes and scales, classes on at least 500 samples, and
OpenVINO where it is installed. Latency is processor time on one thread, beside onnxruntime's own
static quantization of the float file, in turns.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from benchmarks.outcome import Outcome
from benchmarks.zoo import data_folder, load_trained
from hq_optuna.errors import ExportError
from hq_optuna.export import write
from hq_optuna.export.check import OnnxNetwork, session
from hq_optuna.export.deployed import deployed
from hq_optuna.export.folding import factors_of, foldable
from hq_optuna.export.tracing import traced
from hq_optuna.network.batches import Batch, Batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.prepare import float_weight, weight_quantizer
from hq_optuna.space.layers import LayerSpec

MIXED = ((8, 8), (4, 6), (3, 5), (6, 4), (5, 8), (2, 7), (4, 4), (8, 3))
"""Weight and activation bits that layers take in turn; the first and the last have 8."""
ZOO = ("digits", "kws", "vww", "resnet20", "resnet32", "efficientnet_lite0")


class Case(NamedTuple):
    """A network with samples to calibrate on and samples to compare on."""

    network: nn.Module
    calibration: tuple[Tensor, Tensor]
    unseen: tuple[Tensor, Tensor]


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
    return Case(network, (x[:128], labels[:128]), (x[128:], labels[128:]))


DRAWN = ("resnet18", "mobilenet_v2", "vit", "lstm", "gru", "upsampling")


def load(name: str, data: Path, quick: bool) -> Case:
    """Return a network of the zoo or a drawn one."""
    if name in DRAWN:
        return drawn(name)
    found = load_trained(name, data, n_calibration=32 if quick else 128)
    return Case(found.network, found.calibration, found.unseen)


def assignments(layers: tuple[LayerSpec, ...]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield uniform and mixed bits by name."""
    names = [layer.name for layer in layers]
    for bits in (8, 4):
        yield f"uniform_{bits}", dict.fromkeys(names, (bits, bits))
    mixed = {name: MIXED[i % len(MIXED)] for i, name in enumerate(names)}
    yield "mixed", {**mixed, names[0]: (8, 8), names[-1]: (8, 8)}


def equal_weights(answer: nn.Module, batch: Batch, path: Path) -> tuple[int, int]:
    """Return how many layers' codes and scales a file holds as the quantizers say, and of how many.

    Codes bit for bit, scales within 2 ulp of scale × |γ/σ| where a batch-norm was folded.
    """
    arrays = {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    ready = deployed(answer)
    norms = foldable(ready, traced(ready, batch))
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
def classes(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and their classes."""
    found = torch.cat([network(part) for part in x.split(64)])
    return found, found.argmax(1)


def openvino_outputs(path: Path, x: Tensor) -> Tensor | str:
    """Return what OpenVINO computes of a file, or why it refuses."""
    try:
        import openvino
    except ModuleNotFoundError:
        return "not installed"
    try:
        core = openvino.Core()
        # By default it computes in bfloat16 where the processor can, and rounds what enters layers
        # with weights of 4 bits again, to 8 bits.
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
        hints["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        compiled = core.compile_model(core.read_model(path), "CPU", hints)
        parts = [torch.from_numpy(compiled(part.numpy())[0].copy()) for part in x.split(64)]
    except Exception as error:  # of OpenVINO's, of many kinds
        return " ".join(str(error).split())[-200:]
    return torch.cat(parts)


class Benchmark:
    """Writes and compares files, and keeps the worst of each figure."""

    def __init__(self, outcome: Outcome, folder: Path, quick: bool) -> None:
        self.outcome, self.folder, self.quick = outcome, folder, quick
        self.rows: list[dict[str, Any]] = []

    @torch.no_grad()
    def run(self, name: str, case: Case) -> None:
        """Write and compare a network at each assignment."""
        x, y = case.calibration
        pairs = zip(x.split(32), y.split(32), strict=True)
        data = Batches([Batch(inputs, labels, len(labels)) for inputs, labels in pairs])
        layers = introspect(case.network, data).layers
        names = [layer.name for layer in layers]
        prepared = prepare(case.network, layers, observe_inputs(case.network, names, data))
        correction = StatisticsCorrection(prepared, data)
        for kind, bits in assignments(layers):
            correction.reset()
            set_bits(prepared, bits)
            correction.apply()
            row = {"network": name, "bits": kind, **self.compared(name, kind, prepared, data, case)}
            self.rows.append(row)
            print(row, flush=True)

    def compared(
        self, name: str, kind: str, answer: nn.Module, data: Batches, case: Case
    ) -> dict[str, Any]:
        """Write one file, and return its figures."""
        path = self.folder / f"{name}_{kind}.onnx"
        started = time.process_time()
        try:
            written = write(answer, path, data, check=32 if self.quick else 64)
        except ExportError as error:
            return {"refused": str(error)}
        seconds = time.process_time() - started
        check = written.check
        assert check is not None
        x, labels = case.unseen
        if self.quick:
            x, labels = x[:100], labels[:100]
        outputs, expected = classes(answer, x)
        file = OnnxNetwork(path.read_bytes(), answer)
        _, found = classes(file, x)
        _, plain = classes(OnnxNetwork(path.read_bytes(), answer, optimize=False), x)
        single = file(x[:1]).shape == outputs[:1].shape and file(x[:7]).shape == outputs[:7].shape
        right, of = equal_weights(answer, data[0], path)
        other = openvino_outputs(path, x)
        expected_size = expected_bytes(answer, path)
        share = float((found == expected).double().mean())
        result = {
            "samples": len(x),
            "weights_equal": right,
            "weights": of,
            "codes_equal": check.plain.equal,
            "codes_equal_free": check.plain.equal_free,
            "codes_furthest": check.plain.furthest,
            "codes_furthest_optimized": check.optimized.furthest,
            "output_error": check.plain.given_error / max(check.largest, 1e-30),
            "output_steps_optimized": check.optimized.given_error / max(check.step, 1e-30),
            "output_error_free": check.plain.free_error / max(check.largest, 1e-30),
            "agreement": share,
            "agreement_plain": float((plain == expected).double().mean()),
            "accuracy_points": 100
            * abs(float(((found == labels).double() - (expected == labels).double()).mean())),
            "any_batch": bool(single),
            "bytes": written.bytes,
            "size_overhead": written.stored_bytes / expected_size - 1,
            "integer_layers": len(check.integer_layers),
            "layers": len(check.layers),
            "seconds": round(seconds, 1),
        }
        if isinstance(other, str):
            return {**result, "openvino": other}
        difference = float((other - outputs).abs().max()) / max(check.largest, 1e-30)
        same = float((other.argmax(1) == expected).double().mean())
        return {**result, "openvino": same, "openvino_error": difference}

    def figures(self) -> dict[str, float]:
        """Return the worst of each figure."""
        rows = [row for row in self.rows if "refused" not in row]
        done = {row["network"] for row in rows}
        told = [row for row in rows if isinstance(row["openvino"], float)]
        return {
            "networks": len(done),
            "files": len(rows),
            "refused": len(self.rows) - len(rows),
            "weights_equal_share": sum(r["weights_equal"] for r in rows)
            / sum(r["weights"] for r in rows),
            "codes_equal_share_min": min(r["codes_equal"] for r in rows),
            "codes_equal_share_free_min": min(r["codes_equal_free"] for r in rows),
            "output_error_max": max(r["output_error"] for r in rows),
            "output_steps_optimized_max": max(r["output_steps_optimized"] for r in rows),
            "top1_agreement_min": min(r["agreement"] for r in rows),
            "top1_agreement_plain_min": min(r["agreement_plain"] for r in rows),
            "accuracy_points_max": max(r["accuracy_points"] for r in rows),
            "size_overhead_max": max(r["size_overhead"] for r in rows),
            "openvino_files": len(told),
            "openvino_agreement_min": min((r["openvino"] for r in told), default=float("nan")),
        }


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
    parser.add_argument("--networks", nargs="+", default=[*ZOO, *DRAWN], choices=[*ZOO, *DRAWN])
    parser.add_argument("--quick", action="store_true", help="three networks, few samples")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    outcome = Outcome("exported")
    networks = ["digits", "kws", "lstm"] if given.quick else given.networks
    with tempfile.TemporaryDirectory() as temporary:
        benchmark = Benchmark(outcome, Path(temporary), given.quick)
        for name in networks:
            case = load(name, given.data, given.quick)
            benchmark.run(name, case)
            if name == "resnet20":
                rows = [r for r in benchmark.rows if r["network"] == name and "refused" not in r]
                eight = next(r for r in rows if r["bits"] == "uniform_8")
                outcome.figures["integer_convs_resnet20"] = (eight["integer_layers"] - 1) / (
                    eight["layers"] - 1
                )
                path = Path(temporary) / "resnet20_uniform_8.onnx"
                given_x = case.calibration[0]
                outcome.figures["latency_ratio_resnet20"] = latency(
                    case.network, Path(temporary), given_x, path, given.quick
                )
        outcome.figures |= benchmark.figures()
        outcome.details["rows"] = benchmark.rows
    outcome.finish(given.out)


if __name__ == "__main__":
    main()
