"""Random one-notch moves: distinct, one notch, the same everywhere, and fair."""

import hashlib
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_optuna.search.moves import Move, lowerable, propose
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace


def space_of(*choices: tuple[int, ...]) -> SearchSpace:
    layers = [
        LayerSpec(f"l{k}", "Linear", (2, 2), 0, macs=4, n_calls=1, n_inputs=2)
        for k in range(len(choices))
    ]
    allowed = {f"l{k}": bits for k, bits in enumerate(choices)}
    return SearchSpace.build(layers, pin_first_last=None, allowed=allowed)


FIVE = space_of(*[(8, 4, 2)] * 5)
NOTCHES = st.sets(st.integers(1, 16), min_size=2, max_size=4).map(tuple)


@st.composite
def places(draw: st.DrawFn) -> tuple[SearchSpace, tuple[int, ...]]:
    space = space_of(*draw(st.lists(NOTCHES, min_size=1, max_size=6)))
    return space, tuple(draw(st.sampled_from(variable.bits)) for variable in space.variables)


def test_a_move_changes_one_place() -> None:
    assert Move(1, 8, 4).apply((8, 8, 2)) == (8, 4, 2)


def test_a_move_leaves_the_state_it_starts_from() -> None:
    state = [8, 8]
    Move(0, 8, 4).apply(state)
    assert state == [8, 8]


def test_what_is_at_its_fewest_bits_cannot_go_down() -> None:
    assert lowerable(FIVE, (8, 4, 2, 2, 8)) == [Move(0, 8, 4), Move(1, 4, 2), Move(4, 8, 4)]
    assert lowerable(FIVE, FIVE.bottom) == []


def test_bits_that_are_no_notch_are_an_error() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        lowerable(FIVE, (8, 8, 8, 8, 7))


@given(places(), st.integers(1, 8), st.integers(0, 2**64), st.integers(1, 500))
def test_a_draw_is_distinct_one_notch_moves(
    place: tuple[SearchSpace, tuple[int, ...]], n: int, seed: int, step: int
) -> None:
    space, state = place
    moves = propose(space, state, n=n, seed=seed, step=step)
    can_go_down = [v for v, b in zip(space.variables, state, strict=True) if b != min(v.bits)]
    assert len(moves) == min(n, len(can_go_down))
    assert len({move.apply(state) for move in moves}) == len(moves)
    for move in moves:
        bits = space.variables[move.variable].bits
        assert state[move.variable] == move.from_bits
        assert move.to_bits == max(b for b in bits if b < move.from_bits)


@given(places(), st.integers(0, 2**64), st.integers(1, 500))
def test_enough_candidates_make_the_step_exhaustive(
    place: tuple[SearchSpace, tuple[int, ...]], seed: int, step: int
) -> None:
    space, state = place
    moves = propose(space, state, n=len(space.variables), seed=seed, step=step)
    assert sorted(moves) == lowerable(space, state)


@given(places(), st.integers(0, 2**64), st.integers(1, 500))
def test_asking_for_fewer_candidates_gives_the_first_of_the_many(
    place: tuple[SearchSpace, tuple[int, ...]], seed: int, step: int
) -> None:
    space, state = place
    many = propose(space, state, n=6, seed=seed, step=step)
    assert propose(space, state, n=2, seed=seed, step=step) == many[:2]


def test_the_draw_is_the_order_of_the_hashes() -> None:
    # A resumed search on another version must draw the same: the text of the key is fixed.
    keys = {k: hashlib.sha256(f"7/3/l{k}".encode()).hexdigest() for k in range(5)}
    expected = sorted(keys, key=lambda k: keys[k])
    moves = propose(FIVE, FIVE.top, n=5, seed=7, step=3)
    assert [move.variable for move in moves] == expected


def test_another_process_draws_the_same() -> None:
    code = (
        "from tests.search.test_moves import FIVE; from hq_optuna.search.moves import propose\n"
        "print([m.variable for m in propose(FIVE, FIVE.top, n=3, seed=1, step=2)])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(path for path in sys.path if path)},
    )
    moves = propose(FIVE, FIVE.top, n=3, seed=1, step=2)
    assert run.stdout.strip() == str([move.variable for move in moves])


@pytest.mark.parametrize("vary", ["seed", "step"])
def test_every_layer_is_drawn_equally_often(vary: str) -> None:
    # 4000 draws of 2 out of 5: each layer 1600 times, standard deviation √(4000·0.4·0.6) = 31;
    # five of them over or under. Seeds are fixed, so the test always sees the same counts.
    count: Counter[int] = Counter()
    first: Counter[int] = Counter()
    for k in range(4000):
        seed, step = (k, 1) if vary == "seed" else (1, k)
        moves = propose(FIVE, FIVE.top, n=2, seed=seed, step=step)
        count.update(move.variable for move in moves)
        first[moves[0].variable] += 1
    assert all(abs(count[k] - 1600) < 5 * 31 for k in range(5))
    # The first slot: 800 each, √(4000·0.2·0.8) = 25.
    assert all(abs(first[k] - 800) < 5 * 25 for k in range(5))


def test_moves_that_save_nothing_are_drawn_only_where_none_does() -> None:
    space, top = FIVE, FIVE.top
    options = {"n": 3, "seed": 0, "step": 1}
    every = propose(space, top, n=99, seed=0, step=1)
    saving = propose(space, top, **options, saves=lambda move: move.variable % 2 == 0)
    assert saving == tuple(move for move in every if move.variable % 2 == 0)[:3]
    assert propose(space, top, **options, saves=lambda move: False) == every[:3]
    assert propose(space, top, **options) == every[:3]
