"""A traced network as an ONNX graph of integers: QuantizeLinear, Clip, DequantizeLinear.

Weights are integer initializers in the smallest standard type, each followed by DequantizeLinear.
What enters a layer goes through QuantizeLinear and DequantizeLinear, with a Clip on the integers
between them where no standard type has so many bits. Every value of the graph is then a float, so
any runtime computes it, and one that knows how runs what stands between them in integers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21
from onnxscript.optimizer import fold_constants
from torch import nn
from torch.export import ExportedProgram

from hq_optuna.errors import ExportError
from hq_optuna.export.deployed import (
    CODES,
    bias_step,
    deployed_layers,
)
from hq_optuna.export.job import Weights

OPSET, OPSET_INT2 = 21, 25
IR_VERSIONS = {OPSET: 10, OPSET_INT2: 13}
"""The first version of the file format that knows an opset: older runtimes refuse newer ones."""

_INTEGERS: dict[int, tuple[ir.DataType, Any]] = {
    2: (ir.DataType.INT2, ml_dtypes.int2),
    4: (ir.DataType.INT4, ml_dtypes.int4),
    8: (ir.DataType.INT8, np.int8),
    16: (ir.DataType.INT16, np.int16),
}
op: Any = opset21  # whose annotations are narrower than ONNX


@dataclass(frozen=True)
class Containers:
    """Which types integers have in a file.

    Attributes:
        weights: The smallest type of weights.
    """

    weights: Weights = "int4"

    @property
    def opset(self) -> int:
        """Return the version of ONNX's operators."""
        return OPSET_INT2 if self.weights == "int2" else OPSET

    def weight_bits(self, largest_code: int) -> int:
        """Return the bits of the smallest type that holds codes up to ± ``largest_code``.

        Example:
            >>> [Containers().weight_bits(code) for code in (1, 7, 15, 127, 255)]
            [4, 4, 8, 8, 16]
        """
        least = int(self.weights.removeprefix("int"))
        return next(n for n in _INTEGERS if n >= least and largest_code < 2 ** (n - 1))

    def activation_bits(self, bits: int) -> int:
        """Return the bits of the type of activations.

        4 bits have a type of their own, uint4, and take uint8 and a Clip all the same: onnxruntime
        has no integer kernel for it, and OpenVINO 2026.4 corrupts its memory and dies.
        """
        return 8 if bits <= 8 else 16


