"""Draws the rooms of the package from the table of imports in tests/test_architecture.py.

    python -m docs.drawing

writes docs/concepts/rooms.svg. A room stands above all rooms that it may import. Lines show the
imports that no other path of imports implies. The rooms at the bottom have no lines: nearly every
room imports them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from pathlib import Path

from tests.test_architecture import BASE, BOTH, FACE, OPTUNA, PLAIN, ROOMS, TORCH

TARGET = Path(__file__).parent / "concepts" / "rooms.svg"
WIDTH, BOX_WIDTH, BOX_HEIGHT, ROW = 900, 112, 30, 66
KINDS = {
    "standard library only": (BASE, "#e8e8e8"),
    "NumPy and SciPy": (PLAIN, "#f7e3af"),
    "PyTorch": (TORCH, "#f9cdb8"),
    "Optuna": (OPTUNA, "#c3dcf3"),
    "both": (BOTH, "#d9c9ec"),
    "command line": (("cli",), "#c9e6c4"),
}

Rooms = Mapping[str, Set[str]]


def levels(rooms: Rooms) -> dict[str, int]:
    """Return how high each room stands: above every room that it imports."""

    @functools.cache
    def level(room: str) -> int:
        return 1 + max((level(below) for below in rooms[room] if below in rooms), default=-1)

    return {room: level(room) for room in rooms}


def needed(rooms: Rooms) -> list[tuple[str, str]]:
    """Return the imports that do not follow from others, as pairs (importer, imported)."""

    @functools.cache
    def reached(room: str) -> frozenset[str]:
        below = rooms[room] & rooms.keys()
        return frozenset(below).union(*(reached(other) for other in below))

    return [
        (room, below)
        for room in rooms
        for below in sorted(rooms[room] & rooms.keys())
        if not any(below in reached(other) for other in rooms[room] & rooms.keys() - {below})
    ]


def places(rooms: Rooms) -> dict[str, tuple[float, float]]:
    """Return the centre of each room: PyTorch's left, Optuna's right, the others in the middle."""
    shares: dict[tuple[int, float], list[str]] = {}
    for room, level in levels(rooms).items():
        centre = 0.18 if room in TORCH else 0.8 if room in OPTUNA else 0.47
        shares.setdefault((level, centre), []).append(room)
    top = max(level for level, _ in shares)
    return {
        room: (
            WIDTH * centre + (i - (len(names) - 1) / 2) * (BOX_WIDTH + 16),
            ROW * (top - level) + 30,
        )
        for (level, centre), names in shares.items()
        for i, room in enumerate(sorted(names))
    }


def draw(table: Rooms) -> str:
    """Return the drawing as SVG."""
    kind_of = {room: kind for kind, (names, _) in KINDS.items() for room in names}
    base = [room for room in BASE if room in table]
    rooms = {
        room: below - {*base}
        for room, below in table.items()
        if room not in (FACE, "__main__", *base)
    }
    place = places(rooms)
    bottom = max(y for _, y in place.values()) + ROW
    lines, boxes = [], []
    for upper, lower in needed(rooms):
        (x1, y1), (x2, y2) = place[upper], place[lower]
        lines.append(
            f'<path d="M{x1:.0f} {y1 + BOX_HEIGHT / 2:.0f} L{x2:.0f} {y2 - BOX_HEIGHT / 2:.0f}"/>'
        )
    for i, room in enumerate(base):  # nearly every room imports these: no lines
        place[room] = (WIDTH * (i + 0.5) / len(base), bottom)
    for room, (x, y) in place.items():
        colour = KINDS[kind_of.get(room, "both")][1]
        boxes.append(
            f'<rect x="{x - BOX_WIDTH / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" rx="5" '
            f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}" fill="{colour}"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}">{room}</text>'
        )
    for i, (kind, (_, colour)) in enumerate(KINDS.items()):
        x = 20 + i * (WIDTH - 40) / len(KINDS)
        boxes.append(
            f'<rect x="{x:.0f}" y="{bottom + 34:.0f}" width="14" height="14" fill="{colour}"/>'
            f'<text x="{x + 20:.0f}" y="{bottom + 46:.0f}" text-anchor="start">{kind}</text>'
        )
    height = bottom + 60
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            'font-family="sans-serif" font-size="13" text-anchor="middle">',
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
            '<g stroke="#8a8a8a" fill="none">',
            *lines,
            '</g>\n<g stroke="none" fill="#202020">',
            *boxes,
            "</g>\n</svg>\n",
        ]
    )


if __name__ == "__main__":
    TARGET.write_text(draw(ROOMS), encoding="utf-8")
    print(TARGET)
