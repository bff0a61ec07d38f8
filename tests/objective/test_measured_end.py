"""The end of a search: finalists are measured on set-aside samples, and the best is the answer."""

import math
from functools import partial

import optuna
import pytest
import torch
from torch import Tensor, nn

import hq_optuna as hq
from hq_optuna import attributes
from hq_optuna.protocol.history import read_history
from hq_optuna.quantization import set_bits
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.search.finalists import UNIFORM, choose_finalist
from tests.searches import Network, data, facts, search

APART = {"bits": range(2, 9), "activation_bits": range(2, 9), "budget": "0.3 bops"}


@pytest.fixture(scope="module")
def made() -> tuple[hq.BitSearch, optuna.Study]:
    searched = search(calibration=data(96), batch_size=8, **APART)
    return searched, searched.optimize()


def finalists_of(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.trials if trial.user_attrs[attributes.KIND] == "finalist"]


def test_the_answer_is_the_finalist_that_prediction_and_measurement_choose(made):
    searched, study = made
    found = finalists_of(study)
    assert len(found) > 2
    assert found[0].user_attrs[attributes.LAYER] == UNIFORM
    predicted = [
        t.user_attrs[attributes.SCORE_WEIGHTS] + t.user_attrs[attributes.SCORE_ACTIVATIONS]
        for t in found
    ]
    measured = [t.user_attrs[attributes.RISES] for t in found]
    for trial, rises in zip(found, measured, strict=True):
        assert trial.value == pytest.approx(math.fsum(rises) / len(rises), rel=1e-8)
    winner = found[choose_finalist(predicted, measured, 0)]
    best = study.best_trial
    assert best.user_attrs[attributes.WINNER] == winner.number
    assert hq.assignment(best, study) == hq.assignment(winner, study)
    assert best.number == study.trials[-1].number
    assert searched.result(study).config == hq.assignment(winner, study)


def test_a_finalists_rise_is_the_quadratic_form_of_the_mean_hessian_on_set_aside_samples(made):
    searched, study = made
    objective = searched.objective
    scorer, places = objective.prepare(study), objective.setup.set_aside_places
    read = {place for place, _ in enumerate(objective.data)} - set(places)
    assert {id(b) for b in objective.setup.rounding_data} == {id(objective.data[p]) for p in read}
    x = torch.cat([objective.data[place].inputs for place in places])
    with torch.no_grad():
        z = Network().eval()(x).double()
    hessian, scale = mean_hessian(z, 3.0), trace(z, 1.0) / trace(z, 3.0)
    for trial in finalists_of(study)[:2]:
        set_bits(scorer.prepared, hq.assignment(trial, study))
        correction = scorer.correction.on(places)
        correction.apply()
        with torch.no_grad():
            change = scorer.prepared(x).double() - z
        correction.reset()
        expected = 0.5 * ((change @ hessian) * change).sum(1).mean() * scale
        assert trial.value == pytest.approx(float(expected), rel=1e-4)


def mean_hessian(z: Tensor, temperature: float) -> Tensor:
    p = (z / temperature).softmax(1)
    return torch.stack([torch.diag(q) - torch.outer(q, q) for q in p]).mean(0)


def trace(z: Tensor, temperature: float) -> Tensor:
    return mean_hessian(z, temperature).trace()


def test_the_history_tells_finalists_and_what_the_table_predicted(made):
    _, study = made
    history = read_history(study)
    last = history.step(history.records[-1].step)
    sums = history.additive()
    for c in last:
        assert c.measured == pytest.approx(study.trials[c.number].value, rel=1e-8)
        assert c.score == sums.score(history.space.config(c.state))
    assert all(c.measured is None for c in history.candidates if c not in last)


def test_nothing_is_measured_where_zero_finalists_were_asked_for():
    searched = search(verify=0)
    assert not finalists_of(searched.optimize())
    assert facts(searched.optimize())[1] == facts(search().optimize(verify=0))[1]


@pytest.mark.parametrize("options", [{"scorer": "gauss_newton"}, {"measure_candidates": True}])
def test_candidates_that_are_measured_anyway_need_no_finalists(options):
    assert not finalists_of(search(**options).optimize())


def test_a_loop_of_optunas_own_measures_them_too(made):
    _, study = made
    searched = search(calibration=data(96), batch_size=8, **APART)
    given = {name: getattr(study.sampler, name) for name in ("n_candidates", "seed", "verify")}
    sampler = ProgressiveBitSampler(searched.space, budget=searched.budget, **given)
    plain = optuna.create_study(sampler=sampler)
    plain.optimize(searched.objective)
    assert facts(plain) == facts(study)
    assert plain.best_trial.user_attrs[attributes.KIND] == "incumbent"


def test_a_search_that_is_stopped_in_the_end_goes_on_with_the_finalists_left(made, tmp_path):
    _, study = made
    url = f"sqlite:///{tmp_path / 's.db'}"

    def stop(log, after: int) -> None:
        if log.open is not None and log.open.measures and len(log.open.done) >= after:
            raise KeyboardInterrupt

    for after in (0, 1, 2):
        again = search(calibration=data(96), batch_size=8, **APART)
        with pytest.raises(KeyboardInterrupt):
            again.optimize(url, "s", on_progress=partial(stop, after=after))
    again = search(calibration=data(96), batch_size=8, **APART)
    resumed = again.optimize(url, "s")
    assert facts(resumed) == facts(study)
    assert len(resumed.trials) == len(study.trials)
    assert resumed.best_trial.number == resumed.trials[-1].number


class Deaf(nn.Module):
    """Takes no notice of how its first layer is rounded, so nothing tells its bits apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(0 * self.first(x) + x)


def test_uniform_bits_stay_where_nothing_is_told_apart():
    x, y = torch.randn(96, 4, generator=torch.Generator().manual_seed(0)), torch.arange(96) % 3
    searched = hq.BitSearch(
        *(Deaf(), (x, y)),
        batch_size=8,
        bits=(8, 4, 2),
        pins={"last": 8},
        pin_first_last=None,
        budget="0.6 bops",
    )
    study = searched.optimize()
    history = read_history(study)
    assert history.incumbent.winner.variable in (UNIFORM, None) or not finalists_of(study)
