"""Values of several candidates in one: a tensor ``(N·k, …)``, a sample's k candidates in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from hq_optuna.scoring.graph import plain


class ApartError(Exception):
    """Values that do not go into one tensor."""


def has_rows(tree: Any, n: int) -> bool:
    """Say whether a value is tensors with a row for each of n samples, and nothing else."""

    def has(leaf: Any) -> bool:
        if isinstance(leaf, (tuple, list)):
            return all(map(has, leaf))
        if isinstance(leaf, Tensor):
            return leaf.dim() > 0 and leaf.shape[0] == n and leaf.is_contiguous()
        return leaf is None

    return has(tree)


def part_of(tree: Any, i: int, k: int, n: int) -> Any:
    """Return the i-th of k candidates' part."""

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != n * k:
            return leaf
        return leaf.view(n, k, *leaf.shape[1:])[:, i].contiguous()

    return plain(map_aggregate(tree, part))


def join(parts: Sequence[Any], n: int) -> Any:
    """Return candidates' values in one, side by side for each sample."""
    first = parts[0]
    if isinstance(first, Tensor):
        if any(not _stackable(part, first, n) for part in parts):
            raise ApartError
        return torch.stack(list(parts), 1).flatten(0, 1)
    if type(first) in (tuple, list) and all(len(part) == len(first) for part in parts):
        return type(first)(join(leaves, n) for leaves in zip(*parts, strict=True))
    if all(type(part) is type(first) and part == first for part in parts):
        return first
    raise ApartError


def _stackable(part: Any, first: Tensor, n: int) -> bool:
    return (
        isinstance(part, Tensor)
        and part.dim() > 0
        and (part.shape, part.dtype) == (first.shape, first.dtype)
        and part.shape[0] == n
        and part.is_contiguous()
    )


def repeat(tree: Any, k: int, n: int) -> Any:
    """Return what k candidates have in common as values of each of them."""

    def repeated(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != n:
            return leaf
        if not leaf.is_contiguous():
            raise ApartError
        return leaf.repeat_interleave(k, 0)

    return plain(map_aggregate(tree, repeated))


def copy_of(tree: Any) -> Any:
    """Return a value with tensors of its own."""

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return plain(map_aggregate(tree, copied))
