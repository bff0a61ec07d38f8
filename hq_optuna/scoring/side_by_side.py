"""Values of several candidates in one: a tensor ``(N·k, …)``, a sample's k candidates in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from hq_optuna.batches import tensors
from hq_optuna.scoring.graph import equal, plain

VECTORS = 128
"""Bytes that a processor's loops take at once, at most: two vectors of AVX-512."""

ALONE = 16_000
"""Elements that one thread does alone, at least."""

GRAIN = 32_768
"""Elements that PyTorch gives a thread in most operations, at least."""


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


def same_in_one(joined: Any, parts: Sequence[Any], n: int) -> bool:
    """Say whether candidates' results in one are those of each, and will be on other values too.

    Args:
        joined: What an operation made of candidates in one.
        parts: What it made of each.
        n: Samples.
    """
    k = len(parts)
    return has_rows(joined, n * k) and all(
        has_rows(part, n) and _fills_vectors(part, k) and equal(part_of(joined, i, k, n), part)
        for i, part in enumerate(parts)
    )


def _fills_vectors(tree: Any, k: int) -> bool:
    """Say whether each element is done the same way among those of k candidates as alone.

    What a vector does not take is done otherwise, such as the last elements of a SiLU, which differ
    in one value of thirty; which ones are last depends on how many there are. And a product of few
    elements may be equal by chance though it is summed up in another order.
    """

    def fills(leaf: Tensor) -> bool:
        if leaf.is_complex():
            return False
        per = VECTORS // leaf.element_size()
        for n in (leaf.numel(), k * leaf.numel()):
            threads = torch.get_num_threads() if n > ALONE and leaf.device.type == "cpu" else 1
            shares = {-(-n // t) for t in (threads, min(threads, max(-(-n // GRAIN), 1)))}
            if any(share % per for share in (n, *shares)):
                return False
        return True

    return all(map(fills, filter(_is_inexact, tensors(tree))))


def _is_inexact(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def part_of(tree: Any, i: int, k: int, n: int) -> Any:
    """Return the i-th of k candidates' part.

    Args:
        tree: A tensor ``(n·k, …)`` or a structure of such; other leaves are everybody's.
        i: Which candidate.
        k: Candidates.
        n: Samples.

    Returns:
        The same with contiguous tensors ``(n, …)``.
    """

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != n * k:
            return leaf
        return leaf.view(n, k, *leaf.shape[1:])[:, i].contiguous()

    return plain(map_aggregate(tree, part))


def join(parts: Sequence[Any], n: int) -> Any:
    """Return candidates' values in one, side by side for each sample.

    Args:
        parts: Of each of k candidates a contiguous tensor ``(n, …)``, or a structure of such.
        n: Samples.

    Returns:
        The same with tensors ``(n·k, …)``.

    Raises:
        ApartError: They differ in shape, type or structure, or lie otherwise in memory.
    """
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
    """Return what k candidates have in common as values of each of them.

    Args:
        tree: A tensor ``(n, …)`` or a structure of such; other leaves stay as they are.
        k: Candidates.
        n: Samples.

    Returns:
        The same with tensors ``(n·k, …)``.

    Raises:
        ApartError: A tensor is not contiguous.
    """

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
