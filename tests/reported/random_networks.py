"""A grammar of small networks: a description prints as the code that makes it again.

`networks()` is a hypothesis strategy of descriptions; `Network.make` builds one: its data, its loss
and `nn.Module`s of any seed. Descriptions say what is wished for; what does not fit (a kernel wider
than its input) is cut to fit when it is built, so that almost every description is a network.
All blocks take and give ``(N, C, *places)``, with no axis of places to three of them.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.reported.random_modules import (
    ACTIVATIONS,
    ADAPTIVE_POOLS,
    AVG_POOLS,
    BATCH_NORMS,
    CONVOLUTIONS,
    INSTANCE_NORMS,
    LOSSES,
    MAX_POOLS,
    OUTPUTS,
    TRANSPOSED,
    Applied,
    Built,
    CallsParent,
    ChannelsLast,
    Ids,
    InDouble,
    KeepsForward,
    Odd,
    Scale,
    ScaledConv,
    SecondAxis,
    add,
    as_function,
    attention,
    by_keyword,
    concatenate,
    conditional,
    detached,
    experts,
    in_half,
    logits_of,
    looks_before,
    looks_on,
    recomputed,
    twice,
    unused,
    without_grad,
)

# --- descriptions of blocks --------------------------------------------------------------------


class Described:
    """Prints as the call that makes it again, with what is not the default alone."""

    def __repr__(self) -> str:
        told = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(told)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis prints so


def channels_of(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a module makes of an example, for the shape."""
    with torch.no_grad():
        return copy.deepcopy(module).eval()(x.clone())


