"""A worker: asks for trials until the search is over, and waits where there is nothing to do."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import Trial, TrialState

from hq_optuna import attributes
from hq_optuna.errors import HqOptunaError, StorageError
from hq_optuna.optuna_internals import storage_of, trial_id_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.claims import PATIENCE_S, ClaimedTrial
from hq_optuna.protocol.heartbeat import heartbeat
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.table_steps import LookUp, is_looked_up, write_step
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.storages import explain_errors_of, pausing
from hq_optuna.storages.writing import write_heartbeats
from hq_optuna.workers.interrupts import held_interrupts

logger = logging.getLogger(__name__)

Doing = Literal["scoring", "scored", "recording", "training", "waiting"]

SHORTEST_WAIT_S = 0.02
LONGEST_WAIT_S = 1.0


def fail_dead_trials(study: Study) -> int:
    """Mark trials whose worker is dead as failed, and return how many.

    Their slots are free anyway; this keeps them from showing as running for ever.
    """
    sampler = study.sampler
    assert isinstance(sampler, ProgressiveBitSampler)
    failed = 0
    storage = storage_of(study)
    for number, trial_id in sampler.log(study).owners.dead.items():
        with contextlib.suppress(UpdateFinishedTrialError):  # another worker was quicker
            storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
            logger.info("The worker of trial %d is dead; its work is free again.", number)
            failed += 1
    return failed


def work(
    study: Study,
    objective: Callable[[Trial], float],
    *,
    on_progress: Callable[[StepLog], None] = lambda log: None,
    on_doing: Callable[[Doing], None] = lambda doing: None,
) -> None:
    """Run trials until the search is over.

    Ctrl-C gives the running candidate back (its trial is marked failed, its slot is free again) and
    raises `KeyboardInterrupt`; everything recorded stays. A worker with nothing to do asks again,
    after a second at most. It takes up what a dead worker left: at once where that was a process
    of this host, else when it has been silent for `hq_optuna.protocol.owners.GRACE_S`.

    ``on_progress`` is called with the record after each trial and each wait; ``on_doing`` before a
    candidate, a step record, one that trains, or a wait, and after a candidate. Raises what
    `ProgressiveBitSampler.ask` raises, ``ValueError`` where the objective returns no number, and
    `StorageError` where the storage stayed away for as long as it is tried again, or the study was
    deleted.
    """
    sampler = study.sampler
    if not isinstance(sampler, ProgressiveBitSampler):
        raise TypeError(
            f"This study has the sampler {type(sampler).__name__}: optuna.load_study does not know "
            "the search's. Open it by BitSearch.open, or give load_study the sampler."
        )
    with explain_errors_of(storage_of(study), study):
        _work(study, sampler, objective, on_progress, on_doing)


def _work(
    study: Study,
    sampler: ProgressiveBitSampler,
    objective: Callable[[Trial], float],
    on_progress: Callable[[StepLog], None],
    on_doing: Callable[[Doing], None],
) -> None:
    wait_s, waited_s, alone, n_seen = SHORTEST_WAIT_S, 0.0, set[int](), -1
    while True:
        log = sampler.log(study)
        on_progress(log)
        if log.owners.dead.keys() - alone:
            fail_dead_trials(study)
            alone |= log.owners.dead.keys()
        if log.open is None:
            return
        look_up = _look_up(study, objective, log)
        if look_up is not None and log.cursor.n != n_seen:  # who leads is at work
            wait_s, waited_s, n_seen = SHORTEST_WAIT_S, 0.0, log.cursor.n
        if look_up is not None:
            done = _write_step(study, sampler, look_up, on_doing, waited_s)
        else:
            to_do = log.anything_left() or log.owners.waiting
            done = bool(to_do) and _run_one(study, sampler, objective, on_doing, waited_s)
        if done:
            wait_s, waited_s = SHORTEST_WAIT_S, 0.0
        else:
            on_doing("waiting")
            time.sleep(wait_s)
            waited_s += wait_s
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _look_up(study: Study, objective: Any, log: StepLog) -> LookUp | None:
    """Return what looks the open step's candidates up, if the objective has a table of them."""
    if not is_looked_up(log) or log.owners.waiting or not hasattr(objective, "look_up"):
        return None
    found: LookUp | None = objective.look_up(study, log.base)
    return found


def _write_step(
    study: Study,
    sampler: ProgressiveBitSampler,
    look_up: LookUp,
    on_doing: Callable[[Doing], None],
    waited_s: float,
) -> bool:
    """Write what the open step lacks, unless another worker leads; return whether it was written.

    One of several workers is enough. The others take over where nothing is heard of it for a while.
    """
    view = sampler.view(study)
    at_work = view.log.owners.at_work(worker_identity.worker_id(), last=2 * sampler.n_candidates)
    if at_work[0] != worker_identity.worker_id() and waited_s < PATIENCE_S:
        return False
    on_doing("scoring")
    storage = storage_of(study)
    with held_interrupts() as held, pausing(storage, held.sleep):
        write_step(view, study, look_up)
    return True


def _run_one(
    study: Study,
    sampler: ProgressiveBitSampler,
    objective: Callable[[Trial], float],
    on_doing: Callable[[Doing], None],
    waited_s: float,
) -> bool:
    """Run one trial and return whether there was one to run."""
    storage = storage_of(study)
    # Ctrl-C ends a wait for the database too.
    with held_interrupts() as held, pausing(storage, held.sleep):
        trial = sampler.ask(study, waited_s)
        if trial is None:
            return False
        ticket = sampler.ticket(study, trial)
        recording = ticket is not None and ticket.kind == "incumbent"
        try:
            beat = functools.partial(write_heartbeats, storage, [trial_id_of(trial)])
            with heartbeat(storage, beat):
                held.release()
                trains = ticket is not None and ticket.trains
                on_doing("training" if trains else "recording" if recording else "scoring")
                value = float(objective(trial))
                held.hold()  # a result is stored whole
            if math.isnan(value):
                raise ValueError(
                    f"Trial {trial.number}: the objective returned NaN. Expected a number."
                )
            if sampler.view(study).log.signed and attributes.SCORE_WEIGHTS not in trial.user_attrs:
                raise ValueError(
                    f"Trial {trial.number}: this study's trials are scored by HessianObjective, "
                    "which this objective did not call. Call it, or take another study."
                )
        except optuna.TrialPruned:
            _finish(study, sampler, trial, TrialState.PRUNED)
            if ticket is not None:
                log = sampler.log(study)
                sampler.view(study).failures.note(log, ticket, TrialState.PRUNED)
        except BaseException as error:
            # What cannot be given back, as the storage is away, others take up later.
            with contextlib.suppress(StorageError):
                _finish(study, sampler, trial, TrialState.FAIL)
            enqueued = ticket is None or ticket.kind == "free"
            if not enqueued or not isinstance(error, Exception) or isinstance(error, HqOptunaError):
                raise
            logger.warning(
                "Trial %d, which somebody enqueued, failed and is left out: %s", trial.number, error
            )
        else:
            _finish(study, sampler, trial, TrialState.COMPLETE, value)
            if not recording:
                on_doing("scored")
    return True


def _finish(
    study: Study,
    sampler: ProgressiveBitSampler,
    trial: ClaimedTrial,
    state: TrialState,
    value: float | None = None,
) -> None:
    sampler.view(study).tickets.pop(trial_id_of(trial), None)
    try:
        trial.finish(state, value)
    except UpdateFinishedTrialError:
        # Who was taken for dead, as after a pause, finds its trial failed and goes on.
        logger.info("Trial %d was taken over by another worker.", trial.number)
