"""What a step's record says, made from the trial it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optuna.study import Study

from hq_optuna import attributes

KEPT = (attributes.SCORE_WEIGHTS, attributes.SCORE_ACTIVATIONS, attributes.CALIBRATION_LOSS)
"""What a record repeats of its winner, where the winner has it."""


def winner_of(study: Study, number: int) -> tuple[float, Mapping[str, Any]]:
    """Return value and user attributes of the complete trial with this number."""
    storage = study._storage
    winner = storage.get_trial(
        storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    )
    assert winner.value is not None
    return winner.value, winner.user_attrs


def closing(value: float, winner: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return value and attributes of the record that takes a winner.

    The value is one unit in the last place below the winner's, so that `study.best_trial` is the
    record, which has the bits of all layers, and not the candidate it repeats.

    Args:
        value: The winner's value.
        winner: Its user attributes.
    """
    facts = {name: winner[name] for name in KEPT if name in winner}
    return math.nextafter(value, -math.inf), facts
