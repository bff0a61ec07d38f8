"""The patent's method (CN112183742B): random layers, Adam, a pass, the least score, training."""

import pytest
import torch
import torch.nn.functional as F

from hq_optuna.curvature import calibration_adam
from hq_optuna.errors import SettingError
from hq_optuna.network.batches import read_batches
from hq_optuna.protocol.history import History, read_history
from hq_optuna.quantization.prepare import float_weight, set_bits
from hq_optuna.settings import PATENT, SearchSettings
from tests.searches import Network, data
from tests.training_searches import plan, search


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    searched = search(method="patent", training=plan(every=1, final=None))
    return read_history(searched.optimize(artifacts=tmp_path_factory.mktemp("store"), seed=3))


def test_the_method_names_its_settings_and_refuses_others():
    settings = SearchSettings(method="patent")
    assert {name: getattr(settings, name) for name in PATENT} == dict(PATENT)
    assert settings.train_every == 1
    assert SearchSettings(method="patent", train_every=3).train_every == 3
    assert SearchSettings(method="patent", scorer="diagonal").rule == "min"
    with pytest.raises(SettingError, match=r"'patent' has scorer 'diagonal'; got 'gauss_newton'"):
        SearchSettings(method="patent", scorer="gauss_newton")
    with pytest.raises(SettingError, match="need training data"):
        search(method="patent")


def test_candidates_lower_one_layer_by_one_notch_each(history):
    for step, record in enumerate(history.records[:-1]):
        before = record.winner.state
        for c in history.step(step + 1):
            changed = [(a, b) for a, b in zip(before, c.state, strict=True) if a != b]
            assert len(changed) == 1
            notches = history.space.variables[0].bits
            assert notches.index(changed[0][1]) == notches.index(changed[0][0]) + 1


def test_each_candidate_took_a_forward_pass_and_the_smallest_score_wins(history):
    assert all(c.calibration_loss > 0 for c in history.candidates)
    for record in history.records[:-1]:
        found = history.step(record.step)
        assert record.winner.score == min(c.score for c in found)
    assert not any(c.rises for c in history.candidates)


def test_each_winner_is_trained_and_the_search_ends_with_the_budget(history):
    assert history.met
    assert all(r.winner.cost > history.info.limit for r in history.records[:-1])
    trained = [record.training for record in history.records[1:]]
    assert all(said is not None for said in trained)
    kept = [said for said in trained if said["kept"]]
    assert kept
    assert {said["curvature"] for said in kept} == {"second moments of training"}


def test_the_score_is_adams_second_moment_times_the_squared_error_of_rounding():
    searched = search(method="patent", training=plan(every=1, final=None), batch_size=8)
    scorer = searched.objective.prepare()
    batches = read_batches(data(), batch_size=8)
    adam = calibration_adam(Network().eval(), searched.space.layers, batches, F.cross_entropy)
    config = searched.space.config((4, 2, 8))
    expected = 0.0
    for name, bits in config.items():
        module = scorer.prepared.get_submodule(name)
        set_bits(scorer.prepared, {name: bits})
        with torch.no_grad():
            error = (module.weight - float_weight(module)).double().square()
        expected += 0.5 * float((adam.weights[name].double() * error).sum())
    assert scorer.score(config).weights == pytest.approx(expected, rel=1e-7)  # single precision
