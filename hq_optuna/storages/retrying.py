"""`RetryingStorage`: calls a storage again while its database is away or its disk is full.

A call that failed may have been committed all the same: the answer was lost, not the question. So
every call here may be made twice. Attributes and parameters are written again with the same value;
a trial that was ended by the first try is recognized by what it says; of a trial that was created
twice the one whose number nobody heard is marked as failed (`hq_optuna.protocol.owners.HELD`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import sqlalchemy.exc
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hq_optuna.errors import StorageError
from hq_optuna.optuna_internals import id_of
from hq_optuna.storages.opening import (
    explain_storage_errors,
    open_storage,
    redact_url,
    url_of,
)

logger = logging.getLogger(__name__)

RETRY_FOR_S = 300.0
"""How long a storage is tried again before a worker gives up, unless told otherwise."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0

_PASSING_GRPC = {"UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED"}
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PASSING = (
    ConnectionError,
    sqlalchemy.exc.PendingRollbackError,
    sqlalchemy.exc.TimeoutError,
    sqlalchemy.exc.InternalError,  # PostgreSQL that shuts down or recovers
)
_LASTING = (
    *("readonly", "no such table", "no such column", "syntax error", "malformed"),
    *("does not exist", "unknown database", "permission denied", "command denied"),
)

_T = TypeVar("_T")
_P = ParamSpec("_P")
_Method = TypeVar("_Method", bound=Callable[..., Any])


def may_pass(error: BaseException | None) -> bool:
    """Return whether the same call may succeed later: a lost connection, a full disk, a lock.

    Example:
        >>> may_pass(OSError(errno.ENOSPC, "No space left on device")), may_pass(KeyError("x"))
        (True, False)
    """
    if isinstance(error, StorageInternalError):
        return may_pass(error.__cause__)
    if isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
        return not any(words in str(error.orig).lower() for words in _LASTING)
    code = getattr(error, "code", None)  # gRPC's errors, without importing gRPC
    if callable(code) and type(error).__module__.startswith("grpc"):
        return getattr(code(), "name", "") in _PASSING_GRPC
    if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
        return True
    full = isinstance(error, OSError) and error.errno in _FULL_DISK
    return full or isinstance(error, _PASSING)


def _tried_again(method: _Method) -> _Method:
    """Return a method of a storage that reads, or writes the same again, as one that is retried."""

    def call(self: RetryingStorage, *args: Any, **kwargs: Any) -> Any:
        return self.retry(lambda: getattr(self.wrapped, method.__name__)(*args, **kwargs))

    call.__doc__ = method.__doc__
    return cast("_Method", call)


