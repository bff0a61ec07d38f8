"""The answer beside uniform bits, measured and said."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from hq_optuna.answer import comparison
from hq_optuna.answer.intervals import paired, wilson
from hq_optuna.attributes import COMPARED
from hq_optuna.bit_search import BitSearch
from hq_optuna.protocol.history import read_history
from hq_optuna.quantization.prepare import input_quantizer
from hq_optuna.report.comparison import beaten_by_uniform, warnings
from hq_optuna.report.data import report_data, with_intervals
from hq_optuna.report.page import write_report
from hq_optuna.report.text import compared as table
from hq_optuna.report.text import render_markdown
from tests.fake_search import fake_study
from tests.searches import data, search


def row(method="answer", accuracy=None, loss=1.0, **more):
    measured = {"loss": loss} | ({} if accuracy is None else {"accuracy": accuracy})
    base = {"method": method, "bits": None, "cost": 2e6, "score": 0.01}
    return {**base, "evaluations": 10, "seconds": 1.0, "measured": measured, **more}


def uniform(bits="3 bits", **more):
    return row("uniform", bits=bits, seconds=None, **more)


@pytest.fixture(scope="module")
def searched():
    mine = search(validation=data(40, seed=5), scorer="trace")
    study = mine.optimize()
    mine.result(study)
    return mine, study


def test_answer_and_uniform_bits_are_measured_on_the_validation_data(searched):
    mine, study = searched
    compared = read_history(study).facts["compared"]
    assert [(r["method"], r["bits"]) for r in compared] == [
        ("answer", None),
        ("uniform", "4 bits"),
        ("8 bits", "8 bits"),
    ]
    answer, four, eight = compared
    history = read_history(study)
    assert answer["score"] == history.incumbent.winner.score
    assert answer["cost"] == history.incumbent.winner.cost <= history.info.limit
    assert four["cost"] == pytest.approx(0.25 * history.info.int8)
    # By hand, on the network the user would get.
    inputs, labels = data(40, seed=5)
    for entry, config in (
        (answer, history.incumbent.config),
        (four, mine.space.config((4, 4, 4))),
        (eight, mine.space.config((8, 8, 8))),
    ):
        with torch.no_grad():
            outputs = mine.objective.quantized(config)(inputs)
        loss = float(functional.cross_entropy(outputs, labels))
        assert entry["measured"]["loss"] == pytest.approx(loss, rel=1e-5)  # float32 batches
        right = outputs.argmax(1) == labels
        assert entry["measured"]["accuracy"] == float(right.double().mean())
        if entry is answer:
            ours = right
        assert entry["pairs"] == {
            "samples": 40,
            "only_this": sum(a and not b for a, b in zip(right, ours, strict=True)),
            "only_answer": sum(b and not a for a, b in zip(right, ours, strict=True)),
        }
        assert entry["score"] == mine.objective.prepare().score(config).total


def test_without_validation_data_or_before_the_budget_is_met_nothing_is_compared():
    mine = search()
    study = mine.optimize()
    mine.result(study)
    assert "compared" not in read_history(study).facts
    assert "## Compared" not in render_markdown(report_data(study))
    unmet = read_history(fake_study(4, n_trials=3))
    assert comparison.rows(mine.objective, unmet, mine.objective.data, lambda n, d: {}) == []


def test_the_report_says_plainly_when_uniform_bits_are_better():
    facts = {
        "compared": [row(accuracy=0.9), uniform(accuracy=0.91)],
        "validation_samples": 400,
    }
    data = report_data(fake_study(4, facts=facts))
    (warning,) = data["warnings"]
    assert warning == (
        "Mixed bits lose to uniform ones here: 3 bits everywhere cost 2 MBOPs, within the budget, "
        "and have validation accuracy 91.00 % against 90.00 % (400 samples, standard error 1.4 "
        "points). Take the uniform ones, or judge both on more data."
    )
    assert "Mixed bits lose" in render_markdown(data)
    assert "compared" not in data["facts"]


@pytest.mark.parametrize(
    ("only_this", "only_answer", "words"),
    [
        (12, 1, ("Mixed bits lose to uniform ones here: 3 bits", "Take the uniform ones")),
        (5, 1, ("Mixed bits are not shown to be better", "do not tell the two apart")),
    ],
)
def test_where_samples_were_counted_the_warning_says_whether_they_decide(
    only_this, only_answer, words
):
    pairs = {"samples": 400, "only_this": only_this, "only_answer": only_answer}
    theirs = 0.9 + (only_this - only_answer) / 400
    (warning,) = warnings([row(accuracy=0.9), uniform(accuracy=theirs, pairs=pairs)], "bops", 400)
    low, high = (100 * end for end in paired(only_answer, only_this, 400))
    assert f"95 % interval of the difference {low:+.1f} to {high:+.1f} points" in warning
    for text in words:
        assert text in warning


@pytest.mark.parametrize(
    ("answer", "other", "beaten"),
    [
        (row(accuracy=0.9), uniform(accuracy=0.9), False),
        (row(accuracy=0.9), uniform(accuracy=0.9, cost=1e6), True),  # as good, and cheaper
        (row(accuracy=0.9), uniform(accuracy=0.901), True),
        (row(accuracy=0.9, loss=2.0), uniform(accuracy=0.8, loss=1.0), False),
        (row(loss=2.0), uniform(loss=1.9), True),
        (row(loss=2.0), uniform(loss=2.0), False),
        (row(accuracy=0.1), row("8 bits", accuracy=0.9), False),  # only uniform bits are a warning
    ],
)
def test_uniform_bits_beat_by_accuracy_or_else_by_loss(answer, other, beaten):
    assert bool(beaten_by_uniform([answer, other])) is beaten
    assert bool(warnings([answer, other], "bops", None)) is beaten


def test_figures_that_are_no_numbers_are_not_measured_in_the_report(tmp_path):
    nan, infinity = float("nan"), float("inf")
    facts = {
        "compared": [row(accuracy=0.9), uniform(accuracy=nan, loss=infinity)],
        **{"accuracy_before": nan, "accuracy_after": nan, "validation_samples": 40},
    }
    study = fake_study(4, facts=facts)
    text = render_markdown(report_data(study))
    assert re.search(r"\| uniform 3 bits \|.* \| not measured \| not measured \| 10 \|", text)
    assert re.search(r"\| float \|.* \| not measured \|", text)
    write_report(study, tmp_path / "report.html")


def pairs(only_this, only_answer):
    return {"samples": 400, "only_this": only_this, "only_answer": only_answer}


def test_every_row_has_the_interval_of_its_accuracy_and_of_what_it_is_over_the_answer():
    compared = [row(accuracy=0.9, pairs=pairs(0, 0)), uniform(accuracy=0.8, pairs=pairs(5, 45))]
    found = table(with_intervals(compared), "bops")
    rows = found.rows
    assert found.header[4:6] == ["accuracy", "over the answer, points"]
    assert any("95 % intervals" in line for line in found.lines)

    def percents(right):
        low, high = wilson(right, 400)
        return f"[{100 * low:.2f}, {100 * high:.2f}]"

    def over(only_answer, only_this):
        return "[{:+.1f}, {:+.1f}]".format(
            *(100 * end for end in paired(only_answer, only_this, 400))
        ).replace("-", "−")

    assert rows[0][4:6] == (f"90.00 % {percents(360)}", "")
    assert rows[1][4:6] == (f"80.00 % {percents(320)}", f"−10.0 {over(45, 5)}")


def test_the_intervals_are_in_the_reports_data_too():
    facts = {
        "compared": [
            row(accuracy=0.9, pairs=pairs(0, 0)),
            uniform(accuracy=0.85, pairs=pairs(2, 22)),
            uniform("2 bits", accuracy=0.7),
        ]
    }
    answer, counted, uncounted = report_data(fake_study(4, facts=facts))["compared"]
    low, high = wilson(340, 400)
    assert counted["accuracy"] == {"value": 0.85, "low": low, "high": high}
    assert counted["over_answer"]["value"] == -0.05
    assert answer["over_answer"] is None
    assert uncounted["accuracy"] == {"value": 0.7, "low": None, "high": None}


def test_where_no_uniform_bits_fit_the_report_says_so():
    found = table(with_intervals([row()]), "bops")
    assert "No uniform bits are within the budget." in found.lines


def test_on_hardware_the_vendors_default_is_a_row_without_our_corrections():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(160, 6) * torch.randn(160, 1).exp()  # with outliers
    with torch.no_grad():
        y = network(x).argmax(1)
    given = {"budget": "0.8 size_bytes", "pin_first_last": None, "verify": 0}
    given |= {"validation": (x[64:], y[64:]), "hardware": "cmsis-nn"}
    mine = BitSearch(network, (x[:64], y[:64]), **given)
    study = mine.optimize()
    mine.result(study)
    rows = {row["method"]: row for row in read_history(study).facts[COMPARED]}
    default = rows["vendor's default"]
    sizes = mine.space.costs("size_bytes")
    assert default["cost"] == sizes.int8
    config, made = mine.objective.setup.vendors_default(network)
    assert set(config.values()) == {(8, 8)}
    seen = torch.cat([batch.inputs for batch in mine.objective.setup.rounding_data])
    low, high = float(seen.min()), float(seen.max())
    scale, _ = input_quantizer(made[0]).range(8)
    assert float(scale) == pytest.approx((high - low) / 255, rel=0.02)
    right = (made(x[64:]).argmax(1) == y[64:]).double().mean()
    assert default["measured"]["accuracy"] == pytest.approx(float(right))
    text = render_markdown(report_data(study))
    assert "vendor's default" in text
    assert "nothing corrected" in text
    any_hardware = BitSearch(network, (x[:64], y[:64]), pin_first_last=None)
    assert any_hardware.objective.setup.vendors_default(network) is None
