"""The deployed network: the answer in plain modules, rebuilt from integer codes and scales.

A prepared network keeps float weights, hooks and parametrizations, because it has to change its
bits at any time. A deployed one has the bits of the answer and nothing else: a layer holds the
codes and the scales of its weight, and a quantizer of its input with scale, zero point and grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.answer.result import SearchResult
from hq_optuna.errors import ExportError
from hq_optuna.export.operators import dequantize, quantize
from hq_optuna.network.copies import copied
from hq_optuna.network.modes import own_modes
from hq_optuna.network.products import Product
from hq_optuna.quantization.calls import uncounted
from hq_optuna.quantization.correction import SHIFT, without_shift_
from hq_optuna.quantization.functional import activation_grid, along
from hq_optuna.quantization.observers import first_input, with_first_input
from hq_optuna.quantization.outputs import output_quantizers
from hq_optuna.quantization.prepare import (
    factor_quantizers,
    float_weight,
    input_quantizer,
    prepared_layers,
    unprepared_,
    weight_quantizer,
    without_factors_,
)
from hq_optuna.space.layers import FLOAT_BITS

MOST_INT8 = 127
CODES, SCALE = ".weight_codes", ".weight_scale"
"""Ends of the names of a layer's codes and scales, in a network's state and in files."""


class ActivationQuantizer(nn.Module):
    """Rounds activations to integers from ``quant_min`` to ``quant_max``, and back.

    Attributes:
        bits: How many bits an integer has.
        scale: Step of the grid, float32, no axis.
        zero_point: The integer of 0.0, uint8 or uint16, no axis.
        quant_min: Smallest integer, 0.
        quant_max: Largest integer.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: float, zero_point: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.quant_min, self.quant_max = activation_grid(bits)
        kind = torch.uint8 if bits <= 8 else torch.uint16
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded values."""
        rounded: Tensor = quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max)
        return rounded

    def extra_repr(self) -> str:
        """Return the grid in words."""
        return f"bits={self.bits}, scale={float(self.scale):g}, zero_point={int(self.zero_point)}"


class DeployedLayer(nn.Module):
    """A convolution or linear layer whose weight is codes times scales; see `deployed`.

    Classes of deployed layers inherit from this one and from the layer's own, whose ``forward``
    reads ``self.weight`` as it always does.

    Attributes:
        weight_bits: Bits of a code, or `FLOAT_BITS` where the weight stays in float.
        largest_code: Largest magnitude a code of this quantizer and these bits can have.
        quantizer_name: Name of the weight's quantizer.
        weight_codes: int8 or int16, as the weight; of transposed convolutions in groups
            ``(outputs, inputs of a group, …)``.
        weight_scale: Step of each output channel, float32.
        channel_axis: Axis of the codes along which scales lie.
        input_quantizer: Rounds what enters, or ``None``.
        folded: Name of the batch-norm whose factors are in scale and bias, if any.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_bits: int
    largest_code: int
    quantizer_name: str
    channel_axis: int
    input_quantizer: ActivationQuantizer | None
    folded: str | None

    @property
    def by_output(self) -> bool:
        """Say whether codes lie output by output, of a transposed convolution in groups."""
        return isinstance(self, _TRANSPOSED) and self.groups > 1

    @property
    def weight(self) -> Tensor:
        """Return codes times scales, in the layout of the layer's class."""
        if self.weight_bits == FLOAT_BITS:
            return self.get_buffer("float_weight")
        with uncounted():
            rows: Tensor = dequantize(self.weight_codes, self.weight_scale, self.channel_axis)
            if not self.by_output:
                return rows
            groups: Any = self.groups
            rows = rows.reshape(groups, -1, *rows.shape[1:]).transpose(1, 2)
            return rows.flatten(0, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer's class computes of the rounded input."""
        if self.input_quantizer is not None:
            with uncounted():
                x = self.input_quantizer(first_input(args, kwargs))
            args, kwargs = with_first_input(args, kwargs, x)
        return super().forward(*args, **kwargs)


class DeployedProduct(Product):
    """A product of activations that rounds both factors.

    Attributes:
        input_quantizer: Rounds the first factor.
        other_quantizer: Rounds the second.
    """

    input_quantizer: ActivationQuantizer
    other_quantizer: ActivationQuantizer

    def forward(self, input: Tensor, other: Tensor, equation: str = "") -> Tensor:
        """Return the product of the rounded factors."""
        with uncounted():
            input, other = self.input_quantizer(input), self.other_quantizer(other)
        return super().forward(input, other, equation)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@own_modes()
def deployed(network: nn.Module) -> nn.Module:
    """Return an answer's network in plain modules, on the CPU and in evaluation mode.

    Its outputs are those of ``network`` but for the rounding of one addition, where a layer's
    output is shifted (`hq_optuna.quantization.correction`): the shift goes into the bias.

    Args:
        network: A prepared network with the bits it shall have. Left as it is.

    Raises:
        ExportError: The network is not prepared, not in single precision, or a layer has a
            forward of its own in the place of its class's.
    """
    layers = prepared_layers(network)
    if not layers:
        raise ExportError(
            "The network holds no quantized layer. Give the answer of a search: result.network, "
            "or what hq_optuna.load returns."
        )
    _check_precision(network)
    clean = copied(network).cpu()
    clean.requires_grad_(False)
    for name in layers:
        _deploy_(clean.get_submodule(name), name)
    for name, quantizer in output_quantizers(clean).items():
        owner, _, own = name.rpartition(".")
        bits = quantizer.bits
        if bits != FLOAT_BITS:
            rounds = ActivationQuantizer(*quantizer.range(bits), bits)  # type: ignore[call-arg]
            setattr(clean.get_submodule(owner), own, rounds)
    return clean


def _check_precision(network: nn.Module) -> None:
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ExportError(
                f"Files are written in single precision, and {name!r} is {tensor.dtype}. Give "
                "network.float(), and measure it: its outputs may differ in the last digits."
            )


def _deploy_(module: nn.Module, name: str) -> None:
    """Make a prepared layer a deployed one, in its place."""
    if isinstance(module, Product):
        _deploy_product_(module)
        return
    if "forward" in vars(module):
        raise ExportError(
            f"Layer {name!r} has a function in the place of its class's forward, which would read "
            "its input before it is rounded. Make it a method of a class."
        )
    holder, inputs = weight_quantizer(module), input_quantizer(module)
    bits, activation_bits = holder.bits, inputs.bits
    about: dict[str, Any] = {
        "weight_bits": bits,
        "largest_code": 0 if bits == FLOAT_BITS else holder.quantizer.largest_code(bits),
        "quantizer_name": holder.quantizer.name,
        "channel_axis": holder.channel_axis,
        "folded": None,
    }
    weight, buffers = float_weight(module).detach(), dict[str, Tensor]()
    if bits == FLOAT_BITS:
        buffers["float_weight"] = weight
    else:
        scale = holder.scale(weight, bits).detach().float()
        rounded = holder.quantized(weight, bits).detach()
        step = along(scale, rounded, holder.channel_axis)
        codes = (rounded.double() / step.double()).round()
        small = about["largest_code"] <= MOST_INT8
        buffers["weight_codes"] = codes.to(torch.int8 if small else torch.int16)
        buffers["weight_scale"] = scale.clone()
    quantizer = None
    if activation_bits != FLOAT_BITS:
        quantizer = ActivationQuantizer(*inputs.range(activation_bits), activation_bits)
    shift = dict(module.named_buffers(recurse=False)).get(SHIFT)
    without_shift_(module)
    unprepared_(module)
    if shift is not None and bool(shift.any()):
        _shift_bias_(module, name, shift)
    _replace_weight_(module, about, buffers, quantizer)


def _deploy_product_(module: Any) -> None:
    factors = factor_quantizers(module)
    without_factors_(module)
    bits = factors[0].bits
    if bits == FLOAT_BITS:
        return
    module.__class__ = DeployedProduct
    module.input_quantizer, module.other_quantizer = (
        ActivationQuantizer(*one.range(bits), bits) for one in factors
    )


def _shift_bias_(module: nn.Module, name: str, shift: Tensor) -> None:
    if has_hooks(module):
        raise ExportError(
            f"Layer {name!r} has a forward hook, and the mean of its outputs is corrected, which "
            "comes after that hook and can't go into the layer's bias. Remove the hook, or search "
            "without the correction."
        )
    bias = bias_of(module)
    total = shift.double() if bias is None else bias.double() + shift.double()
    set_bias_(module, total.float())


def set_bias_(module: nn.Module, bias: Tensor) -> None:
    """Give a layer a bias of its own, whatever it had."""
    module.register_parameter("bias", nn.Parameter(bias.contiguous(), requires_grad=False))


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling a module calls something else too."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _replace_weight_(
    module: Any,
    about: dict[str, Any],
    buffers: dict[str, Tensor],
    quantizer: ActivationQuantizer | None,
) -> None:
    """Put codes and scales in the place of a weight."""
    own = type(module)
    module.__class__ = type(f"Deployed{own.__name__}", (DeployedLayer, own), {})
    for key, value in about.items():
        setattr(module, key, value)
    for key, value in buffers.items():
        module.register_buffer(key, value.contiguous())
    if about["weight_bits"] != FLOAT_BITS and module.by_output:
        groups: Any = module.groups
        codes = module.weight_codes
        rows = codes.reshape(groups, -1, *codes.shape[1:]).transpose(1, 2)
        module.register_buffer("weight_codes", rows.flatten(0, 1).contiguous())
        module.channel_axis = 0
    module.input_quantizer = quantizer


