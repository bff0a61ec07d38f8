"""Latency tables: how long each layer takes at each (weight, activation) pair of bits.

A table is measured on the hardware, by its vendor's tools or by ``hq-optuna profile``, and read
from a CSV or JSON file. The unit is part of the file::

    layer,weight_bits,activation_bits,ms        {"unit": "ms", "rest": 0.31, "layers": {
    conv1,8,8,0.52                                 "conv1": {"W8A8": 0.52, "W4A8": 0.41},
    conv1,4,8,0.41                                 "fc": {"W8A8": 0.07, "W4A8": 0.05}}}
    (rest),,,0.31

The rest is what runs in no layer, whatever the bits. ``float`` or 32 stands for bits that are not
quantized. The latency of an assignment is the sum.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hq_optuna.errors import SpaceError
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import FLOAT_BITS, MAX_BITS, LayerSpec

REST = "(rest)"
"""Stands in place of a layer's name for what runs in no layer."""

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_COLUMNS = ("layer", "weight_bits", "activation_bits")
_PAIR = re.compile(r"W(\d+|float)A(\d+|float)")
_REFERENCE = LayerBits(8, 8)

_SLOWEST, _FASTEST = 1e5, 1e15
"""MACs a second beyond which no hardware is: an 8-bit microcontroller does 10⁶, a GPU 10¹⁵."""


class LatencyRow(NamedTuple):
    """How long one layer takes at one pair of bits, in seconds."""

    layer: str
    weight_bits: int
    activation_bits: int
    seconds: float


@dataclass(frozen=True)
class LatencyTable:
    """Seconds by layer and pair of bits, and the rest, which no bits change.

    Example:
        >>> table = LatencyTable((LatencyRow("fc", 8, 8, 0.002), LatencyRow("fc", 4, 8, 0.001)))
        >>> table.seconds("fc", LayerBits(4, 8))
        0.001
    """

    rows: tuple[LatencyRow, ...]
    rest_s: float = 0.0
    source: str = ""

    @functools.cached_property
    def _known(self) -> dict[tuple[str, int, int], float]:
        return {(row.layer, row.weight_bits, row.activation_bits): row.seconds for row in self.rows}

    def seconds(self, layer: str, bits: LayerBits) -> float:
        """Return how long a layer takes with these bits.

        Raises:
            SpaceError: The table has no such pair.
        """
        found = self._known.get((layer, *bits))
        if found is None:
            raise SpaceError(f"The latency table has no {bits} of {layer!r}.")
        return found

    def knows(self, layer: str, bits: LayerBits) -> bool:
        """Return whether the table has this pair of a layer."""
        return (layer, *bits) in self._known

    def total(self, config: Mapping[str, LayerBits]) -> float:
        """Return how long an assignment takes, in seconds."""
        return math.fsum([self.rest_s, *(self.seconds(n, bits) for n, bits in config.items())])

    def check(self, layers: Sequence[LayerSpec], pairs: Mapping[str, Iterable[LayerBits]]) -> None:
        """Refuse a table that does not belong to these layers, or lacks a pair that they may have.

        W8A8 of each layer is needed too: what shares of the all-8-bit latency refer to.

        Raises:
            SpaceError: Says which layers and pairs, or that the unit must be wrong.
        """
        known = {layer.name for layer in layers}
        strange = sorted({row.layer for row in self.rows} - known)
        if strange:
            raise SpaceError(
                f"{self._said} has {_some(map(repr, strange))}, which the network has not. Its "
                f"layers are {_some(sorted(known))}."
            )
        holes = [
            f"{name} {bits}"
            for name in (layer.name for layer in layers)
            for bits in sorted({*pairs[name], _REFERENCE}, reverse=True)
            if (name, *bits) not in self._known
        ]
        if holes:
            raise SpaceError(
                f"{self._said} has holes: {_some(holes)}. Add these rows, or allow fewer bits."
            )
        macs = sum(layer.macs for layer in layers)
        rate = macs / sum(self.seconds(layer.name, _REFERENCE) for layer in layers)
        if not _SLOWEST <= rate <= _FASTEST:
            raise SpaceError(
                f"{self._said} says that {macs:,} MACs with 8 bits run at {rate:.2g} a second, "
                f"which is too {'slow' if rate < _SLOWEST else 'fast'} for any hardware. Is the "
                "unit right? A table says s, ms or us."
            )

    @property
    def _said(self) -> str:
        return f"The latency table {self.source}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return the table as a JSON file has it, in seconds."""
        layers: dict[str, dict[str, float]] = {}
        for name, w, a, seconds in self.rows:
            layers.setdefault(name, {})[str(LayerBits(w, a))] = seconds
        return {"unit": "s", "rest": self.rest_s, "layers": layers, "source": self.source}

    @classmethod
    def from_json(cls, data: Any, source: str = "") -> LatencyTable:
        """Read a table from JSON data.

        Raises:
            SpaceError: Says what is wrong where.
        """
        where = f"The latency table {source}".rstrip()
        allowed = {"unit", "rest", "layers", "source"}
        if not isinstance(data, Mapping) or not {"unit", "layers"} <= set(data) <= allowed:
            raise SpaceError(
                f'{where} is no JSON object with "unit" and "layers" (and perhaps "rest" and '
                '"source"): {"unit": "ms", "layers": {"conv1": {"W8A8": 0.52}}}.'
            )
        unit, layers = _unit(data["unit"], where), data["layers"]
        if not isinstance(layers, Mapping) or not all(
            isinstance(of, Mapping) for of in layers.values()
        ):
            raise SpaceError(f'{where}: "layers" is an object of objects, by layer and by pair.')
        rows = (
            (name, pair, value, f"{where}, layer {name!r}")
            for name, of in layers.items()
            for pair, value in of.items()
        )
        found = _collected((n, *_pair(pair, at), _time(v, unit, at), at) for n, pair, v, at in rows)
        rest = _time(data.get("rest", 0.0), unit, f"{where}, rest", least=0.0)
        return cls(found, rest, str(data.get("source", "")) or source)


