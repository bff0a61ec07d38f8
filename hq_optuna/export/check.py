"""Does a written file compute what the network does? Asked of onnxruntime, code by code.

Rounding is a cliff: where a value lies within float rounding of the middle between two codes, two
correct programs round it differently, and everything after it differs by steps. A comparison of
outputs alone says little then. So a file is run twice:

- with *given* codes: every layer receives the codes that it receives in the network, and the codes
  and outputs it computes from them are compared. Differences do not add up from layer to layer, so
  each must be explained by float rounding alone.
- *freely*, from the inputs to the outputs, as it will be used.

Both without and with the runtime's optimizations, which run integer kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn

from hq_optuna.errors import ExportError
from hq_optuna.export.deployed import CODES, ActivationQuantizer, DeployedLayer, deployed_layers
from hq_optuna.export.tracing import bound, rows
from hq_optuna.network.batches import Batches, arguments, forward
from hq_optuna.network.containers import tensors
from hq_optuna.quantization.modules import InputFakeQuantize
from hq_optuna.space.layers import FLOAT_BITS

UNEQUAL_SHARE = 1e-4
"""Largest share of unequal codes, given equal codes before; they are off by one. Above 8 bits a
step is as small as float rounding of sums, and the share is 2ᵇ⁻²²."""
OUTPUT_ERROR, OUTPUT_FLOOR = 1e-5, 1e-6
"""Largest difference of outputs, given equal codes: so much of the largest output, and so much."""
AGREEMENT = 0.995
"""Least share of samples with the same class, optimized, ties left out. A tie is a sample whose two
largest outputs are closer than twice what float rounding alone moves an output by, from the inputs
on: which of them is the larger one is then a matter of the order of sums. Ties included, as many
keep their class as without optimizations, within three standard errors of a count and 0.5 %, where
codes are equal but for float rounding. Integer kernels round biases too, which moves ties more
often, and then those alone count that are none.
"""
FREE_ERROR = 0.1
"""Largest difference of optimized outputs, as a share of the largest one; or two of their steps, or
ten times what float rounding alone makes."""
_ROWS = 32
"""Samples that are run together."""

INTEGER_KERNELS = (
    *("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger"),
    *("ConvInteger", "DynamicQuantizeMatMul"),
)


@dataclass(frozen=True)
class Run:
    """What one level of optimization computes, beside the network.

    Attributes:
        codes: Codes compared, given equal codes before.
        equal: Share of them that are equal.
        least_equal: The least share that float rounding explains.
        furthest: Largest difference of two codes, in steps.
        given_error: Largest difference of outputs, given equal codes.
        free_error: Largest difference of outputs, from the inputs on.
        agreement: Share of samples with the same largest output, where labels are classes.
        equal_free: Share of equal codes, from the inputs on; without optimizations alone.
        changed: By how much the largest output exceeds the second one in the network, of each
            sample whose class is another one in the file.
    """

    codes: int
    equal: float
    least_equal: float
    furthest: int
    given_error: float
    free_error: float
    agreement: float | None
    equal_free: float | None
    changed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Check:
    """What `check_file` found.

    Attributes:
        samples: Samples run.
        largest: Largest magnitude of the network's outputs.
        step: What one code of the last layer's input changes an output by, at most.
        output_step: What outputs are rounded to, 0 where they are not.
        plain: Without optimizations.
        optimized: With the runtime's defaults.
        integer_layers: Layers that the optimized graph runs in integers.
        layers: All deployed layers.
        figures: The study's own metric of file and network, by name, as pairs.
    """

    samples: int
    largest: float
    step: float
    output_step: float
    plain: Run
    optimized: Run
    integer_layers: tuple[str, ...]
    layers: tuple[str, ...]
    figures: Mapping[str, tuple[float, float]]

    @classmethod
    def same(
        cls, samples: int, largest: float, steps: Mapping[str, float], run: Run, layers: Any
    ) -> Check:
        """Return what was found where nothing optimizes a file; ``layers`` by name."""
        return cls(
            *(samples, largest, steps["step"], steps["output_step"], run, run),
            *((), tuple(layers), {}),
        )

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON data."""
        return asdict(self)

    @property
    def clear_changes(self) -> int:
        """Samples that get another class, optimized, and are no ties: see `AGREEMENT`."""
        return sum(margin > 2 * self.plain.free_error for margin in self.optimized.changed)

    @property
    def sentence(self) -> str:
        """Return what the check says, in plain words."""
        share = 100 * self.plain.equal
        said = (
            f"The file rounds {share:.4f} % of {self.plain.codes:,} codes as the network does, and "
            f"the others by one step, where a value lies between two."
        )
        if self.plain.agreement is None:
            return said
        said += f" {100 * (self.optimized.agreement or 0):.2f} % of samples keep their class."
        ties = len(self.optimized.changed) - self.clear_changes
        if not ties:
            return said
        return f"{said} Of {ties} that do not, float rounding alone decides between two classes."

    @property
    def failures(self) -> list[str]:
        """Return what is wrong with the file, in sentences; none if it passes."""
        found = []
        limit = OUTPUT_ERROR * self.largest + OUTPUT_FLOOR
        if self.plain.equal < self.plain.least_equal:
            least = 100 * self.plain.least_equal
            found.append(f"{100 * self.plain.equal:.3f} % of codes are equal, not {least:.2f} %")
        if self.plain.furthest > 1:
            found.append(f"a code is off by {self.plain.furthest} steps")
        if not self.plain.given_error <= limit:
            found.append(
                f"an output is off by {self.plain.given_error:.3g}, given equal codes; float "
                f"rounding explains {limit:.3g}"
            )
        if self.optimized.furthest > 1:
            found.append(f"optimized, a code is off by {self.optimized.furthest} steps")
        if not self.optimized.given_error <= max(limit, self.step):
            found.append(
                f"optimized, an output is off by {self.optimized.given_error:.3g}, given equal "
                f"codes; one step of the last layer is {self.step:.3g}"
            )
        others, by_rounding = (len(run.changed) for run in (self.optimized, self.plain))
        clear, allowed = self.clear_changes, (1 - AGREEMENT) * self.samples
        floats_alone = self.optimized.equal >= self.optimized.least_equal
        if clear > allowed:
            found.append(
                f"optimized, {clear} of {self.samples} samples get another class that are no ties"
            )
        elif floats_alone and others > by_rounding + 3 * (by_rounding + 1) ** 0.5 + allowed:
            found.append(
                f"optimized, {others} of {self.samples} samples get another class, and "
                f"{by_rounding} without optimizations"
            )
        most = max(10 * self.plain.free_error, FREE_ERROR * self.largest, 2 * self.output_step)
        if not self.optimized.free_error <= most:
            found.append(
                f"optimized, an output is off by {self.optimized.free_error:.3g}, where the "
                f"largest is {self.largest:.3g}"
            )
        return found


