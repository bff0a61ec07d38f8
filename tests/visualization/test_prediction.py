"""`plot_prediction`."""

import dataclasses
import math

import numpy as np
import pytest

from hq_optuna.protocol.history import read_history
from hq_optuna.search import rank_correlation
from hq_optuna.space.budget import Budget
from hq_optuna.visualization.prediction import (
    AFTER,
    PredictionInfo,
    PredictionPoint,
    linear_unit,
    prediction_figure,
    prediction_info,
    rise_axis,
    squeeze,
)
from tests.fake_search import fake_space, fake_study


def _history(**more):
    space = fake_space(4, bits=(8, 4))
    return read_history(fake_study(space, budget=Budget.fraction(bops=0.32), **more))


def with_candidates(history, **changes):
    """Return the history, each candidate changed by functions of it."""
    return dataclasses.replace(
        history,
        candidates=tuple(
            dataclasses.replace(c, **{name: change(c) for name, change in changes.items()})
            for c in history.candidates
        ),
    )


def test_rises_are_those_over_the_start_in_the_order_of_the_trials():
    # s of the inner layers is 2 and 1; a layer from 8 to 4 bits adds 1.5·s·(4⁻⁴ − 4⁻⁸).
    rise = 1.5 * (4.0**-4 - 4.0**-8)
    info = prediction_info(_history())
    assert info.scorer == "table"
    assert sorted((p.step, p.move, p.won) for p in info.points) == [
        (1, "layer1.0.conv 8 → 4", False),
        (1, "layer3.1.conv 8 → 4", True),
        (2, "layer1.0.conv 8 → 4", True),
    ]
    assert [p.number for p in info.points] == sorted(p.number for p in info.points)
    expected = {"layer3.1.conv": 1 * rise, "layer1.0.conv": 2 * rise}
    for point in info.points:
        nats = 3 * rise if point.step == 2 else expected[point.move.split()[0]]
        assert point.by_score == pytest.approx(nats, rel=1e-12)
        assert point.measured == pytest.approx(nats, rel=1e-9)  # beside a loss of 0.5
        assert point.by_layers is None  # the score is that sum: one panel says it all
    assert info.rank_by_score == 1.0
    assert info.rank_by_layers is None


def test_a_score_that_is_no_sum_over_layers_gets_a_panel_for_each():
    history = with_candidates(_history(), score=lambda c: 2 * c.score)
    info = prediction_info(history)
    for point in info.points:
        assert point.by_score == pytest.approx(2 * point.by_layers, rel=1e-12)
    figure = prediction_figure(info)
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [
        "score (table): rank correlation 1.00",
        "sum over layers: rank correlation 1.00",
    ]


def test_a_measured_score_predicts_nothing():
    history = _history()
    settings = {**history.info.settings, "scorer": "loss"}
    measured = dataclasses.replace(history.info, settings=settings)
    info = prediction_info(dataclasses.replace(history, info=measured))
    assert {p.by_score for p in info.points} == {None}
    assert all(p.by_layers > 0 for p in info.points)
    assert len(prediction_figure(info).layout.annotations) == 1


def test_what_was_not_measured_is_left_out():
    history = _history()
    last = history.candidates[-1].number
    lost = with_candidates(
        history,
        calibration_loss=lambda c: math.nan if c.number == last else c.calibration_loss,
    )
    assert last not in {p.number for p in prediction_info(lost).points}
    assert prediction_info(_history(bare=True)).points == ()
    assert prediction_info(_history(n_trials=1)).points == ()


