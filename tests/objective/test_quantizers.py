"""Quantizers by layer glob: who is chosen, what is refused, and what the study then says."""

from __future__ import annotations

import pytest
import torch

import hq_optuna as hq
from hq_optuna import attributes
from hq_optuna.errors import ResumeError, SettingError, SpaceError
from hq_optuna.protocol.history import read_history
from hq_optuna.quantization.prepare import prepared_layers, weight_quantizer
from hq_optuna.quantization.quantizers.choice import choose_quantizers
from hq_optuna.report.data import report_data
from hq_optuna.report.text import render_markdown
from hq_optuna.space.search_space import SearchSpace
from tests.reference import quantizers as slow
from tests.searches import LAYERS, Network, data, facts, search

MIXED = {"*": "midrise", "last": "dorefa"}


def space(**options) -> SearchSpace:
    return search(**options).space


def test_a_glob_chooses_and_the_last_match_counts():
    chosen = choose_quantizers({"*": "midrise", "last": "dorefa", "fir*": "uniform"}, space())
    assert chosen == {"middle": "midrise", "last": "dorefa"}
    assert choose_quantizers(None, space()) == choose_quantizers({"*": "uniform"}, space()) == {}


def test_an_unknown_quantizer_is_refused_with_those_there_are():
    with pytest.raises(SpaceError, match=r"one of uniform, binary, .*, dorefa; got 'xnor'\."):
        search(quantizers={"last": "xnor"})


def test_a_glob_without_a_match_is_refused_with_the_layers():
    with pytest.raises(SpaceError, match=r"quantizers: 'layer3.\*' matches no layer. The layers a"):
        search(quantizers={"layer3.*": "dorefa"})
    with pytest.raises(SpaceError, match=r"first, middle, last\."):
        search(quantizers={"layer3.*": "dorefa"})


def test_anything_but_a_mapping_is_refused():
    with pytest.raises(SettingError, match=r"quantizers is a dict from layer names.*got 'dorefa'"):
        search(quantizers="dorefa")


@pytest.mark.parametrize(
    "quantizer, options, says",
    [
        (
            "ternary",
            {},
            r"'ternary' can do 2 bits, but the weights of layer 'middle' may have 4, 8",
        ),
        ("binary", {"bits": (2, 1)}, r"'binary' can do 1 bit, but .* 'middle' may have 2 bits"),
        ("midrise", {"bits": (16, 4)}, r"'midrise' can do 1 to 8 bits, .* may have 16 bits"),
        (
            "ternary",
            {"pins": {"middle": 3}},
            r"may have 3 bits\. Give such layers bits",
        ),
    ],
)
def test_bits_that_a_quantizer_cannot_do_are_refused_before_any_work(quantizer, options, says):
    with pytest.raises(SpaceError, match=says):
        search(quantizers={"mid*": quantizer}, **options)


def test_weights_that_stay_in_float_need_no_bits():
    layers = space().layers
    pinned = SearchSpace.build(layers, pins={"middle": (32, 8)}, pin_first_last=None)
    assert choose_quantizers({"middle": "ternary"}, pinned) == {"middle": "ternary"}


def test_a_search_with_mixed_quantizers_ends_within_its_budget_and_rounds_as_it_was_told():
    by = search(quantizers=MIXED, validation=data(12, seed=3))
    study = by.optimize(n_candidates=2)
    result = by.result(study)
    assert result.met
    names = {"first": "midrise", "middle": "midrise", "last": "dorefa"}
    for name, module in prepared_layers(result.network).items():
        assert weight_quantizer(module).quantizer.name == names[name]
        bits, weight = result.config[name].weight_bits, module.weight.detach()
        scale = weight_quantizer(module).scales[bits]
        codes = weight / scale.reshape(-1, *[1] * (weight.dim() - 1))
        assert {round(float(c)) for c in codes.unique()} <= set(slow.codes_of("midrise", bits))
    other = search()
    assert facts(study) != facts(other.optimize(n_candidates=2))
    assert facts(study) == facts(search(quantizers=MIXED).optimize(n_candidates=2))