class IntegerBias(nn.Module):
    """A deployed layer whose bias is a 32-bit multiple of input scale × weight scale."""

    bias_codes: Tensor
    bias_scale: Tensor

    @property
    def bias(self) -> Tensor:
        """Return codes times scales."""
        with uncounted():
            bias: Tensor = dequantize(self.bias_codes, self.bias_scale, 0)
            return bias


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return a layer's bias without gradient, if it has one."""
    bias: Any = layer.bias
    return None if bias is None else bias.detach()


def bias_step(layer: DeployedLayer) -> Tensor | None:
    """Return input scale × weight scale, ``(channels,)``, where a bias can be counted in it.

    ``None`` where the layer has no bias, its weight or input stay in float, or a bias needs more
    than 32 bits.
    """
    inputs, bias = layer.input_quantizer, bias_of(layer)
    if bias is None or inputs is None or layer.weight_bits == FLOAT_BITS:
        return None
    step = inputs.scale * layer.weight_scale
    counts = bias.double().abs() / step.double()
    return step if bool((counts < 2.0**31 - 1).all()) else None


def round_biases_(network: nn.Module) -> list[str]:
    """Round every bias to 32-bit integers; return the layers whose bias stays in float."""
    left = []
    for name, module in deployed_layers(network).items():
        step = bias_step(module)
        bias = bias_of(module)
        if step is not None and bias is not None:
            codes = (bias.double() / step.double()).round()
            del module._parameters["bias"]
            own = type(module)
            module.__class__ = type(own.__name__, (IntegerBias, own), {})
            module.register_buffer("bias_codes", codes.to(torch.int32))
            module.register_buffer("bias_scale", step)
        elif bias is not None:
            left.append(name)
    return left


def deployed_products(network: nn.Module) -> dict[str, DeployedProduct]:
    """Return the deployed products of activations by name, in the network's order."""
    return {n: m for n, m in network.named_modules() if isinstance(m, DeployedProduct)}


def deployed_layers(network: nn.Module) -> dict[str, DeployedLayer]:
    """Return the deployed layers of a network by name, in its order."""
    return {n: m for n, m in network.named_modules() if isinstance(m, DeployedLayer)}


MOST_TORCHAO = 8
"""Bits of torchao's widest integers."""


class _RoundedLinear(nn.Linear):
    """A linear layer that rounds what enters."""

    input_quantizer: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in_features)``."""
        return super().forward(self.input_quantizer(input))


def for_torchao(answer: SearchResult | nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the deployed network with torchao's weights in linear layers, and the layers' names.

    torchao's own `quantize_` finds scales and codes anew from float weights, and so loses
    compensated rounding. Its tensor subclass takes both as they are.

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
        if not is_linear or layer.weight_bits == FLOAT_BITS or bits > MOST_TORCHAO:
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
