"""Linear layers for torchao, with the answer's codes and scales: nothing is rounded again.

torchao's own `quantize_` finds scales and codes anew from float weights, and so loses compensated
rounding. Its tensor subclass takes codes and scales as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.answer.result import SearchResult
from hq_optuna.errors import ExportError
from hq_optuna.export.deployed import DeployedLayer, bias_of, deployed, deployed_layers
from hq_optuna.space.layers import FLOAT_BITS

MOST_BITS = 8


class _RoundedLinear(nn.Linear):
    """A linear layer that rounds what enters."""

    input_quantizer: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in_features)``."""
        return super().forward(self.input_quantizer(input))


def for_torchao(answer: SearchResult | nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the deployed network with torchao's weights in linear layers, and the layers' names.

    Their weights are ``IntxUnpackedToInt8Tensor`` of as many bits as the codes need, with one scale
    for each output; what enters is rounded as in the answer. Other layers, and weights of more than
    8 bits, stay as `deployed` has them. Outputs are the deployed network's, bit for bit.

    Args:
        answer: What a search returned, or a network with its bits. Left as it is.

    Raises:
        ExportError: torchao is missing, or the network is not prepared.
    """
    try:
        from torchao.quantization import IntxUnpackedToInt8Tensor
    except ModuleNotFoundError as error:
        raise ExportError(
            f"This needs the package {error.name!r}: pip install 'hq_optuna[torchao]'."
        ) from error
    network = deployed(answer.network if isinstance(answer, SearchResult) else answer)
    done = []
    for name, layer in deployed_layers(network).items():
        bits = layer.largest_code.bit_length() + 1
        is_linear = type(layer).__mro__[2] is nn.Linear
        if not is_linear or layer.weight_bits == FLOAT_BITS or bits > MOST_BITS:
            continue
        weight = IntxUnpackedToInt8Tensor(
            qdata=layer.weight_codes,
            scale=layer.weight_scale[:, None],
            zero_point=torch.zeros_like(layer.weight_codes[:, :1]),
            target_dtype=getattr(torch, f"int{bits}"),
            block_size=(1, layer.weight_codes.shape[1]),
            dtype=torch.float32,
            activation_quantization=None,
        )
        _replace(network, name, _linear(layer, weight))
        done.append(name)
    return network.eval(), tuple(done)


def _linear(layer: DeployedLayer, weight: Any) -> nn.Linear:
    """Return a linear layer with this weight, and the bias and input quantizer of another."""
    n_outputs, n_inputs = layer.weight_codes.shape
    kind = nn.Linear if layer.input_quantizer is None else _RoundedLinear
    module: Any = kind(n_inputs, n_outputs, bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    bias = bias_of(layer)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    for name, child in layer.named_children():  # what rounds its input, and outputs behind it
        setattr(module, name, child)
    return module  # type: ignore[no-any-return]


def _replace(network: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another, under all its names."""
    old = network.get_submodule(name)
    for module in list(network.modules()):
        for key, child in list(module._modules.items()):
            if child is old:
                setattr(module, key, new)
