"""`plot_pareto(study, measured=…)`."""

import pytest

from hq_optuna import attributes
from hq_optuna.protocol.history import read_history
from hq_optuna.visualization import plot_pareto
from hq_optuna.visualization.measured import (
    _LOOK,
    MeasuredInfo,
    MeasuredPoint,
    error_bars,
    measured_figure,
    measured_info,
    standard_error,
)
from tests.fake_search import fake_study

FACTS = {
    "accuracy_before": 0.92,
    "validation_samples": 400,
    "compared": [
        {
            **{"method": "answer", "bits": None, "seed": None, "cost": 3e6, "score": 0.1},
            "measured": {"accuracy": 0.9, "loss": 0.3},
        },
        {
            **{"method": "uniform", "bits": "3 bits", "seed": None, "cost": 2e6, "score": 0.4},
            "measured": {"accuracy": 0.8, "loss": 0.7},
        },
        {
            **{"method": "TPE", "bits": None, "seed": 1, "cost": 2.5e6, "score": 0.3},
            "measured": {"accuracy": 0.85, "loss": 0.5},
        },
        {"method": "NSGA-II", "bits": None, "seed": 0, "cost": None, "score": None, "measured": {}},
    ],
}


def test_what_was_measured_is_read_from_the_study():
    history = read_history(fake_study(4, facts=FACTS))
    assert measured_info(history) == MeasuredInfo(
        name="accuracy",
        points=(
            MeasuredPoint("answer", "answer", 3e6, 0.9),
            MeasuredPoint("uniform", "3 bits", 2e6, 0.8),
            MeasuredPoint("TPE", "TPE", 2.5e6, 0.85),
        ),
        before=0.92,
        n_samples=400,
        limit=history.info.limit,
        int8=history.info.int8,
        metric="bops",
    )
    loss = measured_info(history, "loss")
    assert [point.value for point in loss.points] == [0.3, 0.7, 0.5]
    assert loss.before is None


def test_accuracies_are_percent_with_their_standard_errors():
    figure = plot_pareto(fake_study(4, facts=FACTS), measured="accuracy")
    answer, uniform, tpe = figure.data
    assert (answer.name, uniform.name, tpe.name) == ("answer", "uniform bits", "TPE")
    assert (answer.y, uniform.y, tpe.y) == ((90.0,), (80.0,), (85.0,))
    # sqrt(p · (1 − p) / 400), where p is 320 of 400 and one sample more of each kind.
    p = 321 / 402
    assert uniform.error_y.array == pytest.approx((100 * (p * (1 - p) / 400) ** 0.5,))
    assert uniform.error_y.arrayminus == uniform.error_y.array
    assert uniform.text == ("3 bits",)
    texts = [note.text for note in figure.layout.annotations]
    assert texts[0] == "float 92 %"
    assert texts[1].startswith("budget ")
    assert figure.layout.yaxis.title.text == "accuracy (%)"


def test_bars_of_an_accuracy_near_100_percent_are_there_and_end_at_100():
    assert error_bars([99.9], [0.3])["array"] == pytest.approx([0.1])
    assert error_bars([99.9], [0.3])["arrayminus"] == [0.3]
    assert standard_error(1.0, 300) > 0.003


def test_losses_have_no_errors_and_no_percent():
    figure = plot_pareto(fake_study(4, facts=FACTS), measured="loss")
    assert [trace.y[0] for trace in figure.data] == [0.3, 0.7, 0.5]
    assert figure.data[0].error_y.array is None
    assert "%{y:.4g}<br>" in figure.data[0].hovertemplate


def test_a_figure_that_was_not_measured_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match="Nothing called 'psnr' was measured; there are accuracy, l"
    ):
        plot_pareto(fake_study(4, facts=FACTS), measured="psnr")


def test_without_validation_data_the_figure_says_so(caplog):
    figure = plot_pareto(fake_study(4), measured="accuracy")
    assert len(figure.data) == 0
    assert "Nothing is measured: give the search validation data" in caplog.text


def test_answer_and_uniform_bits_have_a_colour_and_a_symbol_of_its_own():
    assert set(_LOOK) == {attributes.ANSWER, attributes.UNIFORM}
    assert len({colour for _, colour, _, _ in _LOOK.values()}) == len(_LOOK)
    assert len({symbol for _, _, symbol, _ in _LOOK.values()}) == len(_LOOK)


def test_a_method_that_is_not_known_is_drawn_by_its_name():
    point = MeasuredPoint("mine", "mine, seed 0", 1e6, 0.5)
    info = MeasuredInfo("accuracy", (point,), None, None, 2e6, 4e6, "bops")
    assert measured_figure(info).data[0].name == "mine"
