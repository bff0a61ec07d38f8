"""The answer keeps its corrected statistics, on disk and back; the scorer follows the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import hq_optuna as hq
from hq_optuna.errors import ResumeError
from hq_optuna.quantization.correction import SHIFT


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        )
        net(torch.randn(64, 1, 6, 6))
    return net.eval()


def data(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.arange(n) % 3


def search(net: nn.Module, **settings: Any) -> hq.BitSearch:
    return hq.BitSearch(
        net,
        data(),
        bits=(8, 4, 2),
        pin_first_last=None,
        budget=hq.Budget.fraction(bops=0.15),
        **settings,
    )


def test_a_corrected_result_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bits = search(net)
    result = bits.result(bits.optimize())
    assert not torch.equal(result.network[1].running_mean, net[1].running_mean)  # type: ignore[index]
    assert bool(result.network[3].get_buffer(SHIFT).any())  # type: ignore[index]
    result.save(tmp_path / "answer")
    loaded = hq.load(tmp_path / "answer", net)
    with torch.no_grad():
        assert torch.equal(loaded(data()[0]), result.network(data()[0]))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    names = load_file(tmp_path / "answer" / "weights.safetensors")
    assert set(before) <= set(names)
    assert not any(name.endswith(SHIFT) for name in names)


def test_a_saved_result_can_be_loaded_and_saved_again(tmp_path: Path) -> None:
    net = network()
    bits = search(net)
    result = bits.result(bits.optimize())
    result.save(tmp_path / "one")
    object.__setattr__(result, "network", hq.load(tmp_path / "one", net))
    result.save(tmp_path / "two")
    one, two = (
        json.loads((tmp_path / name / "recipe.json").read_text()) for name in ("one", "two")
    )
    assert one["layers"] == two["layers"]
    assert one["weights"] == two["weights"]


def test_without_correction_the_statistics_are_those_of_the_network() -> None:
    net = network()
    bits = search(net, correction=False)
    result = bits.result(bits.optimize())
    assert torch.equal(result.network[1].running_mean, net[1].running_mean)  # type: ignore[index]
    assert not hasattr(result.network[3], SHIFT)  # type: ignore[index]


def test_the_score_of_the_answer_is_what_its_network_gives_on_the_calibration_set() -> None:
    net = network()
    bits = search(net, scorer="gauss_newton")
    study = bits.optimize()
    result = bits.result(study)
    x, y = data()
    with torch.no_grad():
        loss = float(functional.cross_entropy(result.network(x), y))
    recorded = study.best_trial.user_attrs["calibration_loss"]
    assert loss == pytest.approx(recorded, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "scorer"),
    [
        (functional.cross_entropy, "hessian_trace"),
        (nn.CrossEntropyLoss(), "hessian_trace"),
        (lambda z, y: functional.cross_entropy(z, y), "hessian_trace"),
    ],
)
def test_the_scorer_follows_the_loss(loss: Any, scorer: str) -> None:
    assert search(network(), loss_fn=loss).objective.settings.scorer == scorer


def test_correction_is_part_of_what_a_resumed_search_must_share() -> None:

    memory = optuna.storages.InMemoryStorage()
    net = network()
    search(net).optimize(memory, "s")
    with pytest.raises(ResumeError, match="whether statistics are corrected"):
        search(net, correction=False).optimize(memory, "s")