@dataclass(frozen=True, repr=False)
class Conv(Described):
    """A convolution; a linear layer where there are no axes of places. Groups 0: depthwise."""

    out: int = 4
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    padding: Any = 1
    mode: str = "zeros"
    bias: bool = True
    transposed: bool = False
    output_padding: int = 0

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        axes, channels = x.dim() - 2, x.shape[1]
        out = channels if keep or self.groups == 0 else self.out
        if axes == 0:
            return nn.Linear(channels, out, bias=self.bias)
        kernel, dilation, same = self._window(min(x.shape[2:]), keep)
        stride = 1 if same else self.stride
        padding: Any = "same" if same else min(self.padding, kernel // 2)
        groups = channels if self.groups == 0 else self.groups
        if channels % groups or out % groups:
            groups = 1
        if self.transposed:
            extra = self.output_padding if stride > 1 else 0
            return TRANSPOSED[axes](
                *(channels, out, kernel, stride, 0 if same else padding, extra, groups, self.bias),
                dilation=dilation,
            )
        return CONVOLUTIONS[axes](
            *(channels, out, kernel, stride, padding, dilation, groups, self.bias, self.mode)
        )

    def _window(self, least: int, keep: bool) -> tuple[int, int, bool]:
        """Return kernel, dilation and whether places stay as many, for so many places at least."""
        same = self.padding == "same" or keep
        if least <= 2 or (keep and self.transposed):
            return 1, 1, same
        if not same and (self.kernel - 1) * self.dilation + 1 > least:
            return self.kernel, 1, self.kernel > least
        return self.kernel, self.dilation, same


@dataclass(frozen=True, repr=False)
class Linear(Described):
    """A linear layer over the channels, of a subclass that keeps or changes its forward."""

    out: int = 4
    bias: bool = True
    kind: str = ""

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        out = x.shape[1] if keep else self.out
        if self.kind == "SecondAxis":
            return SecondAxis(x.shape[1], out, self.bias)
        if self.kind in ("by keyword", "unused"):
            layer = nn.Linear(x.shape[1], out, self.bias)
            return Applied(by_keyword if self.kind == "by keyword" else unused, layer)
        if self.kind == "weight_norm":
            layer = nn.utils.parametrizations.weight_norm(nn.Linear(x.shape[1], out, self.bias))
            return ChannelsLast(layer) if x.dim() > 2 else layer
        if self.kind == "ScaledConv" and x.dim() == 4:
            return ScaledConv(x.shape[1], out, 3, padding=1, bias=self.bias)
        kinds = {"KeepsForward": KeepsForward, "CallsParent": CallsParent}
        layer = kinds.get(self.kind, nn.Linear)(x.shape[1], out, self.bias)
        return ChannelsLast(layer) if x.dim() > 2 else layer


@dataclass(frozen=True, repr=False)
class Norm(Described):
    """A normalization; `make` draws its scales, negative ones too, and its statistics."""

    kind: str = "batch"
    affine: bool = True
    track: bool = True

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        axes, channels = x.dim() - 2, x.shape[1]
        if self.kind == "instance" and axes and x[0, 0].numel() > 1:
            return INSTANCE_NORMS[axes](
                channels, affine=self.affine, track_running_stats=self.track
            )
        if self.kind == "group" and ((axes and x[0, 0].numel() > 1) or channels > 2):
            return nn.GroupNorm(2, channels, affine=self.affine)
        if self.kind == "layer":
            layer = nn.LayerNorm(channels, elementwise_affine=self.affine)
            return ChannelsLast(layer) if axes else layer
        return BATCH_NORMS[axes](channels, affine=self.affine, track_running_stats=self.track)


@dataclass(frozen=True, repr=False)
class Act(Described):
    """An activation."""

    kind: str = "relu"

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        return ACTIVATIONS[self.kind]() if self.kind in ACTIVATIONS else Odd(self.kind)


@dataclass(frozen=True, repr=False)
class Pool(Described):
    """A pool of two places, or to two places."""

    kind: str = "max"

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        axes = x.dim() - 2
        if axes == 0 or keep or min(x.shape[2:]) < 2:
            return nn.Identity()
        if self.kind == "adaptive":
            return ADAPTIVE_POOLS[axes](2)
        return (MAX_POOLS if self.kind == "max" else AVG_POOLS)[axes](2)


@dataclass(frozen=True, repr=False)
class Held(Described):
    """A scale of each channel: a parameter, a buffer or one that is not in the state."""

    held: str = "parameter"

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        return Scale(x.shape[1], x.dim() - 2, self.held)


def chain(blocks: tuple[Any, ...], x: Tensor, keep: bool = False) -> nn.Module:
    """Return blocks one after the other; with ``keep`` none changes the shape."""
    modules: list[nn.Module] = []
    for block in blocks:
        modules.append(block.module(x, keep))
        x = channels_of(modules[-1], x)
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


@dataclass(frozen=True, repr=False)
class Residual(Described):
    """Adds what goes in, through a projection where shapes differ."""

    inner: tuple[Any, ...] = (Conv(),)

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        inner = chain(self.inner, x, keep)
        y = channels_of(inner, x)
        if y.shape == x.shape:
            return Applied(add, inner, nn.Identity())
        axes = x.dim() - 2
        if axes == 0:
            return Applied(add, inner, nn.Linear(x.shape[1], y.shape[1]))
        pool = ADAPTIVE_POOLS[axes](tuple(y.shape[2:]))
        projection = CONVOLUTIONS[axes](x.shape[1], y.shape[1], 1, bias=False)
        return Applied(add, inner, nn.Sequential(pool, projection))


@dataclass(frozen=True, repr=False)
class Concat(Described):
    """Concatenates what two branches make."""

    first: tuple[Any, ...] = (Conv(),)
    second: tuple[Any, ...] = (Linear(),)

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        parts = [chain(self.first, x, True), chain(self.second, x, True)]
        if keep:
            return Applied(add, *parts)
        return Applied(concatenate, *parts)


@dataclass(frozen=True, repr=False)
class Twice(Described):
    """A layer that is called twice: one module, one with two names, or two with one weight."""

    layer: Any = Conv()
    how: str = "module"

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        first = self.layer.module(x, True)
        if self.how == "module":
            return Applied(lambda _self, x, layer: layer(torch.tanh(layer(x))), first)
        if self.how == "names":
            return Applied(twice, first, first)
        again = copy.deepcopy(first)
        for module, other in zip(first.modules(), again.modules(), strict=True):
            if isinstance(module, (nn.Linear, *CONVOLUTIONS.values(), *TRANSPOSED.values())):
                other.weight = module.weight
        return Applied(twice, first, again)


@dataclass(frozen=True, repr=False)
class Function(Described):
    """The weight of a linear layer used by `F.linear` or a product; the layer called too or not."""

    called: bool = False
    product: bool = False
    bias: bool = True

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        layer = nn.Linear(x.shape[1], x.shape[1], bias=self.bias)
        return Applied(as_function, layer, called=self.called, product=self.product)


@dataclass(frozen=True, repr=False)
class Around(Described):
    """Blocks in a way of their own: recomputed, without gradient, detached, conditional, frozen."""

    inner: tuple[Any, ...] = (Conv(),)
    how: str = "checkpoint"
    add: bool = True

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        same = keep or self.add or self.how in ("conditional", "experts")
        inner = chain(self.inner, x, same)
        if self.how in ("checkpoint", "reentrant"):
            return Applied(recomputed, inner, reentrant=self.how == "reentrant")
        if self.how == "plain":
            return Applied(lambda _self, x, inner: inner(x), inner)
        if self.how in ("no_grad", "detach"):
            return Applied(without_grad if self.how == "no_grad" else detached, inner, add=self.add)
        if self.how == "conditional":
            return Applied(conditional, inner, above=0.0)
        if self.how == "double":
            return InDouble(inner)
        if self.how == "autocast":
            return Applied(in_half, inner)
        if self.how == "experts":
            return Applied(experts, inner, chain(self.inner, x, True))
        return inner.requires_grad_(False)


@dataclass(frozen=True, repr=False)
class Attention(Described):
    """Self-attention over the places."""

    heads: int = 2

    def module(self, x: Tensor, keep: bool = False) -> nn.Module:
        heads = self.heads if x.shape[1] % self.heads == 0 else 1
        return Applied(attention, nn.MultiheadAttention(x.shape[1], heads, batch_first=True))


# --- whole networks ----------------------------------------------------------------------------

N_OUT = 3


@dataclass(frozen=True, repr=False)
class Network(Described):
    """A whole network with its data and loss; `make` builds it."""

    places: tuple[int, ...] = (5, 5)
    blocks: tuple[Any, ...] = (Conv(),)
    ids: bool = False
    tied: bool = False
    pooled: bool = True
    inputs: str = "tensor"
    outputs: str = "tensor"
    loss: str = "cross_entropy"
    dtype: str = "float32"
    training: bool = False
    hooked: bool = False
    correction: bool = True
    sizes: tuple[int, ...] = (6, 6, 4)
    seed: int = 0

    def make(self, seed: int | None = None) -> nn.Module:
        """Return the network, with weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed if seed is None else seed)
            network = self._built()
            for module in network.modules():
                if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
                    _draw_norm(module)
        network.to(getattr(torch, self.dtype))
        network.train(self.training)
        if self.hooked:
            network.head.register_forward_hook(looks_on)
            network.register_forward_pre_hook(looks_before)
        return network

    def _built(self) -> nn.Module:
        x = self._input(2).to(torch.int64 if self.ids else torch.float32)
        entry = Ids(N_OUT if self.tied else 7, 4) if self.ids else nn.Identity()
        x = channels_of(entry, x)
        gate = None if self.inputs == "tensor" else nn.Linear(2, x.shape[1])
        body = chain(self.blocks, x)
        x = channels_of(body, x)
        n = N_OUT
        if self.pooled or x.dim() == 2:
            head: nn.Module = nn.Linear(x.shape[1], n)
        else:
            head = CONVOLUTIONS[x.dim() - 2](x.shape[1], n, 1)
        if self.tied and head.weight.shape == entry.weight.shape:
            head.weight = entry.weight
        return Built(entry, gate, body, (head, self.pooled, self.outputs))

    def _input(self, n: int) -> Tensor:
        if self.ids:
            return torch.randint(0, N_OUT if self.tied else 7, (n, *self.places))
        return torch.randn(n, 4, *self.places) + 0.3 * torch.randn(n, *[1] * (1 + len(self.places)))

    def plain(self) -> Network:
        """Return the same network without recomputation, of the same names."""
        return dataclasses.replace(self, blocks=tuple(map(_plain, self.blocks)))

    @property
    def signature(self) -> tuple[Any, ...]:
        """What kinds of blocks stand where: networks of one signature are much alike."""
        return (*map(_kinds, self.blocks), len(self.places))

    @property
    def loss_function(self) -> Any:
        """The loss, a new one where it is a module."""
        loss = LOSSES[self.loss]()
        return loss.to(getattr(torch, self.dtype)) if isinstance(loss, nn.Module) else loss

    def data(self) -> list[tuple[Any, Tensor]]:
        """Return calibration batches of inputs and labels."""
        dtype = getattr(torch, self.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            shape = logits_of(self.make().eval()(*self._arguments(2, dtype))).shape[2:]
            return [self._batch(n, shape, dtype) for n in self.sizes]

    def _arguments(self, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, extra = self._input(n), torch.randn(n, 2).to(dtype)
        x = x if self.ids else x.to(dtype)
        return (x,) if self.inputs == "tensor" else (x, extra)

    def _batch(self, n: int, shape: Any, dtype: torch.dtype) -> tuple[Any, Tensor]:
        inputs: Any = self._arguments(n, dtype)
        if self.inputs == "dict":
            inputs = dict(zip(("x", "extra"), inputs, strict=True))
        elif self.inputs == "tensor":
            (inputs,) = inputs
        if "mse" in self.loss.lower():
            return inputs, torch.randn(n, N_OUT, *shape).to(dtype)
        labels = torch.randint(0, N_OUT, (n, *shape))
        labels[0] = 0  # a batch of ignored labels alone has no loss
        return inputs, labels


def _plain(block: Any) -> Any:
    changes = {
        f.name: tuple(map(_plain, getattr(block, f.name)))
        for f in dataclasses.fields(block)
        if f.name in ("inner", "first", "second")
    }
    if getattr(block, "how", "") in ("checkpoint", "reentrant"):
        changes["how"] = "plain"
    return dataclasses.replace(block, **changes)


def _kinds(block: Any) -> Any:
    name = [type(block).__name__, getattr(block, "how", "")]
    for field in ("inner", "first", "second"):
        name.append("".join(type(b).__name__ for b in getattr(block, field, ())))
    return " ".join(name)


def _draw_norm(module: Any) -> None:
    for name, tensor in module.named_parameters(recurse=False):
        tensor.data.copy_(torch.randn(tensor.shape) * (0.8 if name == "weight" else 0.2))
    if getattr(module, "running_mean", None) is not None:
        module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape))
        module.running_var.copy_(0.5 + torch.rand(module.running_var.shape))


# --- the grammar -------------------------------------------------------------------------------

LEFT_OUT: frozenset[str] = frozenset()
"""Features that the product does not treat right yet; nothing drawn has them."""


def allowed(*features: str) -> list[str]:
    """Return the features that are not left out."""
    return [feature for feature in features if feature not in LEFT_OUT]


convolutions = st.builds(
    Conv,
    out=st.sampled_from([2, 4, 8]),
    kernel=st.sampled_from([3, 1, 2]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 0]),
    padding=st.sampled_from([1, 0, "same"]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
)
transposed = st.builds(
    Conv,
    out=st.sampled_from([4, 2, 8]),
    kernel=st.sampled_from([3, 2, 1]),
    stride=st.sampled_from([2, 1]),
    groups=st.sampled_from([1, 2, 0]),
    padding=st.sampled_from([0, 1]),
    bias=st.booleans(),
    transposed=st.just(True),
    output_padding=st.sampled_from([0, 1]),
)
subclasses = allowed(
    "",
    "KeepsForward",
    "CallsParent",
    "SecondAxis",
    "ScaledConv",
    "by keyword",
    "unused",
    "weight_norm",
)
linears = st.builds(
    Linear,
    out=st.sampled_from([4, 2, 8]),
    bias=st.booleans(),
    kind=st.sampled_from(subclasses),
)
layers = st.one_of(convolutions, convolutions, linears, transposed)
norms = st.builds(
    Norm,
    kind=st.sampled_from(["batch", "batch", "group", "layer", "instance"]),
    affine=st.booleans(),
    track=st.booleans(),
)
small = st.one_of(
    norms,
    st.builds(
        Act, kind=st.sampled_from([*sorted(ACTIVATIONS) * 3, *allowed("random", "remembers")])
    ),
    st.builds(Pool, kind=st.sampled_from(["max", "avg", "adaptive"])),
    st.builds(Held, held=st.sampled_from(["parameter", "buffer", "not in the state"])),
)
inner = st.tuples(layers, st.one_of(small, layers)) | st.tuples(layers)
ways = allowed(
    *(
        "checkpoint",
        "reentrant",
        "no_grad",
        "detach",
        "conditional",
        "experts",
        "frozen",
        "double",
        "autocast",
    )
)
structures = st.one_of(
    st.builds(Residual, inner=inner),
    st.builds(Concat, first=inner, second=inner),
    st.builds(Twice, layer=layers, how=st.sampled_from(allowed("module", "names", "weight"))),
    st.builds(Function, called=st.booleans(), product=st.booleans(), bias=st.booleans()),
    st.builds(Around, inner=inner, how=st.sampled_from(ways), add=st.booleans()),
    st.builds(Attention),
)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Draw a description of a network with its data and loss."""
    blocks = tuple(
        draw(st.lists(st.one_of(layers, small, structures, structures), min_size=1, max_size=4))
    )
    places = draw(st.sampled_from([(5, 5), (7,), (3, 4, 3), ()]))
    outputs = draw(st.sampled_from(["tensor"] * 5 + allowed(*sorted(set(OUTPUTS) - {"tensor"}))))
    losses = sorted(LOSSES) if outputs == "tensor" else ["unknown", "unknown_mse"]
    ids = len(places) == 1 and draw(st.booleans())
    return Network(
        places=places,
        blocks=blocks,
        ids=ids,
        tied=ids and draw(st.booleans()),
        pooled=draw(st.booleans()),
        inputs=draw(st.sampled_from(["tensor", "tensor", "tuple", "dict"])),
        outputs=outputs,
        loss=draw(st.sampled_from(allowed(*losses))),
        dtype=draw(st.sampled_from(allowed("float32", "float32", "float64", "bfloat16"))),
        training=draw(st.booleans()),
        hooked=draw(st.booleans()),
        correction=draw(st.booleans()),
        sizes=draw(st.sampled_from([(6, 6, 6, 6), (6, 6, 4), (2, 7, 3, 5)])),
        seed=draw(st.integers(0, 99)),
    )