@pytest.mark.parametrize("scorer", ["trace", "diagonal"])
def test_predicted_rises_are_made_from_the_error_of_the_quantizer_that_is_used(scorer):
    rises = {
        name: search(quantizers={"*": name}, scorer=scorer, rounding="nearest")
        .objective.prepare()
        .sensitivity.weights
        for name in ("uniform", "midrise", "dorefa")
    }
    for layer in LAYERS:
        ratio = rises["dorefa"][layer][4] / rises["uniform"][layer][4]
        if scorer == "trace":  # the mean curvature is the same, so what differs is the error
            expected = squared_error(layer, "dorefa") / squared_error(layer, "uniform")
            assert ratio == pytest.approx(expected, rel=1e-6)
        assert len({rises[name][layer][2] for name in rises}) == 3


def squared_error(layer: str, quantizer: str) -> float:
    """Return the squared error of a layer's weight at 4 bits, rounded to nearest."""
    network = Network()
    layers = hq.introspect(network, data()[0]).layers
    prepared = hq.prepare(network, layers, quantizers={layer: quantizer})
    hq.set_bits(prepared, {layer: (4, 32)})
    with torch.no_grad():
        change = prepared.get_submodule(layer).weight - network.get_submodule(layer).weight
    return float(change.double().square().sum())


def test_a_resume_with_other_quantizers_is_refused_by_name(tmp_path):
    storage = f"sqlite:///{tmp_path}/s.db"
    search(quantizers=MIXED).open(storage, "s", n_candidates=2)
    search(quantizers=MIXED).open(storage, "s", n_candidates=2)
    with pytest.raises(ResumeError, match=r"Changed: the quantizers \(study: .*midrise for first"):
        search().open(storage, "s", n_candidates=2)
    with pytest.raises(ResumeError, match=r"now: .*dorefa for first, middle") as error:
        search(quantizers={"*": "dorefa", "last": "uniform"}).open(storage, "s", n_candidates=2)
    assert error.value.changed == ("quantizers",)


def test_a_search_without_quantizers_has_the_fingerprint_it_always_had():
    study = search(quantizers={"first": "uniform"}).open(n_candidates=2)
    assert study.user_attrs[attributes.FINGERPRINT]["quantizers"] == (
        "weights: symmetric per channel, squared error; activations: affine per tensor"
    )


def test_the_study_says_where_rounding_errors_are_not_made_up_for():
    def said(**options) -> list[str]:
        history = read_history(search(**options).optimize(n_candidates=2))
        return [w for w in history.info.warnings if "made up for" in w]

    (sentence,) = said(quantizers=MIXED)
    assert "'dorefa'" in sentence and "(last)" in sentence
    assert said(quantizers=MIXED, rounding="nearest") == []
    assert said(quantizers={"*": "midrise"}) == said() == []


def test_the_report_shows_quantizers_where_they_are_not_all_uniform():
    data_ = report_data(search(quantizers={"last": "dorefa"}).optimize(n_candidates=2))
    assert [row["quantizer"] for row in data_["layers"]] == ["uniform", "uniform", "dorefa"]
    lines = [line for line in render_markdown(data_).splitlines() if line.startswith("| ")]
    header = next(line for line in lines if line.startswith("| layer |"))
    last = next(line for line in lines if line.startswith("| last |"))
    total = next(line for line in lines if line.startswith("| all |"))
    assert [cell.strip() for cell in header.split("|")][1:4] == ["layer", "kind", "quantizer"]
    assert [cell.strip() for cell in last.split("|")][3] == "dorefa"
    assert header.count("|") == last.count("|") == total.count("|")
    plain = render_markdown(report_data(search().optimize(n_candidates=2)))
    assert "| layer | kind | weights |" in plain


def test_another_sampler_scores_with_the_quantizers_too():
    by = search(quantizers=MIXED)
    study = by.open(n_candidates=2)
    scorer = by.objective.prepare(study)
    config = by.space.config(by.space.bottom)
    expected = scorer.score(config).total
    again = hq.HessianObjective(Network(), data(), by.space, quantizers=MIXED)
    assert again.prepare().score(config).total == expected
    with torch.no_grad():
        assert search().objective.prepare().score(config).total != expected
