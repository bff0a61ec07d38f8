"""`PageWriter`: keeps what the dashboard shows current, off the path of the workers."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study

from hq_optuna.dashboard.pages import STAMP, unwrapped, write_pages, write_preparation
from hq_optuna.optuna_internals import database_of, id_of, storage_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.status import StatusReader, read_status
from hq_optuna.protocol.step_log import StepLog

logger = logging.getLogger(__name__)

EVERY_S = 10.0
"""Least time between two writings, of all processes together."""

REST = 20
"""A pause is this many times as long as the writing before it: a twentieth of a core at most."""

LONGEST_WAIT_S = 30.0
"""How long the end of a search waits for a writing that is under way."""

_said = threading.Event()


class PageWriter:
    """Writes a study's pages while this process works on it; hand it to `work` as ``on_progress``.

    Of all processes of a search the one that recorded the last step writes, so there is nothing to
    agree on, and no writer to replace when it dies. It writes in a thread of its own, at most every
    `EVERY_S` seconds; the last state is written when the search ends. Nothing here waits for the
    storage on the worker's path, and no error of it ends a search.

    A study that lives in memory has no pages, nor has one with ``on=False``. A launcher writes
    ``always``, even if another process recorded the last step. ``then`` is also called with the
    record of the search, first.

    Example:
        >>> from hq_optuna.dashboard import PageWriter
        >>> with PageWriter(study) as pages:  # doctest: +SKIP
        ...     search.work(study, on_progress=pages)
    """

    def __init__(
        self,
        study: Study,
        *,
        always: bool = False,
        every_s: float = EVERY_S,
        then: Callable[[StepLog], None] = lambda log: None,
        on: bool = True,
    ) -> None:
        self._name = study.study_name
        self._storage = unwrapped(storage_of(study))
        self._on = on and not lives_in_memory(self._storage)
        self._then = then
        self._always = always
        self._every_s = every_s
        self._thread: threading.Thread | None = None
        self._not_before = -float("inf")
        self._mine = always
        self._last: tuple[int, bool] | None = None  # what the last writing saw
        self._watch: StatusReader | None = None
        self._warned = False
        if self._on:
            say_how_to_look()

    def __call__(self, log: StepLog) -> None:
        """Take notice of where the search stands; begin to write if that is due. Never waits."""
        self._then(log)
        if not self._on:
            return
        last = log.closed[-1] if log.closed else None
        self._mine = self._always or last is None or last.worker == worker_identity.worker_id()
        now = (len(log.closed), log.open is None)
        if not self._mine or now == self._last or time.monotonic() < self._not_before:
            return
        if self._thread is not None and self._thread.is_alive():
            return
        self._last = now
        self._thread = threading.Thread(target=self._write, name="pages", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write the last state, if that is this process's to do."""
        if self._thread is not None:
            self._thread.join(LONGEST_WAIT_S)
        if self._on and self._mine:
            self._write(last=True)
        self._on = False

    def _write(self, *, last: bool = False) -> None:
        began = time.monotonic()
        try:
            study = optuna.load_study(study_name=self._name, storage=self._storage)
            if not last:
                left_s = self._left(self._storage.get_study_system_attrs(id_of(study)))
                if left_s > 0:  # somebody else has just written
                    self._last = None
                    self._not_before = began + left_s
                    return
            if self._watch is None:
                self._watch = StatusReader(study)
            current = self._watch.read()
            if not last and current.state == "idle":  # a moment between two trials
                current = dataclasses.replace(current, state="running")
            write_pages(study, current=current)
        except Exception as error:
            level = logging.DEBUG if self._warned else logging.WARNING
            self._warned = True
            logger.log(
                level, "The dashboard's pages of study %r were not written: %s", self._name, error
            )
        finally:
            if not last:
                self._storage.remove_session()
        if self._last is not None:
            took_s = time.monotonic() - began
            self._not_before = time.monotonic() + max(self._every_s, REST * took_s)

    def _left(self, stored: dict[str, Any]) -> float:
        """Return how long the last writing forbids another; clocks that disagree forbid nothing."""
        since_s = time.time() - float((stored.get(STAMP) or {}).get("at", 0.0))
        return self._every_s - since_s if 0 <= since_s < self._every_s else 0.0


class PreparationNote:
    """Keeps the note of a study current while its pieces are prepared; call it now and then.

    No error of it ends a search, and a study that lives in memory has no note.
    """

    def __init__(self, study: Study, every_s: float = EVERY_S) -> None:
        self._study, self._every_s = study, every_s
        self._on = not lives_in_memory(unwrapped(storage_of(study)))
        self._not_before = -float("inf")

    def __call__(self) -> None:
        """Write, if that is due and something changed."""
        if not self._on or time.monotonic() < self._not_before:
            return
        began = time.monotonic()
        try:
            current = read_status(self._study)
            if current.state == "preparing" and current.pieces:
                write_preparation(self._study, current)
        except Exception as error:
            logger.debug("The note of study %r was not written: %s", self._study.study_name, error)
        took_s = time.monotonic() - began
        self._not_before = time.monotonic() + max(self._every_s, REST * took_s)


def lives_in_memory(storage: BaseStorage) -> bool:
    """Return whether a study is gone with its process, so that nobody can browse it."""
    if isinstance(storage, optuna.storages.InMemoryStorage):
        return True
    database = database_of(storage)
    if database is None or database.engine.name != "sqlite":
        return False
    return database.engine.url.database in (None, "", ":memory:")


def say_how_to_look() -> None:
    """Say once how the dashboard is installed, where it is not."""
    if not _said.is_set() and importlib.util.find_spec("optuna_dashboard") is None:
        logger.info(
            "The study's pages are written for optuna-dashboard, which is not installed here. "
            "To browse them: pip install 'hq_optuna[dashboard]', then hq-optuna dashboard."
        )
    _said.set()