def read_latency(path: str | Path) -> LatencyTable:
    """Read a latency table from a CSV or JSON file, by its ending.

    Raises:
        SpaceError: The file cannot be read; a column, unit, pair or time is missing, unknown, given
            twice, not a number, or not above 0.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpaceError(f"The latency table {path} cannot be read: {error}.") from None
    if path.suffix.lower() == ".json":
        try:
            data = json.loads(text)
        except ValueError as error:
            raise SpaceError(f"The latency table {path} is no JSON: {error}.") from None
        return LatencyTable.from_json(data, str(path))
    if path.suffix.lower() == ".csv":
        return _read_csv(text, str(path))
    raise SpaceError(f"A latency table is a .csv or .json file; got {path}.")


def write_latency(table: LatencyTable, path: str | Path) -> None:
    """Write a table as CSV or JSON, by the ending of the file; `read_latency` reads it.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        path.write_text(json.dumps(table.to_json(), indent=1) + "\n", encoding="utf-8")
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow((*_COLUMNS, "s"))
        out.writerows(table.rows)
        if table.rest_s:
            out.writerow((REST, "", "", table.rest_s))


def _read_csv(text: str, source: str) -> LatencyTable:
    where = f"The latency table {source}"
    lines = csv.reader(io.StringIO(text))
    header = [name.strip() for name in next(lines, [])]
    units = [name for name in header if name not in _COLUMNS]
    if len(header) != 4 or set(header) != {*_COLUMNS, *units} or len(units) != 1:
        raise SpaceError(
            f"{where} has the columns {header}; it needs {', '.join(_COLUMNS)} and one of "
            f"{', '.join(_UNITS)}, whose name is the unit."
        )
    unit, rest = _unit(units[0], where), 0.0
    found = list[tuple[str, int, int, float, str]]()
    rests = 0
    for n, line in enumerate(lines, start=2):
        if not any(cell.strip() for cell in line):
            continue
        at = f"{where}, line {n}"
        if len(line) != 4:
            raise SpaceError(f"{at} has {len(line)} cells in place of 4.")
        cells = dict(zip(header, (cell.strip() for cell in line), strict=True))
        if cells["layer"] == REST:
            rest, rests = _time(cells[units[0]], unit, at, least=0.0), rests + 1
            continue
        w, a = (_bits(cells[name], at) for name in _COLUMNS[1:])
        found.append((cells["layer"], w, a, _time(cells[units[0]], unit, at), at))
    if rests > 1:
        raise SpaceError(f"{where} has {REST} {rests} times.")
    return LatencyTable(_collected(found), rest, source)


def _collected(rows: Iterable[tuple[str, int, int, float, str]]) -> tuple[LatencyRow, ...]:
    """Return the rows, where none is given twice and there is any."""
    known: dict[tuple[str, int, int], str] = {}
    found = []
    for layer, w, a, seconds, at in rows:
        if (layer, w, a) in known:
            raise SpaceError(f"{at}: {LayerBits(w, a)} of {layer!r} is given twice.")
        known[layer, w, a] = at
        found.append(LatencyRow(layer, w, a, seconds))
    if not found:
        raise SpaceError("The latency table has no rows.")
    return tuple(found)


def _unit(value: Any, where: str) -> float:
    if value not in _UNITS:
        raise SpaceError(f"{where} has the unit {value!r}; it is one of {', '.join(_UNITS)}.")
    return _UNITS[value]


def _pair(text: str, at: str) -> tuple[int, int]:
    match = _PAIR.fullmatch(text)
    if match is None:
        raise SpaceError(f"{at}: {text!r} is no pair of bits such as W4A8 or WfloatAfloat.")
    return _bits(match[1], at), _bits(match[2], at)


def _bits(text: str, at: str) -> int:
    if text == "float":
        return FLOAT_BITS
    bits = int(text) if text.isascii() and text.isdigit() else 0
    if not (1 <= bits <= MAX_BITS or bits == FLOAT_BITS):
        raise SpaceError(f"{at}: {text!r} is no number of bits from 1 to {MAX_BITS}, nor float.")
    return bits


def _time(value: Any, unit: float, at: str, least: float | None = None) -> float:
    """Return seconds; those of a layer are above 0."""
    try:
        seconds = math.nan if isinstance(value, bool) else float(value) * unit
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise SpaceError(f"{at}: {value!r} is no time. A pair that cannot run is left out.")
    if seconds < 0 or (least is None and seconds == 0):
        raise SpaceError(f"{at}: {value!r} is no time above 0.")
    return seconds


def _some(names: Iterable[str], most: int = 6) -> str:
    """Return the first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
