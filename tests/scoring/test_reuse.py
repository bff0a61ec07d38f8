"""Candidates run on what their incumbent left give the outputs of a whole pass, bit for bit."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hq_optuna.bit_config import BitConfig
from hq_optuna.layers import FLOAT_BITS
from hq_optuna.quantization import set_bits
from tests.scoring.side_by_side import (
    ALL,
    IMAGES,
    ROWS,
    SEQUENCES,
    Mixed,
    Search,
)
from tests.small_networks import ConvNet, LaterInPlace, Residual, Tokens, Twice, make, seeded


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from(Mixed.PIECES), min_size=1, max_size=5),
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from([ALL, 20_000, 5_000]),
)
@example(["whole", "view", "whole", "norm"], 1, True, ALL)  # calls its norm once in float
def test_random_networks_and_searches_give_equal_outputs(pieces, seed, correct, memory):
    network = make(Mixed(pieces), seed, torch.float32)
    Search(network, IMAGES, correct=correct, memory=memory).walk(seed)


@pytest.mark.parametrize("piece", Mixed.PIECES)
def test_each_piece_can_be_cut(piece):
    # A branch that depends on the data may call its norm twice, where its module is called twice.
    pieces = [piece, "norm" if piece == "whole" else piece]
    search = Search(make(Mixed(pieces), 3, torch.float32), IMAGES)
    assert search.reusing.warnings == []
    search.walk(0, n_steps=5)
    assert search.reuse.n_bytes > 0


def test_layers_whose_quantizer_knows_few_bits_can_be_cut():
    network = make(Residual, dtype=torch.float32)
    search = Search(network, ROWS, quantizers={"a": "ternary", "b": "binary"})
    assert search.reusing.warnings == []
    incumbent = BitConfig({"first": (4, 4), "a": (2, 4), "b": (1, 4), "head": (4, 4)})
    for name in ("a", "b"):
        weights, activations = incumbent[name]
        search.check(BitConfig({**incumbent, name: (weights, activations - 1)}), incumbent)
    assert search.reuse.n_bytes > 0


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (ConvNet, IMAGES),
        (Residual, ROWS),
        (Twice, ROWS),
        (LaterInPlace, ROWS),
        (Tokens(flat=True), SEQUENCES),
        (Tokens(flat=False), SEQUENCES),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_that_are_hard_to_quantize(kind, inputs, dtype):
    search = Search(make(kind, dtype=dtype), inputs.to(dtype))
    assert search.reusing.warnings == []
    search.walk(1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_precisions_are_equal_and_differ_from_each_other(precision):
    search = Search(
        make(Mixed(["shortcut", "iadd"]), 0, torch.float32), IMAGES, precision=precision
    )
    search.walk(2)
    plain = Search(make(Mixed(["shortcut", "iadd"]), 0, torch.float32), IMAGES)
    ours, theirs = (s.reusing.score(s.uniform(4)) for s in (search, plain))
    assert (ours == theirs) == (precision == "float32")
    assert ours.calibration_loss == pytest.approx(theirs.calibration_loss, rel=0.2, abs=2)


class Named(nn.Module):
    """Keyword inputs, a default that is not given, a dictionary of tuples as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, left: Tensor, right: Tensor, mask: Tensor | None = None) -> dict:
        x = torch.tanh(self.a(left)) + self.b(right)
        if mask is not None:
            x = x * mask
        return {"sum": (x, x.sum(1, keepdim=True)), "more": [self.c(F.relu(x))]}


@pytest.mark.parametrize("inputs", [{"left": ROWS, "right": ROWS * 2}, (ROWS, ROWS * 2)])
def test_several_inputs_defaults_and_nested_outputs(inputs):
    search = Search(make(Named, dtype=torch.float32), inputs)
    assert search.reusing.warnings == []
    search.walk(3)


def test_a_candidate_runs_only_what_depends_on_its_change():
    search = Search(make(Mixed(["norm", "norm", "norm"]), 0, torch.float32), IMAGES)
    ran: list[str] = []
    for name in search.names:
        search.prepared.get_submodule(name).register_forward_hook(
            lambda *_, name=name: ran.append(name)
        )
    incumbent = search.uniform(8)
    search.reusing.score(incumbent, incumbent)
    ran.clear()
    search.reusing.score(search.changed(incumbent, "convs.1"), incumbent)
    assert ran == ["convs.1", "convs.2", "head"] * len(search.data)
    ran.clear()  # the next incumbent: what changed with it runs once, with who needs it first
    incumbent = search.changed(incumbent, "convs.1")
    search.reusing.score(search.changed(incumbent, "convs.1"), incumbent)
    assert ran == ["convs.1", "convs.2", "head"] * len(search.data)
    ran.clear()
    search.reusing.score(search.changed(incumbent, "head"), incumbent)
    assert ran == ["convs.1", "convs.2", "head"] * len(search.data)
    ran.clear()
    search.reusing.score(search.changed(incumbent, "convs.2"), incumbent)
    assert ran == ["convs.2", "head"] * len(search.data)


