"""Fused modules, as layers of their own: `nn.MultiheadAttention` and the recurrent ones.

They hold several weights and multiply by them inside one function, where nothing that enters can be
rounded. `unfused` gives each weight a `nn.Linear` that is called, under PyTorch's name of the
weight: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``; ``ih_l0``, ``hh_l0``,
``ih_l0_reverse``, ….
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from hq_optuna.network.copies import copied
from hq_optuna.network.layer_types import runs_forward_of

_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def unfused(network: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode in which every weight belongs to a layer that is called.

    Outputs are the network's but for the order of sums. The network itself comes back where it
    holds nothing fused. Subclasses, and modules with hooks or computed weights, stay as they are:
    what else they do is not known.

    Example:
        >>> network = unfused(nn.Sequential(nn.GRU(3, 4)))
        >>> [name for name, _ in network[0].named_children()]
        ['ih_l0', 'hh_l0']
    """
    if not any(map(is_fused, network.modules())):
        return network
    copy = copied(network)
    if is_fused(copy):
        return _made_of(copy)
    made: dict[nn.Module, nn.Module] = {}
    for module in list(copy.modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only its fused layers can read
        for name, child in module._modules.items():
            if child is not None and is_fused(child):
                if child not in made:
                    made[child] = _made_of(child)
                module._modules[name] = made[child]
    return copy


def is_fused(module: nn.Module) -> bool:
    """Say whether `unfused` takes this module apart."""
    kinds = (nn.MultiheadAttention, *_RECURRENT, *_CELLS)
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    hooks += (module._backward_hooks, module._backward_pre_hooks)  # type: ignore[assignment]
    names = ("in_proj_weight", "q_proj_weight", "weight_ih", "weight_ih_l0")
    return (
        type(module) in kinds
        and runs_forward_of(module, *kinds)
        and not any(hooks)
        and not hasattr(module, "parametrizations")
        and any(module._parameters.get(name) is not None for name in names)
    )


def _made_of(fused: nn.Module) -> nn.Module:
    if isinstance(fused, nn.MultiheadAttention):
        made: nn.Module = Attention(fused)
    else:
        made = Recurrent(fused) if isinstance(fused, _RECURRENT) else Cell(fused)
    return made.train(fused.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a layer that holds this weight, ``(outputs, inputs)``."""
    n_outputs, n_inputs = weight.shape
    layer = nn.Linear(n_inputs, n_outputs, bias=False, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            own = nn.Parameter(value.detach().clone(), value.requires_grad)
            layer.register_parameter(name, own)
    return layer


class Attention(nn.Module):
    """`nn.MultiheadAttention` with four linear layers; the same arguments and outputs."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = fused.embed_dim, fused.num_heads
        self.batch_first, self.dropout = fused.batch_first, fused.dropout
        self.add_zero_attn = fused.add_zero_attn
        self._qkv_same_embed_dim = False  # keeps PyTorch's transformers off their fused path
        weights: Sequence[Any] = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        if fused._qkv_same_embed_dim:
            weights = fused.in_proj_weight.chunk(3)
        biases = (None,) * 3 if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)
        self.bias_k, self.bias_v = fused.bias_k, fused.bias_v

    @property
    def in_proj_weight(self) -> Tensor:
        """Weights of the three projections, for functions that read them, ``(3 E, E)``."""
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """Their biases, ``(3 E,)``."""
        if self.q_proj.bias is None:
            return None
        return torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs and attention weights, as `nn.MultiheadAttention` does.

        ``is_causal`` is a hint: ``attn_mask`` says the same.
        """
        single = query.dim() == 2
        q, k, v = (
            x[None] if single else x if self.batch_first else x.transpose(0, 1)
            for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )  # (N, places, E)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        if self.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(q, k.shape[2], attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout, self.training)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # (N, places, E)
        if single:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _mask(
        self, q: Tensor, n_keys: int, attn: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """Return what is added to the scores ``(N, heads, queries, keys)``; keys added are seen."""
        found: Tensor | None = None
        for mask, is_padding in ((attn, False), (padding, True)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
            mask = functional.pad(mask, (0, n_keys - mask.shape[-1]))
            if is_padding:
                mask = mask.reshape(-1, 1, 1, n_keys)
            elif mask.dim() == 3:
                mask = mask.reshape(-1, self.num_heads, *mask.shape[1:])
            found = mask if found is None else found + mask
        return found


class Recurrent(nn.Module):
    """`nn.RNN`, `nn.LSTM` or `nn.GRU`, step by step; the same arguments and outputs."""

    def __init__(self, fused: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.batch_first, self.dropout = fused.mode, fused.batch_first, fused.dropout
        self.input_size, self.hidden_size = fused.input_size, fused.hidden_size
        self.num_layers, self.bidirectional = fused.num_layers, fused.bidirectional
        self.bias, self.proj_size = fused.bias, fused.proj_size
        for at in (at for level in self._levels() for at in level):
            for part in ("ih", "hh", "hr")[: 3 if self.proj_size else 2]:
                bias = getattr(fused, f"bias_{part}_{at}", None)
                self.add_module(
                    f"{part}_{at}", _linear(getattr(fused, f"weight_{part}_{at}"), bias)
                )

    def _levels(self) -> list[list[str]]:
        """Return the names of each level's directions."""
        ways = ("", "_reverse") if self.bidirectional else ("",)
        return [[f"l{level}{way}" for way in ways] for level in range(self.num_layers)]

    def flatten_parameters(self) -> None:
        """Do nothing: it is of the fused module."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Return the outputs of all steps, and the last state, as the fused module does."""
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        axis = 1 if self.batch_first and x.dim() == 3 and not packed else 0
        sizes = input.batch_sizes.tolist() if packed else None
        states: Any = (None,) * self.num_layers * (1 + self.bidirectional)
        if hx is not None:
            parts = hx if self.mode == "LSTM" else (hx,)
            if packed and input.sorted_indices is not None:
                parts = [part.index_select(1, input.sorted_indices) for part in parts]
            states = list(zip(*(part.unbind(0) for part in parts), strict=True))
        last: list[tuple[Tensor, ...]] = []
        for level in self._levels():
            ways = []
            for at in level:
                y, state = self._run(x, at, states[len(last)], axis, sizes)
                ways.append(y)
                last.append(state)
            x = torch.cat(ways, -1)
            if len(last) < len(states):
                x = functional.dropout(x, self.dropout, self.training)
        ends = [torch.stack(part) for part in zip(*last, strict=True)]  # (levels · ways, N, H)
        if packed:
            if input.unsorted_indices is not None:
                ends = [end.index_select(1, input.unsorted_indices) for end in ends]
            x = PackedSequence(x, *input[1:])
        return x, tuple(ends) if self.mode == "LSTM" else ends[0]

    def _run(
        self, x: Tensor, at: str, state: Any, axis: int, sizes: list[int] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the outputs of one direction, laid out as the inputs, and its last state."""
        entering = self.get_submodule(f"ih_{at}")(x)
        steps = entering.unbind(axis) if sizes is None else entering.split(sizes)
        hh = self.get_submodule(f"hh_{at}")
        if state is None:
            zeros = steps[0].new_zeros(*steps[0].shape[:-1], hh.in_features)
            state = (zeros,)
            if self.mode == "LSTM":
                state += (steps[0].new_zeros(*steps[0].shape[:-1], self.hidden_size),)
        backwards, outputs = at.endswith("_reverse"), []
        for step in reversed(steps) if backwards else steps:
            # Rows of a packed sequence that have ended, or not begun, keep their state.
            n = None if sizes is None else len(step)
            now = tuple(part[:n] for part in state)
            now = _step(self.mode, step, hh(now[0]), now)
            if self.proj_size:
                now = (self.get_submodule(f"hr_{at}")(now[0]), now[1])
            outputs.append(now[0])
            if n is not None and n < len(state[0]):
                now = tuple(torch.cat([a, b[n:]]) for a, b in zip(now, state, strict=True))
            state = now
        if backwards:
            outputs.reverse()
        return torch.cat(outputs) if sizes is not None else torch.stack(outputs, axis), state


class Cell(nn.Module):
    """`nn.RNNCell`, `nn.LSTMCell` or `nn.GRUCell`; the same arguments and outputs."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.bias = (
            fused.input_size,
            fused.hidden_size,
            fused.bias,
        )
        kind = type(fused).__name__.removesuffix("Cell")
        self.mode = f"RNN_{fused.nonlinearity.upper()}" if kind == "RNN" else kind
        self.ih = _linear(fused.weight_ih, fused.bias_ih)
        self.hh = _linear(fused.weight_hh, fused.bias_hh)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the next state, a pair for an LSTM."""
        entering, pair = self.ih(input), self.mode == "LSTM"
        if hx is None:
            zeros = entering.new_zeros(*entering.shape[:-1], self.hidden_size)
            hx = (zeros, zeros) if pair else zeros
        state = tuple(hx) if pair else (hx,)
        now = _step(self.mode, entering, self.hh(state[0]), state)
        return now if pair else now[0]


def _step(mode: str, entering: Tensor, again: Tensor, state: tuple[Tensor, ...]) -> Any:
    """Return the state after a step, ``(rows, hidden)`` each.

    ``entering`` and ``again`` are the gates' sums of input and of the state before.
    """
    if mode == "LSTM":
        i, f, g, o = (entering + again).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if mode == "GRU":
        (r, z, n), (r_again, z_again, n_again) = entering.chunk(3, -1), again.chunk(3, -1)
        n = (n + (r + r_again).sigmoid() * n_again).tanh()
        return (n + (z + z_again).sigmoid() * (state[0] - n),)
    sums = entering + again
    return (sums.relu() if mode == "RNN_RELU" else sums.tanh(),)
