"""The format ``qonnx``: ONNX with Quant nodes of any number of bits, for FINN and hls4ml.

Weights are float values on their grid, and a Quant node says which grid: signed and narrow (as many
codes below zero as above) for ``uniform`` and ``ternary``, BipolarQuant for one bit, and for
``midrise`` and ``dorefa``, whose codes are the odd numbers, a zero point of −½ and twice the step.
Batches hold one sample, as FINN has them. Checked by QONNX's own execution.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx

from hq_optuna.errors import ExportError
from hq_optuna.export.check import Check, Tally, furthest, have_classes, last_steps, watched_codes
from hq_optuna.export.deployed import deployed_layers
from hq_optuna.export.job import Job
from hq_optuna.export.rewriting import (
    ActivationRounding,
    New,
    WeightRounding,
    described,
    graph_of,
    rewritten,
)
from hq_optuna.export.tracing import bound, rows
from hq_optuna.network.batches import arguments, forward
from hq_optuna.network.containers import tensors

DOMAIN = "qonnx.custom_op.general"
MOST_SAMPLES = 16
"""QONNX runs node by node, in a session each: more would take minutes."""


def content(job: Job) -> tuple[bytes, int, Check | None]:
    """Return the file, the bytes its numbers take, and what its check found."""
    graph = graph_of(job.deployed, job.data, fixed=True)
    proto = rewritten(graph, job.deployed, _quant_input, _quant_weight)
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    proto = described(proto, job.about)
    stored = sum(len(item.raw_data) for item in proto.graph.initializer)
    found = _checked(proto, job) if job.samples else None
    return proto.SerializeToString(), stored, found


def _quant(
    source: str, output: str, name: str, bits: int, zero: float, scale: Any, **kind: int
) -> New:
    names = [f"{name}.{part}" for part in ("scale", "zero_point", "bits")]
    arrays = (np.asarray(scale, np.float32), np.float32(zero), np.float32(bits))
    says: dict[str, Any] = {"domain": DOMAIN, "rounding_mode": "ROUND", **kind}
    node = helper.make_node("Quant", [source, *names], [output], **says)
    return [node], {n: np.asarray(a) for n, a in zip(names, arrays, strict=True)}


def _quant_input(one: ActivationRounding) -> New:
    quantizer, name = one.quantizer, f"{one.name}.quant"
    zero, scale = float(quantizer.zero_point), float(quantizer.scale)
    return _quant(one.source, one.output, name, quantizer.bits, zero, scale, signed=0, narrow=0)


def _quant_weight(one: WeightRounding) -> New:
    name, bits = f"{one.name}.weight", one.layer.weight_bits
    values, scale = one.values, one.shaped_scale
    if bits == 1:
        # A folded batch-norm may have made zeros of codes, which BipolarQuant has not.
        if (one.codes == 0).any():
            raise ExportError(
                f"Layer {one.name!r} has 1-bit weights and a channel that batch-norm multiplies by "
                "zero, which QONNX's BipolarQuant can't say. Give that layer 2 bits."
            )
        node = helper.make_node(
            "BipolarQuant", [name, f"{name}.scale"], [one.output], domain=DOMAIN
        )
        return [node], {name: values, f"{name}.scale": scale}
    odd = one.layer.quantizer_name in ("midrise", "dorefa")
    if odd and (one.codes == 0).any():
        raise ExportError(
            f"Layer {one.name!r} has {one.layer.quantizer_name} weights and a channel that its "
            "batch-norm multiplies by zero, which that grid has not. Prune that channel first."
        )
    zero, step = (-0.5, 2 * scale) if odd else (0.0, scale)
    nodes, arrays = _quant(
        name, one.output, name, bits, zero, step, signed=1, narrow=0 if odd else 1
    )
    return nodes, {name: values, **arrays}


@torch.no_grad()
def _checked(proto: onnx.ModelProto, job: Job) -> Check:
    """Run the file in QONNX beside the network, sample by sample; each layer is given its codes."""
    quants = [n for n in proto.graph.node if n.op_type == "Quant" and n.input[1].endswith(
        ".quant.scale")]  # fmt: skip
    given = _with_given_values(proto, quants)
    plain, free = ModelWrapper(given), ModelWrapper(proto)
    modules = dict(job.deployed.named_modules())
    tally, largest, done = Tally(have_classes(job.data)), 0.0, 0
    names = [n.input[1].removesuffix(".quant.scale") for n in quants]
    for inputs, n in rows(job.data, min(job.samples, MOST_SAMPLES), 1):
        with watched_codes(job.reference) as codes:
            outputs = [y.numpy() for y in tensors(forward(job.reference, inputs))]
        largest = max(largest, *(float(np.abs(y).max(initial=0)) for y in outputs))
        called = bound(job.network, *arguments(job.network, inputs)).arguments
        arrays = [x.numpy() for x in tensors(called)]
        feed = dict(zip([i.name for i in proto.graph.input], arrays, strict=True))
        places, expected = dict.fromkeys(names, 0), list[NDArray[np.int64]]()
        for i, name in enumerate(names):
            expected.append(codes[name][places[name]])
            places[name] += 1
            feed[f"given_{i}"] = _values(expected[-1], modules[name])
        found = execute_onnx(plain, feed)
        for i, name in enumerate(names):
            quantizer: Any = modules[name]
            steps = found[f"seen_{i}"].astype(np.float64) / float(quantizer.scale)
            tally.add_codes(
                expected[i], np.rint(steps).astype(np.int64) + int(quantizer.zero_point),
                quantizer.bits,
            )  # fmt: skip
        ends = [item.name for item in proto.graph.output]
        tally.given_error = max(tally.given_error, furthest([found[e] for e in ends], outputs))
        alone = execute_onnx(free, {k: v for k, v in feed.items() if not k.startswith("given_")})
        tally.add_free([alone[e] for e in ends], outputs)
        done += n
    layers = deployed_layers(job.deployed)
    run = tally.run(done)
    job.notes.append(f"QONNX executed {done} samples, node by node.")
    return Check.same(done, largest, last_steps(names, layers), run, layers)


def _values(codes: NDArray[np.int64], quantizer: Any) -> NDArray[np.float32]:
    scale, zero = np.float32(float(quantizer.scale)), int(quantizer.zero_point)
    found: NDArray[np.float32] = (codes - zero).astype(np.float32) * scale
    return found


def _with_given_values(proto: onnx.ModelProto, quants: list[Any]) -> onnx.ModelProto:
    """Return a model that takes what each Quant returns as an input, and gives what it computed."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    shapes = {item.name: item for item in changed.graph.value_info}
    order = [n.output[0] for n in quants]
    for i, name in enumerate(order):
        info = shapes[name]
        for node in changed.graph.node:
            if name in node.output:
                node.output[0] = f"seen_{i}"
            for place, read in enumerate(node.input):
                if read == name:
                    node.input[place] = f"given_{i}"
        for where, new in (
            (changed.graph.input, f"given_{i}"),
            (changed.graph.output, f"seen_{i}"),
        ):
            value = where.add()
            value.CopyFrom(info)
            value.name = new
        changed.graph.value_info.remove(info)
    return changed
