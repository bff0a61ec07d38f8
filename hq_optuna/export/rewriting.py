"""A written ONNX graph with other things in the place of its roundings.

QONNX and files with encodings have the same graph as ``onnx``, between other nodes: this finds what
`hq_optuna.export.onnx_graph` wrote for each rounding, and puts something else there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import nn

from hq_optuna.export.deployed import (
    CODES,
    ActivationQuantizer,
    DeployedLayer,
    deployed_layers,
)
from hq_optuna.export.onnx_graph import Containers, onnx_graph
from hq_optuna.export.tracing import traced
from hq_optuna.network.batches import Batch


@dataclass(frozen=True)
class ActivationRounding:
    """What enters a layer: the module that rounds, and the tensors before and after."""

    name: str
    quantizer: ActivationQuantizer
    source: str
    output: str


@dataclass(frozen=True)
class WeightRounding:
    """A layer's weight: its codes and scales as they lie in the graph, and the tensor they make."""

    name: str
    layer: DeployedLayer
    codes: NDArray[Any]
    scale: NDArray[np.float32]
    axis: int
    output: str

    @property
    def shaped_scale(self) -> NDArray[np.float32]:
        """The scale, shaped to multiply the codes."""
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return self.scale.reshape(shape)

    @property
    def values(self) -> NDArray[np.float32]:
        """Codes times scales."""
        return self.codes.astype(np.float32) * self.shaped_scale


New = tuple[list[Any], Mapping[str, NDArray[Any]]]
"""Nodes that stand in the place of others, and arrays that they read, by name."""


def graph_of(network: nn.Module, data: Sequence[Batch], *, fixed: bool) -> onnx.ModelProto:
    """Return the ONNX graph of a deployed network with all shapes; ``fixed`` for single samples."""
    program = traced(network, data, fixed=fixed)
    model = onnx_graph(network, program, Containers("int8"))
    model.producer_name = "hq_optuna"
    proto = ir.serde.serialize_model(model)
    outputs = {item.name for item in proto.graph.output}
    for node in [n for n in proto.graph.node if n.op_type == "DequantizeLinear"]:
        if (name := node.output[0]) in outputs:  # a rounded tensor is one inside the graph
            node.output[0] = f"{name}_rounded"
            proto.graph.node.append(helper.make_node("Identity", [node.output[0]], [name]))
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def rewritten(
    proto: onnx.ModelProto,
    network: nn.Module,
    activation: Callable[[ActivationRounding], New],
    weight: Callable[[WeightRounding], New],
) -> onnx.ModelProto:
    """Return a graph with other nodes in the place of each rounding.

    The new nodes of a rounding make the tensor of its ``output``.
    """
    arrays = {item.name: item for item in proto.graph.initializer}
    makers = {name: node for node in proto.graph.node for name in node.output}
    layers, modules = deployed_layers(network), dict(network.named_modules())
    nodes, gone, added = list[Any](), set[int](), dict[str, NDArray[Any]]()
    for node in proto.graph.node:
        stored = node.input[0] if node.input else ""
        layer = layers.get(stored.removesuffix(CODES)) if stored.endswith(CODES) else None
        quantizer = None
        if node.op_type == "DequantizeLinear" and node.input[1].endswith(".scale"):
            quantizer = modules.get(node.input[1].removesuffix(".scale"))
        if node.op_type == "DequantizeLinear" and layer is not None:
            new, values = weight(_weight(node, layer, arrays))
        elif isinstance(quantizer, ActivationQuantizer):
            found, passed = _activation(node, quantizer, makers)
            gone |= passed
            new, values = activation(found)
        else:
            new, values = [node], {}
        nodes += new
        added |= dict(values)
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    del changed.graph.node[:]
    changed.graph.node.extend(n for n in nodes if id(n) not in gone)
    changed.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in added.items())
    return without_unused(changed)


def _activation(
    node: Any, quantizer: ActivationQuantizer, makers: Mapping[str, Any]
) -> tuple[ActivationRounding, set[int]]:
    """Return the rounding that ends in a node, and the nodes that it began with."""
    passed, last = set[int](), makers[node.input[0]]
    if last.op_type == "Clip":
        passed.add(id(last))
        last = makers[last.input[0]]
    passed.add(id(last))
    source = last.input[0]
    if 8 < quantizer.bits < 16:  # values are bounded before they are rounded
        passed.add(id(makers[source]))
        source = makers[source].input[0]
    name = node.input[1].removesuffix(".scale")
    return ActivationRounding(name, quantizer, source, node.output[0]), passed


def _weight(node: Any, layer: DeployedLayer, arrays: Mapping[str, Any]) -> WeightRounding:
    axis = next(a.i for a in node.attribute if a.name == "axis")
    codes, scale = (numpy_helper.to_array(arrays[name]) for name in node.input[:2])
    name = node.input[0].removesuffix(CODES)
    return WeightRounding(name, layer, codes, scale, axis % codes.ndim, node.output[0])


def without_unused(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph without the arrays and shapes that nothing refers to."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    used = {name for node in changed.graph.node for name in node.input}
    made = {name for node in changed.graph.node for name in node.output}
    used |= {item.name for item in changed.graph.output}
    for held, names in ((changed.graph.initializer, used), (changed.graph.value_info, made)):
        kept = [item for item in held if item.name in names]
        del held[:]
        held.extend(kept)
    return changed


def described(proto: onnx.ModelProto, about: Mapping[str, str]) -> onnx.ModelProto:
    """Return a graph that says this of itself."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    for key, value in about.items():
        changed.metadata_props.add(key=key, value=value)
    return changed
