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
    def of(
        cls,
        study: str,
        storage: str | None,
        name: str | None,
        folder: Path | None,
        *,
        reads: bool = False,
    ) -> Place:
        """Return the place of a run; what is not given follows from the study's name.

        Args:
            study: Study file or its name.
            storage: Storage URL or ``None``.
            name: Name of the study or ``None``.
            folder: The run's folder or ``None``.
            reads: Whether nothing is made there. A study of a storage that is given may then have
                any name, such as one that was started from Python.

        Raises:
            StudyFileError: A run's folder cannot have the study's name.
        """
        name = Path(study).stem if name is None else name
        named_after = folder is None and not (reads and storage is not None)
        if not name or (named_after and name != Path(name).name):
            raise StudyFileError(
                f"{name!r} is no name for a study: it names a folder of its own. "
                "Give the run another folder (--folder)."
            )
        folder = RUNS / name if folder is None else folder
        return cls(name, folder, sqlite_url(folder / "study.db") if storage is None else storage)
