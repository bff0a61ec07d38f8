"""Steps whose candidates are looked up in a table: their trials are written finished, together.

A look-up takes microseconds, so there is nothing to claim and nobody to wait for: whoever reaches
an open step first writes all of its candidates in one transaction, and its record in another. Two
workers may write the same ones; the lower numbers count, and both say the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna.study import Study

from hq_optuna import attributes
from hq_optuna.attributes import StudyInfo
from hq_optuna.optuna_internals import id_of, place_of, storage_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.claims import create_record, new_claim, template
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.study_view import StudyView
from hq_optuna.protocol.tickets import candidate_ticket, closing, record_ticket
from hq_optuna.space.assignment import BitConfig
from hq_optuna.storages.writing import create_trials

LookUp = Callable[[BitConfig], dict[str, Any]]
"""From an assignment to the user attributes of its trial, `attributes.SCORE_WEIGHTS` among them."""


def stored_look_up(study: Study, log: StepLog) -> LookUp | None:
    """Return what looks candidates up in the table that the study holds.

    ``None`` where they are not scored so, or are made from a trained network, which has another.
    """
    user = storage_of(study).get_study_user_attrs(id_of(study))
    if log.base is not None or attributes.INFO not in user:
        return None
    sums = log.sums() if StudyInfo.from_json(user[attributes.INFO]).scores_by_table else None
    if sums is None:
        return None

    def look_up(config: BitConfig) -> dict[str, Any]:
        weights, activations = sums.parts(config)
        return {
            attributes.SCORE_WEIGHTS: weights,
            attributes.SCORE_ACTIVATIONS: activations,
            attributes.SECONDS: 0.0,
            attributes.WORKER: worker_identity.my_short_name(),
        }

    return look_up


def is_looked_up(log: StepLog) -> bool:
    """Return whether what the open step needs next takes no network."""
    step = log.open
    if step is None or step.final or (step.complete and log.trains_open_step()):
        return False
    return not step.measures


def write_step(view: StudyView, study: Study, look_up: LookUp) -> None:
    """Write what the open step lacks as it was read last: its candidates, or its record."""
    view.refuse_another_search(study)
    with view.lock:
        log = view.log
        if not is_looked_up(log):
            return
        assert log.open is not None
        step, space = log.open, log.search.space
        if step.complete:
            ticket = record_ticket(log, view.search, new_claim())
            assert ticket.origin is not None
            found = look_up(space.config(ticket.bits))
            value, kept = closing(log.score_of(ticket.origin), found, log)
            kept |= {name: found[name] for name in (attributes.SECONDS, attributes.WORKER)}
            create_record(view, study, ticket, value, kept)
        else:
            made = []
            for slot in step.free or [s for s in range(len(step.states)) if s not in step.done]:
                ticket = candidate_ticket(log, slot, view.search, new_claim())
                found = look_up(space.config(ticket.bits))
                score = found[attributes.SCORE_WEIGHTS] + found[attributes.SCORE_ACTIVATIONS]
                made.append(template(view, ticket, score, found))
            create_trials(*place_of(study), made)
