"""Whole searches of networks whose data have no labels, and whose outputs have any form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import hq_optuna
from hq_optuna import rises
from hq_optuna.errors import DataError
from hq_optuna.protocol.history import read_history
from tests.small_networks import seeded

X = torch.randn(48, 3, 8, 8, generator=seeded(0))


class Outputs(nn.Module):
    """Returns what ``make`` makes of features and a linear layer's answer."""

    def __init__(self, make) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 8, 3, padding=1)
            self.last = nn.Linear(8, 5)
        self.make = make
        self.eval()

    def forward(self, x: Tensor):
        x = functional.relu(self.second(functional.relu(self.first(x))))
        return self.make(x, self.last(x.mean((2, 3))))


def found(network, data, **settings):
    search = hq_optuna.BitSearch(network, data, bits=(8, 4, 2), budget="0.4 bops", **settings)
    study = search.optimize(n_candidates=4, seed=0)
    return search, search.result(study), read_history(study)


@pytest.mark.parametrize(
    "data",
    [
        X,
        DataLoader(X, batch_size=16),
        DataLoader(TensorDataset(X), batch_size=16),
        [{"x": X[:24]}, {"x": X[24:]}],
    ],
)
def test_inputs_alone_are_enough(data) -> None:
    search, result, history = found(Outputs(lambda x, z: 9 * z), data)
    assert result.met
    assert search.objective.settings.scorer == "hessian_trace"
    (said,) = history.info.warnings
    assert "no labels" in said


@pytest.mark.parametrize(
    ("make", "rise"),
    [
        (lambda x, z: {"map": x, "scores": z}, None),
        (lambda x, z: (x, [z]), None),
        (lambda x, z: {"map": x, "scores": z}, rises.Heads({"scores": rises.CrossEntropy()})),
        (
            lambda x, z: [row[: 1 + int(row[0] > 0)] for row in z],
            rises.At({"last": rises.Cosine()}),
        ),
    ],
)
def test_outputs_of_any_form_are_searched(make, rise) -> None:
    _, result, history = found(Outputs(make), X, rise=rise)
    assert result.met
    assert len(history.info.warnings) == (rise is None)


@pytest.mark.parametrize("name", ["first", "second", "last"])
def test_the_table_of_several_outputs_is_what_rounding_one_layer_costs(name: str) -> None:
    network = Outputs(lambda x, z: {"map": x, "scores": z})
    search = hq_optuna.BitSearch(
        network, X, bits=(8, 6, 5), budget="0.9 bops", correction=False, pin_first_last=None
    )
    scorer = search.objective.prepare()
    assert isinstance(search.objective.rise, rises.Heads)
    rise = search.objective.rise.fitted([network(X)])
    in_float = dict.fromkeys(scorer.sensitivity.weights, hq_optuna.LayerBits(32, 32))
    for bits in (6, 5):
        alone = {**in_float, name: hq_optuna.LayerBits(bits, 32)}
        with torch.no_grad():
            moved = search.quantized(hq_optuna.BitConfig(alone))(X)
            measured = float(rise(network(X), moved)) / len(X)
        # Two probes a sample, a quarter of the samples, and ReLUs, which first order leaves out.
        assert scorer.sensitivity.weights[name][bits] == pytest.approx(measured, rel=0.35)


def test_a_loss_without_labels_is_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match="leave the loss out"):
        hq_optuna.BitSearch(Outputs(lambda x, z: z), X, functional.cross_entropy, budget="0.4 bops")


def test_the_diagonal_of_no_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="no labels"):
        hq_optuna.BitSearch(Outputs(lambda x, z: z), X, budget="0.4 bops", scorer="diagonal")


def test_validation_data_without_labels_are_compared_with_the_float_network() -> None:
    search, result, _ = found(Outputs(lambda x, z: z), X, validation=X[:16] + 0.1)
    assert result.facts["validation_samples"] == 16
    losses = [row["measured"]["loss"] for row in history_rows(search, result)]
    assert all(loss > 0 for loss in losses)


def history_rows(search, result):
    from hq_optuna.answer.comparison import rows

    study = search.optimize(n_candidates=4, seed=0)
    history = read_history(study)
    return rows(
        search.objective, history, search.validation, search.evaluate, answer=result.network
    )