@pytest.mark.parametrize("correct", [False, True])
def test_an_end_between_batches_leaves_what_was_run(correct):
    search = Search(
        make(Mixed(["norm", "late", "norm"]), 0, torch.float32), IMAGES, correct=correct
    )
    incumbent = search.uniform(8)
    candidates = [search.changed(incumbent, name) for name in ("head", "convs.1", "convs.0")]
    expected = [search.whole.score(candidate) for candidate in candidates]

    def end():
        raise KeyboardInterrupt

    search.reusing.between_batches = end
    for candidate in candidates:
        with pytest.raises(KeyboardInterrupt):
            search.reusing.score(candidate, incumbent)
    search.reusing.between_batches = lambda: None
    assert [search.reusing.score(candidate, incumbent) for candidate in candidates] == expected


def test_bits_set_elsewhere_do_not_matter():
    search = Search(make(Mixed(["shortcut", "iadd"]), 0, torch.float32), IMAGES)
    incumbent = search.uniform(6)
    search.check(incumbent, incumbent)
    set_bits(search.prepared, search.uniform(2))
    search.check(search.changed(incumbent, "head"), incumbent)


@pytest.mark.parametrize("name", ["stem.parametrizations.weight.original", "first.weight"])
def test_weights_that_changed_are_noticed(name):
    search = Search(make(Mixed(["norm"]), 0, torch.float32), IMAGES, correct=False)
    incumbent = search.uniform(6)
    search.check(incumbent, incumbent)
    with torch.no_grad():
        dict(search.prepared.named_parameters())[name].mul_(1.5)
    search.check(search.changed(incumbent, "head"), incumbent)
    search.check(incumbent, None)


def test_buffers_that_changed_are_noticed():
    search = Search(make(Mixed(["norm"]), 0, torch.float32), IMAGES, correct=False)
    incumbent = search.uniform(6)
    search.check(incumbent, incumbent)
    search.prepared.first.running_mean.add_(0.5)
    search.check(search.changed(incumbent, "head"), incumbent)


def test_without_an_incumbent_what_is_kept_serves_and_nothing_else_is_kept():
    search = Search(make(Mixed(["norm"]), 0, torch.float32), IMAGES)
    search.check(search.uniform(5))
    assert search.reuse.n_bytes == 0
    search.check(search.uniform(5), search.uniform(5))
    kept = search.reuse.n_bytes
    search.check(search.uniform(3))
    assert search.reuse.n_bytes == kept > 0
    search.reuse.forget()
    assert search.reuse.n_bytes == 0
    search.check(search.changed(search.uniform(5), "head"), search.uniform(5))


def test_memory_is_bounded_and_more_of_it_leaves_less_to_run():
    ran: dict[int, int] = {}
    for memory in (1, 4_000, 20_000, 100_000, ALL):
        search = Search(
            make(Mixed(["shortcut", "branch", "norm", "iadd"]), 0, torch.float32),
            IMAGES,
            memory=memory,
        )
        incumbent = search.uniform(8)
        search.check(incumbent, incumbent)
        assert search.reuse.n_bytes <= memory
        counts: list[int] = []
        for name in search.names:
            search.prepared.get_submodule(name).register_forward_hook(
                lambda *_, counts=counts: counts.append(1)
            )
        for name in search.names:
            search.reusing.score(search.changed(incumbent, name), incumbent)
        ran[memory] = len(counts)
    assert sorted(ran.values(), reverse=True) == list(ran.values())
    assert ran[ALL] < 0.7 * ran[1]


def test_the_float_network_is_left_as_it_was_by_looking_for_cuts():
    network = make(Mixed(["late", "iadd", "whole"]), 0, torch.float32)
    search = Search(network, IMAGES)
    with torch.no_grad():
        expected = network(IMAGES)
        set_bits(search.prepared, dict.fromkeys(search.names, (FLOAT_BITS, FLOAT_BITS)))
        assert torch.equal(search.prepared(IMAGES), expected)


@pytest.mark.skipif(
    "HQ_OPTUNA_DATA" not in os.environ, reason="HQ_OPTUNA_DATA names no folder with the checkpoint"
)
def test_the_published_resnet20():
    from studies.cifar10_resnet20 import ResNet20

    state = torch.load(
        Path(os.environ["HQ_OPTUNA_DATA"]) / "resnet20_cifar10.pt", weights_only=True
    )
    network = ResNet20()
    network.load_state_dict(state)
    search = Search(network.eval(), torch.randn(14, 3, 32, 32, generator=seeded(5)))
    assert search.reusing.warnings == []
    search.walk(7, n_steps=6)
