"""Targets: read strictly, held with the stated confidence, and honest about too few samples."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hq_optuna.answer.intervals import paired
from hq_optuna.answer.target import (
    STRIDES,
    TEST_CONFIDENCE,
    Target,
    compare_with_float,
    least_cost,
    parse_target,
)
from hq_optuna.bit_search import BitSearch
from hq_optuna.errors import BudgetError, DataError, SettingError, TargetError
from hq_optuna.network.batches import read_batches
from hq_optuna.network.evaluation import Accuracy, Metric
from hq_optuna.search import Additive
from hq_optuna.space.assignment import BitConfig
from tests.fake_search import fake_space, fake_table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("accuracy -0.5", ("accuracy", 0.005)),
        ("Accuracy 1", ("accuracy", 0.01)),
        ("kl +0.01", ("kl", 0.01)),
        ("mAP@50 -1e-1", ("mAP@50", 0.1)),
        ("top1 -.5", ("top1", 0.5)),
    ],
)
def test_targets_are_read(text: str, expected: tuple[str, float]) -> None:
    found = parse_target(text)
    assert (found.metric, found.worse) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["accuracy", "-0.5", "accuracy +0.5", "kl -1", "a -0", "a - b"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="Write the metric and how much worse"):
        parse_target(text)


def sums() -> Additive:
    space = fake_space(6)
    return Additive(space, fake_table(space), space.costs("bops"))


TARGET = Target("accuracy", 0.02, "-", "accuracy -2")


def draws(truth: float, n: int, chance: np.random.Generator) -> tuple[float, float, float]:
    """Return what a comparison says of ``n`` samples of which a share is lost, an 8th of it won."""
    lost, gained = chance.multinomial(n, [truth * 9 / 8, truth / 8, 1 - truth * 10 / 8])[:2]
    worse = (lost - gained) / n
    return worse, -paired(lost, gained, n, TEST_CONFIDENCE).low, (lost + gained) / n - worse**2


def test_the_answer_is_within_the_target_as_often_as_stated() -> None:
    table, chance = sums(), np.random.default_rng(0)
    top = table.score(table.space.config(table.space.bottom))
    truth_of = lambda config: 0.1 * (table.score(config) / top) ** 0.5  # noqa: E731
    wrong = costs = 0.0
    runs, n = 300, 2000
    for _ in range(runs):
        found = least_cost(table, TARGET, lambda c: draws(truth_of(c), n, chance), n)
        wrong += truth_of(found.config) > TARGET.worse
        costs += found.cost
    exact = least_cost(table, TARGET, lambda c: (truth_of(c), truth_of(c), 0.0), n)
    assert truth_of(exact.config) <= TARGET.worse
    assert wrong / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert costs / runs >= exact.cost  # what samples cannot tell costs something
    assert costs / runs <= 2 * exact.cost


def test_nearly_the_cheapest_optimum_is_found_with_few_tests() -> None:
    table = sums()
    row = table.frontier(n=129)[::-1]  # the dearest first
    tests = []
    for place in range(0, len(row), 3):
        target = Target("kl", 1.0001 * row[place].score, "", "kl")
        found = least_cost(table, target, lambda c: (table.score(c), table.score(c), 0.0), 100)
        assert row[place].cost <= found.cost <= row[max(place - STRIDES[-1] + 1, 0)].cost
        assert found.answer.holds
        tests.append(len(found.tested))
    assert max(tests) <= 1 + len(row) // 32 + 4 + 4 + 2
    assert sum(tests) / len(tests) <= 10


def test_samples_that_are_too_few_are_told_with_how_many_would_do() -> None:
    table, chance = sums(), np.random.default_rng(1)
    with pytest.raises(TargetError, match=r"50 validation samples are too few to tell") as caught:
        least_cost(table, TARGET, lambda c: draws(0.002, 50, chance), 50)
    needed = caught.value.needed
    assert needed is not None
    assert needed > 50
    # With a few times as many the widest bits are within the target.
    assert least_cost(table, TARGET, lambda c: draws(0.002, 4 * needed, chance), 4 * needed)
    with pytest.raises(TargetError, match="already the widest bits") as caught:
        least_cost(table, TARGET, lambda c: (0.1, 0.11, 0.09), 5000)
    assert caught.value.needed is None


def test_comparisons_are_those_of_the_metrics() -> None:
    torch.manual_seed(0)
    float_, other = nn.Linear(6, 4), nn.Linear(6, 4)
    x, y = torch.randn(200, 6), torch.randint(0, 4, (200,))
    data = read_batches((x, y), batch_size=64)
    loss = nn.functional.cross_entropy
    compare = compare_with_float(parse_target("accuracy -1"), float_, data, Accuracy(), loss)
    with torch.no_grad():
        a, b = (net(x).argmax(1) == y for net in (float_, other))
        p, q = (net(x).double().softmax(1) for net in (float_, other))
    lost, gained = int((a & ~b).sum()), int((b & ~a).sum())
    at_most = -paired(lost, gained, 200, TEST_CONFIDENCE).low
    assert compare(other)[:2] == ((lost - gained) / 200, at_most)
    kl = (p * (p / q).log()).sum(1)
    found = compare_with_float(parse_target("kl 1"), float_, data, Accuracy(), loss)(other)
    assert found[0] == pytest.approx(float(kl.mean()))
    assert found[1] > found[0]

    def error(network: nn.Module, batches: object) -> torch.Tensor:
        return (network(x) - 1).square().sum(1).detach()

    metric = Metric(name="error", higher_is_better=False, per_sample=error)
    found = compare_with_float(parse_target("error +1"), float_, data, metric, loss)(other)
    both = error(other, data) - error(float_, data)
    assert found[0] == pytest.approx(float(both.mean()), rel=1e-5)
    assert found[2] == pytest.approx(float(both.var()), rel=0.05)
    with pytest.raises(SettingError, match=r"error gets worse upwards"):
        compare_with_float(parse_target("error -1"), float_, data, metric, loss)
    with pytest.raises(SettingError, match="the metric is one of accuracy, kl"):
        compare_with_float(parse_target("mAP -1"), float_, data, Accuracy(), loss)
    with pytest.raises(DataError, match="no records of samples"):
        figure = Metric(lambda net, data: 1.0, name="PSNR")
        compare_with_float(parse_target("PSNR -1"), float_, data, figure, loss)


def test_a_search_meets_a_target_without_a_budget() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    )
    x = torch.randn(1200, 8)
    with torch.no_grad():
        y = network(x).argmax(1)
    given = {"bits": (8, 6, 4, 3), "pin_first_last": None, "validation": (x[200:], y[200:])}
    search = BitSearch(network, (x[:200], y[:200]), **given)
    study = search.open()
    found = search.meet(study, "accuracy -6")
    told = found.facts["target"]
    assert told["at_most"] <= 0.06
    fell = found.facts["accuracy_before"] - found.facts["accuracy_after"]
    assert fell == pytest.approx(told["worse"])
    assert found.cost < found.cost_int8
    dearer = search.meet(study, "accuracy -3").cost
    assert dearer >= found.cost
    assert isinstance(found.config, BitConfig)
    x_seen = torch.cat([found.network(part).argmax(1) for part in x[200:].split(256)])
    right = (x_seen == y[200:]).double().mean()  # the network is the one that was measured
    assert float(right) == pytest.approx(found.facts["accuracy_after"])

    small = search.meet(study, "accuracy -6", budget=["0.6 size_bytes", "0.4 bops"])
    assert small.metric == "size_bytes"
    assert small.cost <= 0.6 * small.cost_int8
    bops = search.space.costs("bops")
    assert bops.cost(small.config) <= 0.4 * bops.int8
    with pytest.raises(TargetError, match=r"[Bb]est bits within .*BOPs"):
        search.meet(study, "accuracy -3", budget="0.145 bops")
    with pytest.raises(BudgetError, match="below the cheapest"):
        search.meet(study, "accuracy -3", budget="0.01 bops")
    with pytest.raises(SettingError, match="is no target"):
        search.check_target("accuracy")
    del given["validation"]
    with pytest.raises(DataError, match="measured on validation data"):
        BitSearch(network, (x[:200], y[:200]), **given).meet(study, "accuracy -6")
