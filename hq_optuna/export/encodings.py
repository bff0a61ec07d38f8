"""The format ``encodings``: bits and scales as JSON beside a float ONNX file, for AIMET and QNN.

Three files: ``NAME`` in the layout 1.0.0, ``NAME`` with ``.v2`` before its ending in the layout
2.1.0, and an ONNX file in float with the ending ``.float.onnx``, whose tensors both name. Its
weights lie on their grid already, so a tool that rounds them again gets our codes, compensated
rounding included.

An encoding holds for a tensor, whoever reads it. Where something else reads a layer's input too,
the layer gets a tensor of its own, by an Identity.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper

from hq_optuna.errors import ExportError
from hq_optuna.export.check import (
    Check,
    Tally,
    furthest,
    have_classes,
    last_steps,
    session,
    watched_codes,
)
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
from hq_optuna.space.layers import FLOAT_BITS


def content(job: Job) -> tuple[bytes, int, Check | None]:
    """Return the layout 1.0.0, the bytes of the ONNX file's numbers, and what its check found."""
    graph = graph_of(job.deployed, job.data, fixed=False)
    inputs, weights = list[tuple[str, ActivationRounding]](), list[WeightRounding]()

    def activation(one: ActivationRounding) -> New:
        inputs.append((one.output, one))
        return [helper.make_node("Identity", [one.source], [one.output])], {}

    def weight(one: WeightRounding) -> New:
        weights.append(one)
        name = f"{one.name}.weight"
        return [helper.make_node("Identity", [name], [one.output])], {name: one.values}

    proto = _inlined(rewritten(graph, job.deployed, activation, weight), inputs)
    proto = described(proto, job.about)
    named = [(_name_in(proto, output), one) for output, one in inputs]
    first, second = _layout_1(named, weights), _layout_2(named, weights)
    found = _checked(proto, first, named, weights, job) if job.samples else None
    job.beside[".float.onnx"] = proto.SerializeToString()
    job.beside[".v2"] = _json(second)
    return _json(first), sum(len(i.raw_data) for i in proto.graph.initializer), found


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _inlined(
    proto: onnx.ModelProto, inputs: list[tuple[str, ActivationRounding]]
) -> onnx.ModelProto:
    """Return a graph without the Identities that nothing needs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    uses = Counter(name for node in changed.graph.node for name in node.input)
    outside = {item.name for item in (*changed.graph.input, *changed.graph.output)}
    stored = {item.name for item in changed.graph.initializer}
    renamed: dict[str, str] = {}
    for node in [n for n in changed.graph.node if n.op_type == "Identity"]:
        source, output = node.input[0], node.output[0]
        rounded = any(output == name for name, _ in inputs)
        alone = uses[source] == 1 and source not in outside
        if source in stored or (rounded and alone):
            renamed[output] = source
            changed.graph.node.remove(node)
    for node in changed.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    for name, source in renamed.items():
        changed.metadata_props.add(key=f"hq_optuna.renamed.{name}", value=source)
    return changed


def _name_in(proto: onnx.ModelProto, output: str) -> str:
    """Return what a rounded tensor is called in the file."""
    key = f"hq_optuna.renamed.{output}"
    return next((p.value for p in proto.metadata_props if p.key == key), output)


def _grid(one: WeightRounding) -> tuple[int, float, int]:
    """Return bits, zero point and steps a code of a weight's grid, as integers two's complement."""
    bits = one.layer.weight_bits
    if one.layer.quantizer_name in ("midrise", "dorefa") and bits > 1:
        return bits, -0.5, 2
    return max(bits, 2), 0.0, 1


def _layout_1(
    inputs: list[tuple[str, ActivationRounding]], weights: list[WeightRounding]
) -> dict[str, Any]:
    """Return the layout 1.0.0: value = scale · (unsigned code + offset)."""
    activations = []
    for name, one in inputs:
        if one.quantizer.bits < 2:
            raise ExportError(
                f"{one.name!r} rounds to 1 bit, and encodings have 2 bits at least, which is "
                "another grid. Give that layer's input 2 bits, or write --format onnx."
            )
        activations.append(
            {
                "name": name,
                **{"bw": one.quantizer.bits, "dtype": "INT", "enc_type": "PER_TENSOR"},
                "is_sym": False,
                "scale": [float(one.quantizer.scale)],
                "offset": [-int(one.quantizer.zero_point)],
            }
        )
    params = []
    for weight in weights:
        bits, zero, _ = _grid(weight)
        bits += zero != 0  # no half offsets here: odd codes on a grid of one bit more
        params.append(
            {
                "name": f"{weight.name}.weight",
                **{"bw": bits, "dtype": "INT", "enc_type": "PER_CHANNEL", "is_sym": True},
                "scale": weight.scale.tolist(),
                "offset": [-(2 ** (bits - 1))] * len(weight.scale),
            }
        )
    return {
        "version": "1.0.0",
        "producer": "hq_optuna",
        "activation_encodings": activations,
        "param_encodings": params,
        "excluded_layers": [],
    }


def _layout_2(
    inputs: list[tuple[str, ActivationRounding]], weights: list[WeightRounding]
) -> dict[str, Any]:
    """Return the layout 2.1.0: value = y_scale · (code − y_zero_point), along an axis."""
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "output_dtype": f"uint{one.quantizer.bits}",
            "y_scale": float(one.quantizer.scale),
            "y_zero_point": int(one.quantizer.zero_point),
        }
        for name, one in inputs
    ]
    for weight in weights:
        bits, zero, steps = _grid(weight)
        entry = {
            "name": f"{weight.name}.weight",
            "output_dtype": f"int{bits}",
            "y_scale": (steps * weight.scale).tolist(),
            "axis": weight.axis,
        }
        found.append({**entry, "y_zero_point": zero} if zero else entry)
    return {"version": "2.1.0", "producer": "hq_optuna", "encodings": found}


@torch.no_grad()
def _checked(
    proto: onnx.ModelProto,
    first: dict[str, Any],
    named: list[tuple[str, ActivationRounding]],
    weights: list[WeightRounding],
    job: Job,
) -> Check:
    """Round the file's tensors as the encodings say, each layer given the network's codes."""
    _check_weights(first, weights)
    for layer in deployed_layers(job.deployed).values():
        assert layer.weight_bits == FLOAT_BITS or any(layer is w.layer for w in weights)
    tensors_of = {one.name: name for name, one in named}
    entries = {entry["name"]: entry for entry in first["activation_encodings"]}
    given = session(_with_given(proto, named).SerializeToString(), optimize=False)
    names = [item.name for item in given.get_inputs()]
    tally, largest, done, n_outputs = Tally(have_classes(job.data)), 0.0, 0, len(proto.graph.output)
    order = [one.name for _, one in named]
    for inputs, n in rows(job.data, job.samples):
        with watched_codes(job.reference) as codes:
            outputs = [y.numpy() for y in tensors(forward(job.reference, inputs))]
        largest = max(largest, *(float(np.abs(y).max(initial=0)) for y in outputs))
        called = bound(job.network, *arguments(job.network, inputs)).arguments
        feed = [x.numpy() for x in tensors(called)]
        places, expected = dict.fromkeys(order, 0), list[NDArray[np.int64]]()
        for name in order:
            entry = entries[tensors_of[name]]
            expected.append(codes[name][places[name]])
            places[name] += 1
            scale = np.float32(entry["scale"][0])
            feed.append((expected[-1] + entry["offset"][0]).astype(np.float32) * scale)
        found = given.run(None, dict(zip(names, feed, strict=True)))
        for name, e, x in zip(order, expected, found[n_outputs:], strict=True):
            entry = entries[tensors_of[name]]
            seen = np.rint(x / np.float32(entry["scale"][0])) - entry["offset"][0]
            top = 2 ** entry["bw"] - 1
            tally.add_codes(e, np.clip(seen, 0, top).astype(np.int64), entry["bw"])
        ends = found[:n_outputs]
        tally.given_error = max(tally.given_error, furthest(ends, outputs))
        tally.add_free(ends, outputs)
        done += n
    layers = deployed_layers(job.deployed)
    run = tally.run(done)
    return Check.same(done, largest, last_steps(order, layers), run, layers)


def _check_weights(first: dict[str, Any], weights: list[WeightRounding]) -> None:
    """Round the file's weights as the encodings say; they must stay as they are."""
    for entry, one in zip(first["param_encodings"], weights, strict=True):
        shape = one.shaped_scale.shape
        scale = np.asarray(entry["scale"], np.float32).reshape(shape)
        offset = np.asarray(entry["offset"], np.float64).reshape(shape)
        codes = np.clip(np.rint(one.values / scale) - offset, 0, 2 ** entry["bw"] - 1)
        again = (codes + offset).astype(np.float32) * scale
        if not np.array_equal(again, one.values):
            raise ExportError(
                f"The encoding of {entry['name']!r} would round it to other weights than the "
                "network's. This is a mistake of hq_optuna's."
            )


def _with_given(
    proto: onnx.ModelProto, named: list[tuple[str, ActivationRounding]]
) -> onnx.ModelProto:
    """Return a model whose rounded tensors are inputs too, and whose own are outputs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    for i, (name, _) in enumerate(named):
        for node in changed.graph.node:
            for place, read in enumerate(node.input):
                if read == name:
                    node.input[place] = f"given_{i}"
        kind = onnx.TensorProto.FLOAT
        changed.graph.input.append(helper.make_tensor_value_info(f"given_{i}", kind, None))
        changed.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return changed
