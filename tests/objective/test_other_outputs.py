"""Networks whose outputs are not class scores: one logit, or numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hq_optuna.errors import DataError
from hq_optuna.protocol.history import read_history
from tests.searches import Network, data, facts, search


class Head(Network):
    """The network of `searches` with only the first of its outputs: ``(N, 1)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1]


def yes_or_no(n: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    inputs, _ = data(n, seed)
    return inputs, torch.arange(n) % 2


def one_logit(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs[:, 0], labels.to(outputs.dtype))


def test_a_binary_classifier_with_one_logit_is_searched_by_its_own_loss() -> None:
    made = search(
        model=Head(), calibration=yes_or_no(), validation=yes_or_no(30, 2), loss_fn=one_logit
    )
    study = made.optimize(n_candidates=2)
    result = made.result(study)
    assert result.met
    # The argmax of one logit is 0 whatever the network says: no accuracy rather than a wrong one.
    assert not [name for name in result.facts if "accuracy" in name]
    compared = read_history(study).facts["compared"]
    assert compared and all(set(row["measured"]) == {"loss"} for row in compared)


class Number(Network):
    """The same, without the axis of the outputs: ``(N,)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


def test_one_number_a_sample_is_searched_as_one_column_is() -> None:
    inputs, _ = data()
    wanted = torch.linspace(-1, 1, 24)
    found = []
    for model, labels in ((Number(), wanted), (Head(), wanted[:, None])):
        made = search(
            model=model,
            calibration=(inputs, labels),
            validation=(inputs, labels),
            loss_fn=functional.mse_loss,
        )
        study = made.optimize(n_candidates=2)
        assert made.result(study).met
        found.append(facts(study))
    assert found[0] == found[1]


class Pieces(Network):
    """The same numbers in a list of pieces that are no samples: 5 rows, and the rest."""

    def forward(self, x: Tensor) -> list[Tensor]:
        z = super().forward(x)
        return [z[:5], z[5:]]


class Found(Network):
    """Rows that a network selects, with one tensor more where it finds any."""

    def forward(self, x: Tensor) -> list[Tensor]:
        z = super().forward(x)
        return [z, *([z.abs()] if x[0].amax() > 9 else [])]


def of_pieces(outputs: list[Tensor], labels: Tensor) -> Tensor:
    return functional.cross_entropy(torch.cat(outputs)[: len(labels)], labels)


def test_rows_that_are_no_samples_are_scored_by_the_loss_and_refused_without_one() -> None:
    inputs, labels = data()
    made = search(model=Pieces(), calibration=(inputs, labels), loss_fn=of_pieces)
    assert made.objective.settings.scorer == "diagonal"
    assert any("have its 24 samples along axis 0" in said for said in made.objective.warnings)
    assert made.result(made.optimize(n_candidates=2)).met
    with pytest.raises(DataError, match="along axis 0"):
        search(model=Pieces(), calibration=inputs, loss_fn=None)


def test_other_tensors_in_another_batch_are_scored_by_the_loss() -> None:
    inputs, labels = data()
    inputs[0] = 10.0
    batches = [(inputs[:12], labels[:12]), (inputs[12:], labels[12:])]
    made = search(model=Found(), calibration=batches, loss_fn=of_pieces)
    assert made.objective.settings.scorer == "diagonal"
    assert any("other tensors for one batch" in said for said in made.objective.warnings)
    assert made.result(made.optimize(n_candidates=2)).met
