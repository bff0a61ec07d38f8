"""Fused modules taken apart compute what PyTorch's do, in double precision."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from hq_optuna.network.unfused import unfused

N, T, S, E = 3, 5, 4, 8
SWITCH = [False, True]


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif wanted is None:
        assert found is None
    elif wanted.is_floating_point():
        assert torch.allclose(found, wanted, atol=1e-12)
    else:
        assert torch.equal(found, wanted)


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return a module with random biases, and what it is taken apart into."""
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    apart = unfused(module)
    assert type(apart) is not type(module)
    return module, apart


def masks(n: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return masks of attention and of padding, of each kind; no row is masked whole."""
    attn = [drawn(T, S) > 0.5, drawn(n * 2, T, S) > 0.5, drawn(T, S)]
    padding = [drawn(N, S) > 0.5, drawn(N, S)]
    for mask in (*attn, *padding):
        mask[..., 0] = False
    return [None, *attn], [None, *(mask if n > 1 else mask[0] for mask in padding)]


@pytest.mark.parametrize("width", [None, 6])
@pytest.mark.parametrize("single", SWITCH)
@pytest.mark.parametrize(("bias", "extra", "zero"), [*itertools.product(SWITCH, SWITCH, SWITCH)])
def test_attention(bias: bool, extra: bool, zero: bool, single: bool, width: int | None) -> None:
    made: dict[str, Any] = {"bias": bias, "add_bias_kv": extra, "add_zero_attn": zero}
    fused, apart = pair(nn.MultiheadAttention(E, 2, kdim=width, batch_first=single, **made))
    given = drawn(N, T, E), drawn(N, S, width or E), drawn(N, S, E)
    q, k, v = (x[0] if single else x.transpose(0, 1) for x in given)
    for attn, padding in itertools.product(*masks(1 if single else N)):
        for needs, mean in itertools.product(SWITCH, SWITCH):
            more = {"need_weights": needs, "average_attn_weights": mean}
            more |= {"attn_mask": attn, "key_padding_mask": padding}
            with warnings.catch_warnings(action="ignore"):  # masks of two kinds
                wanted = fused(q, k, v, **more)
            assert_same(apart(q, k, v, **more), wanted)


@pytest.mark.parametrize(
    "made",
    [
        lambda **more: nn.LSTM(4, 6, **more),
        lambda **more: nn.LSTM(4, 6, proj_size=3, **more),
        lambda **more: nn.GRU(4, 6, **more),
        lambda **more: nn.RNN(4, 6, **more),
        lambda **more: nn.RNN(4, 6, nonlinearity="relu", **more),
    ],
    ids=["lstm", "projected", "gru", "tanh", "relu"],
)
@pytest.mark.parametrize(
    ("bidirectional", "first", "bias"), [*itertools.product(SWITCH, SWITCH, SWITCH)]
)
def test_recurrent(made: Any, bidirectional: bool, first: bool, bias: bool) -> None:
    more = {"bidirectional": bidirectional, "batch_first": first, "bias": bias}
    fused: Any
    fused, apart = pair(made(num_layers=2, **more))
    n_states = 2 * (1 + bidirectional)
    for x in (drawn(N, T, 4), drawn(T, 4)):
        rows = () if x.dim() == 2 else (N if first else T,)
        assert_same(apart(x), fused(x))
        state = drawn(n_states, *rows, fused.proj_size or 6)
        given = (state, drawn(n_states, *rows, 6)) if fused.mode == "LSTM" else state
        assert_same(apart(x, given), fused(x, given))
    for lengths, is_sorted in (((5, 3, 1), True), ((2, 5, 3), False)):
        packed = pack_sequence([drawn(length, 4) for length in lengths], is_sorted)
        state = drawn(n_states, 3, fused.proj_size or 6)
        given = (state, drawn(n_states, 3, 6)) if fused.mode == "LSTM" else state
        found, wanted = apart(packed, given), fused(packed, given)
        assert isinstance(found[0], PackedSequence)
        assert_same(tuple(found[0]), tuple(wanted[0]))
        assert_same(found[1], wanted[1])


@pytest.mark.parametrize(
    "cell", [nn.LSTMCell(4, 6), nn.GRUCell(4, 6), nn.RNNCell(4, 6, nonlinearity="relu")]
)
def test_cells(cell: nn.Module) -> None:
    fused, apart = pair(cell)
    for x in (drawn(N, 4), drawn(4)):
        assert_same(apart(x), fused(x))
        state = drawn(*x.shape[:-1], 6)
        given = (state, state + 1) if isinstance(cell, nn.LSTMCell) else state
        assert_same(apart(x, given), fused(x, given))


def test_transformers_compute_the_same_also_where_pytorch_would_take_its_fused_path() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 16, batch_first=True), 2)
    encoder = encoder.double().eval()
    apart, x = unfused(encoder), drawn(N, T, E)
    padding = torch.zeros(N, T, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        assert_same(apart(x), encoder(x))
        found, wanted = (net(x, src_key_padding_mask=padding) for net in (apart, encoder))
        assert_same(found[~padding], wanted[~padding])
    whole = nn.Transformer(E, 2, 1, 1, 16, batch_first=True).double().eval()
    causal = whole.generate_square_subsequent_mask(T, dtype=torch.float64)
    assert_same(unfused(whole)(x, x, tgt_mask=causal), whole(x, x, tgt_mask=causal))


def test_what_is_not_pytorchs_own_stays_and_a_network_without_fused_modules_is_not_copied() -> None:
    class Own(nn.GRU):
        pass

    plain = nn.Sequential(nn.Linear(3, 4))
    normed = parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    for network in (plain, nn.Sequential(Own(3, 4)), nn.Sequential(normed)):
        assert unfused(network) is network


def test_a_module_that_stands_in_two_places_is_taken_apart_once_and_the_network_is_left() -> None:
    network = nn.ModuleDict({"a": nn.GRU(4, 4), "b": nn.ModuleList([nn.GRU(4, 4)])})
    network["b"].append(network["a"])  # type: ignore[operator]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    apart: Any = unfused(network)
    assert apart["a"] is apart["b"][1]
    assert apart["a"] is not apart["b"][0]
    assert_same(tuple(network.state_dict().values()), tuple(before.values()))
