"""Batch-norm into the scales of the layer before it, after quantization.

A batch-norm multiplies channel j by g = γ / √(σ² + ε) and adds β − g · μ. Behind a layer with
weights c · s both fold exactly into what it stores: the scale becomes |g| · s, the codes change
sign where g is negative, and the bias becomes g · (b − μ) + β. The codes are not rounded again.
Where g is zero, or so small that the scale would underflow, the codes become zeros.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from hq_optuna.export.deployed import DeployedLayer, bias_of, deployed_layers, has_hooks, set_bias_
from hq_optuna.network.layer_types import CONVOLUTIONS, BatchNorm, runs_forward_of
from hq_optuna.quantization.calls import count
from hq_optuna.space.layers import FLOAT_BITS

_LAYERS = (
    *(f"conv{n}d" for n in (1, 2, 3)),
    *(f"conv_transpose{n}d" for n in (1, 2, 3)),
    *("linear", "convolution"),
)
_TINY = torch.finfo(torch.float32).tiny


def fold_batch_norm_(network: nn.Module, program: ExportedProgram) -> dict[str, str]:
    """Fold what can be folded in a deployed network; return layer → name of its batch-norm.

    Args:
        network: What `deployed` returned.
        program: The trace of this network. Only it tells that a batch-norm reads a layer's output
            and that nothing else does.
    """
    pairs = foldable(network, program)
    for layer, norm in pairs.items():
        _fold_(network.get_submodule(layer), network.get_submodule(norm), norm)
        owner, _, name = norm.rpartition(".")
        setattr(network.get_submodule(owner), name, Folded())
    return pairs


class Folded(nn.Identity):
    """Stands for a batch-norm that was folded: what rounds its output still finds its call."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer before it returned, rounded where the batch-norm's output was."""
        return count("batch_norm", input)


def widen_dead_scales_(network: nn.Module) -> None:
    """Give channels whose codes are all zero a scale that their bias can be counted in.

    Nothing else depends on such a scale. Runtimes store a bias as a 32-bit multiple of input scale
    × weight scale; with the tiny scale of a dead channel it would overflow.
    """
    for layer in deployed_layers(network).values():
        bias, inputs = bias_of(layer), layer.input_quantizer
        if bias is None or inputs is None or layer.weight_bits == FLOAT_BITS:
            continue
        codes = layer.weight_codes.movedim(layer.channel_axis, 0).flatten(1)
        least = bias.abs().double() / (inputs.scale.double() * 2.0**24)
        needed = (codes == 0).all(1) & (layer.weight_scale < least)
        layer.weight_scale.copy_(torch.where(needed, least.float(), layer.weight_scale))


def foldable(network: nn.Module, program: ExportedProgram) -> dict[str, str]:
    """Return the layers that a batch-norm follows, and nothing else, with its name."""
    layers, modules = deployed_layers(network), dict(network.named_modules())
    aliases = Counter(id(m) for _, m in network.named_modules(remove_duplicate=False))
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    calls = Counter(path for n in nodes if kind_of(n) in (*_LAYERS, "batch_norm")
                    for path in [path_of(n)])  # fmt: skip
    found: dict[str, str] = {}
    for node in nodes:
        source = node.args[0] if node.args else None
        if kind_of(node) != "batch_norm" or not isinstance(source, Node):
            continue
        layer, norm = path_of(source), path_of(node)
        pair = layers.get(layer), modules.get(norm)
        once = calls[layer] == 1 == calls[norm] and len(source.users) == 1
        alone = all(m is not None and aliases[id(m)] == 1 and not has_hooks(m) for m in pair)
        if kind_of(source) in _LAYERS and once and alone and _fit(*pair, source):
            found[layer] = norm
    return found


def kind_of(node: Node) -> str:
    """Return the name of the operator that a node of a trace calls."""
    return str(getattr(node.target, "_opname", ""))


def path_of(node: Node) -> str:
    """Return the name of the module that a node of a trace belongs to, ``""`` for the network."""
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    return str(stack[-1][0])


def _fit(layer: Any, norm: Any, output: Node) -> bool:
    """Say whether channels of the layer's output are those that the batch-norm normalizes."""
    own = isinstance(norm, BatchNorm) and norm.running_mean is not None
    axis_1 = isinstance(layer, CONVOLUTIONS) or output.meta["val"].dim() == 2
    quantized = isinstance(layer, DeployedLayer) and layer.weight_bits != FLOAT_BITS
    shipped = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return own and axis_1 and quantized and runs_forward_of(norm, *shipped)


def _fold_(module: Any, norm: Any, name: str) -> None:
    """Fold one batch-norm; see the formula above. In double precision, rounded once."""
    scale, bias = factors_of(norm)
    step = scale.abs() * module.weight_scale.double()
    signs = torch.where(step >= _TINY, scale.sign(), 0.0)
    shape = [1] * module.weight_codes.dim()
    shape[module.channel_axis] = -1
    codes = module.weight_codes * signs.reshape(shape).to(module.weight_codes.dtype)
    module.register_buffer("weight_codes", codes)
    module.register_buffer(
        "weight_scale", torch.where(signs == 0, 1.0, step.clamp_min(_TINY)).float()
    )
    own = bias_of(module)
    before = 0.0 if own is None else own.double()
    set_bias_(module, (scale * before + bias).float())
    module.folded = name


def factors_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Return what a batch-norm multiplies each channel by, and what it adds, ``(C,)`` float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()
