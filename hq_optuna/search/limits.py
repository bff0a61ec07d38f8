"""`Limits`: what a search may spend on itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hq_optuna.space.layers import is_whole


@dataclass(frozen=True)
class Limits:
    """How much a search may do before it ends without having met its budget.

    A step begins only if all of it is allowed, counted over what the record holds (failed, repeated
    and unneeded trials do not count). So with ``max_trials`` (candidates and step records) and
    ``max_evaluations`` (candidates) the history is the beginning of the unlimited search's, for any
    workers, and continues from there when they are raised. With ``max_seconds``, of all workers'
    trials together, it depends on the machine. A limit is positive.
    """

    max_trials: int | None = None
    max_evaluations: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} is a positive number; got {value}.")
            if value is not None:  # plain numbers, so that JSON can hold them
                object.__setattr__(self, name, int(value) if is_whole(value) else float(value))

    def forbid_step(self, n_candidates: int, n_evaluations: int, n_steps: int) -> str | None:
        """Return the limit that a step would exceed, in words, or ``None``.

        The step has ``n_candidates``; ``n_evaluations`` candidates and ``n_steps`` steps were
        before.
        """
        evaluations = n_evaluations + n_candidates
        if self.max_evaluations is not None and evaluations > self.max_evaluations:
            return f"at most {self.max_evaluations} evaluations (--max-evaluations)"
        if self.max_trials is not None and evaluations + n_steps + 1 > self.max_trials:
            return f"at most {self.max_trials} trials (--max-trials)"
        return None

    def forbid_second(self, seconds: float) -> str | None:
        """Return the limit that more work would exceed, in words, or ``None``."""
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return f"at most {self.max_seconds:g} s of work (--max-seconds)"
        return None

    def raised_to(self, other: Limits) -> Limits:
        """Return the larger of both in each; what only one of them limits is limited."""
        mine, theirs = asdict(self), asdict(other)
        return Limits(
            **{
                name: max((v for v in (mine[name], theirs[name]) if v is not None), default=None)
                for name in mine
            }
        )

    def lowered_by(self, other: Limits) -> tuple[str, ...]:
        """Return the names of the limits that another one would lower."""
        mine, theirs = asdict(self), asdict(other)
        return tuple(
            name
            for name in mine
            if None not in (mine[name], theirs[name]) and theirs[name] < mine[name]
        )

    def to_json(self) -> dict[str, float]:
        """Return the limits there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Any) -> Limits:
        """Rebuild from `to_json`; what is not understood is no limit."""
        if not isinstance(data, Mapping):
            return cls()
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
