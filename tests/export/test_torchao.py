"""Linear layers for torchao hold the answer's own codes and scales."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from hq_optuna import export
from hq_optuna.errors import ExportError
from hq_optuna.export.deployed import deployed, deployed_layers
from tests.export.answers import answer_of, data_of, everything, images
from tests.quantization.test_outputs import rounded

has_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


@has_torchao
@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_outputs_are_the_deployed_networks_bit_for_bit(bits):
    x = images()
    answer = answer_of(everything(), x, (bits, 8))
    ready = deployed(answer)
    network, names = export.for_torchao(answer)
    assert names == ("tokens", "head")
    assert torch.equal(network(x), ready(x))
    for name in names:
        weight = network.get_submodule(name).weight
        assert torch.equal(weight.qdata, deployed_layers(ready)[name].weight_codes)
        assert torch.equal(weight.scale[:, 0], deployed_layers(ready)[name].weight_scale)
        assert weight.target_dtype == getattr(torch, f"int{bits}")


@has_torchao
@torch.no_grad()
def test_codes_that_need_more_bits_than_their_count_get_them_and_too_many_stay():
    x = images()
    named = {"tokens": "midrise", "head": "midrise"}
    bits = dict.fromkeys(("stem", "depthwise", "up", "down"), (8, 8))
    answer = answer_of(everything(), x, {**bits, "tokens": (3, 8), "head": (8, 8)}, named)
    network, names = export.for_torchao(answer)
    assert names == ("tokens",)  # mid-rise codes of 8 bits go to 255
    assert network.tokens.weight.target_dtype == torch.int4
    assert torch.equal(network(x), deployed(answer)(x))


@has_torchao
@torch.no_grad()
def test_outputs_that_are_rounded_stay_so():
    answer = rounded()[1]
    network, names = export.for_torchao(answer)
    assert names == ("head",)
    x = data_of(images())[0].inputs
    assert torch.equal(network(x), deployed(answer)(x))


def test_torchao_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(ExportError, match=r"pip install .hq_optuna\[torchao\]"):
        export.for_torchao(nn.Linear(2, 2))
