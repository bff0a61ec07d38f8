"""Weights and second moments as artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hq_optuna.artifacts.store import open_artifacts
from hq_optuna.errors import ArtifactError
from hq_optuna.objective.tensors import get_tensors, put_tensors


def test_weights_and_second_moments_come_back_bit_for_bit(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    network(torch.randn(2, 1, 5, 5)).sum().backward()
    adam = torch.optim.Adam(network.parameters())
    adam.step()
    moments = {
        f"exp_avg_sq.{name}": adam.state[p]["exp_avg_sq"] for name, p in network.named_parameters()
    }
    stored = {**network.state_dict(), **moments, "half": torch.randn(3).bfloat16()}
    artifacts = open_artifacts(tmp_path)
    found = get_tensors(open_artifacts(tmp_path), put_tensors(artifacts, stored))
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_equal_tensors_are_one_artifact_whatever_their_order_and_memory(tmp_path: Path) -> None:
    a, b = torch.randn(3, 4), torch.randn(4)
    artifacts = open_artifacts(tmp_path)
    tied = put_tensors(artifacts, {"a": a, "b": b, "c": a})
    assert put_tensors(artifacts, {"c": a.clone(), "b": b, "a": a.t().contiguous().t()}) == tied
    assert put_tensors(artifacts, {"a": a, "b": b, "c": a + 1}) != tied
    assert len(list(tmp_path.iterdir())) == 2


def test_what_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    artifacts = open_artifacts(tmp_path)
    with pytest.raises(ArtifactError, match="holds no tensors"):
        get_tensors(artifacts, artifacts.put(b"{}"))
