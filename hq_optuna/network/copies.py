"""Copies of networks: whatever is tried, the user's own network stays as it was."""

from __future__ import annotations

import copy

from torch import nn

from hq_optuna.errors import NetworkError


def copied(network: nn.Module, *, training: bool = False) -> nn.Module:
    """Return a copy in evaluation mode, or in training mode.

    Raises:
        NetworkError: PyTorch cannot copy it.
    """
    try:
        found = copy.deepcopy(network)
    except Exception as error:  # of what the user's modules hold
        raise NetworkError(
            f"The network cannot be copied: {error}. Weights that a hook computes can be made "
            "plain ones (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove), and "
            "tensors with a graph that a module keeps can be detached."
        ) from error
    found.train(training)  # what it returns is not looked at: overrides forget to return self
    return found
