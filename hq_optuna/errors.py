"""Errors that callers may want to catch, all children of `HqOptunaError`.

Each is also a child of the builtin that describes it (``ValueError`` for what was handed in,
``RuntimeError`` for what happened on the way), so code that knows nothing of this package still
catches it. Messages follow one pattern: expected, got, next step.
"""

from __future__ import annotations

import sys
import traceback
from functools import partial
from types import TracebackType
from typing import Any


class HqOptunaError(Exception):
    """Base of every error this package raises on purpose."""


class SpaceError(HqOptunaError, ValueError):
    """The search space is not possible: unknown layer, glob without match, bits out of range."""


class BudgetError(HqOptunaError, ValueError):
    """The budget cannot be met.

    Attributes:
        limit: The cost the user allowed, in the unit of the metric.
        minimum: The cost of the cheapest assignment, in the same unit.
    """

    def __init__(self, message: str, *, limit: float, minimum: float) -> None:
        super().__init__(message)
        self.limit = limit
        self.minimum = minimum

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword arguments are not in `args`; without this the error could not leave a process.
        return partial(type(self), limit=self.limit, minimum=self.minimum), self.args


class SettingError(HqOptunaError, ValueError):
    """A setting has a value that it cannot have."""


class HardwareError(HqOptunaError, ValueError):
    """A description of hardware cannot be read, or asks for what the quantizers cannot do."""


class NetworkError(HqOptunaError, ValueError):
    """The network cannot be searched: nothing to quantize, NaN weights, random forward."""


class DataError(HqOptunaError, ValueError):
    """Calibration or validation data are unusable: empty, unlabelled, NaN, labels out of range."""


class StudyFileError(HqOptunaError, ValueError):
    """A study file is missing, cannot be imported, or lacks a function it must define."""


class RecipeError(HqOptunaError, ValueError):
    """A result cannot be saved, or is incomplete, altered, or of another network."""


class ExportError(HqOptunaError, ValueError):
    """A network cannot be written in a format, or what was written computes something else."""


class ResumeError(HqOptunaError, ValueError):
    """An existing study does not belong to this search.

    Attributes:
        changed: Names of the parts that differ, for example ``("network", "budget")``.
    """

    def __init__(self, message: str, *, changed: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.changed = changed


class TargetError(HqOptunaError, ValueError):
    """No assignment is surely within a target.

    Attributes:
        needed: How many validation samples would tell; ``None`` where these tell that none is.
    """

    def __init__(self, message: str, *, needed: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed


class CheckpointError(HqOptunaError, ValueError):
    """A training checkpoint is damaged, or belongs to another training."""


class TrainingError(HqOptunaError, RuntimeError):
    """Training cannot go on: the loss is NaN or infinite, or nothing is left to train."""


class StorageError(HqOptunaError, RuntimeError):
    """The storage could not be opened, read or written. Never carries a password."""


class ArtifactError(HqOptunaError, RuntimeError):
    """An artifact is missing, is not what was stored, or its store cannot be used."""


class WorkerError(HqOptunaError, RuntimeError):
    """Workers cannot go on; carries what they said."""


class DashboardError(HqOptunaError, RuntimeError):
    """The dashboard cannot be started: not installed, or its port is taken."""


class ScoreError(HqOptunaError, RuntimeError):
    """A score came out as NaN or infinity, so candidates cannot be ranked."""


TRUSTED = {"hq_optuna", "optuna", "sqlalchemy", "typer", "click", "rich", *sys.stdlib_module_names}
"""Packages whose own words are meant for whoever typed a command."""


def calling_user_code(trace: TracebackType | None) -> str:
    """Return which function of this package called code of others that raised an error.

    Empty where the error is this package's own, or of a library that speaks for it.
    """
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    ours = [place for place, name in enumerate(names) if name.partition(".")[0] == "hq_optuna"]
    if not ours or all(name.partition(".")[0] in TRUSTED for name in names[ours[-1] :]):
        return ""
    return f"{names[ours[-1]]}.{frames[ours[-1]].f_code.co_name}"


def note_caller(error: Exception) -> bool:
    """Note on an error of the user's code, once, which function of this package called it.

    Returns whether it is one; errors of this package stay as they are.
    """
    if isinstance(error, HqOptunaError) or not (caller := calling_user_code(error.__traceback__)):
        return False
    note = f"hq_optuna called the code that raised this from {caller}."
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
    return True
