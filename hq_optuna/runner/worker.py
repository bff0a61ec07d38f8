"""A worker: asks for trials until the search is over, and waits between them when it must."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import Trial, TrialState

from hq_optuna import workers
from hq_optuna.attrs import Ticket
from hq_optuna.runner.interrupts import held_interrupts
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.samplers.log import StepLog, is_overdue

logger = logging.getLogger(__name__)

SHORTEST_WAIT_S = 0.02
LONGEST_WAIT_S = 1.0
LEAST_GRACE_S = 10.0
"""A running candidate is left to its worker at least this long before an idle one repeats it."""


def fail_dead_trials(study: Study) -> int:
    """Mark trials whose worker is certainly dead as failed, and return how many.

    Their slots would be filled anyway; this keeps them from showing as running for ever. A trial
    whose worker died before it wrote a ticket is known by having nothing after some seconds.
    """
    failed = 0
    storage = study._storage
    for trial in storage.get_all_trials(
        study._study_id, deepcopy=False, states=(TrialState.RUNNING,)
    ):
        ticket = Ticket.read(trial.system_attrs)
        if ticket is None:
            dead = is_overdue(trial) and not (trial.params or trial.user_attrs)
        else:
            dead = workers.is_dead(ticket.worker)
        if not dead:
            continue
        try:
            storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
            failed += 1
        except UpdateFinishedTrialError:  # another worker was quicker
            continue
    return failed


class _Patience:
    """Says when running trials have been quiet for so long that their work is repeated."""

    def __init__(self) -> None:
        self._seen: object = None
        self._since = time.monotonic()

    def exhausted(self, log: StepLog, slowest_s: float) -> bool:
        step = log.open
        assert step is not None
        now = time.monotonic()
        view = (step.step, tuple(sorted(step.done)), tuple(step.recording))
        if view != self._seen:
            self._seen, self._since = view, now
        return now - self._since > max(LEAST_GRACE_S, 5 * slowest_s)


def _does_another(log: StepLog, ticket: Ticket, trial: Trial) -> bool:
    """Return whether a trial with a lower number, of a worker that may live, does the same."""
    step = log.open
    if step is None or (step.step, step.parent) != (ticket.step, ticket.parent):
        return False
    same = step.recording if ticket.kind == "incumbent" else step.running.get(ticket.slot, [])
    return any(number < trial.number for number in same)


def work(
    study: Study,
    objective: Callable[[Trial], float],
    *,
    on_progress: Callable[[StepLog], None] = lambda log: None,
) -> None:
    """Run trials until the search is over.

    Ctrl-C gives the running candidate back (Optuna marks the trial failed, its slot is free again)
    and raises `KeyboardInterrupt`; everything recorded stays. When two workers reach for the last
    free slot, the trial with the higher number is pruned unevaluated, and its worker waits.

    Args:
        study: With a `ProgressiveBitSampler`.
        objective: Usually a `HessianObjective`.
        on_progress: Called with the record after each trial and each wait.
    """
    sampler = study.sampler
    assert isinstance(sampler, ProgressiveBitSampler)
    fail_dead_trials(study)
    try:
        _work(study, sampler, objective, on_progress)
    finally:
        sampler.backs_up = True
    fail_dead_trials(study)


def _work(
    study: Study,
    sampler: ProgressiveBitSampler,
    objective: Callable[[Trial], float],
    on_progress: Callable[[StepLog], None],
) -> None:
    patience, wait_s, slowest_s = _Patience(), SHORTEST_WAIT_S, 0.0
    idle = False
    release: Callable[[], None]

    def once(trial: Trial) -> float:
        nonlocal idle
        release()
        ticket = sampler.ticket(study, trial._trial_id)
        idle = ticket is not None and (
            ticket.kind == "surplus"
            or (not sampler.backs_up and _does_another(sampler.log(study), ticket, trial))
        )
        if idle:
            raise optuna.TrialPruned("its work is done, or another worker does it")
        return objective(trial)

    while True:
        log = sampler.log(study)
        on_progress(log)
        step = log.open
        if step is None:
            return
        sampler.backs_up = patience.exhausted(log, slowest_s)
        idle = not log.anything_left()
        if sampler.backs_up or not idle:
            started = time.monotonic()
            # Who was taken for dead, as after a pause, finds its trial failed and goes on.
            with contextlib.suppress(UpdateFinishedTrialError), held_interrupts() as release:
                study.optimize(once, n_trials=1)
            slowest_s = max(slowest_s, time.monotonic() - started)
        if idle:
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        else:
            wait_s = SHORTEST_WAIT_S
