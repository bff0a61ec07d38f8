"""Signal-to-noise ratios of layers, held against networks whose noise is known by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hq_optuna as hq
from hq_optuna.answer.layer_errors import ERRORS, layer_errors
from hq_optuna.attributes import LAYER_ERRORS
from hq_optuna.objective.publish import publish_facts
from hq_optuna.report.data import report_data
from hq_optuna.report.text import render_markdown
from hq_optuna.space.assignment import BitConfig

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 6, generator=GENERATOR)


class Net(nn.Module):
    """Two branches into a last layer; what they return is no batch-norm's business."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.last(torch.cat([self.a(h), self.b(h)], 1))


def found(config: dict[str, tuple[int, int]]) -> tuple[Any, Any, dict[str, Any]]:
    net = Net().eval()
    settings: dict[str, Any] = {"correction": False, "rounding": "nearest"}
    search = hq.BitSearch(
        net, (X, torch.arange(40) % 4), bits=(8, 4, 2), budget="0.9 bops", **settings
    )
    bits = BitConfig({name: config.get(name, (32, 32)) for name in ("first", "a", "b", "last")})
    return net, search, layer_errors(search.objective, bits)


def decibels(z: Tensor, moved: Tensor) -> float:
    z, moved = z.double(), moved.double()
    return 10 * math.log10(float(z.square().sum() / (z - moved).square().sum()))


@torch.no_grad()
def test_a_layer_alone_has_the_noise_of_its_rounded_weight() -> None:
    net, search, errors = found({"a": (2, 32), "b": (4, 32)})
    x = torch.cat([batch.inputs for batch in search.objective.data][:2])[: errors["samples"]]
    seen: dict[str, Tensor] = {}
    search.objective.prepare()
    config = dict.fromkeys(("first", "a", "b", "last"), (32, 32))
    for only in ("a", "b", "a, b"):
        bits = config | {n: {"a": (2, 32), "b": (4, 32)}[n] for n in only.split(", ")}
        seen[only] = search.quantized(BitConfig(bits))(x)
    z, layers = net(x), errors["layers"]
    assert layers["a"]["output_alone"] == pytest.approx(decibels(z, seen["a"]), rel=1e-4)
    assert layers["a"]["output_without"] == pytest.approx(decibels(z, seen["b"]), rel=1e-4)
    assert layers["b"]["output_without"] == pytest.approx(decibels(z, seen["a"]), rel=1e-4)
    assert errors["output"] == pytest.approx(decibels(z, seen["a, b"]), rel=1e-4)
    # Nothing before them is rounded, so that they return the same among the others.
    for name in ("a", "b"):
        assert layers[name]["own_alone"] == pytest.approx(layers[name]["own_in_answer"])
    assert layers["a"]["own_alone"] < layers["b"]["own_alone"]
    assert layers["first"] == dict.fromkeys(ERRORS)


def test_the_report_and_the_terminal_show_them_for_the_answer_they_are_of() -> None:
    net = Net().eval()
    search = hq.BitSearch(net, (X, torch.arange(40) % 4), bits=(8, 4), budget="0.7 bops")
    study = search.optimize()
    assert "without it (dB)" not in render_markdown(report_data(study))
    errors = search.layer_errors(study, search.result(study))
    data = report_data(study)
    assert [row["errors"] for row in data["layers"]] == list(errors["layers"].values())
    text = render_markdown(data)
    assert f"with all layers it is {errors['output']:.1f} dB" in text
    value = errors["layers"]["a"]["output_without"]
    assert f"{value:.1f}" in next(row for row in text.splitlines() if row.startswith("| a "))
    publish_facts(study, {LAYER_ERRORS: {**errors, "of": "another answer"}})
    assert all(row["errors"] is None for row in report_data(study)["layers"])
