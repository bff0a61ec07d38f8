"""What `run`, `worker` and `launch` begin with: the study file's parts, and the search of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from rich.console import Console

from hq_optuna import attributes
from hq_optuna.artifacts.store import Artifacts, open_artifacts
from hq_optuna.cli import tables
from hq_optuna.cli.place import Place
from hq_optuna.cli.settings import n_cores, read_settings, sensible_threads
from hq_optuna.errors import StorageError, StudyFileError
from hq_optuna.protocol.start_options import StartOptions
from hq_optuna.search import Limits
from hq_optuna.space.cost import macs
from hq_optuna.storages import explain_storage_errors, load_study, redact_url, study_exists
from hq_optuna.study_files.study_file import StudyFile, StudyParts, find_study

if TYPE_CHECKING:
    from hq_optuna.bit_search import BitSearch
    from hq_optuna.protocol.step_log import StepLog

LONGEST_PAUSE_S = 5.0
"""Between two looks for a study that does not exist yet."""


LIMITS = ("max_trials", "max_evaluations", "max_seconds")
"""Options of `Limits`; unlike settings of the search they may be raised later."""


@dataclass(frozen=True)
class Request:
    """What a user asked for.

    Attributes:
        study: Study file or its name.
        arguments: Options of the study file as typed.
        storage: Storage URL or ``None``.
        name: Name of the study or ``None``.
        folder: The run's folder or ``None``.
        artifacts: Folder or URL of the artifact store, or ``None`` for the study's own, or else
            one in the run's folder.
        given: Search settings from the command line; the study's and the file's fill the rest.
        threads: Threads of PyTorch.
        retry_for_s: How long a storage that does not answer is tried again.
        command: The whole command, which the study remembers.
        device: Where the network runs, or ``None`` for where the study file puts it. The study
            does not remember it: who resumes may have another.
    """

    study: str
    arguments: Sequence[str]
    storage: str | None
    name: str | None
    folder: Path | None
    artifacts: str | None
    given: Mapping[str, Any]
    threads: int | None
    retry_for_s: float
    command: str = ""
    device: str | None = None

    def find(self) -> tuple[StudyFile, Place]:
        """Return the study file, and where its run keeps what it makes.

        Raises:
            StudyFileError: There is no such file, or it cannot be used.
        """
        file = StudyFile.load(find_study(self.study))
        taken = sorted(RESERVED & set(file.options))
        if taken:
            raise StudyFileError(
                f"{file.path}: the option {taken[0]!r} is one of hq-optuna run's own, which would "
                "take its value. Give the study's parameter another name."
            )
        return file, Place.of(file.path.name, self.storage, self.name, self.folder)


RESERVED = {
    *("storage", "name", "folder", "artifacts", "budget", "candidates", "rule", "scorer", "bits"),
    *("activation_bits", "pin_first_last", "seed", "refine", "rounding", "correction"),
    *("precision", "threads", "device", "max_trials", "max_evaluations", "max_seconds"),
    *("train_every", "train_epochs", "final_epochs"),
    *("retry_for", "create", "wait_for", "workers", "scheduler", "json", "help"),
    "quantizer",
}
"""Options of ``hq-optuna run``, ``worker`` and ``launch``; a study file's own have other names."""


@dataclass(frozen=True)
class Session:
    """A study file's network and data, and the search of them, before any work.

    Attributes:
        file: The study file.
        place: Where the run keeps what it makes.
        parts: What the study file's functions returned.
        search: The search.
        searching: Arguments of `BitSearch.open` that were given.
        artifacts: The artifact store.
        limits: What the search may spend, where that was given.
        started: What to remember of the command line, if the study is new.
        retry_for_s: How long a storage that does not answer is tried again.
        threads: Threads that are of use for this network, or as given.
    """

    file: Path
    place: Place
    parts: StudyParts
    search: BitSearch
    searching: Mapping[str, Any]
    artifacts: Artifacts
    limits: Limits | None
    started: StartOptions
    retry_for_s: float
    threads: int

    def open(self, **options: Any) -> optuna.Study:
        """Open the study of the search, made if need be; see `BitSearch.open`.

        Raises:
            StorageError: The storage cannot be opened, read or written.
            ResumeError: The study belongs to another search.
        """
        return self.search.open(
            self.place.storage,
            self.place.name,
            artifacts=self.artifacts,
            limits=self.limits,
            retry_for_s=self.retry_for_s,
            started=self.started,
            **self.searching,
            **options,
        )

    def log(self, study: optuna.Study) -> StepLog:
        """Return the record of a search that `open` returned, as it stands now."""
        from hq_optuna.samplers import ProgressiveBitSampler

        assert isinstance(study.sampler, ProgressiveBitSampler)
        return study.sampler.log(study)