def test_after_a_training_rises_are_those_over_the_trained_network():
    # In a fake search a training takes 0.1 nats, and its network's own score is 0: against any
    # other reference than the last trained network, predicted and measured would be apart.
    space = fake_space(5, bits=(8, 6, 4))
    study = fake_study(space, budget=Budget.fraction(bops=0.3), train_every=2, final=True)
    history = read_history(study)
    trained = [record.step for record in history.records if record.trained is not None]
    assert len(trained) >= 3
    info = prediction_info(history)
    assert {p.over for p in info.points} == {0, *trained[:-1]}  # nothing is made from the answer
    for point in info.points:
        assert point.over == max((step for step in trained if step < point.step), default=0)
        assert point.by_score == pytest.approx(point.measured, abs=1e-12)
    figure = prediction_figure(info)
    names = [trace.name for trace in figure.data]
    assert names == ["as predicted", "candidates", AFTER, "taken by a step"]
    assert {row[5] for row in figure.data[2].customdata} == {
        f"over the network trained at step {step}" for step in trained[:-1]
    }
    assert "or the last training" in figure.layout.xaxis.title.text


def test_what_a_training_left_unmeasured_gives_no_rises():
    history = read_history(fake_study(5, train_every=1))
    step = history.records[1]
    lost = dataclasses.replace(step.trained, calibration_loss=math.nan)
    records = (history.records[0], dataclasses.replace(step, trained=lost), *history.records[2:])
    shown = {p.step for p in prediction_info(dataclasses.replace(history, records=records)).points}
    assert step.step + 1 not in shown
    assert step.step in shown


def test_a_repeated_candidate_is_drawn_once():
    history = _history()
    first = history.candidates[1].number
    twice = with_candidates(history, counted=lambda c: c.number != first)
    assert first not in {p.number for p in prediction_info(twice).points}


def test_the_rank_correlation_is_that_of_the_ranks():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.normal(size=50)
    ranks = np.argsort(np.argsort(x)), np.argsort(np.argsort(y))
    expected = np.corrcoef(*ranks)[0, 1]  # Pearson's of the ranks; there are no ties
    found = rank_correlation(zip(x.tolist(), y.tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("pairs", [[], [(1.0, 2.0)] * 2, [(1.0, 2.0)] * 5, [(None, 1.0)] * 5])
def test_without_differences_there_is_no_correlation(pairs):
    assert rank_correlation(pairs) is None


def test_the_axis_keeps_order_and_signs_and_is_linear_near_zero():
    values = [-3.0, -0.5, -0.001, -0.0005, 0.0, 0.0005, 0.001, 0.5, 3.0]
    unit = linear_unit(values)
    places = [squeeze(value, unit) for value in values]
    assert unit == 0.001
    assert places == sorted(places)
    assert places == [-place for place in reversed(places)]
    assert places[5] == 0.5
    assert squeeze(10.0, unit) - squeeze(1.0, unit) == pytest.approx(1.0)


def test_ticks_say_the_values_where_they_stand():
    axis = rise_axis([-0.5, 10.0], 0.01, 0.1)
    texts = dict(zip(axis["tickvals"], axis["ticktext"], strict=True))
    assert texts[0] == "0"
    for place, value, text in (
        (squeeze(-0.1, 0.01), -0.1, "−10<sup>−1</sup>"),
        (squeeze(1.0, 0.01), 1.0, "1"),
        (squeeze(10.0, 0.01), 10.0, "10"),
    ):
        assert texts[round(place)] == text, value


def test_points_below_zero_are_drawn_and_hover_texts_say_the_numbers():
    points = (
        PredictionPoint(1, 1, 0, "a 8 → 7", 0.1, None, -0.02, False),
        PredictionPoint(2, 1, 0, "<b> 8 → 7", 0.2, None, 0.3, True),
    )
    line, candidates, taken = prediction_figure(PredictionInfo("loss", points, None, None)).data
    assert line.x == line.y
    assert candidates.y[0] < 0 < candidates.x[0]
    assert list(taken.customdata[0]) == [1, "&lt;b&gt; 8 → 7", 2, 0.2, 0.3, "over the start"]
    assert "%{customdata[4]:.4g} nats" in taken.hovertemplate


def test_rises_that_are_all_zero_are_drawn():
    point = PredictionPoint(1, 1, 0, "a 8 → 7", 0.0, None, 0.0, True)
    assert len(prediction_figure(PredictionInfo("x", (point,), None, None)).data) == 3
