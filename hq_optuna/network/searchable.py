"""What is no network that can be searched: refused with the cause and the way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hq_optuna.errors import NetworkError
from hq_optuna.network.containers import is_finite, strided
from hq_optuna.network.devices import check_double_precision
from hq_optuna.network.layer_types import QUANTIZABLE

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of numbers that weights may have; complex ones and integers stay as they are."""

_USES_A_WEIGHT = ("conv", "linear", "mm", "matmul", "einsum")
"""Parts of the names of functions that multiply by a weight."""


def check_searchable(network: Any) -> None:
    """Refuse what is no network, what hides its layers, and weights that no pass could use.

    Raises:
        NetworkError: Says what was given and what to give instead.
    """
    check_structure(network)
    for name, parameter in network.named_parameters():
        if not is_finite(parameter):
            found = [torch.isfinite(part) for part in strided(parameter)]
            bad = sum(int((~part).sum()) for part in found)
            raise NetworkError(
                f"Parameter {name!r} holds {bad} NaN or infinite values of {parameter.numel()}. "
                "Load a checkpoint whose training did not diverge."
            )


def check_structure(network: Any) -> None:
    """Refuse what `check_searchable` does, but for the values of weights."""
    if not isinstance(network, nn.Module):
        raise NetworkError(_no_module(network))
    if not hasattr(network, "_modules"):
        kind = type(network).__name__
        raise NetworkError(f"The {kind} is not set up: call super().__init__() in its __init__.")
    for name, module in network.named_modules():
        _check_module(name, module)
    if type(network).forward is nn.Module.forward and "forward" not in vars(network):
        kind, hint = type(network).__name__, "Give it a forward that calls what it holds"
        if isinstance(network, nn.ModuleList):
            hint = "Give nn.Sequential(*modules), if each takes what the one before returns"
        raise NetworkError(f"The network is a {kind} without a forward. {hint}.")
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        _check_tensor(name, tensor)


def _check_module(name: str, module: nn.Module) -> None:
    for reason in (_wrapped, _without_layers, _quantized_before):
        if said := reason(module):
            raise NetworkError(f"{repr(name) if name else 'The network'} {said}")
    dotted = next((child for child, _ in module.named_children() if "." in child), None)
    if dotted is not None:
        raise NetworkError(
            f"A {type(module).__name__} holds a module under the name {dotted!r}, whose dot "
            "reads as a module within a module. Call it by another name."
        )
    weight = module._parameters.get("weight") if isinstance(module, QUANTIZABLE) else None
    if weight is not None and not is_lazy(weight):
        _check_weight(f"{name}.weight", weight)


def _no_module(given: Any) -> str:
    """Return what is said of something that is no network at all."""
    kind = type(given).__name__
    if isinstance(given, type) and issubclass(given, nn.Module):
        given_as = f"the class {given.__name__} itself. Make one and load its weights"
    elif isinstance(given, Mapping):
        given_as = (
            f"a mapping ({kind}), as a state_dict is. Make the network and give it these weights: "
            "network.load_state_dict(weights)"
        )
    elif isinstance(given, (str, Path)):
        given_as = (
            f"the path {str(given)!r}. Make the network and load the weights that lie there: "
            "network.load_state_dict(torch.load(path, weights_only=True))"
        )
    elif isinstance(given, (list, tuple)):
        given_as = (
            f"a {kind} of {len(given)}. Give nn.Sequential(*modules), if each takes what the one "
            "before returns"
        )
    elif kind == "ExportedProgram":
        given_as = (
            "a program of torch.export, which has no layers. Give the network that was exported"
        )
    elif isinstance(given, torch.jit.ScriptFunction) or callable(given):
        name = getattr(given, "__name__", "")
        given_as = (
            f"{kind}{f' {name!r}' if name else ''}. Give the module whose layers it calls, or a "
            "module whose forward does the same"
        )
    else:
        given_as = f"{kind}. Give the trained network itself"
    return f"Expected a torch.nn.Module; got {given_as}."