def session(model: bytes, *, optimize: bool, keep: Path | None = None) -> Any:
    """Return an onnxruntime session on one thread, so that sums have one order.

    Raises:
        ExportError: onnxruntime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if keep is not None:
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(keep)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime, which has classes of its own
        said = " ".join(str(error).split())[:400]
        version = onnxruntime.__version__
        raise ExportError(f"onnxruntime {version} refuses the file: {said}") from error


class OnnxNetwork(nn.Module):
    """A file as a network: called as the network it was made from, with tensors."""

    def __init__(self, model: bytes, like: nn.Module, *, optimize: bool = True) -> None:
        super().__init__()
        self._session = session(model, optimize=optimize)
        self._like = [like]  # not a part of this network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the file's first output, or all of them."""
        given = tensors(bound(self._like[0], args, kwargs).arguments)
        names = [item.name for item in self._session.get_inputs()]
        feed = {n: x.numpy() for n, x in zip(names, given, strict=True)}
        found = [torch.from_numpy(y) for y in self._session.run(None, feed)]
        return found[0] if len(found) == 1 else tuple(found)


@contextmanager
def watched_codes(network: nn.Module) -> Iterator[dict[str, list[NDArray[np.int64]]]]:
    """Yield a mapping that gets the codes of every quantizer of activations, call by call.

    The network is a prepared or a deployed one; quantizers go by their names in the latter.
    """
    found: dict[str, list[NDArray[np.int64]]] = {}
    with ExitStack() as stack:
        for path, module in network.named_modules():
            if isinstance(module, InputFakeQuantize):
                if module.bits == FLOAT_BITS:
                    continue
                scale, zero = module.range(module.bits)
                path = path.replace("_fake_quantize", "_quantizer")
            elif isinstance(module, ActivationQuantizer):
                scale, zero = float(module.scale), int(module.zero_point)
            else:
                continue

            def see(
                m: nn.Module, args: Any, x: Tensor, name: str = path,
                scale: float = scale, zero: int = zero,
            ) -> None:  # fmt: skip
                codes = (x.detach().double() / float(np.float32(scale))).round() + zero
                found.setdefault(name, []).append(codes.to(torch.int64).numpy())

            stack.callback(module.register_forward_hook(see).remove)
        yield found


