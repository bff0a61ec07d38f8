"""Where trained weights begin, where compensated rounding has found better codes than nearest."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from hq_optuna.quantization.prepare import float_weight, prepared_layers, weight_quantizer
from hq_optuna.quantization.quantizers import UNIFORM, WeightQuantizer
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.training.settings import Start

MARGIN = 0.1
"""How far inside its cell a moved weight lies, in steps of the grid."""


@torch.no_grad()
def start_weights_(network: nn.Module, start: Start) -> None:
    """Set the float weights of a prepared network to where training begins.

    Weights without compensated ones stay, as do those that other parametrizations compute, and
    those that another module uses too: an embedding that is the last layer's weight stays right.

    Args:
        network: A prepared network with its bits set.
        start: See `Start`.
    """
    owners = Counter(id(p) for m in network.modules() for p in m._parameters.values())
    for module in prepared_layers(network).values():
        quantizer = weight_quantizer(module)
        parametrizations = module.parametrizations.weight  # type: ignore[union-attr]
        if start == "float" or quantizer.bits == FLOAT_BITS or len(parametrizations) > 1:  # type: ignore[arg-type]
            continue
        weight: Tensor = float_weight(module)
        if owners[id(weight)] > 1:
            continue
        kept = quantizer.kept(weight, quantizer.bits)
        if kept is None:
            continue
        scale = quantizer.scale(weight, quantizer.bits)
        along = [1] * weight.dim()
        along[quantizer.channel_axis] = -1
        begin = quantizer.training_start(weight, quantizer.bits)
        if start != "moved":
            begin = kept
        elif begin is None:
            begin = moved(weight, kept, scale.reshape(along), quantizer.bits, quantizer.quantizer)
        weight.copy_(begin)


def moved(
    weight: Tensor, rounded: Tensor, scale: Tensor, bits: int, quantizer: WeightQuantizer = UNIFORM
) -> Tensor:
    """Return each weight at the nearest value that rounds to what ``rounded`` holds.

    Args:
        weight: The float weight.
        rounded: Codes times the scale, of the same shape.
        scale: Broadcasts over the weight.
        bits: A number of bits that the quantizer can do.
        quantizer: One whose codes are evenly spaced.

    Example:
        >>> w, rounded = torch.tensor([0.2, 0.9, 3.0]), torch.tensor([1.0, 1.0, 1.0])
        >>> moved(w, rounded, torch.tensor(1.0), bits=2)
        tensor([0.6000, 0.9000, 3.0000])
    """
    largest = quantizer.largest_code(bits)
    # Codes are 1 apart where one of them is 0, and 2 apart where they are odd.
    step = 2.0 if bits == 1 or quantizer.name == "midrise" else 1.0
    codes = (rounded / scale).round()
    reach = step / 2 - MARGIN * step
    low = torch.where(codes == -largest, -torch.inf, (codes - reach) * scale)
    high = torch.where(codes == largest, torch.inf, (codes + reach) * scale)
    return weight.maximum(low).minimum(high)
