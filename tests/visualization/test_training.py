"""`plot_training`."""

import dataclasses

import pytest

from hq_optuna.protocol.history import read_history
from hq_optuna.space.budget import Budget
from hq_optuna.visualization import plot_training
from hq_optuna.visualization.training import (
    TrainingInfo,
    TrainingPoint,
    training_figure,
    training_info,
)
from tests.fake_search import fake_space, fake_study


def trained(**more):
    """Return a search that trains at step 1 and then its answer, step 3."""
    space = fake_space(4, bits=(8, 4))
    return fake_study(space, budget=Budget.fraction(bops=0.32), train_every=1, final=True, **more)


def with_training(history, **changes):
    """Return the history, what each training recorded changed; ``None`` takes a name away."""

    def changed(said):
        return {k: v for k, v in {**said, **changes}.items() if v is not None}

    records = tuple(
        record
        if record.training is None
        else dataclasses.replace(record, training=changed(record.training))
        for record in history.records
    )
    return dataclasses.replace(history, records=records)


def test_the_info_holds_what_was_measured_before_and_after_each_training():
    facts = {"accuracy_before": 0.95, "accuracy_after": 0.92, "validation_samples": 400}
    history = read_history(trained(facts=facts))
    first, last = (record.number for record in history.records if record.training is not None)
    more = {"training loss": (0.25, 0.125)}
    assert training_info(history) == TrainingInfo(
        points=(
            TrainingPoint(
                *(1, first, False, 2, 640, 2.5),
                {**more, "loss": (0.51, 0.4), "accuracy": (0.89, 0.91)},
            ),
            TrainingPoint(
                *(3, last, True, 5, 640, 3.5),
                {**more, "loss": (0.43, 0.3), "accuracy": (0.87, 0.92)},
            ),
        ),
        names=("accuracy", "loss"),
        float_network={"accuracy": 0.95},
        n_samples=400,
        planned=True,
    )


def test_the_figure_has_a_panel_each_with_before_after_and_answer():
    facts = {"accuracy_before": 0.95, "validation_samples": 400}
    figure = plot_training(trained(facts=facts))
    assert figure.layout.yaxis.title.text == "validation accuracy (%)"
    assert figure.layout.yaxis2.title.text == "validation loss (nats)"
    assert "2 trainings, 7 epochs, 6 s in all" in figure.layout.title.text
    drawn = {}
    for trace in figure.data:
        drawn.setdefault(trace.name, []).append((list(trace.x), list(trace.y)))
    assert drawn["before"] == [([1, 3], [89.0, 87.0]), ([1, 3], [0.51, 0.43])]
    assert drawn["after"] == [([1], [91.0]), ([1], [0.4])]
    assert drawn["after, answer"] == [([3], [92.0]), ([3], [0.3])]
    assert len(drawn["float network"]) == 1  # its loss was not measured
    assert [line.y0 for line in figure.layout.shapes] == [95.0]
    before, after = figure.data[1], figure.data[2]
    assert before.error_y.array is None
    # 364 of 400 and one more of each kind.
    assert after.error_y.array == pytest.approx((100 * (365 / 402 * 37 / 402 / 400) ** 0.5,))
    assert after.customdata[0][0].startswith("step 1 (trial ")
    assert after.customdata[0][0].endswith("2 epochs of 640 samples in 2.5 s")
    assert "accuracy %{customdata[1]:.4g} % → %{customdata[2]:.4g} ± " in after.hovertemplate
    assert [t.name for t in figure.data if t.showlegend] == [
        "before",
        "after",
        "after, answer",
        "float network",
    ]


def test_steps_are_whole_numbers_even_of_a_single_training():
    history = read_history(trained())
    one = dataclasses.replace(history, records=history.records[:2])
    axis = training_figure(training_info(one)).layout.xaxis
    assert axis.dtick == 1
    assert list(axis.range) == [0.5, 1.5]


def test_figures_of_the_searchs_own_are_drawn_behind_accuracy_and_loss():
    history = with_training(
        read_history(trained()), iou_before=0.5, iou_after=0.6, accuracy_before=None
    )
    info = training_info(history)
    assert info.names == ("loss", "iou")
    figure = training_figure(info)
    assert figure.layout.yaxis2.title.text == "iou"
    (after,) = (t for t in figure.data if t.name == "after" and t.y == (0.6,))
    assert "nats" not in after.hovertemplate


def test_a_training_that_was_not_kept_is_told_from_the_others():
    history = read_history(trained())
    records = list(history.records)
    records[1] = with_training(history, kept=False).records[1]
    figure = training_figure(training_info(dataclasses.replace(history, records=tuple(records))))
    (lost,) = (t for t in figure.data if t.name == "after, not kept" and t.showlegend)
    assert list(lost.x) == [1] and lost.customdata[0][0].endswith("in 2.5 s; not kept")
    assert "after" not in {t.name for t in figure.data}


def test_without_validation_data_the_training_loss_is_drawn():
    history = with_training(
        read_history(trained()),
        **{"accuracy_before": None, "accuracy_after": None},
        **{"loss_before": None, "loss_after": None},
    )
    figure = training_figure(training_info(history))
    assert "give the search validation data" in figure.layout.title.text
    assert figure.layout.yaxis.title.text == "training loss (nats)"
    drawn = {t.name: t.y for t in figure.data if t.hoverinfo != "skip"}
    assert drawn == {
        "first epoch": (0.25, 0.25),
        "last epoch": (0.125,),
        "last epoch, answer": (0.125,),
    }


def test_a_search_that_will_train_is_told_from_one_that_never_does(caplog):
    assert len(plot_training(trained(n_trials=2)).data) == 0
    assert "No step is trained yet" in caplog.text
    caplog.clear()
    assert len(plot_training(fake_study(4)).data) == 0
    assert "This search trains nothing" in caplog.text


def test_a_record_that_says_nothing_of_its_training_draws_nothing():
    study = trained(bare=True)
    info = training_info(read_history(study))
    assert [p.step for p in info.points] == [1, 3]
    assert info.names == ()
    assert len(training_figure(info).data) == 0
