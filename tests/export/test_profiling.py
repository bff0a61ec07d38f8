"""Pieces of a file compute what the file computes, and their times add up to it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.bit_search import BitSearch
from hq_optuna.export import profiling
from hq_optuna.export.profiling import Piece, Timed
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.latency import REST


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x)))
        y = functional.relu(self.conv1(x))
        x = functional.relu(x + self.conv2(y))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def search() -> BitSearch:
    torch.manual_seed(0)
    data = torch.randn(32, 3, 12, 12), torch.randint(0, 4, (32,))
    return BitSearch(Residual().eval(), data, bits=(8, 4), budget="0.5 bops")


def run_in_order(pieces: dict[str, Piece], feed: Any) -> dict[str, Any]:
    """Run pieces on what the pieces before them computed, by name of the value."""
    values = dict(feed)
    for piece in pieces.values():
        inputs = [value.name for value in piece.model.graph.input]
        outputs = [value.name for value in piece.model.graph.output]
        made = profiling.session(piece.model.SerializeToString(), optimize=False)
        found = made.run(None, {name: values[name] for name in inputs})
        values |= dict(zip(outputs, found, strict=True))
    return values


def test_pieces_in_their_order_compute_what_the_file_computes(search: BitSearch) -> None:
    names = [layer.name for layer in search.space.layers]
    config = search.space.config(search.space.bottom)
    model = profiling.exported(search.quantized(config), search.objective.data, "int4")
    feed, pieces = profiling.cut(model, names, search.objective.data)
    assert list(pieces) == [REST, *names]
    whole = profiling.session(model.SerializeToString(), optimize=False)
    (expected,) = whole.run(None, feed)
    found = run_in_order(pieces, feed)[model.graph.output[0].name]
    assert np.array_equal(found, expected)
    n_nodes = sum(len(piece.model.graph.node) for piece in pieces.values())
    assert n_nodes == len(model.graph.node)
    # conv1 and conv2 are alike, but an addition follows one of them.
    assert len({piece.key for piece in pieces.values()}) == len(pieces)


def test_a_profile_has_each_layer_at_each_of_its_pairs(search: BitSearch) -> None:
    space, said = search.space, list[str]()
    mixed, further = profiling.drawn(space, 2), profiling.drawn(space, 3)[2:]
    given = space, search.quantized, search.objective.data
    found = profiling.profile(*given, turns=5, fit=further, check=mixed, tell=said.append)
    rows = {(row.layer, row.weight_bits, row.activation_bits) for row in found.table.rows}
    assert rows == {(name, *pair) for name, pairs in space.pairs.items() for pair in pairs}
    assert set(found.spreads) == {(name, LayerBits(w, a)) for name, w, a in rows}
    assert len(found.whole) == 5
    assert [told for told, _ in found.checked] == [found.table.total(c) for c in mixed]
    assert found.error is not None
    assert any("mixed assignments: predicted within" in line for line in found.sentences)
    assert any("timing" in line for line in said)


def timed(seconds: float) -> Timed:
    return Timed(None, {}, [seconds, 0.9 * seconds, 1.1 * seconds, seconds])


def test_scales_are_found_that_make_sums_of_pieces_what_whole_files_take() -> None:
    pairs = {name: [LayerBits(8, 8), LayerBits(4, 4)] for name in ("a", "b")}
    took = {"a8": 2e-3, "a4": 1e-3, "b8": 4e-3, "b4": 3e-3, "rest": 5e-4}
    call = 1e-5
    seen = {
        **{("a", LayerBits(8, 8)): ["a8"], ("a", LayerBits(4, 4)): ["a4"]},
        **{("b", LayerBits(8, 8)): ["b8"], ("b", LayerBits(4, 4)): ["b4"]},
        **{(REST, LayerBits(8, 8)): ["rest"]},
    }
    pieces = {name: timed(seconds + call) for name, seconds in took.items()}
    scale = {8: 1.2, 4: 0.9}
    whole = []
    for a in (8, 4):
        for b in (8, 4):
            config = BitConfig({"a": (a, a), "b": (b, b)})
            seconds = scale[a] * took[f"a{a}"] + scale[b] * took[f"b{b}"] + took["rest"] + call
            whole.append((config, timed(seconds)))
    found = profiling._fitted(pairs, seen, pieces, whole, call)
    assert found.table.rest_s == pytest.approx(took["rest"] + call)
    for row in found.table.rows:  # held at 1 a little
        expected = scale[row.weight_bits] * took[f"{row.layer}{row.weight_bits}"]
        assert row.seconds == pytest.approx(expected, rel=0.01)
    assert all(abs(fitted / t - 1) < 0.01 for _, fitted, t in found.whole)
    assert found.spreads["a", LayerBits(8, 8)] == pytest.approx(0.15, rel=0.01)


def test_a_turn_keeps_the_quickest_of_its_runs_and_the_first_turn_warms_up() -> None:
    class Session:
        calls = 0

        def run(self, _: None, feed: Any) -> None:
            Session.calls += 1
            sum(range(1000))

    one, other = Timed(Session(), {}), Timed(Session(), {})
    profiling.in_turns([one, other], 5)
    assert Session.calls == 2 * 6 * profiling.REPEATS
    assert len(one.turns) == len(other.turns) == 5
    assert 0 < one.seconds < math.inf


def test_entries_are_moved_to_what_files_take_whose_layers_hang_on_each_other() -> None:
    eight, four = LayerBits(8, 8), LayerBits(4, 4)
    pairs = {name: [eight, four] for name in ("a", "b", "c")}
    pieces = {"slow": timed(70e-6), "fast": timed(10e-6), "plain": timed(40e-6)}
    seen = {(name, pair): ["plain"] for name in pairs for pair in (eight, four)}
    seen["a", eight] = ["slow", "fast"]  # fast where b has 4 bits

    def takes(config: BitConfig) -> float:
        first = (10e-6 if config["b"] == four else 70e-6) if config["a"] == eight else 40e-6
        return first + 80e-6 + (20e-6 if config["c"] == four else 0)  # which no piece shows

    every = [
        BitConfig({"a": (a, a), "b": (b, b), "c": (c, c)})
        for a in (8, 4) for b in (8, 4) for c in (8, 4)
    ]  # fmt: skip
    whole = [(config, timed(takes(config))) for config in every]
    errors = []
    for moved in (False, True):
        found = profiling._fitted(pairs, seen, pieces, whole, 0.0, moved=moved)
        errors.append([abs(found.table.total(c) / takes(c) - 1) for c in every])
        assert found.by_neighbours == {("a", eight): pytest.approx((10e-6, 70e-6))}
    assert max(errors[1]) < 0.8 * max(errors[0])
    assert sum(errors[1]) < 0.8 * sum(errors[0])
    assert any("a W8A8 (10 to 70 us)" in line for line in found.sentences)
