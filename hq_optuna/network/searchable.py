"""What is no network that can be searched: refused with the cause and the way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hq_optuna.errors import NetworkError
from hq_optuna.network.devices import check_double_precision


def check_searchable(network: Any) -> None:
    """Refuse what is no network, weights that no pass could use, and compiled modules.

    Raises:
        NetworkError: Says what was given and what to give instead.
    """
    if not isinstance(network, nn.Module):
        raise NetworkError(f"Expected a torch.nn.Module; got {type(network).__name__}.")
    for name, module in network.named_modules():
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None):
            raise NetworkError(
                f"{repr(name) if name else 'The network'} is compiled by torch.compile, and what "
                "is compiled does not tell which layers it calls. Give the network as it was "
                "before (a compiled network's _orig_mod; after network.compile(), a deepcopy)."
            )
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise NetworkError(
                f"{name!r} is not initialized yet (a lazy module). Run the network once on an "
                "example input, or load its weights, before the search."
            )
        if tensor.is_meta:
            raise NetworkError(
                f"{name!r} is on the meta device and holds no values. Load it first."
            )
        check_double_precision(tensor.device)
    for name, parameter in network.named_parameters():
        numeric = parameter.is_floating_point() or parameter.is_complex()
        if numeric and not bool(torch.isfinite(parameter.detach()).all()):
            bad = parameter.numel() - int(torch.isfinite(parameter.detach()).sum())
            raise NetworkError(
                f"Parameter {name!r} holds {bad} NaN or infinite values of {parameter.numel()}. "
                "Load a checkpoint whose training did not diverge."
            )
