"""What `run`, `worker` and `launch` begin with: the study file's parts, and the search of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from rich.console import Console
from rich.markup import escape

from hq_optuna import attributes
from hq_optuna.artifacts.store import Artifacts, open_artifacts
from hq_optuna.cli import tables
from hq_optuna.cli.options import Given, Place, command_line, own_options, place_of, say
from hq_optuna.errors import StorageError, StudyFileError
from hq_optuna.protocol.start_options import StartOptions
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.search import Limits
from hq_optuna.settings import RunSettings, SearchSettings
from hq_optuna.space.cost import macs
from hq_optuna.storages import (
    explain_storage_errors,
    load_study,
    redact_url,
    refuse_read_only,
    study_exists,
)
from hq_optuna.study_files.options import parse
from hq_optuna.study_files.study_file import StudyFile, StudyParts, find_study

if TYPE_CHECKING:  # these load torch
    from hq_optuna.training.data import Augment
    from hq_optuna.training.plan import TrainingPlan

LONGEST_PAUSE_S = 5.0
"""Between two looks for a study that does not exist yet."""


@dataclass(frozen=True)
class Session:
    """A study file's network and data, and the `hq_optuna.BitSearch` of them, before any work.

    `arguments` are the study file's options as typed, `run` says where to run as given, and
    `start` is what a new study remembers of the command line. `threads` are as many as this network
    keeps busy, or as given.
    """

    file: Path
    arguments: Sequence[str]
    run: RunSettings
    place: Place
    parts: StudyParts
    search: Any
    artifacts: Artifacts
    start: StartOptions
    threads: int

    def open(self, progress: Callable[[str, int, int], None] | None) -> optuna.Study:
        """Open the study of the search, made if need be; see `BitSearch.open`.

        Without ``progress`` it is not prepared.

        Raises:
            StorageError: The storage cannot be opened, read or written.
            ResumeError: The study belongs to another search.
        """
        run = self.run
        limits = Limits(run.max_trials, run.max_evaluations, run.max_seconds)
        study: optuna.Study = self.search.open(
            self.place.storage,
            self.place.name,
            artifacts=self.artifacts,
            limits=None if limits == Limits() else limits,
            retry_for_s=run.retry_for,
            start=self.start,
            progress=progress,
            prepare=progress is not None,
        )
        return study

    def log(self, study: optuna.Study) -> StepLog:
        """Return the record of a search that `open` returned, as it stands now."""
        assert isinstance(study.sampler, ProgressiveBitSampler)
        return study.sampler.log(study)


def find(study: str, run: RunSettings) -> tuple[StudyFile, Place]:
    """Return the study file of this path or name, and where its run keeps what it makes.

    Raises:
        StudyFileError: There is no such file, or it cannot be used.
    """
    file = StudyFile.load(find_study(study))
    taken = sorted({option.flag for option in file.options.values()} & set(own_options()))
    if taken:
        name = taken[0].removeprefix("--").replace("-", "_")
        raise StudyFileError(
            f"{file.path}: the option {name!r} is one of hq-optuna run's own, which would "
            "take its value. Give the study's parameter another name."
        )
    return file, place_of(file.path.name, run)


def begin(
    study: str,
    arguments: Sequence[str],
    run: RunSettings,
    given: Given,
    console: Console,
    cut: Callable[[StudyParts], StudyParts] = lambda parts: parts,
) -> Session:
    """Import the study file, build network and data, and check all that can be wrong with them.

    Nothing is created in the storage. Options of the study file (`arguments`) and settings of the
    search (`given`) that are not given come from the study, where it exists, then from the file.
    ``cut`` returns the parts of the study file to go on with.

    Raises:
        HqOptunaError: Of the kind of what is wrong.
    """
    file, place = find(study, run)
    refuse_read_only(place.storage)
    given_options = parse(file.options, arguments, file.path.name, beside=own_options())
    stored = StartOptions()
    if study_exists(place.storage, place.name):
        stored = StartOptions.read(load_study(place.storage, place.name))
    options = file.complete({**file.stored_options(stored.options), **given_options})
    typed = dict(given)
    if run.artifacts is not None:
        location = run.artifacts  # a folder is to be found from others, too
        typed["artifacts"] = location if "://" in location else str(Path(location).absolute())
    kept = {name: value for name, value in stored.settings.items() if name not in typed}
    chosen = {**file.settings, **kept, **typed}
    artifacts_at = chosen.pop("artifacts", None) or place.folder / "artifacts"
    settings = SearchSettings().replace(**chosen)
    artifacts = open_artifacts(str(artifacts_at))

    say(console, f"[bold]{escape(place.name)}[/]  {escape(file.doc)}")
    taken = kept | {k: v for k, v in stored.options.items() if k not in given_options}
    if taken:
        words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in taken.items())
        say(console, f"as the study says: {escape(words)}")
    with console.status("loading PyTorch and the study's network and data"):
        parts, search, threads = _load(file, place, run, options, settings, given, cut)
    tables.opening(console, search.space, search.budget, search.objective.skipped, place)
    for warning in search.objective.warnings:
        say(console, f"[yellow]Warning:[/] {escape(warning)}")
    start = StartOptions.of(typed, given_options, command_line())
    return Session(file.path, arguments, run, place, parts, search, artifacts, start, threads)


def _load(
    file: StudyFile,
    place: Place,
    run: RunSettings,
    options: Mapping[str, Any],
    settings: SearchSettings,
    given: Given,
    cut: Callable[[StudyParts], StudyParts],
) -> tuple[StudyParts, Any, int]:
    """Return the study file's parts, the search of them, and how many threads are of use."""
    import torch  # here, so that wrong options are told before it is loaded

    from hq_optuna.bit_search import BitSearch
    from hq_optuna.network.devices import move_to

    torch.set_num_threads(run.threads or n_cores())
    # Failed trials show as errors of ours; Optuna would add its traceback to each.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parts = file.build(place.folder, options)
    if run.device is not None:
        move_to(parts.network, run.device)
    parts = cut(parts)
    search = BitSearch(
        parts.network,
        parts.calibration,
        *(() if parts.loss is None else (parts.loss,)),
        settings=settings,
        rise=parts.rise,
        validation=parts.validation,
        evaluate=parts.evaluate,
        training=plan_of(settings, parts.train, parts.augment, typed=given),
    )
    threads = run.threads or sensible_threads(macs(search.space.layers))
    torch.set_num_threads(threads)
    return parts, search, threads