def roundings(model: onnx.ModelProto) -> list[Any]:
    """Return the nodes that make floats of rounded activations, in the order of the graph."""
    stored = {item.name for item in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    return [n for n in nodes if n.input[0] not in stored and n.input[1].endswith(".scale")]


def quantizer_of(node: Any) -> str:
    """Return the name of the module that rounds, which its scale carries."""
    return str(node.input[1]).removesuffix(".scale")


def with_codes(model: onnx.ModelProto, *, given: bool) -> tuple[onnx.ModelProto, list[str]]:
    """Return a model that also gives the codes of each rounding, and the names of the roundings.

    Codes are integers of 8 or 16 bits. With ``given`` it takes codes as further inputs too, which
    stand in the place of the computed ones.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    kinds, names = {i.name: i.data_type for i in model.graph.initializer}, list[str]()
    for i, node in enumerate(roundings(changed)):
        kind, codes = kinds[node.input[2]], node.input[0]
        changed.graph.output.append(helper.make_tensor_value_info(codes, kind, None))
        if given:
            node.input[0] = f"given_{i}"
            changed.graph.input.append(helper.make_tensor_value_info(f"given_{i}", kind, None))
        names.append(quantizer_of(node))
    return changed, names


def have_classes(data: Batches) -> bool:
    """Say whether labels are classes, one a sample: only then the largest output means anything."""
    return all(
        isinstance(y := batch.labels, Tensor) and y.dim() == 1 and not y.is_floating_point()
        for batch in data
    )


@dataclass
class Tally:
    """Sums over samples of what `Run` says; ``classes``: whether outputs are scores of classes."""

    classes: bool
    codes: int = 0
    equal: int = 0
    unequal_allowed: float = 0.0
    furthest: int = 0
    given_error: float = 0.0
    free_error: float = 0.0
    changed: list[float] = field(default_factory=list)
    codes_free: int = 0
    equal_free: int = 0

    def add_codes(self, expected: NDArray[np.int64], found: NDArray[np.int64], bits: int) -> None:
        """Compare codes, given equal codes before."""
        difference = np.abs(expected - found)
        self.codes += expected.size
        self.equal += int((difference == 0).sum())
        self.unequal_allowed += expected.size * max(UNEQUAL_SHARE, 2.0 ** (bits - 22))
        self.furthest = max(self.furthest, int(difference.max(initial=0)))

    def add_free(self, found: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]) -> None:
        """Compare outputs, from the inputs on."""
        self.free_error = max(self.free_error, furthest(found, outputs))
        self.classes = self.classes and outputs[0].ndim == 2 and outputs[0].shape[1] > 1
        if self.classes:
            other = found[0].argmax(1) != outputs[0].argmax(1)
            largest = np.sort(outputs[0][other], 1)[:, -2:]
            self.changed += (largest[:, 1] - largest[:, 0]).tolist()

    def run(self, samples: int) -> Run:
        """Return what was found on so many samples."""
        return Run(
            codes=self.codes,
            equal=self.equal / self.codes if self.codes else 1.0,
            least_equal=1 - self.unequal_allowed / max(self.codes, 1),
            furthest=self.furthest,
            given_error=self.given_error,
            free_error=self.free_error,
            agreement=1 - len(self.changed) / samples if self.classes else None,
            equal_free=self.equal_free / self.codes_free if self.codes_free else None,
            changed=tuple(self.changed),
        )


class _Comparison:
    """Runs a file at one level of optimization beside a network."""

    def __init__(
        self, model: onnx.ModelProto, bits: Mapping[str, int], tally: Tally, *, optimize: bool
    ) -> None:
        self._bits = bits
        self.tally, self.optimize = tally, optimize
        given, self.quantizers = with_codes(model, given=True)
        self._given = session(given.SerializeToString(), optimize=optimize)
        # More outputs may keep kernels apart.
        free = model if optimize else with_codes(model, given=False)[0]
        self._free = session(free.SerializeToString(), optimize=optimize)
        self._n = len(model.graph.output)

    def add(
        self,
        inputs: Sequence[NDArray[Any]],
        codes: Mapping[str, Sequence[NDArray[np.int64]]],
        outputs: Sequence[NDArray[Any]],
    ) -> None:
        """Compare one batch."""
        names = [item.name for item in self._given.get_inputs()]
        places = dict.fromkeys(self.quantizers, 0)
        expected = []
        for name in self.quantizers:
            expected.append(codes[name][places[name]])
            places[name] += 1
        kinds = [item.type for item in self._given.get_inputs()][len(inputs) :]
        given = [
            e.astype(np.uint16 if "16" in k else np.uint8)
            for e, k in zip(expected, kinds, strict=True)
        ]
        found = self._given.run(None, dict(zip(names, [*inputs, *given], strict=True)))
        tally = self.tally
        for name, e, f in zip(self.quantizers, expected, found[self._n :], strict=True):
            tally.add_codes(e, f.astype(np.int64), self._bits[name])
        tally.given_error = max(tally.given_error, furthest(found[: self._n], outputs))
        free = self._free.run(None, dict(zip(names, inputs, strict=False)))
        tally.add_free(free[: self._n], outputs)
        for e, f in zip(expected, free[self._n :], strict=False):
            tally.codes_free += e.size
            tally.equal_free += int((e == f).sum())


def furthest(found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> float:
    """Return the largest difference; infinity where shapes differ or one is not a number."""
    worst = 0.0
    for f, e in zip(found, expected, strict=True):
        if f.shape != e.shape:
            return float("inf")
        if e.size:
            difference = np.abs(f.astype(np.float64) - e.astype(np.float64))
            worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max()))
    return worst


@torch.no_grad()
def check_file(
    model: onnx.ModelProto,
    network: nn.Module,
    deployed: nn.Module,
    data: Batches,
    samples: int,
    *,
    figures: Mapping[str, tuple[float, float]] | None = None,
) -> Check:
    """Run a file beside the network that it was made from.

    Args:
        model: The file.
        network: The answer's network, prepared or deployed.
        deployed: The deployed network that was written.
        data: Calibration data.
        samples: How many of them to run, at least one.
        figures: The study's own metric of file and network.

    Raises:
        ExportError: onnxruntime refuses the file, or calls another number of layers than the
            network.
    """
    layers = deployed_layers(deployed)
    bits = {n: m.bits for n, m in deployed.named_modules() if isinstance(m, ActivationQuantizer)}
    classes = have_classes(data)
    comparisons = [_Comparison(model, bits, Tally(classes), optimize=o) for o in (False, True)]
    done, largest = 0, 0.0
    for inputs, n in rows(data, samples):
        with watched_codes(network) as codes:
            outputs = [y.numpy() for y in tensors(forward(network, inputs))]
        arrays = [x.numpy() for x in tensors(bound(network, *arguments(network, inputs)).arguments)]
        largest = max(largest, *(float(np.abs(y).max(initial=0)) for y in outputs))
        for one in comparisons:
            one.add(arrays, codes, outputs)
        done += n
    plain, optimized = (one.tally.run(done) for one in comparisons)
    return Check(
        samples=done,
        largest=largest,
        **last_steps(comparisons[0].quantizers, layers),
        plain=plain,
        optimized=optimized,
        integer_layers=integer_layers(model, tuple(layers)),
        layers=tuple(layers),
        figures=dict(figures or {}),
    )


def last_steps(quantizers: Sequence[str], layers: Mapping[str, DeployedLayer]) -> dict[str, float]:
    """Return `Check.step` and `Check.output_step` of a graph with these quantizers, in order."""
    output_step = 0.0
    for name in reversed(quantizers):
        owner, _, own = name.rpartition(".")
        layer = layers.get(owner)
        if layer is not None and own != "input_quantizer":
            output_step = output_step or float(getattr(layer, own).scale)
        elif layer is not None and layer.input_quantizer is not None:
            step = float(layer.input_quantizer.scale) * float(layer.weight.abs().max())
            return {"step": max(step, output_step), "output_step": output_step}
    return {"step": output_step, "output_step": output_step}


def integer_layers(model: onnx.ModelProto, layers: Sequence[str]) -> tuple[str, ...]:
    """Return the layers that the optimized graph runs in integers, read back from that graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model.SerializeToString(), optimize=True, keep=path)
        nodes = onnx.load(path).graph.node
    read = {name for n in nodes if n.op_type in INTEGER_KERNELS for name in n.input}
    found = {name.partition(CODES)[0] for name in read if CODES in name}
    return tuple(name for name in layers if name in found)
