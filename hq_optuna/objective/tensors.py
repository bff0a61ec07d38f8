"""Tensors as artifacts: safetensors, which hold numbers and cannot run anything."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from hq_optuna.artifacts.store import Artifacts, Reference
from hq_optuna.errors import ArtifactError


def put_tensors(artifacts: Artifacts, tensors: Mapping[str, Tensor]) -> Reference:
    """Store tensors by name; equal ones give one artifact, whatever their device or order."""
    # A copy each: safetensors refuses tensors that share memory, as tied weights do.
    plain = {n: t.detach().cpu().clone().contiguous() for n, t in sorted(tensors.items())}
    return artifacts.put(safetensors.save(plain))


def get_tensors(artifacts: Artifacts, reference: Reference) -> dict[str, Tensor]:
    """Return tensors by name, on the CPU; refuse an artifact that holds none."""
    data = artifacts.get(reference)
    try:
        return safetensors.load(data)
    except SafetensorError as error:
        raise ArtifactError(f"Artifact {reference.id} holds no tensors: {error}.") from None