def _wrapped(module: nn.Module) -> str:
    """Return what is said of a module around a network that runs it elsewhere, or compiled."""
    forward = getattr(type(module), "forward", None)  # scripted classes have none
    compiled = hasattr(forward, "_torchdynamo_orig_callable")
    if compiled or hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
        return (
            "is compiled by torch.compile, and what is compiled does not tell which layers it "
            "calls. Give the network as it was before (a compiled network's _orig_mod; after "
            "network.compile(), a deepcopy; a class without the decorator of its forward)."
        )
    kinds = {kind.__name__ for kind in type(module).__mro__}
    parallel = kinds & {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
    if parallel:
        return (
            f"is wrapped in {parallel.pop()}, which runs copies or parts of it elsewhere. Give "
            "what it wraps, its .module, with whole weights; workers share a search through the "
            "storage instead."
        )
    return ""


def _without_layers(module: nn.Module) -> str:
    """Return what is said of a program in which layers are functions."""
    if isinstance(module, torch.jit.ScriptModule):  # which may be a mere activation
        program = str(module.inlined_graph) if module._c._has_method("forward") else ""
        return any(f"aten::{name}" in program for name in ("_conv", "conv", "linear", "addmm")) * (
            "is a TorchScript program (torch.jit.script or trace), whose layers are no modules of "
            "PyTorch any more. Give the network as it was before."
        )
    if not isinstance(module, torch.fx.GraphModule):
        return ""
    if any(isinstance(m, QUANTIZABLE) for m in module.modules()):
        return ""
    used = next(filter(None, (_weight_used(module, node) for node in module.graph.nodes)), "")
    return used and (
        f"is a graph (torch.fx or torch.export) that calls {used} as a function, where a layer "
        "would be a module. Give the network as it was before, or torch.fx.symbolic_trace(network)."
    )


def _weight_used(module: torch.fx.GraphModule, node: torch.fx.Node) -> str:
    """Return the function and the weight of a node that multiplies by one."""
    if node.op != "call_function" or not isinstance(node.target, Callable):  # type: ignore[arg-type]
        return ""
    name = getattr(node.target, "__name__", "")
    for held in node.all_input_nodes:
        if held.op == "get_attr" and any(part in name for part in _USES_A_WEIGHT):
            weight = _attribute(module, str(held.target))
            if isinstance(weight, nn.Parameter) and weight.dim() >= 2:
                return f"{name} with {held.target!r}"
    return ""


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _quantized_before(module: nn.Module) -> str:
    """Return what is said of a module that rounds weights or activations already."""
    home, kind = type(module).__module__, type(module).__name__
    by = "hq_optuna" if home.startswith("hq_optuna.quantization") else "PyTorch"
    if by == "hq_optuna" or hasattr(module, "_packed_params"):
        return f"is quantized by {by} already. Give the float network that it was made from."
    stubs = ("QuantStub", "DeQuantStub", "QuantWrapper")
    ours = home.startswith(
        ("torch.ao.quantization", "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat")
    )
    if ours and kind not in stubs:
        return (
            f"({kind}) is prepared for PyTorch's own quantization, which rounds and observes too. "
            "Give the network as it was before torch.ao.quantization.prepare."
        )
    return ""


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a parameter or buffer without values of its own in memory."""
    if is_lazy(tensor):
        raise NetworkError(
            f"{name!r} is not initialized yet (a lazy module). Run the network once on an "
            "example input, or load its weights, before the search."
        )
    if type(tensor).__name__ == "DTensor":
        raise NetworkError(
            f"{name!r} is a DTensor, which holds a part of the values. Give a network of whole "
            "tensors: parameter.full_tensor()."
        )
    if tensor.is_meta:
        raise NetworkError(
            f"{name!r} is on the meta device and holds no values. Load it first: make the network "
            "on another device, or network.to_empty(device='cpu') and load_state_dict."
        )
    check_double_precision(tensor.device)


def _check_weight(name: str, weight: Tensor) -> None:
    """Refuse the weight of a layer that is no tensor of floating-point numbers in a row."""
    what = "a sparse tensor (to_dense())" if weight.layout != torch.strided else ""
    if weight.is_quantized:
        what = "a quantized tensor (dequantize())"
    elif is_traceable_wrapper_subclass(weight):
        what = f"a {type(weight).__name__}, which stands for other tensors (dequantize())"
    elif weight.is_floating_point() and weight.dtype not in FLOATS:
        what = f"{weight.dtype}, in which PyTorch does not compute (network.float())"
    if what and type(weight).__name__ != "DTensor":
        raise NetworkError(f"{name!r} is {what}. Give a network whose layers have plain weights.")
