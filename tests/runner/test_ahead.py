"""Candidates that are scored along with an earlier one have the scores of passes of their own."""

from __future__ import annotations

import math

import optuna
import pytest

from hq_optuna import attrs
from hq_optuna.bit_config import BitConfig
from hq_optuna.errors import ScoreError
from hq_optuna.runner.ahead import Ahead
from hq_optuna.runner.worker import work
from hq_optuna.scoring import Score, Scorer
from tests.runner.test_objective import objective, study
from tests.samplers.tables import history

CONFIGS = [BitConfig({"a": (bits, bits)}) for bits in range(2, 9)]
TOP = CONFIGS[-1]


class Counted:
    """Stands for a scorer of which one pass takes up to three candidates."""

    most_together = 3

    def __init__(self) -> None:
        self.passes: list[list[BitConfig]] = []

    def score_together(self, configs, incumbent) -> list[Score]:
        self.passes.append(list(configs))
        found = [Score(float(config["a"][0]), 0.0, 0.0, 0.0) for config in configs]
        if any(score.total == 5 for score in found):
            raise ScoreError("The score of an assignment is nan.")
        return found


def test_what_comes_next_is_scored_in_the_same_pass_and_not_again():
    scorer, ahead = Counted(), Ahead()
    for index, config in enumerate(CONFIGS[:3]):
        coming = iter(CONFIGS[index:3])  # its own candidate may be among them
        score, seconds = ahead.score(scorer, config, TOP, coming)
        assert score.total == config["a"][0]
        assert 0 < seconds < 1
    assert scorer.passes == [CONFIGS[:3]]


@pytest.mark.parametrize("another", ["step", "network"])
def test_another_step_or_another_network_begins_anew(another):
    scorer, ahead = Counted(), Ahead()
    ahead.score(scorer, CONFIGS[0], TOP, CONFIGS[1:3])
    then = Counted() if another == "network" else scorer
    ahead.score(then, CONFIGS[1], CONFIGS[-2] if another == "step" else TOP, ())
    assert then.passes[-1] == [CONFIGS[1]]


def test_a_score_that_is_no_number_is_an_error_of_its_own_candidate_alone():
    scorer, ahead = Counted(), Ahead()
    bad = CONFIGS[3]  # 5 bits
    assert ahead.score(scorer, CONFIGS[0], TOP, [bad])[0].total == 2
    with pytest.raises(ScoreError):
        ahead.score(scorer, bad, TOP, ())


@pytest.fixture
def one_pass(monkeypatch):
    """Let a search score together whatever it can, and return how many each pass had."""
    sizes: list[int] = []
    measure = Scorer._measure_together

    def measured(self, configs, incumbent):
        sizes.append(len(configs))
        return measure(self, configs, incumbent)

    monkeypatch.setattr(Scorer, "_measure_together", measured)
    monkeypatch.setattr(Scorer, "_one_pass", True, raising=False)
    monkeypatch.setattr("hq_optuna.scoring.scorer.FEWEST_TOGETHER", 2)
    return sizes


def forced(**options):
    made = objective(scorer="gauss_newton", **options)
    made.prepare()._one_pass = True
    return made


@pytest.mark.parametrize("loop", ["work", "optimize"])
def test_a_search_has_the_history_of_one_that_scores_each_alone(one_pass, loop):
    alone, together = (study(n_candidates=3) for _ in range(2))
    alone.optimize(objective(scorer="gauss_newton", memory=0))
    assert one_pass == []
    if loop == "work":
        work(together, forced())
    else:
        together.optimize(forced())
    assert history(together) == history(alone)
    assert max(one_pass) == 3
    n_candidates = sum(
        trial.user_attrs[attrs.KIND] == "candidate" for trial in together.get_trials()
    )
    assert sum(one_pass) <= n_candidates  # none was scored twice
    facts = ("score_weights", "score_activations", "calibration_loss")
    for ours, theirs in zip(together.trials, alone.trials, strict=True):
        assert ours.value == theirs.value
        assert [ours.user_attrs[f] for f in facts] == [theirs.user_attrs[f] for f in facts]
        assert ours.user_attrs[attrs.SECONDS] >= 0


def test_an_interrupted_pass_loses_no_more_than_its_candidates(one_pass):
    whole, broken = (study(n_candidates=3) for _ in range(2))
    work(whole, forced())
    made, n_looks = forced(), 0
    scorer = made.prepare()
    measure = scorer._measure_together

    def interrupted(configs, incumbent):
        nonlocal n_looks
        n_looks += 1
        if n_looks == 2:
            raise KeyboardInterrupt
        return measure(configs, incumbent)

    scorer._measure_together = interrupted
    with pytest.raises(KeyboardInterrupt):
        work(broken, made)
    work(broken, made)
    assert history(broken) == history(whole)
    assert math.isfinite(broken.best_value)
    failed = broken.get_trials(states=[optuna.trial.TrialState.FAIL])
    assert len(failed) == 1
