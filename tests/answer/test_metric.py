"""The field's own metric, through a whole search and wherever its figures are shown."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import hq_optuna as hq
from hq_optuna.attributes import COMPARED
from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batches, read_batches
from hq_optuna.network.evaluation import before_and_after
from hq_optuna.protocol.history import read_history
from hq_optuna.report.comparison import beaten_by_uniform, warnings
from hq_optuna.report.data import report_data
from hq_optuna.report.text import headline
from tests.searches import Network, data, search


def confidence(network: nn.Module, batches: Batches) -> list[float]:
    found = [network(b.inputs).softmax(1)[torch.arange(b.n), b.labels] for b in batches]
    return torch.cat(found).tolist()


CONFIDENCE = hq.Metric(name="confidence", unit="pp", per_sample=confidence)


def geometric(records: list[float]) -> float:
    return math.exp(np.mean(np.log(records)))


def test_a_mean_has_students_interval_of_paired_differences() -> None:
    first, second = [1.0, 2.0, 4.0], [1.5, 2.25, 4.75]
    found = CONFIDENCE.difference(first, second)
    # Differences 0.5, 0.25, 0.75: mean 0.5, standard error 0.25 / √3, t(2) = 4.30265.
    half = 4.302652729911275 * 0.25 / math.sqrt(3)
    assert found == pytest.approx({"value": 0.5, "low": 0.5 - half, "high": 0.5 + half})


def test_the_bootstrap_of_a_mean_is_near_students_interval() -> None:
    generator = np.random.default_rng(1)
    first = generator.normal(size=200)
    second = first + generator.normal(0.1, 0.3, size=200)
    plain = CONFIDENCE.difference(first, second)
    drawn = hq.Metric(np.mean, name="mean", per_sample=confidence).difference(first, second)
    assert drawn["value"] == pytest.approx(plain["value"])
    for end in ("low", "high"):
        # 200 resamples: an end is off by about a tenth of the width, here three of them.
        assert drawn[end] == pytest.approx(plain[end], abs=0.3 * (plain["high"] - plain["low"]))
    assert drawn == hq.Metric(np.mean, name="mean", per_sample=confidence).difference(first, second)


def test_one_sample_tells_no_interval() -> None:
    found = CONFIDENCE.difference([1.0], [2.0])
    assert (found["value"], found["low"], found["high"]) == (1.0, -math.inf, math.inf)


def test_before_and_after_hold_unit_direction_and_difference() -> None:
    model = Network().eval()
    with torch.no_grad():
        other = Network(1).eval()
        x, y = data()
        mine, theirs = (confidence(n, read_batches((x, y))) for n in (model, other))
    facts = before_and_after(CONFIDENCE, model, other, read_batches((x, y)), "validation")
    assert facts["confidence_before"] == pytest.approx(np.mean(mine))
    assert facts["confidence_after"] == pytest.approx(np.mean(theirs))
    said = facts["validation_metric"]
    assert (said["name"], said["unit"], said["higher_is_better"]) == ("confidence", "pp", True)
    assert said["difference"]["value"] == pytest.approx(np.mean(theirs) - np.mean(mine))


@pytest.mark.parametrize("higher", [True, False])
def test_a_search_shows_the_metric_wherever_accuracy_stands(higher: bool) -> None:
    metric = hq.Metric(
        geometric, name="confidence", unit="pp", higher_is_better=higher, per_sample=confidence
    )
    made = search(validation=data(60, seed=5), evaluate=metric)
    study = made.optimize(seed=0)
    result = made.result(study)
    history = read_history(study)
    assert "confidence" in str(result)
    assert "pp" in str(result)
    report = report_data(study)
    said = headline(report)
    assert "validation confidence" in said
    assert "pp" in said
    rows = history.facts[COMPARED]
    assert all(row["metric"]["higher_is_better"] == higher for row in rows)
    assert rows[0]["over_answer"]["value"] == 0
    answer = rows[0]["measured"]["confidence"]
    beaten = [row for row in beaten_by_uniform(rows) if row["measured"]["confidence"] != answer]
    for row in beaten:
        assert (row["measured"]["confidence"] > answer) == higher
    for text in warnings(rows, "bops", 60):
        assert "confidence" in text
    beside = {row["name"]: row for row in report["beside"]}
    assert beside["float"]["metric"] == pytest.approx(history.facts["confidence_before"])
    assert beside["this answer"]["metric"] == pytest.approx(history.facts["confidence_after"])


def test_a_metric_without_records_has_no_interval() -> None:
    plain = hq.Metric(lambda network, batches: 7.0, name="sevens", higher_is_better=False)
    made = search(validation=data(30, seed=5), evaluate=plain)
    result = made.result(made.optimize(seed=0))
    assert result.facts["sevens_before"] == result.facts["sevens_after"] == 7.0
    assert "difference" not in result.facts["validation_metric"]


def test_records_that_are_not_one_a_sample_are_refused() -> None:
    wrong = hq.Metric(name="wrong", per_sample=lambda network, batches: [1.0])
    with pytest.raises(DataError, match="1 records of 30 samples"):
        search(validation=data(30, seed=5), evaluate=wrong)


@pytest.mark.parametrize("options", [{"name": "loss", "per_sample": confidence}, {"name": "x"}])
def test_what_is_no_metric_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="metric"):
        hq.Metric(**options)


def test_the_answer_names_the_layers_that_cost_most() -> None:
    made = search(budget=hq.Budget.fraction(bops=0.3))
    report = report_data(made.optimize(seed=0))
    rises = {row["name"]: row["sensitivity"] for row in report["layers"]}
    most = max(rises, key=lambda name: rises[name])
    share = 100 * rises[most] / sum(rises.values())
    assert f"most of the predicted rise is in {most} ({share:.0f} %)" in headline(report)
