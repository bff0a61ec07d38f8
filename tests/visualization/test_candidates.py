"""`plot_candidates`."""

import dataclasses
import math

import pytest

from hq_optuna.protocol.history import read_history
from hq_optuna.space.budget import Budget
from hq_optuna.visualization.candidates import (
    CandidateInfo,
    CandidatesInfo,
    candidates_figure,
    candidates_info,
    plot_candidates,
)
from tests.fake_search import fake_space, fake_study

INNER = 2_359_296
RISE = 1.5 * (4.0**-4 - 4.0**-8)
"""Rise when a layer with s = 1 of `fake_table` goes from 8 to 4 bits, weights and inputs."""


def _study(rule="ratio", **more):
    return fake_study(
        fake_space(4, bits=(8, 4)), budget=Budget.fraction(bops=0.32), rule=rule, **more
    )


def test_a_step_lists_its_candidates_with_the_best_first_and_the_winner_marked():
    info = candidates_info(read_history(_study("min")), 1)
    first, second = info.candidates
    assert (info.step, info.closed, info.elsewhere, info.rule) == (1, True, None, "min")
    assert (first.move, first.won) == ("layer3.1.conv 8 → 4", True)
    assert (second.move, second.won) == ("layer1.0.conv 8 → 4", False)
    assert first.saved == second.saved == 48 * INNER
    assert first.rise == pytest.approx(RISE, rel=1e-12)  # a difference of rounded sums
    assert second.rise == pytest.approx(2 * RISE, rel=1e-12)
    assert second.key == 4.5 * 4.0**-8 + 4.5 * 4.0**-8 - 1.5 * 2 * 4.0**-8 + 3 * 4.0**-4


def test_with_the_rule_ratio_the_key_is_the_rise_per_cost_saved():
    first, second = candidates_info(read_history(_study()), 1).candidates
    assert first.key == first.rise / (48 * INNER)
    assert second.key == second.rise / (48 * INNER)


def test_with_the_rule_ratio_savings_below_the_budget_count_for_nothing():
    history = read_history(_study())
    (last,) = candidates_info(history).candidates
    needed = history.records[1].winner.cost - history.info.limit
    assert 0 < needed < last.saved == 48 * INNER
    assert last.key == last.rise / needed


def test_the_first_step_shows_the_start_and_its_score():
    study = _study()
    (start,) = candidates_info(read_history(study), 0).candidates
    score = 9 * 4.0**-8
    assert start == CandidateInfo(0, "start", score, None, score, True)
    figure = plot_candidates(study, step=0)
    assert len(figure.data) == 1
    assert figure.layout.xaxis.title.text == "predicted loss rise (nats)"


@pytest.mark.parametrize("rule", ["min", "ratio"])
def test_the_winner_of_every_step_stands_first(rule):
    space = fake_space(9, bits=range(2, 9))
    history = read_history(fake_study(space, rule=rule, budget=Budget.fraction(bops=0.3)))
    assert len(history.records) > 20
    for record in history.records[:-1]:
        info = candidates_info(history, record.step)
        assert info.candidates[0].won
        assert sum(c.won for c in info.candidates) == 1


def test_an_open_step_has_no_winner_and_says_so():
    info = candidates_info(read_history(_study(n_trials=3)))
    assert (info.step, info.closed) == (1, False)
    assert not any(c.won for c in info.candidates)
    assert "still open" in candidates_figure(info).layout.title.text


def test_a_search_that_ends_with_an_earlier_candidate_says_which():
    history = read_history(_study())
    loser = next(c for c in history.step(1) if c.number != history.records[1].winner.number)
    last = dataclasses.replace(history.records[2], winner=loser)
    info = candidates_info(dataclasses.replace(history, records=(*history.records[:2], last)))
    assert info.elsewhere == loser.number
    title = candidates_figure(info).layout.title.text
    assert f"took trial {loser.number} of an earlier step" in title


def test_without_a_scored_candidate_there_is_no_step():
    info = candidates_info(read_history(_study(n_trials=0)))
    assert info == CandidatesInfo(None, False, None, "ratio", "bops", ())


def test_an_unknown_step_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="Step 9 has no scored candidate; there are steps 0 to 2"):
        plot_candidates(_study(), step=9)


def test_the_panels_are_in_the_units_of_their_titles():
    info = candidates_info(read_history(_study()), 1)
    figure = candidates_figure(info)
    titles = [figure.layout[f"xaxis{i}"].title.text for i in ("", 2, 3)]
    assert titles == [
        "rise (nats)",
        "cost saved (MBOPs)",
        "rise per saving (nats/MBOPs)",
    ]
    rise, saved, per = (list(trace.x) for trace in figure.data)
    assert rise == [c.rise for c in info.candidates]
    assert saved == [48 * INNER / 1e6] * 2
    assert per == [c.key * 1e6 for c in info.candidates]


def test_rises_over_orders_of_magnitude_get_a_log_axis_and_falls_a_linear_one():
    def axis(rises):
        rows = tuple(CandidateInfo(i, f"c{i}", r, None, r, False) for i, r in enumerate(rises))
        return candidates_figure(CandidatesInfo(1, False, None, "min", "bops", rows)).layout.xaxis

    assert axis([1e-6, 1e-2]).type == "log"
    assert math.log10(1e-6) > axis([1e-6, 1e-2]).range[0]
    assert axis([1e-2, 2e-2]).type is None
    assert axis([-1e-6, 1e-2]).type is None


def test_costs_are_those_of_the_bits_where_the_objective_recorded_none():
    bare, full = (plot_candidates(fake_study(5, bare=bare)) for bare in (True, False))
    assert [list(trace.x) for trace in bare.data] == [list(trace.x) for trace in full.data]


def test_a_step_of_swaps_is_ordered_by_the_score_whatever_the_rule():
    space = fake_space(20, bits=range(2, 9))
    history = read_history(fake_study(space, n_candidates=8, budget=Budget.fraction(bops=0.25)))
    swaps = [
        record.step
        for record in history.records[1:]
        if history.records[record.step - 1].winner.cost <= history.info.limit
    ]
    assert swaps
    for step in swaps:
        info = candidates_info(history, step)
        assert info.rule == "swaps"
        assert [c.key for c in info.candidates] == sorted(c.score for c in history.step(step))
        assert info.candidates[0].won or info.elsewhere is not None
        assert "(swaps)" in candidates_figure(info).layout.title.text
        assert len(candidates_figure(info).data) == 2  # without the quotient, which decides nothing


def test_labels_are_short_and_hover_texts_whole():
    name = "encoder.block{}.attention.output.projection.quantized.linear"
    moves = [f"{name.format(1)} 8 → 7", f"{name.format(1)} 6 → 7, {name.format(2)} 8 → 7"]
    rows = tuple(CandidateInfo(i, move, 1.0, None, 1.0, False) for i, move in enumerate(moves))
    figure = candidates_figure(CandidatesInfo(1, False, None, "min", "bops", rows))
    shown = figure.layout.yaxis.ticktext
    assert list(figure.data[0].y) == [f"{move} (trial {i})" for i, move in enumerate(moves)]
    assert all(len(text) <= 75 for text in shown)
    assert "block1" in shown[0]
    assert "block1" in shown[1]
    assert "block2" in shown[1]
