"""Settings as people type them, read into values; and how many threads are of use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hq_optuna.errors import SpaceError
from hq_optuna.space.budget import Budget
from hq_optuna.space.budget_text import parse_budget
from hq_optuna.space.layers import FLOAT_BITS


def n_cores() -> int:
    """Return the processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sensible_threads(macs_per_sample: int) -> int:
    """Return how many threads a network's forward pass can keep busy.

    Below some ten million MACs a sample threads wait for each other more than they compute, and on
    a busy machine many times more. Depends on the network and the number of cores alone.

    Example:
        >>> sensible_threads(500_000)
        1
    """
    return max(1, min(n_cores(), macs_per_sample // 5_000_000))


def read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with what was typed as text turned into values.

    Raises:
        SpaceError: Bits that cannot be read.
        StudyFileError: A budget that cannot be read.
    """
    read = dict(settings)
    if "budget" in read and not isinstance(read["budget"], Budget):
        read["budget"] = parse_budget(read["budget"])
    if isinstance(read.get("bits"), str):
        read["bits"] = parse_bits(read["bits"])
    activation = read.get("activation_bits")
    if isinstance(activation, str) and activation != "same":
        if activation in ("float", "none"):
            read["activation_bits"] = None
        else:
            bits = parse_bits(activation)
            read["activation_bits"] = bits[0] if activation.isdigit() else bits
    pin = read.get("pin_first_last")
    if isinstance(pin, str):
        read["pin_first_last"] = None if pin == "none" else _only(parse_bits(pin), pin)
    if isinstance(read.get("quantizers"), (list, tuple)):
        read["quantizers"] = parse_quantizers(read["quantizers"])
    return read


def _only(bits: tuple[int, ...], text: str) -> int:
    if len(bits) != 1:
        raise SpaceError(f"--pin-first-last is one number of bits, or none; got {text!r}.")
    return bits[0]


def parse_quantizers(texts: Sequence[str]) -> dict[str, str]:
    """Return ``{glob: quantizer}`` of what is written as ``'layer3.*=midrise'``.

    Raises:
        SpaceError: A text is no such pair.

    Example:
        >>> parse_quantizers(["layer3.*=midrise", "head=uniform"])
        {'layer3.*': 'midrise', 'head': 'uniform'}
    """
    found = {}
    for text in texts:
        glob, equals, name = (part.strip() for part in str(text).rpartition("="))
        if not (equals and glob and name):
            raise SpaceError(f"{text!r} names no quantizer of a layer. Write 'layer3.*=midrise'.")
        found[glob] = name
    return found


def parse_bits(text: str) -> tuple[int, ...]:
    """Return the bits written as ``'2-8'`` or ``'8,4,2'``; ``float`` stands for 32.

    Example:
        >>> parse_bits("2-4"), parse_bits("8,4")
        ((2, 3, 4), (8, 4))
    """
    bits: list[int] = []
    for part in text.replace(" ", "").split(","):
        low, dash, high = part.partition("-")
        try:
            if part == "float":
                found = [FLOAT_BITS]
            else:
                found = list(range(int(low), int(high) + 1)) if dash else [int(low)]
        except ValueError:
            found = []
        if not found:
            raise SpaceError(
                f"{text!r} are no bits. Write 2-8, or 8,4,2; float, same and none, where an "
                "option takes them, in small letters."
            )
        bits += found
    return tuple(bits)
