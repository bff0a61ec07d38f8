"""`plot_pareto`."""

import pytest

from hq_optuna.protocol.history import read_history
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from hq_optuna.visualization.pareto import N_COMPARED, pareto_figure, pareto_info
from tests.fake_search import fake_score, fake_space, fake_study, fake_table


def best_at(info, cost):
    """Return the least sum that the drawn stairs promise at a cost."""
    return min(p.score for p in info.exact if p.cost <= cost)


@pytest.mark.parametrize("activation_bits", ["same", (8, 4, 2), None])
def test_nothing_that_is_drawn_lies_below_the_exact_curve(activation_bits):
    space = fake_space(7, bits=(8, 6, 4, 3, 2), activation_bits=activation_bits)
    budget = Budget.fraction(size_bytes=0.5)
    info = pareto_info(read_history(fake_study(space, budget=budget)))
    assert info.answer in {p._replace(name="answer") for p in info.incumbents}
    assert info.answer.cost <= info.limit
    for point in (*info.incumbents[:N_COMPARED], *info.uniform[:N_COMPARED], info.answer):
        assert point.score >= best_at(info, point.cost) * (1 - 1e-12)
    scores = [p.score for p in info.exact]
    assert scores == sorted(scores, reverse=True)


def test_scores_are_sums_of_the_table_and_costs_those_of_the_model():
    space = fake_space(5)
    history = read_history(fake_study(space))
    info = pareto_info(history)
    model, table = CostModel(space.layers), fake_table(space)
    for record, point in zip(history.records, info.incumbents, strict=True):
        assert point.cost == model.cost(record.config) == record.winner.cost
        assert point.score == pytest.approx(sum(fake_score(table, record.config)), rel=1e-14)
    assert [p.name for p in info.uniform] == ["2 bits", "4 bits", "8 bits"]
    assert info.uniform[-1].cost == info.int8 == model.int8


def test_uniform_bits_of_weights_and_activations_are_told_apart():
    info = pareto_info(read_history(fake_study(fake_space(3, activation_bits=(8, 4)))))
    assert {p.name for p in info.uniform} == {"8 bits", "W8A4", "W4A8", "4 bits", "W2A8", "W2A4"}


def test_another_metric_has_a_curve_and_no_budget():
    info = pareto_info(read_history(fake_study(5)), metric="size_bytes")
    assert info.limit is None
    assert info.metric == "size_bytes"
    figure = pareto_figure(info)
    assert figure.layout.xaxis.title.text == "cost (KiB)"
    assert not figure.layout.shapes


def test_the_figure_marks_budget_and_answer():
    info = pareto_info(read_history(fake_study(6)))
    figure = pareto_figure(info)
    traces = {trace.name: trace for trace in figure.data}
    assert set(traces) == {"exact optimum", "steps of the search", "uniform bits", "answer"}
    assert traces["exact optimum"].line.shape == "hv"
    assert traces["answer"].y == (info.answer.score,)
    assert figure.layout.shapes[0].x0 == pytest.approx(info.limit / 1e6)
    assert "budget" in figure.layout.annotations[0].text


def test_without_a_table_the_figure_says_so(caplog):
    figure = pareto_figure(pareto_info(read_history(fake_study(4, sensitivity=False))))
    assert len(figure.data) == 0
    assert "holds no whole table of sensitivities" in caplog.text


def test_before_the_first_step_the_curve_stands_alone():
    figure = pareto_figure(pareto_info(read_history(fake_study(4, n_trials=0))))
    assert [trace.name for trace in figure.data] == ["exact optimum", "uniform bits"]


def test_of_many_steps_some_are_drawn_the_last_among_them_and_none_below_the_curve():
    space = fake_space(20, bits=range(2, 9))
    history = read_history(fake_study(space, n_candidates=8, budget=Budget.fraction(bops=0.25)))
    info = pareto_info(history)
    assert len(history.records) > 2 * N_COMPARED
    assert N_COMPARED / 2 <= len(info.incumbents) <= N_COMPARED
    assert info.incumbents[-1].name == f"step {history.records[-1].step}"
    for point in info.incumbents:
        assert point.score >= best_at(info, point.cost) * (1 - 1e-12)


def test_the_incumbent_of_an_unfinished_search_is_not_called_its_answer():
    figure = pareto_figure(pareto_info(read_history(fake_study(8, n_trials=6))))
    names = {trace.name for trace in figure.data}
    assert "incumbent,<br>over the budget" in names
    assert "answer" not in names
