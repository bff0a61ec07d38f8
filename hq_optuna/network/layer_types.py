"""The classes of modules this package tells apart: the only table of them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hq_optuna.network.shipped import runs_forward_of

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

QUANTIZABLE: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
"""Classes of layers that can be quantized; their subclasses count, as long as they are called."""

BatchNorm = _BatchNorm
"""Base of all batch-norm layers; PyTorch has no public name for it."""

OTHER_NORMS = (nn.LayerNorm, nn.RMSNorm)
"""Normalization without stored statistics: nothing to quantize and nothing to correct."""

UNSUPPORTED: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "a table that is looked up, nothing is multiplied"),
    (nn.MultiheadAttention, "attention projects with these weights inside one function"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers are not supported"),
    (nn.Bilinear, "bilinear layers are not supported"),
    (nn.Module, "not a Conv, ConvTranspose or Linear layer"),
)
"""Modules with weights that are not quantized, and why; the first class that fits counts."""


def has_statistics(module: nn.Module | None) -> bool:
    """Return whether a module is a batch-norm layer that stores statistics."""
    return isinstance(module, BatchNorm) and module.running_mean is not None


def has_known_axes(module: nn.Module) -> bool:
    """Return whether inputs and outputs are laid out as in PyTorch's own layers.

    A layer with a forward pass of its own may have its channels along any axis.
    """
    return runs_forward_of(module, *QUANTIZABLE)
