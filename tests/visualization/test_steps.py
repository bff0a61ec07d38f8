"""`plot_steps`."""

import dataclasses

import pytest

from hq_optuna.protocol.history import read_history
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from hq_optuna.visualization.steps import StepsInfo, steps_figure, steps_info
from tests.fake_search import fake_space, fake_study

MACS = 442_368 + 2 * 2_359_296 + 1280
"""Of ``conv1``, the two inner layers, and ``fc``."""


def _small():
    return fake_study(fake_space(4, bits=(8, 4)), budget=Budget.fraction(bops=0.32))


def test_the_steps_carry_score_parts_cost_and_what_was_lowered():
    # s of fake_table: 0.25·(1, 8, 4, 11); a layer at b bits adds s·4⁻ᵇ, half of that for inputs.
    at8, at4 = 4.0**-8, 4.0**-4
    weights = (6 * at8, 5 * at8 + at4, 3 * at8 + 3 * at4)
    inner = 2_359_296
    info = steps_info(read_history(_small()))
    assert info == StepsInfo(
        steps=(0, 1, 2),
        taken=("start", "layer3.1.conv 8 → 4", "layer1.0.conv 8 → 4"),
        score=tuple(1.5 * w for w in weights),
        score_weights=weights,
        score_activations=tuple(0.5 * w for w in weights),
        calibration_loss=tuple(0.5 + w + 0.5 * w for w in weights),
        cost=(64.0 * MACS, 64.0 * MACS - 48 * inner, 64.0 * MACS - 96 * inner),
        limit=0.32 * 64 * MACS,
        int8=64.0 * MACS,
        metric="bops",
    )


def test_a_trained_step_shows_what_it_took_and_what_training_left():
    study = fake_study(
        fake_space(4, bits=(8, 4)), budget=Budget.fraction(bops=0.32), train_every=1, final=True
    )
    info = steps_info(read_history(study))
    assert info.steps == (0, 1, 1, 2, 3, 3)
    assert info.taken == (
        "start",
        "layer3.1.conv 8 → 4",
        "trained, 2 epochs",
        "layer1.0.conv 8 → 4",
        "layer1.0.conv 8 → 4",
        "trained, 5 epochs",
    )
    assert info.score[2] == info.score[5] == 0.0
    assert info.calibration_loss[2] == 0.4
    assert info.cost[1] == info.cost[2]
    # A log axis has no zero; a score above it is marked.
    assert "score after<br>a training" not in {t.name for t in steps_figure(info).data}
    moved = info._replace(score=(*info.score[:2], 0.25, *info.score[3:]))
    (marks,) = (t for t in steps_figure(moved).data if t.name == "score after<br>a training")
    assert (marks.x, marks.y) == ((1,), (0.25,))
    assert "%{y:.4g} nats" in marks.hovertemplate


def test_what_was_not_measured_is_none_and_gets_no_line():
    info = steps_info(read_history(fake_study(5, bare=True)))
    assert set(info.score_weights) == set(info.score_activations) == {None}
    assert set(info.calibration_loss) == {None}
    names = {trace.name for trace in steps_figure(info).data}
    assert names == {"score", "cost"}


def test_a_part_that_is_zero_throughout_is_left_out_of_the_log_axis():
    info = steps_info(read_history(_small()))._replace(score_activations=(0.0, 0.0, 0.0))
    figure = steps_figure(info)
    assert figure.layout.yaxis.type == "log"
    assert "activations, by layers" not in {trace.name for trace in figure.data}


def test_the_budget_line_stands_at_the_limit_in_the_unit_of_the_axis():
    info = steps_info(read_history(_small()))
    figure = steps_figure(info)
    (line,) = figure.layout.shapes
    assert figure.layout.yaxis2.title.text == "cost (MBOPs)"
    assert line.y0 == line.y1 == info.limit / 1e6
    (note,) = figure.layout.annotations
    assert note.text == "budget 105.7 MBOPs (32.0% of all-8-bit)"
    assert list(figure.data[-1].y) == [cost / 1e6 for cost in info.cost]


def test_the_log_axis_is_made_for_the_lines_that_are_shown():
    info = steps_info(read_history(_small()))
    low, high = steps_figure(info).layout.yaxis.range
    assert 10**low < min(info.score_activations)
    assert max(info.score) < 10**high < 0.5  # the calibration loss waits in the legend


def test_costs_of_the_steps_are_those_of_their_assignments():
    study = fake_study(fake_space(8, bits=range(2, 9)), budget=Budget.fraction(size_bytes=0.5))
    history = read_history(study)
    model = CostModel(history.space.layers, "size_bytes")
    expected = tuple(model.cost(record.config) for record in history.records)
    assert steps_info(history).cost == expected


@pytest.mark.parametrize(("n", "mode"), [(60, "lines+markers"), (61, "lines")])
def test_many_steps_are_drawn_without_markers(n, mode):
    info = steps_info(read_history(_small()))
    record = read_history(_small()).records[0]
    many = dataclasses.replace(read_history(_small()), records=(record,) * n)
    assert len(info.steps) == 3
    assert steps_figure(steps_info(many)).data[0].mode == mode
