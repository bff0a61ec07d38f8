"""The answer in the terms of hardware: limits, what is in memory at the peak, where time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hq_optuna.report.block import Block, Column, percent
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import NOUNS, UNITS, format_cost, shares
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.space.search_space import SearchSpace

MOST_MOMENTS = 8
"""Moments of a pass that the memory map shows: those with the most bytes."""


def limits(data: Mapping[str, Any]) -> Block:
    """Return what each limit allows, what of it is used, and what more of it would bring."""
    rows, prices = data["limits"], data["exact"]["prices"]
    more = []
    for row, price in zip(rows, prices, strict=True):
        gain = price["nats_per_unit"] * row["limit"] / 100
        units = UNITS[row["metric"]].items()
        unit, scale = next(
            ((u, s) for u, s in units if row["limit"] >= s), (NOUNS[row["metric"]], 1)
        )
        more.append(
            f"1 % more: -{gain:.2g} nats (-{gain / max(data['exact']['optimum'], 1e-300):.2%}); "
            f"1 {unit} more: -{price['nats_per_unit'] * scale:.2g} nats"
            if price["nats_per_unit"] > 0
            else "nothing: it does not bind"
        )
    columns: list[Column] = [
        ("limit", [NOUNS[row["metric"]] for row in rows]),
        ("allowed", [format_cost(row["limit"], row["metric"]) for row in rows]),
        ("the answer", [format_cost(row["answer"], row["metric"]) for row in rows]),
        ("of it", [percent(row["answer"] / row["limit"]) for row in rows]),
        ("what more would buy", more),
    ]
    lines = [
        "What more of a limit would buy is the shadow price of the least sum over layers where "
        "choices may be mixed: what the predicted rise would fall by at first."
    ]
    return Block("limits", "Limits", columns, lines)


def memory_map(space: SearchSpace, config: BitConfig) -> list[dict[str, Any]] | None:
    """Return the moments with the most bytes, in the order of the network; ``None`` if unknown.

    One row each: ``{"moment", "bytes", "int8", "tensors": [[name, bits, bytes], …]}``, the largest
    tensors first; ``int8`` are the bytes with 8 bits everywhere.
    """
    if space.memory is None or not space.memory.moments:
        return None
    memory, eight = space.memory, BitConfig.uniform(list(config), 8, 8)
    now, before = memory.profile(config), memory.profile(eight).tolist()
    most = sorted(sorted(range(len(now)), key=lambda m: -now[m])[:MOST_MOMENTS])
    return [
        {
            "moment": memory.moments[m],
            "bytes": float(now[m]),
            "int8": before[m],
            "tensors": [[t.name, t.width(config), size] for t, size in memory.held(config, m)],
        }
        for m in most
    ]


def latencies(space: SearchSpace, config: BitConfig) -> list[dict[str, Any]] | None:
    """Return how long each layer takes, and with 8 bits, seconds; ``None`` where it is not known.

    The last row is what runs in no layer.
    """
    if space.latency is None:
        return None
    model, eight = space.costs("latency_s"), BitConfig.uniform(list(config), 8, 8)
    now, before = (model.per_layer(bits).tolist() for bits in (config, eight))
    rest = space.latency.rest_s
    rows = zip([*config, ""], [*now, rest], [*before, rest], strict=True)
    return [{"layer": name, "seconds": a, "int8": b} for name, a, b in rows]


def _memory(rows: Sequence[Mapping[str, Any]]) -> Block:
    """Return the memory map; the peak is told in words."""
    peak = max(rows, key=lambda row: row["bytes"])
    columns: list[Column] = [
        ("while this runs", [row["moment"] for row in rows]),
        ("in memory", [", ".join(map(_tensor, row["tensors"])) for row in rows]),
        ("bytes", [format_cost(row["bytes"], "activation_bytes") for row in rows]),
        ("with 8 bits", [format_cost(row["int8"], "activation_bytes") for row in rows]),
    ]
    lines = [
        f"The peak is {format_cost(peak['bytes'], 'activation_bytes')}, while {peak['moment']} "
        "runs. A tensor is as wide as the widest of its readers needs it, and float where none "
        "rounds it."
    ]
    return Block("memory", "Memory between layers", columns, lines, n_text_columns=2)


def _tensor(held: Sequence[Any]) -> str:
    name, bits, size = held
    width = "float" if bits == FLOAT_BITS else f"{bits} bits"
    return f"{name} ({width}) {format_cost(size, 'activation_bytes')}"


def _latency(rows: Sequence[Mapping[str, Any]]) -> Block:
    """Return the share of the time by layer."""
    total, eight = (sum(row[key] for row in rows) for key in ("seconds", "int8"))
    parts = shares([row["seconds"] for row in rows]).tolist()
    columns: list[Column] = [
        ("layer", [*(row["layer"] or "in no layer" for row in rows), "all"]),
        ("time", [format_cost(s, "latency_s") for s in (*(r["seconds"] for r in rows), total)]),
        ("share", [*map(percent, parts), "100 %"]),
        ("with 8 bits", [format_cost(s, "latency_s") for s in (*(r["int8"] for r in rows), eight)]),
    ]
    slower = [row["layer"] for row in rows if row["seconds"] > row["int8"]]
    lines = [f"Slower than with 8 bits: {', '.join(slower[:8])}."] if slower else []
    return Block("latency", "Latency", columns, lines, last_stands_out=True)


ON_HARDWARE: Mapping[str, Callable[[Any], Block]] = {"memory": _memory, "latency": _latency}
"""Parts of the report by what they show in the report's data."""
