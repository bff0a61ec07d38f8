"""Whether a sampler may go on with a study: direction, and the settings it was made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna.study import Study, StudyDirection

from hq_optuna import attrs
from hq_optuna.errors import ResumeError
from hq_optuna.samplers.known import Known
from hq_optuna.samplers.limiting import limits_of, stored_limits, write_limits
from hq_optuna.samplers.log import StepLog
from hq_optuna.space import SearchSpace


def refuse_maximization(study: Study) -> None:
    """Refuse a study in which the largest score is best.

    Raises:
        ValueError: The study maximizes.
    """
    if study.direction == StudyDirection.MAXIMIZE:
        raise ValueError(
            "The score is a loss and is minimized. Create the study with direction='minimize'."
        )


def compare_settings(study: Study, space: SearchSpace, mine: dict[str, Any]) -> dict[str, str]:
    """Return what differs from the settings in the study, by name and in words.

    The first worker finds none there, and writes its own and the space.
    """
    storage, study_id = study._storage, study._study_id
    stored = storage.get_study_system_attrs(study_id).get(attrs.SETTINGS)
    if stored is None:
        write_settings(study, space, mine)
        return {}
    return {
        name: f"{name} (study: {stored.get(name)!r}, sampler: {mine.get(name)!r})"
        for name in dict.fromkeys([*mine, *stored])
        if stored.get(name) != mine.get(name)
    }


def write_settings(study: Study, space: SearchSpace, mine: dict[str, Any]) -> None:
    """Write settings and space into the study."""
    storage, study_id = study._storage, study._study_id
    # `hq_optuna.assignment` reads the space; the settings come last and say it is complete.
    for key, value in attrs.split(attrs.SPACE, space.to_json()).items():
        storage.set_study_system_attr(study_id, key, value)
    storage.set_study_system_attr(study_id, attrs.SETTINGS, mine)


def look_again(study: Study, space: SearchSpace, known: Known) -> None:
    """Take in what others wrote into the study itself, beside its trials.

    Does something where steps were closed or another search was met since, or limits ended this
    one.

    Args:
        study: The study.
        space: The sampler's space.
        known: What the sampler knows of the study, its record up to date.
    """
    log, seen = known.log, (len(known.log.closed), len(known.log.searches))
    if seen == known.looked_at and not log.stopped_by:
        return
    mine, anew = known.is_mine, seen != known.looked_at
    if mine and anew and compare_settings(study, space, log.settings):
        # Another search was started here at the same moment and found no settings either, but
        # wrote last. Its limits are not ours.
        write_settings(study, space, log.settings)
        if stored_limits(study) != log.limits:
            limits = log.limits.to_json()
            study._storage.set_study_user_attr(study._study_id, attrs.LIMITS, limits)
    known.looked_at = seen
    log.limit(limits_of(study))  # somebody may have raised them, or set the first


def refuse_another_search(study: Study, is_mine: bool | None) -> None:
    """Refuse a study whose first trial belongs to another search.

    Of two searches that are started in one new study at the same moment, both may find it empty
    and write their settings; the lower trial number is the one thing they agree on.

    Raises:
        ResumeError: The first trial is of another search.
    """
    if is_mine is False:
        raise ResumeError(
            f"Study {study.study_name!r} is another search: its first trial was made with other "
            "settings, another network or other data. Use the same, or another study name.",
            changed=("search",),
        )


def refuse_changes(study: Study, changed: dict[str, str]) -> None:
    """Refuse a study that was made with other settings.

    Args:
        study: The study.
        changed: What `compare_settings` returned.

    Raises:
        ResumeError: Naming what changed.
    """
    if changed:
        raise ResumeError(
            f"Study {study.study_name!r} was made with another sampler: "
            f"{', '.join(changed.values())}. Use the same settings, or another study name.",
            changed=tuple(changed),
        )


def check_settings(
    study: Study, space: SearchSpace, known: Known, log: Callable[[], StepLog]
) -> None:
    """Refuse a study that was made with other settings; write them into one that has none.

    Args:
        study: The study.
        space: The sampler's space.
        known: What the sampler knows of the study.
        log: Reads the study.

    Raises:
        ResumeError: The study was made with other settings.
        ValueError: The study maximizes.
    """
    refuse_maximization(study)
    mine = known.log.settings
    if known.changed is None:
        known.changed = compare_settings(study, space, mine)
        if not known.changed:
            write_limits(study)
    if known.changed and log() and known.is_mine:
        # Another search was started here at the same moment, wrote last, and was refused.
        write_settings(study, space, mine)
        known.changed = {}
    refuse_changes(study, known.changed)
