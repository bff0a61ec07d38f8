"""Whether halves of the calibration data choose the same bits."""

from __future__ import annotations

import pytest

from hq_optuna.answer.stability import Stability, stability
from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Batches
from tests.searches import BUDGET, data, search


def halves(same: bool, batch_size: int = 8):
    """Return a search whose table reads batches that are all alike, or differ."""
    x, y = data(64)
    if same:
        part = x[:batch_size], y[:batch_size]
        batches = Batches(Batch(*part, batch_size) for _ in range(8))
    else:
        parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
        scales = (1.0, 30.0)
        batches = Batches(Batch(a * scales[i % 2], b, len(a)) for i, (a, b) in enumerate(parts))
    return search(calibration=batches, scorer="hessian_trace", correction=False, bits=(8, 6, 5, 4))


def test_halves_that_are_alike_agree_in_nearly_all() -> None:
    found = stability(halves(same=True).objective, BUDGET)
    assert found.excess < 0.05
    assert "would change little" in str(found)


def test_an_answer_is_never_better_than_the_halfs_own() -> None:
    found = stability(halves(same=False).objective, BUDGET)
    assert 0 <= found.same_bits <= 1
    assert found.excess >= 0
    assert found == stability(halves(same=False).objective, BUDGET)


def test_the_sentence_asks_for_more_data_where_halves_disagree() -> None:
    text = str(Stability(64, 0.6, 0.2))
    assert "60 % of the bits" in text
    assert "20.0 % more" in text
    assert "give more calibration data" in text


def test_one_batch_has_no_halves() -> None:
    made = search(calibration=data(16), scorer="hessian_trace", correction=False)
    with pytest.raises(DataError, match="one batch of 16 samples"):
        stability(made.objective, BUDGET)
