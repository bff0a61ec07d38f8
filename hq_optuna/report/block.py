"""One titled part of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NOT_MEASURED = "not measured"

Column = tuple[str, Sequence[str]]
"""Title and cells."""


@dataclass(frozen=True, slots=True)
class Block:
    """One titled part of the report."""

    key: str  # short name, for links
    title: str
    columns: Sequence[Column] = ()  # of its table; empty for none
    lines: Sequence[str] = ()  # sentences, one item each
    n_text_columns: int = 1  # how many columns hold words; the others hold numbers
    code: str = ""  # a command to copy
    last_stands_out: bool = False  # the last row sums up the others, or is compared with them

    @property
    def header(self) -> list[str]:
        """Titles of the columns."""
        return [title for title, _ in self.columns]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table."""
        return list(zip(*(cells for _, cells in self.columns), strict=True))


def percent(fraction: float | None) -> str:
    """Return the fraction as ``"24.8 %"``, or "not measured" for ``None``."""
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.1f} %"