def onnx_graph(network: nn.Module, program: ExportedProgram, containers: Containers) -> ir.Model:
    """Return the ONNX model of a deployed network's trace.

    Raises:
        ExportError: ONNX has no operator for something that the network computes.
    """
    table: dict[Any, Any] = {
        torch.ops.hq_optuna.quantize.default: _quantize(containers),
        torch.ops.hq_optuna.dequantize.default: _dequantize,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own deprecations
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=containers.opset,
                custom_translation_table=table,
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # of the exporter
        raise ExportError(_not_expressed(error)) from error
    assert written is not None
    model = written.model
    _set_types_(model, network, containers)
    # Constants first: until they are folded, they read the values that they are cast like.
    fold_constants(model, should_fold=_is_plain)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _lay_weights_down_(model)
    _set_biases_apart_(model, network, containers)
    _add_zero_points_(model)
    _round_behind_pads_(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    _strip_(model)
    model.ir_version = IR_VERSIONS[containers.opset]
    return model


def _not_expressed(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    said = " ".join(str(cause).split())
    return (
        f"ONNX can't express the network: {type(cause).__name__}: {said[:400]} Replace that part "
        "by operators that ONNX has, or take --format pt2."
    )


def _quantize(containers: Containers) -> Any:
    """Return how `hq_optuna.export.operators.quantize` is written."""

    def written(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Any:
        bits = (quant_max - quant_min).bit_length()
        if 8 < bits < 16:  # Clip takes no uint16: bound the values, which is the same
            zero = op.CastLike(zero_point, scale)
            low, high = (
                op.Mul(op.Sub(op.CastLike(op.Constant(value_int=v), scale), zero), scale)
                for v in (quant_min, quant_max)
            )
            x = op.Clip(x, low, high)
        codes = op.QuantizeLinear(x, scale, zero_point)
        if bits < containers.activation_bits(bits) == 8:
            low, high = (ir.tensor(np.uint8(v)) for v in (quant_min, quant_max))
            codes = op.Clip(codes, op.Constant(value=low), op.Constant(value=high))
        return op.DequantizeLinear(codes, scale, zero_point)

    return written


def _dequantize(codes: Any, scale: Any, axis: int) -> Any:
    return op.DequantizeLinear(codes, scale, axis=axis)


def _is_plain(node: ir.Node) -> bool | None:
    """Say what must not be computed beforehand: integers would become floats."""
    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return False
    if any(v is not None and (p := v.producer()) and p.op_type == "DequantizeLinear"
           for v in node.inputs):  # fmt: skip
        return False
    return None


def _set_types_(model: ir.Model, network: nn.Module, containers: Containers) -> None:
    """Give weights their types."""
    layers = deployed_layers(network)
    for name, value in model.graph.initializers.items():
        if name.endswith(CODES) and (layer := layers.get(name.removesuffix(CODES))) is not None:
            kind, dtype = _INTEGERS[containers.weight_bits(layer.largest_code)]
            _set_(value, layer.weight_codes.numpy().astype(dtype), kind)


def _add_zero_points_(model: ir.Model) -> None:
    """Give 8-bit weights zero points, all zero.

    They say nothing, but onnxruntime's cure for overflows on processors without VNNI
    (``session.x64quantprecision``) makes weights unsigned, and fails where there are none.
    """
    for node in list(model.graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.const_value is None or codes.dtype != ir.DataType.INT8:
            continue
        scale = node.inputs[1]
        assert scale is not None and scale.const_value is not None
        zeros = np.zeros(scale.const_value.shape.numpy(), dtype=np.int8)
        value = _stored(model, f"{codes.name}_zero_point", zeros, ir.DataType.INT8)
        node.resize_inputs(3)
        node.replace_input_with(2, value)


def _round_behind_pads_(model: ir.Model) -> None:
    """Round again what a Pad passes on: nothing changes, and runtimes see integers behind it.

    They know by themselves that integers stay integers in a Reshape or Slice.
    """
    for node in list(model.graph):
        found = node.inputs[0] if node.op_type == "Pad" else None
        while found is not None and (source := found.producer()) is not None:
            if source.op_type == "DequantizeLinear" and len(source.inputs) > 2:
                _round_again_(model, node, source)
            found = source.inputs[0] if source.op_type in ("Slice", "Reshape") else None


def _round_again_(model: ir.Model, node: ir.Node, source: ir.Node) -> None:
    """Round a node's output as ``source`` rounds, whose integers it only moves."""
    scale, zero = source.inputs[1], source.inputs[2]
    assert scale is not None and zero is not None
    codes, held = source.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    known = None if held is None else held.const_value
    if codes is None or codes.const_value is not None or scale.const_value is None:
        return  # a weight
    if zero.const_value is None or (known is not None and known.numpy().any()):
        return  # filled with other numbers than zeros
    name, output = node.name, node.outputs[0]
    again = [
        _stored(model, f"{name}_{part}", v.const_value.numpy(), v.const_value.dtype)
        for part, v in (("step", scale), ("zero", zero))
        if v.const_value is not None
    ]
    rounding = ir.node("QuantizeLinear", [output, *again], name=f"{name}_quantized")
    back = ir.node("DequantizeLinear", [rounding.outputs[0], *again], name=f"{name}_again")
    value = back.outputs[0]
    value.shape, value.type = output.shape, output.type
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    rounding.replace_input_with(0, output)
    model.graph.insert_after(node, [rounding, back])


def _set_(value: ir.Value, array: Any, kind: ir.DataType) -> None:
    value.const_value = ir.Tensor(array, dtype=kind, name=value.name)
    value.dtype, value.shape = kind, ir.Shape(array.shape)


def _lay_weights_down_(model: ir.Model) -> None:
    """Store linear weights as they are multiplied, so that runtimes see them: no Transpose."""
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type != "Transpose" or source is None or source.op_type != "DequantizeLinear":
            continue
        codes, scale = source.inputs[:2]
        assert codes is not None and scale is not None
        only = len(codes.uses()) == 1 == len(source.outputs[0].uses())
        if codes.const_value is None or len(codes.const_value.shape) != 2 or not only:
            continue
        array = np.ascontiguousarray(codes.const_value.numpy().T)
        _set_(codes, array, codes.const_value.dtype)
        axis = source.attributes["axis"].as_int()
        source.attributes["axis"] = ir.AttrInt64("axis", 1 - axis % 2)
        value = source.outputs[0]
        value.shape = ir.Shape(array.shape)
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)


def _set_biases_apart_(model: ir.Model, network: nn.Module, containers: Containers) -> None:
    """Add a float bias in a node of its own, where a runtime would round it to integers.

    onnxruntime's optimizer makes a float bias of Conv, ConvTranspose and Gemm a multiple of input
    scale × weight scale. Where that is coarse beside the step that the output is rounded to
    (few bits, or few products a sum), codes would be off by many steps. An Add it leaves alone.
    """
    for node in list(model.graph):
        layer = layer_of(node, network) if node.op_type in ("Conv", "ConvTranspose", "Gemm") else ""
        bias = node.inputs[2] if layer and len(node.inputs) > 2 else None
        if bias is None or bias.const_value is None:
            continue
        step, output_step = bias_step(deployed_layers(network)[layer]), _next_step(node)
        exact = step is None and deployed_layers(network)[layer].input_quantizer is None
        if exact or output_step is None or (
            step is not None and float(step.max()) <= FINE * output_step
        ):  # fmt: skip
            continue
        output = node.outputs[0]
        rank = len(output.shape) if output.shape is not None else 2
        node.resize_inputs(2)
        if rank > 2:
            by_channel = bias.const_value.numpy().reshape(-1, *[1] * (rank - 2))
            bias = _stored(model, f"{bias.name}_by_channel", by_channel, bias.const_value.dtype)
        added = ir.node("Add", [output, bias], name=f"{node.name}_bias")
        value = added.outputs[0]
        value.name, value.shape, value.type = f"{output.name}_biased", output.shape, output.type
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        added.replace_input_with(0, output)
        model.graph.insert_after(node, added)


def _stored(model: ir.Model, name: str, array: Any, kind: ir.DataType) -> ir.Value:
    """Add an initializer to a model."""
    value = ir.Value(name=name)
    _set_(value, array, kind)
    model.graph.initializers[name] = value
    return value


def _next_step(node: ir.Node) -> float | None:
    """Return the step that a layer's output is rounded to next, ``None`` where others read it."""
    value = node.outputs[0]
    while len(value.uses()) == 1 and not value.is_graph_output():
        (reader,) = (use.node for use in value.uses())
        if reader.op_type == "QuantizeLinear":
            scale = reader.inputs[1]
            assert scale is not None and scale.const_value is not None
            return float(scale.const_value.numpy())
        if reader.op_type not in _PASSING:
            return None
        value = reader.outputs[0]
    return None


_PASSING = (
    *("Relu", "Clip", "LeakyRelu", "Identity", "MaxPool", "Pad", "Resize"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Expand", "Gather"),
)
"""Operators that an optimizer may move a rounding across, up to the layer before them."""

FINE = 1 / 128
"""Input scale × weight scale, as a share of the output's step, up to which a bias may be rounded to
it: of thousand values one is then rounded to the next code."""


def layer_of(node: ir.Node, network: nn.Module) -> str:
    """Return the deployed layer whose weight a node reads, ``""`` if none."""
    found, layers = node.inputs[1] if len(node.inputs) > 1 else None, deployed_layers(network)
    while found is not None:
        name = str(found.name)
        if name.removesuffix(CODES) in layers and name.endswith(CODES):
            return name.removesuffix(CODES)
        producer = found.producer()
        through = producer is not None and producer.op_type in (
            *("DequantizeLinear", "Transpose", "Reshape"),
        )
        found = producer.inputs[0] if producer is not None and through else None
    return ""


def _strip_(model: ir.Model) -> None:
    """Take out what the exporter says of its own machine: paths of source files, versions."""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def stored_bytes(model: ir.Model) -> int:
    """Return the bytes of a model's initializers, each in its type."""
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