def begin(request: Request, console: Console) -> Session:
    """Import the study file, build network and data, and check all that can be wrong with them.

    Nothing is created in the storage. What the study was started with, where it exists, fills in
    what was not given.

    Raises:
        HqOptunaError: Of the kind of what is wrong.
    """
    file, place = request.find()
    own = [f"--{name.replace('_', '-')}" for name in (*RESERVED, "no_refine", "no_correction")]
    given_options = file.given_options(request.arguments, beside=own)
    stored = StartOptions()
    if study_exists(place.storage, place.name):
        stored = StartOptions.read(load_study(place.storage, place.name))
    options = file.complete({**file.stored_options(stored.options), **given_options})
    given = {k: v for k, v in request.given.items() if k not in LIMITS}
    limits = {k: v for k, v in request.given.items() if k in LIMITS}
    if request.artifacts is not None:
        location = request.artifacts
        if "://" not in location:  # a folder, which is to be found from another one too
            location = str(Path(location).absolute())
        given["artifacts"] = location
    settings = read_settings({**file.settings, **stored.settings, **given})
    artifacts = open_artifacts(str(settings.pop("artifacts", place.folder / "artifacts")))
    of_search = ("n_candidates", "rule", "seed", "refine")
    searching = {name: settings.pop(name) for name in of_search if name in settings}

    console.print(
        f"[bold]{tables.plain(place.name)}[/]  {tables.plain(file.doc)}",
        highlight=False,
        soft_wrap=True,
    )
    _say_what_the_study_says(console, stored, given_options, given)
    with console.status("loading PyTorch and the study's network and data"):
        import torch

        from hq_optuna.bit_search import BitSearch
        from hq_optuna.network.devices import move_to
        from hq_optuna.training.plan import SETTINGS, plan_of

        torch.set_num_threads(request.threads or n_cores())
        # Failed trials show as errors of ours; Optuna would add its traceback to each.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        parts = file.build(place.folder, options)
        if request.device is not None:
            move_to(parts.network, request.device)
        if parts.loss is not None:
            settings["loss_fn"] = parts.loss
        if parts.output_rise is not None:
            settings["output_rise"] = parts.output_rise
        asked = {name: settings.pop(name) for name in SETTINGS if name in settings}
        search = BitSearch(
            parts.network,
            parts.calibration,
            validation=parts.validation,
            evaluate=parts.evaluate,
            training=plan_of(asked, parts.train, parts.augment, typed=request.given),
            **settings,
        )
        threads = request.threads or sensible_threads(macs(search.space.layers))
        torch.set_num_threads(threads)
    tables.opening(console, search, place)
    for warning in search.objective.warnings:
        console.print(
            f"[yellow]Warning:[/] {tables.plain(warning)}", highlight=False, soft_wrap=True
        )
    return Session(
        file.path,
        place,
        parts,
        search,
        searching,
        artifacts,
        Limits(**limits) if limits else None,
        StartOptions.of(given, given_options, request.command),
        request.retry_for_s,
        threads,
    )


def _say_what_the_study_says(
    console: Console,
    stored: StartOptions,
    given_options: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    taken = {k: v for k, v in stored.settings.items() if k not in given}
    taken |= {k: v for k, v in stored.options.items() if k not in given_options}
    if taken:
        words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in taken.items())
        console.print(f"as the study says: {tables.plain(words)}", highlight=False, soft_wrap=True)


def wait_for_study(place: Place, seconds: float) -> None:
    """Wait until the study exists and its sensitivities are measured.

    A study that exists is joined when the time is over, measured or not: whoever measures may have
    died, and a worker can do it as well.

    Args:
        place: Where the study is.
        seconds: How long to wait; 0 for a look.

    Raises:
        StorageError: The study does not exist by then, or its storage cannot be opened.
    """
    until, pause_s = time.monotonic() + seconds, 0.1
    found: optuna.Study | None = None  # opened once, as servers have few connections
    while True:
        last = time.monotonic() >= until
        try:
            with explain_storage_errors(redact_url(place.storage)):
                if found is None and study_exists(place.storage, place.name):
                    found = load_study(place.storage, place.name)
                if found is not None and attributes.INFO in found.user_attrs:
                    return
        except KeyError:  # deleted meanwhile
            found = None
        except StorageError:
            found = None
            if last:
                raise
        if last and found is not None:
            return
        if last:
            waited = f" after {seconds:g} s" if seconds else ""
            raise StorageError(
                f"{redact_url(place.storage)} holds no study {place.name!r}{waited}. Start it with "
                "hq-optuna run or launch, or let this worker start it (--create) or wait for it "
                "(--wait-for SECONDS)."
            )
        time.sleep(min(pause_s, max(0.0, until - time.monotonic())))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
