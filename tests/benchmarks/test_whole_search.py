"""What the benchmark of whole searches draws, measures and sums up; and its smoke mode."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.whole_search import (
    TABLES,
    TOLERANCE,
    Unseen,
    answers_summed_up,
    drawn,
    main,
    points,
    ratio,
    reliability,
    state_of,
)
from benchmarks.zoo import Trained, load_trained
from hq_optuna.rises import CrossEntropy
from hq_optuna.space.cost import CostModel
from hq_optuna.study_files.published import SamePad
from tests.fake_search import fake_space
from tests.real_data import shared_data
from tests.small_networks import seeded


@pytest.mark.parametrize("activation_bits", ["same", range(2, 9)])
def test_drawn_assignments_are_distinct_near_their_centre_and_cost_as_much(activation_bits):
    space = fake_space(12, bits=range(2, 9), activation_bits=activation_bits)
    cost = CostModel(space.layers).cost
    centre = (4,) * len(space.variables)
    limit = cost(space.config(centre))
    taken = {centre}
    found = drawn(space, cost, limit, centre, 20, random.Random(0), taken)
    states = [state_of(space, config) for config in found]
    assert len(set(states) | {centre}) == 21
    assert taken == {*states, centre}
    assert all(limit * (1 - 2 * TOLERANCE) <= cost(config) <= limit for config in found)
    assert all(2 <= bits <= 6 for state in states for bits in state)
    assert [space.config(state) for state in states] == found


def test_the_smooth_rise_is_that_of_the_mean_hessian():
    x, labels = torch.randn(5, 3, generator=seeded(0)).double(), torch.arange(5) % 3
    network, moved = nn.Identity(), nn.Linear(3, 3).double()
    unseen = Unseen(Trained(network, (x, labels), (x, labels)))
    found = unseen.rises(moved)

    def hessian(z):  # of the loss at temperature 3, whose gradient is 1/3 of that at 1
        loss = lambda z: 9 * F.cross_entropy(z / 3, torch.tensor(0))  # noqa: E731
        return torch.autograd.functional.hessian(loss, z)

    mean = torch.stack([hessian(z) for z in x]).mean(0)
    with torch.no_grad():
        change = moved(x) - x
        kl = F.kl_div(moved(x).log_softmax(1), x.softmax(1), reduction="none").sum(1)
    expected = torch.stack([0.5 * d @ mean @ d for d in change])
    assert found.smooth == pytest.approx(expected.numpy(), rel=1e-12)
    assert found.kl == pytest.approx(kl.numpy(), rel=1e-9)
    assert unseen.rises(network).smooth.max() == 0


def test_networks_without_a_class_a_sample_are_judged_by_their_rise():
    x = torch.randn(6, 3, generator=seeded(0))
    moved = nn.Linear(3, 3)
    rise = CrossEntropy(temperature=1.0)
    found = Unseen(Trained(nn.Identity(), x, x, rise)).rises(moved)
    p = x.double().softmax(1)
    with torch.no_grad():
        change = moved(x).double() - x.double()
    own = torch.stack([torch.diag(q) - torch.outer(q, q) for q in p])
    for given, hessian in ((found.kl, own), (found.smooth, own.mean(0).expand(6, 3, 3))):
        expected = 0.5 * torch.einsum("ni,nij,nj->n", change, hessian, change)
        assert given == pytest.approx(expected.numpy(), rel=1e-5)
    assert np.isnan(found.accuracy)


def test_uniform_bits_are_better_by_any_truth_beyond_two_errors():
    right, wrong = np.repeat([1.0, 0.0], [90, 10]), np.repeat([1.0, 0.0], [80, 20])
    gained, error = points(wrong - right)
    assert gained == pytest.approx(-10)
    assert error == pytest.approx(100 * np.sqrt(0.09 / 99))
    figures = {"answer_smooth_a_4": 0.5, "answer_kl_a_4": 0.9, "answer_points_a_4": gained}
    figures |= {f"{name}_standard_error": 0.1 for name in figures}
    assert answers_summed_up(figures)["uniform_better"] == 1
    figures["answer_points_a_4_standard_error"] = 6.0
    assert answers_summed_up(figures)["uniform_better"] == 0
    figures["answer_kl_a_4"] = 1.3
    assert answers_summed_up(figures)["uniform_better"] == 1


def test_reliability_is_that_of_parallel_tests():
    rng = np.random.default_rng(1)
    n, samples = 400, 100
    # A true value of variance 1, and noise whose mean over all samples has variance 1 / 4.
    values = rng.normal(size=(n, 1)) + rng.normal(size=(n, samples)) * (samples / 4) ** 0.5
    half, whole = reliability(values)
    assert half == pytest.approx(1 / 1.5, abs=0.06)  # 3 standard errors, and ranks for values
    assert whole == pytest.approx(1 / 1.25, abs=0.06)
    assert reliability(np.arange(6.0)[:, None] + np.zeros(8)) == (1.0, 1.0)


def test_a_ratio_over_the_same_samples_has_no_error_where_one_is_a_multiple_of_the_other():
    uniform = np.random.default_rng(0).exponential(size=200)
    value, error = ratio(0.5 * uniform, uniform)
    assert value == pytest.approx(0.5)
    assert error < 1e-12
    value, error = ratio(np.random.default_rng(1).exponential(size=200), uniform)
    assert error == pytest.approx((2 / 200) ** 0.5 * value, rel=0.2)  # independent: 1/n + 1/n


@pytest.mark.parametrize("size", [(49, 10), (96, 96), (7, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_gives_the_size_over_the_stride_and_the_odd_pixel_comes_last(size, stride):
    x = torch.ones(1, 1, *size)
    padded = SamePad((5, 4), stride)(x)
    y = F.conv2d(padded, torch.ones(1, 1, 5, 4), stride=stride)
    assert y.shape[2:] == tuple(-(-n // stride) for n in size)
    rows = padded[0, 0].amax(1)
    before = int(rows.argmax())
    assert 0 <= len(rows) - before - size[0] - before <= 1


@pytest.mark.parametrize(("name", "published"), [("kws", 91.4), ("vww", 86.0)])
def test_networks_of_the_zoo_are_as_accurate_as_their_reference(name, published):
    trained = load_trained(name, shared_data("zoo.tar").parent)
    parts = zip(trained.calibration, trained.unseen, strict=True)
    inputs, labels = (torch.cat(tensors) for tensors in parts)
    with torch.inference_mode():
        right = [trained.network(x).argmax(1) for x in inputs.split(64)]
    assert len(labels) == 500
    assert 100 * float((torch.cat(right) == labels).double().mean()) == pytest.approx(published)


def test_an_unknown_network_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"A network is one of digits, kws.*; got 'vgg'"):
        load_trained("vgg", tmp_path)


def test_the_smoke_mode_prints_one_json_line_last(tmp_path, capsys):
    data, out = shared_data("zoo.tar").parent, tmp_path / "out.json"
    n_threads = torch.get_num_threads()
    options = ["--calibration", "32", "--unseen", "64", "--assignments", "6", "--budgets", "4"]
    try:
        main(["--networks", "kws", *options, "--data", str(data), "--out", str(out)])
    finally:
        torch.set_num_threads(n_threads)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["benchmark"] == "whole_search"
    figures = line["figures"]
    for table in TABLES:
        assert -1 <= figures[f"spearman_{table}_kws_4"] <= 1
        assert figures[f"table_passes_{table}_kws"] > 0
        for truth in ("smooth", "kl"):
            assert figures[f"{truth}_ratio_{table}_kws_4"] > 0
            assert figures[f"{truth}_ratio_{table}_kws_4_standard_error"] > 0
    assert figures["passes_prepare_kws"] > figures[f"table_passes_{TABLES[0]}_kws"]
    assert figures["iso_spearman_median"] == figures[f"spearman_{TABLES[0]}_median"]
    stored = json.loads(out.read_text())
    assert stored["figures"] == figures
    ranked = stored["details"]["kws_seed0"]["ranked_4"]
    assert len(ranked["smooth"]) == sum(ranked["drawn"].values()) == 6
