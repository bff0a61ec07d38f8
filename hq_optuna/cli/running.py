"""``hq-optuna run``: from a study file to a result, a report and a recipe on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from rich.console import Console

from hq_optuna.artifacts import attach, open_artifacts
from hq_optuna.cli import show
from hq_optuna.cli.progress import SearchProgress
from hq_optuna.cost import Budget, macs
from hq_optuna.errors import SpaceError, StudyFileError
from hq_optuna.layers import FLOAT_BITS
from hq_optuna.runner.budget_text import parse_budget
from hq_optuna.runner.study_file import StudyFile, find_study
from hq_optuna.storages import sqlite_url, study_exists

RUNS = Path("hq-optuna-runs")
RESERVED = {
    *("storage", "name", "folder", "artifacts", "budget", "candidates", "rule", "scorer", "bits"),
    *(
        "activation_bits",
        "pin_first_last",
        "seed",
        "refine",
        "rounding",
        "correction",
        "threads",
        "json",
        "help",
    ),
}
"""Options of ``hq-optuna run``, which a study file's own may not be called."""


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


def run(
    study: str,
    arguments: Sequence[str],
    *,
    storage: str | None,
    name: str | None,
    folder: Path | None,
    given: Mapping[str, Any],
    artifacts: str | None,
    threads: int | None,
    command: str,
    console: Console,
) -> dict[str, Any]:
    """Run a study file's search and show it; return the report as JSON data.

    Args:
        study: Study file or its name.
        arguments: Options of the study file as typed.
        storage: Storage URL or ``None``.
        name: Name of the study or ``None``.
        folder: The run's folder or ``None``.
        given: Search settings from the command line; the study file's own fill the rest.
        artifacts: Folder or URL of the artifact store, or ``None`` for one in the run's folder.
        threads: Threads of PyTorch.
        command: The command, for the report.
        console: Where to show progress and result.
    """
    file = StudyFile.load(find_study(study))
    place = Place.of(file.path.name, storage, name, folder)
    taken = sorted(RESERVED & set(file.options))
    if taken:
        raise StudyFileError(
            f"{file.path}: the option {taken[0]!r} is one of hq-optuna run's own, which would take "
            "its value. Give the study's parameter another name."
        )
    options = file.parse_options(arguments)
    settings = read_settings({**file.settings, **given})
    of_search = ("n_candidates", "rule", "seed", "refine")
    searching = {name: settings.pop(name) for name in of_search if name in settings}

    store = open_artifacts(place.folder / "artifacts" if artifacts is None else artifacts)

    console.print(
        f"[bold]{show.plain(place.name)}[/]  {show.plain(file.doc)}",
        highlight=False,
        soft_wrap=True,
    )
    with console.status("loading PyTorch and the study's network and data"):
        import torch

        from hq_optuna.runner.bit_search import BitSearch
        from hq_optuna.runner.report import report_data, write_report

        torch.set_num_threads(threads or n_cores())
        # Failed trials show as errors of ours; Optuna would add its traceback to each.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        parts = file.build(place.folder, options)
        if parts.loss is not None:
            settings["loss_fn"] = parts.loss
        search = BitSearch(
            parts.network,
            parts.calibration,
            validation=parts.validation,
            evaluate=parts.evaluate,
            **settings,
        )
        torch.set_num_threads(threads or sensible_threads(macs(search.space.layers)))
    show.opening(console, search, place)
    for warning in search.objective.warnings:
        console.print(f"[yellow]Warning:[/] {show.plain(warning)}", highlight=False, soft_wrap=True)
    existed = study_exists(place.storage, place.name)
    with SearchProgress(console, search.space, search.budget) as progress:
        found = search.optimize(
            place.storage,
            place.name,
            **searching,
            artifacts=store,
            progress=progress.phase,
            on_progress=progress.search,
        )
    if existed:
        console.print(
            "This search was finished before; nothing was changed."
            if progress.was_finished
            else f"Went on at step {progress.first_step}, after {progress.first_candidates} "
            "candidates of an earlier run.",
            highlight=False,
            soft_wrap=True,
        )
    with console.status("measuring on validation and test data"):
        result = search.result(found, test=parts.test)
    report, saved = place.folder / "report.html", place.folder / "result"
    if not (existed and progress.was_finished and report.exists() and saved.exists()):
        result.save(saved)
        write_report(found, report, command=command)
        page = store.put(report.read_bytes())
        attach(found, "report", page, filename="report.html", mimetype="text/html")
    show.result(console, found)
    console.print(
        f"Report: {report}\nResult: {saved}  (hq_optuna.load)", highlight=False, soft_wrap=True
    )
    return {**report_data(found, command=command), "report": str(report), "result": str(saved)}


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
        read["pin_first_last"] = None if pin == "none" else parse_bits(pin)[0]
    return read


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
                bits.append(FLOAT_BITS)
            else:
                bits += range(int(low), int(high) + 1) if dash else [int(low)]
        except ValueError:
            raise SpaceError(f"{text!r} are no bits. Write 2-8, or 8,4,2.") from None
    if not bits:
        raise SpaceError(f"{text!r} are no bits. Write 2-8, or 8,4,2.")
    return tuple(bits)
