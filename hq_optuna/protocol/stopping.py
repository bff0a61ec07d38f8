"""Ends loops of `optuna.Study.optimize`: with the search, and where that cannot go on."""

from __future__ import annotations

from optuna.study import Study
from optuna.trial import TrialState

from hq_optuna.attributes import Ticket
from hq_optuna.errors import WorkerError
from hq_optuna.optuna_internals import loop_of
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.space.search_space import SearchSpace

MAX_FAILURES = 5
"""How often this process tries work anew that brings no result; an objective is deterministic."""


def stop(study: Study) -> None:
    """End the loop of Optuna's that this thread is in, if it is in one."""
    if (running := loop_of(study)) is not None:
        running.stop()


class Failures:
    """Counts the trials of this process that brought no result although the search needs it."""

    def __init__(self) -> None:
        self._ended: dict[tuple[object, ...], list[TrialState]] = {}

    def note(self, log: StepLog, ticket: Ticket, state: TrialState) -> None:
        """Count a trial without a result of ours, if the search still needs what it was for."""
        if log.open is not None and log.open.needs(ticket):
            self._ended.setdefault(_key(ticket), []).append(state)

    def refuse_more(self, space: SearchSpace, ticket: Ticket, *, told: bool = True) -> None:
        """Refuse to try the same work for ever. It is told once; then counting starts anew.

        Called before a trial, as an error after one would hide why that failed. What was ``told``
        of a trial counts in a loop alone, which goes on for ever; who asks by hand sees it.

        Raises:
            WorkerError: This process tried the ticket's work `MAX_FAILURES` times.
        """
        ended = self._ended.get(_key(ticket), [])
        ended = [state for state in ended if told or state != TrialState.COMPLETE]
        if len(ended) < MAX_FAILURES:
            return
        del self._ended[_key(ticket)]
        if ended[-1] == TrialState.COMPLETE:
            how = "values that this study's HessianObjective did not compute were told of"
            then = "Call that objective, or give your own a study of its own."
        elif ended[-1] == TrialState.PRUNED:
            how = "the objective pruned"
            then = "Prune only where `CostBudgetPruner` says that a trial is not needed."
        else:
            how = "the objective raised an error, or returned NaN or no number, in"
            then = "Return a number for it, infinity if it is of no use."
        raise WorkerError(
            f"The search cannot go on without {_what(space, ticket)}: {how} {len(ended)} trials "
            f"for it. {then} Then start again: what was scored stays."
        )


def _key(ticket: Ticket) -> tuple[object, ...]:
    return ticket.kind, ticket.step, ticket.parent, ticket.slot


def _what(space: SearchSpace, ticket: Ticket) -> str:
    """Return the result that a trial was to bring, in words."""
    if ticket.kind == "incumbent":
        return f"the record of step {ticket.step}"
    if ticket.variable is None:
        return "the score of the start"
    bits = ""
    for variable, now in zip(space.variables, ticket.bits, strict=True):
        if variable.name == ticket.variable and ticket.from_bits is not None:  # swaps say theirs
            bits = f" {variable.shown(ticket.from_bits)} → {variable.shown(now)}"
    return f"the score of {ticket.variable}{bits} in step {ticket.step}"
