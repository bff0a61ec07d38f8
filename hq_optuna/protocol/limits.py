"""The limits of a search as part of its record: read, agreed on, raised."""

from __future__ import annotations

from optuna.study import Study

from hq_optuna import attributes
from hq_optuna.errors import ResumeError
from hq_optuna.search import Limits


def stored_limits(study: Study) -> Limits:
    """Return the limits that the study holds."""
    return Limits.from_json(
        study._storage.get_study_user_attrs(study._study_id).get(attributes.LIMITS)
    )


def limits_of(study: Study) -> Limits:
    """Return the limits of the study, raised by those of its pruner."""
    stored = stored_limits(study)
    given = getattr(study.pruner, "limits", None)  # a `CostBudgetPruner` has some
    return stored.raised_to(given) if isinstance(given, Limits) else stored


def write_limits(study: Study) -> None:
    """Write the limits of the study's pruner into the study, where they raise its own."""
    limits = limits_of(study)
    if limits != stored_limits(study):
        study.set_user_attr(attributes.LIMITS, limits.to_json())


def refuse_lower_limits(study: Study, given: Limits) -> None:
    """Refuse limits that are lower than the study's.

    Raises:
        ResumeError: Naming them.
    """
    stored = stored_limits(study)
    lowered = stored.lowered_by(given)
    if lowered:
        before, now = stored.to_json(), given.to_json()
        words = ", ".join(
            f"{name} (study: {before[name]:g}, now: {now[name]:g})" for name in lowered
        )
        raise ResumeError(
            f"Study {study.study_name!r} has higher limits already: {words}. A search that goes on "
            "may raise them, or leave them out.",
            changed=lowered,
        )
