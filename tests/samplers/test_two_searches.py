"""Two different searches that are started in one new study at the same moment."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.errors import ResumeError
from hq_optuna.protocol import study_view
from hq_optuna.protocol.study_view import stored_limits
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.search import Limits
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.workers.loop import work
from tests.fake_search import fake_space
from tests.samplers.tables import (
    BUDGET,
    add,
    assigned,
    expected,
    history,
    new_study,
    open_ticket,
    ours,
    sampler,
)


def stored(study: optuna.Study) -> dict[str, object]:
    return study._storage.get_study_system_attrs(study._study_id)


def write_last(study: optuna.Study, other: optuna.Study) -> None:
    """Write what a search writes that found the study empty, as its slower twin did."""
    study_view.write_settings(study, ours(other).space, ours(other)._search(None).to_json())


@pytest.fixture
def first() -> optuna.Study:
    """A search whose worker has the first trial."""
    study = new_study(sampler(6, encoding="compact"))
    trial = ours(study).ask(study)
    trial.finish(TrialState.COMPLETE, assigned(trial))
    return study


@pytest.fixture
def second(first: optuna.Study) -> optuna.Study:
    """A search of another space that wrote its settings last."""
    by = sampler(fake_space(7, bits=(8, 5, 2)), seed=5, encoding="compact")
    study = new_study(by, first._storage)
    write_last(first, study)
    return study


@pytest.mark.parametrize("run", [work, optuna.Study.optimize])
def test_the_search_that_has_the_first_trial_ends_with_its_own_settings(first, second, run):
    with pytest.raises(ResumeError, match="its first trial was made with other settings"):
        ours(second).ask(second)
    run(first, assigned)
    assert stored(first)[attributes.SETTINGS]["seed"] == 0
    space = SearchSpace.from_json(attributes.join(attributes.SPACE, stored(first)))
    assert space.digest == ours(first).space.digest
    assert history(first) == expected(first)


def test_settings_are_compared_once_another_search_is_met(first, second):
    log = ours(first).log(first)
    ticket = open_ticket(log, 0, parent="other", search="other/search")
    add(first, ticket, 0.0)
    ours(first).log(first)
    assert stored(first)[attributes.SETTINGS]["seed"] == 0


def test_limits_of_the_search_that_was_refused_do_not_stop_the_other(first):
    space = fake_space(6)
    pruner = CostBudgetPruner(space, BUDGET, Limits(max_evaluations=3))
    second = new_study(sampler(space, seed=5), first._storage, pruner=pruner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_view, "compare_settings", lambda *_: {})  # finds none yet
        with pytest.raises(ResumeError):
            ours(second).ask(second)
    assert stored_limits(first) == Limits(max_evaluations=3)
    write_last(first, second)
    work(first, assigned)
    assert stored_limits(first) == Limits()
    assert history(first) == expected(first)


def test_who_only_reads_with_other_settings_changes_nothing(first):
    work(first, assigned)
    before = stored(first)
    reader = new_study(sampler(6, seed=5), first._storage)
    ours(reader).log(reader)
    assert stored(first) == before
