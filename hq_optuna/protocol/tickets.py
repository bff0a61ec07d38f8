"""What a ticket says, and what a trial with that ticket shows: a candidate, a step's record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Kind, Ticket
from hq_optuna.optuna_internals import place_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.step_log import OpenStep, StepLog
from hq_optuna.search import Move, changes
from hq_optuna.settings import Encoding
from hq_optuna.space.search_space import SearchSpace

LAYER, BITS = "layer", "bits"  # parameters of a candidate in the compact encoding
Parameters = dict[str, tuple[int | str, tuple[int | str, ...]]]  # name → value and choices


def candidate_ticket(log: StepLog, slot: int, search: str = "", claim: int = 0) -> Ticket:
    """Return this process's ticket for a slot of the open step."""
    step, space = log.open, log.search.space
    assert step is not None
    start = space.top if log.incumbent is None else log.incumbent.state
    moves = changes(start, step.states[slot])
    names = [variable.name for variable in space.variables]
    lowered = moves[0] if len(moves) == 1 else None
    if step.measures:
        lowered, said = None, step.names[slot]
    elif lowered is not None:
        said = names[lowered.variable]
    else:
        said = ", ".join(described(space, move) for move in moves)
    return Ticket(
        "candidate",
        step.step,
        slot,
        step.parent,
        step.states[slot],
        origin=log.closed[-1].number if log.closed else None,
        variable=said or None,
        from_bits=None if lowered is None else lowered.from_bits,
        worker=worker_identity.worker_id(),
        search=search,
        claim=claim,
        measures=step.measures,
    )


def described(space: SearchSpace, move: Move) -> str:
    """Return what a move changes, in words."""
    variable = space.variables[move.variable]
    return f"{variable.name} {variable.shown(move.from_bits)} → {variable.shown(move.to_bits)}"


def record_ticket(log: StepLog, search: str = "", claim: int = 0) -> Ticket:
    """Return this process's ticket for the record that closes the complete open step."""
    assert log.open is not None
    incumbent, winner = log.close_open_step()
    return Ticket(
        "incumbent",
        log.open.step,
        incumbent.origin[1],
        log.open.parent,
        incumbent.state,
        origin=winner,
        worker=worker_identity.worker_id(),
        search=search,
        claim=claim,
        trains=log.trains_open_step(),
    )


def idle_ticket(kind: Kind, log: StepLog | None = None, search: str = "") -> Ticket:
    """Return the ticket of a trial without work: ``"surplus"`` or ``"free"``."""
    worker = worker_identity.worker_id()
    if log is None:
        return Ticket(kind, -1, -1, "", (), worker=worker, search=search)
    state = log.search.space.top if log.incumbent is None else log.incumbent.state
    return Ticket(kind, len(log.closed), 0, "", state, worker=worker, search=search)


def parameters(ticket: Ticket, space: SearchSpace, encoding: Encoding) -> Parameters:
    """Return ``{parameter: (value, choices)}`` that a trial with this ticket shows."""
    if ticket.kind == "free":
        return {}  # it has those it was enqueued with
    if ticket.kind == "candidate" and encoding == "compact" and not ticket.measures:
        names = tuple(variable.name for variable in space.variables)
        bits = {b: v.shown(b) for v in space.variables for b in v.bits}
        if ticket.variable not in names:
            return {}
        to_bits = ticket.bits[names.index(ticket.variable)]
        shown = tuple(bits[b] for b in sorted(bits, reverse=True))
        return {LAYER: (ticket.variable, names), BITS: (bits[to_bits], shown)}
    return dict(space.parameters(ticket.bits))


def facts(ticket: Ticket, space: SearchSpace, costs: Mapping[Any, float]) -> dict[str, Any]:
    """Return the user attributes that are known before a trial is scored."""
    kind = "finalist" if ticket.measures else ticket.kind
    known: dict[str, Any] = {attributes.KIND: kind, attributes.STEP: ticket.step}
    if ticket.kind == "incumbent":
        known[attributes.WINNER] = ticket.origin
    else:
        known[attributes.SLOT] = ticket.slot
        if ticket.variable is not None:
            known |= {attributes.PARENT: ticket.origin, attributes.LAYER: ticket.variable}
        names = [variable.name for variable in space.variables]
        if ticket.variable in names:  # one change, not a swap
            variable, now = next(
                (v, b)
                for v, b in zip(space.variables, ticket.bits, strict=True)
                if v.name == ticket.variable
            )
            assert ticket.from_bits is not None
            known[attributes.FROM_BITS] = variable.shown(ticket.from_bits)
            known[attributes.TO_BITS] = variable.shown(now)
    known |= costs_shown(costs)
    known[attributes.WORKER] = worker_identity.short_name(ticket.worker)
    return known


def costs_shown(costs: Mapping[Any, float]) -> dict[str, float]:
    """Return the user attributes that tell what a trial costs, by metric, the first limit's first.

    Example:
        >>> costs_shown({"bops": 8.0, "size_bytes": 2.0})
        {'cost': 8.0, 'cost:size_bytes': 2.0}
    """
    names = [
        attributes.COST if not place else f"{attributes.COST}:{m}" for place, m in enumerate(costs)
    ]
    return dict(zip(names, costs.values(), strict=True))


def constrained(costs: Sequence[float], limits: Mapping[Any, float]) -> dict[str, Any]:
    """Return system attributes that say by which part costs are over limits; none without any.

    `study.best_trial` takes none that is. The older form is what optuna-dashboard 0.21 reads.
    """
    pairs = zip(costs, limits.items(), strict=True)
    over = {metric: cost / most - 1 for cost, (metric, most) in pairs if not math.isinf(most)}
    if not over:
        return {}
    made = optuna.create_trial(state=TrialState.RUNNING, constraints=over)
    return {**made.system_attrs, attributes.OLD_CONSTRAINTS: list(over.values())}


def slot_for(step: OpenStep, untagged: int) -> int:
    """Return the slot for a worker, given how many lower tickets still wait for theirs."""
    free = step.free
    if untagged < len(free):
        return free[untagged]
    # Nothing is free: back up the slot with the fewest runners. This is what keeps a search alive
    # whose workers died unseen, and costs one evaluation otherwise.
    waiting = [slot for slot in range(len(step.states)) if slot not in step.done]
    return min(waiting, key=lambda slot: (len(step.running.get(slot, ())), slot))


KEPT = (
    attributes.SCORE_WEIGHTS,
    attributes.SCORE_ACTIVATIONS,
    attributes.CALIBRATION_LOSS,
    attributes.RISES,
)
"""What a record repeats of its winner, where the winner has it."""


def winner_of(study: Study, number: int) -> tuple[float, Mapping[str, Any]]:
    """Return value and user attributes of the complete trial with this number."""
    storage, study_id = place_of(study)
    winner = storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study_id, number))
    assert winner.value is not None
    return winner.value, winner.user_attrs


def closing(value: float, winner: Mapping[str, Any], log: StepLog) -> tuple[float, dict[str, Any]]:
    """Return value and attributes of the record that takes a winner, given those of the winner.

    The value is one unit in the last place below the winner's, so that `study.best_trial` is the
    record, which has the bits of all layers, and not the candidate it repeats. A finalist that was
    chosen is the answer, so its record's value is below all within the budget.
    """
    facts = {name: winner[name] for name in KEPT if name in winner}
    value = math.nextafter(value, -math.inf)
    if log.open is not None and log.open.measures:
        value = min(value, math.nextafter(log.best_within_budget(), -math.inf))
    return value, facts
