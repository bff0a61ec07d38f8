"""Which scorer a search takes where none was chosen, and what it says of that."""

from __future__ import annotations

import optuna
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.errors import ResumeError
from hq_optuna.protocol.history import read_history
from hq_optuna.rises import CrossEntropy, SquaredError
from tests.searches import facts, search


def around(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, where nothing can tell that it is."""
    return functional.cross_entropy(outputs, labels)


def test_an_unknown_loss_is_scored_by_the_outputs_and_the_reason_is_said() -> None:
    made = search(loss_fn=around)
    assert made.objective.settings.scorer == "hessian_trace"
    (warning,) = made.objective.warnings
    for words in ("classes that the labels name", "torch.nn.functional.cross_entropy", "rise="):
        assert words in warning
    assert warning in read_history(made.optimize(n_candidates=2)).info.warnings


@pytest.mark.parametrize("loss", [functional.cross_entropy, nn.CrossEntropyLoss()])
def test_a_loss_that_is_known_is_not_warned_of(loss) -> None:
    assert search(loss_fn=loss).objective.warnings == []


def test_a_scorer_that_was_chosen_is_not_warned_of() -> None:
    assert search(loss_fn=around, scorer="diagonal").objective.warnings == []


def test_the_rise_of_a_loss_may_be_given_and_ranks_as_if_the_loss_were_known() -> None:
    made = search(loss_fn=around, rise=CrossEntropy(), scorer="gauss_newton")
    assert made.objective.warnings == []
    known = search(scorer="gauss_newton")
    scores, others = ([c[3] for c in facts(s.optimize(seed=0))[0]] for s in (made, known))
    assert scores == others


def test_another_rise_is_another_search() -> None:
    memory = optuna.storages.InMemoryStorage()
    search(loss_fn=around, rise=CrossEntropy()).optimize(memory, "s")
    with pytest.raises(ResumeError, match="the rise"):
        search(loss_fn=around, rise=SquaredError()).optimize(memory, "s")
    plain = search(loss_fn=around, scorer="diagonal")
    with pytest.raises(ResumeError, match=r"the scorer .*; the rise"):
        plain.optimize(memory, "s")


def test_a_known_loss_has_no_rise_in_its_fingerprint() -> None:
    assert "rise" not in read_fingerprint(search())
    given = read_fingerprint(search(loss_fn=around, rise=CrossEntropy()))
    assert given["rise"].startswith("CrossEntropy(")


def read_fingerprint(made) -> dict:
    return made.objective.fingerprint(made.open())


def test_data_in_the_order_of_their_labels_are_warned_of() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16)).eval()
    x, labels = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)), torch.arange(256)
    dealt, in_order = labels % 16, labels // 16
    [said] = search(model=network, calibration=(x, in_order)).objective.warnings
    assert "have 4 of 16 classes" in said
    assert "Shuffle them" in said
    assert search(model=network, calibration=(x, dealt)).objective.warnings == []
    by_passes = search(model=network, calibration=(x, in_order), scorer="gauss_newton")
    assert by_passes.objective.warnings == []  # reads all samples
