"""Where a run keeps what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hq_optuna.errors import StudyFileError
from hq_optuna.storages import sqlite_url

RUNS = Path("hq-optuna-runs")


@dataclass(frozen=True)
class Place:
    """Where a run keeps what it makes.

    Attributes:
        name: Name of the study.
        folder: Report, result, and the study file's own files.
        storage: Storage URL.
    """

    name: str
    folder: Path
    storage: str

    @classmethod
    def of(cls, study: str, storage: str | None, name: str | None, folder: Path | None) -> Place:
        """Return the place of a run; what is not given follows from the study's name."""
        name = Path(study).stem if name is None else name
        if not name or name != Path(name).name:
            raise StudyFileError(f"{name!r} is no name for a study: it names a folder of its own.")
        folder = RUNS / name if folder is None else folder
        return cls(name, folder, sqlite_url(folder / "study.db") if storage is None else storage)