def plan_of(
    given: SearchSettings,
    train: Callable[[], Any] | None,
    augment: Augment | None,
    typed: Collection[str] = (),
) -> TrainingPlan | None:
    """Return the training plan from settings, or ``None`` where they ask for no training.

    ``train`` returns the training data and is called only where they are needed. ``typed`` names
    the settings from the command line: ``train_epochs`` alone is refused there, while a study file
    may give it for runs that do train.

    Raises:
        StudyFileError: Training is asked for without training data or without saying when to
            train, or a setting is not understood.
        DataError: Unusable training data.
    """
    from hq_optuna.training.plan import FINAL_EPOCHS, STEP_EPOCHS, TrainingPlan
    from hq_optuna.training.settings import TrainingSettings

    every, final = given.train_every, given.final_epochs
    if final is None:
        final = FINAL_EPOCHS if every else 0
    if not every and "train_epochs" in typed:
        raise StudyFileError(
            "--train-epochs is of winners, and without --train-every none is trained. Say after "
            "how many steps theirs is (--train-every 4), or train the answer alone "
            "(--final-epochs 20, without --train-epochs)."
        )
    if not every and not final:
        return None
    if train is None:
        raise StudyFileError(
            "Training (--train-every, --final-epochs) needs data: let the study file define "
            "train(), which returns (inputs, labels), a Dataset or batches."
        )

    def settings(epochs: int, *names: str) -> TrainingSettings:
        # A short training has no epoch to spare for warming up.
        found: dict[str, Any] = {"warmup_epochs": 0.0} if epochs == 1 else {}
        for name in names:
            further = getattr(given, name)
            if "epochs" in further:
                raise StudyFileError(
                    f"Give train_epochs and final_epochs instead of {name}['epochs']."
                )
            found |= further
        try:
            return TrainingSettings.from_json({**found, "epochs": epochs})
        except (TypeError, ValueError) as error:
            said = " and ".join(f"SETTINGS[{name!r}]" for name in names if getattr(given, name))
            raise StudyFileError(f"{said or 'Training'}: {error}") from None

    return TrainingPlan(
        data=train(),
        every=every,
        settings=settings(given.train_epochs or STEP_EPOCHS, "training"),
        final=settings(final, "training", "final_training") if final else None,
        augment=augment,
    )


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


def _is_told(study: optuna.Study) -> bool:
    return not {attributes.FINGERPRINT, attributes.INFO}.isdisjoint(study.user_attrs)


def wait_for_study(place: Place, seconds: float) -> None:
    """Wait until the study exists and says of which search it is; with 0 seconds, look once.

    A study that exists is joined when the time is over all the same: the process that made it may
    have died, and a worker can go on as well.

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
                if found is not None and (_is_told(found) or last):
                    return
        except KeyError:  # deleted meanwhile
            found = None
        except StorageError:
            found = None
            if last:
                raise
        if last:
            waited = f" after {seconds:g} s" if seconds else ""
            raise StorageError(
                f"{redact_url(place.storage)} holds no study {place.name!r}{waited}. Start it with "
                "hq-optuna run or launch, or let this worker start it (--create) or wait for it "
                "(--wait-for SECONDS)."
            )
        time.sleep(min(pause_s, max(0.0, until - time.monotonic())))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
