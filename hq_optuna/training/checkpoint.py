"""A training on disk: one safetensors file, with what it belongs to in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from hq_optuna.errors import CheckpointError

FORMAT = "hq_optuna training checkpoint"
VERSION = 1
_ABOUT = "hq_optuna"


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return twelve hexadecimal digits that name these tensors with their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


def dump(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Return tensors and JSON data as the content of a file."""
    plain = {n: t.detach().cpu().clone().contiguous() for n, t in sorted(tensors.items())}
    checked = {**about, "format": FORMAT, "version": VERSION, "tensors": digest_of(plain)}
    return safetensors.save(plain, {_ABOUT: json.dumps(checked, sort_keys=True)})


def parse(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON data of a file's content.

    Raises:
        CheckpointError: Cut off, altered, or no checkpoint of a training.
    """
    try:
        tensors = safetensors.load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        about: dict[str, Any] = json.loads(header["__metadata__"][_ABOUT])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"It is no training checkpoint, or damaged ({type(error).__name__}: {error!s:.120}). "
            "Remove it to train from the start."
        ) from None
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise CheckpointError(
            f"It is a {about.get('format')!r} of version {about.get('version')!r}; expected "
            f"{FORMAT!r} of version {VERSION}. Remove it to train from the start."
        )
    if digest_of(tensors) != about.get("tensors"):
        raise CheckpointError(
            "Its tensors are not those that were written: the file is damaged. Remove it to train "
            "from the start."
        )
    return tensors, about