class RetryingStorage(BaseStorage):
    """Delegates to a storage, and tries again what failed for a reason that may pass.

    Args:
        storage: The storage.
        shown: Its name for messages, without a password.
        retry_for_s: How long one call is tried again, with growing pauses. When that time is over
            the call raises, and later ones are tried once, until one succeeds.

    Attributes:
        wrapped: The storage.
        n_retries: How many calls were tried again so far.
        hurries: Whether a pause was interrupted. Calls are then tried once: whoever interrupts a
            wait does not want another one.
    """

    def __init__(
        self, storage: BaseStorage, shown: str = "the storage", *, retry_for_s: float = RETRY_FOR_S
    ) -> None:
        if retry_for_s < 0:
            raise ValueError(f"retry_for_s is at least 0; got {retry_for_s}.")
        self.wrapped = storage
        self.shown = shown
        self.retry_for_s = retry_for_s
        self._lost = False
        self.n_retries = 0
        self.hurries = False
        self._pause: Callable[[float], None] = time.sleep

    @contextlib.contextmanager
    def pausing(self, pause: Callable[[float], None]) -> Iterator[None]:
        """Wait by ``pause`` while the body runs; what that raises comes out of the call."""
        before, self._pause = self._pause, pause
        try:
            yield
        finally:
            self._pause = before

    def retry(self, function: Callable[[], _T], again: Callable[[], _T] | None = None) -> _T:
        """Call until it succeeds; ``again``, if given, is called instead after a failure.

        Raises:
            StorageError: It did not succeed in time, or a pause before was interrupted.
        """
        began, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                value = function()
            except Exception as error:
                if not may_pass(error):
                    raise
                self._wait(error, began, pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                self.n_retries += 1
                function = again or function
                continue
            self._lost = False
            return value

    def _wait(self, error: Exception, began: float, pause_s: float) -> None:
        waited = time.monotonic() - began
        if self._lost or self.hurries or waited + pause_s > self.retry_for_s:
            self._lost = True
            raise self._explained(error, waited) from None
        if pause_s == FIRST_PAUSE_S:
            logger.warning(
                "%s Trying again for %.0f s.", self._explained(error, None), self.retry_for_s
            )
        try:
            # Workers that lost the same server must not come back all at once.
            self._pause(pause_s * random.uniform(0.5, 1.0))
        except BaseException:
            self.hurries = True
            raise

    def _explained(self, error: Exception, waited_s: float | None) -> StorageError:
        try:
            with explain_storage_errors(self.shown):
                raise error
        except StorageError as explained:
            text = str(explained)
        except Exception:  # gRPC's and the file system's own
            details = getattr(error, "details", None)
            said = (details() if callable(details) else "") or str(error) or type(error).__name__
            text = f"Storage {self.shown}: {said.strip().splitlines()[0].rstrip('.')}."
        if waited_s is not None and waited_s > 0.1:
            text += (
                f" It was tried for {waited_s:.1f} s (--retry-for). Everything recorded stays; "
                "start the same command again to go on."
            )
        return StorageError(text)

    # What reads, and what writes the same again

    get_study_id_from_name = _tried_again(BaseStorage.get_study_id_from_name)
    get_study_name_from_id = _tried_again(BaseStorage.get_study_name_from_id)
    get_study_directions = _tried_again(BaseStorage.get_study_directions)
    get_study_user_attrs = _tried_again(BaseStorage.get_study_user_attrs)
    get_study_system_attrs = _tried_again(BaseStorage.get_study_system_attrs)
    get_all_studies = _tried_again(BaseStorage.get_all_studies)
    get_trial_id_from_study_id_trial_number = _tried_again(
        BaseStorage.get_trial_id_from_study_id_trial_number
    )
    get_trial_number_from_id = _tried_again(BaseStorage.get_trial_number_from_id)
    get_trial_param = _tried_again(BaseStorage.get_trial_param)
    get_trial = _tried_again(BaseStorage.get_trial)
    get_all_trials = _tried_again(BaseStorage.get_all_trials)
    get_n_trials = _tried_again(BaseStorage.get_n_trials)
    get_best_trial = _tried_again(BaseStorage.get_best_trial)
    set_study_user_attr = _tried_again(BaseStorage.set_study_user_attr)
    set_study_system_attr = _tried_again(BaseStorage.set_study_system_attr)
    set_trial_param = _tried_again(BaseStorage.set_trial_param)
    set_trial_intermediate_value = _tried_again(BaseStorage.set_trial_intermediate_value)
    set_trial_user_attr = _tried_again(BaseStorage.set_trial_user_attr)
    set_trial_system_attr = _tried_again(BaseStorage.set_trial_system_attr)

    # What must not happen twice, or need not

    def remove_session(self) -> None:
        """Give the connections of this thread back."""
        self.wrapped.remove_session()

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial; one of a try whose answer was lost stays, and is nobody's."""
        return self.retry(lambda: self.wrapped.create_new_trial(study_id, template_trial))

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """Create a study; one that a try made whose answer was lost is taken."""

        def again() -> int:
            try:
                return self.wrapped.create_new_study(directions, study_name)
            except DuplicatedStudyError:
                assert study_name is not None
                study_id = self.wrapped.get_study_id_from_name(study_name)
                if self.wrapped.get_n_trials(study_id):
                    raise
                return study_id

        return self.retry(lambda: self.wrapped.create_new_study(directions, study_name), again)

    def delete_study(self, study_id: int) -> None:
        """Delete a study; one that is gone after a lost answer was deleted."""

        def again() -> None:
            with contextlib.suppress(KeyError):
                self.wrapped.delete_study(study_id)

        self.retry(lambda: self.wrapped.delete_study(study_id), again)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set a trial's state; one that has it already after a lost answer is done."""
        end = functools.partial(self.wrapped.set_trial_state_values, trial_id, state, values)
        return self.end_trial(end, True, trial_id, state, values)

    def end_trial(
        self,
        function: Callable[[], _T],
        done: _T,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> _T:
        """Call what ends a trial; return ``done`` where an earlier try had ended it so."""

        def again() -> _T:
            try:
                return function()
            except UpdateFinishedTrialError:
                trial = self.wrapped.get_trial(trial_id)
                given = None if values is None else list(values)
                if trial.state == state and (given is None or trial.values == given):
                    return done
                raise

        return self.retry(function, again)


def tried_again(
    function: Callable[Concatenate[BaseStorage, _P], _T],
) -> Callable[Concatenate[BaseStorage, _P], _T]:
    """Let a function of a storage be called again where the storage is a `RetryingStorage`.

    The function gets the storage behind it, and does no harm when it is called twice.
    """

    @functools.wraps(function)
    def call(storage: BaseStorage, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not isinstance(storage, RetryingStorage):
            return function(storage, *args, **kwargs)
        wrapped = storage.wrapped
        return storage.retry(lambda: function(wrapped, *args, **kwargs))

    return call


def pausing(
    storage: BaseStorage, pause: Callable[[float], None]
) -> contextlib.AbstractContextManager[None]:
    """Wait for a storage that is away by ``pause`` while the body runs."""
    if isinstance(storage, RetryingStorage):
        return storage.pausing(pause)
    return contextlib.nullcontext()


def open_retrying(storage: str | Path | BaseStorage | None, retry_for_s: float) -> BaseStorage:
    """Return the storage at a URL, which is tried again when it does not answer.

    Args:
        storage: Storage URL, or the path of a file. An Optuna storage, or ``None`` for memory, is
            not tried again.
        retry_for_s: See `RetryingStorage`.

    Raises:
        StorageError: The storage cannot be opened.
    """
    opened = open_storage(storage)
    if isinstance(storage, (str, Path)):
        return RetryingStorage(opened, redact_url(url_of(storage)), retry_for_s=retry_for_s)
    return opened


@contextlib.contextmanager
def explain_errors_of(storage: BaseStorage, study: Study | None = None) -> Iterator[None]:
    """Turn what a storage raises into `StorageError`s that name it, without a password.

    Where the ``study`` is no more, whatever was raised is told as that.
    """
    named = storage.shown if isinstance(storage, RetryingStorage) else "the storage"
    try:
        with explain_storage_errors(named):
            yield
    except Exception as error:
        if isinstance(error, StorageError) or study is None or _is_there(storage, study):
            raise
        raise StorageError(
            f"Storage {named}: study {study.study_name!r} was deleted while it was in use. Start "
            "the same command again to begin it anew."
        ) from None


def _is_there(storage: BaseStorage, study: Study) -> bool:
    """Return whether a study is in its storage, as far as that can be told."""
    behind = storage.wrapped if isinstance(storage, RetryingStorage) else storage
    try:
        return any(id_of(found) == id_of(study) for found in behind.get_all_studies())
    except Exception:
        return True
