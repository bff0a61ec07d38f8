"""`TrainingPlan`: when a search trains its winners, how, and on what."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from hq_optuna.space.layers import is_whole
from hq_optuna.training.data import Augment
from hq_optuna.training.settings import TrainingSettings

STEP_EPOCHS, FINAL_EPOCHS = 2, 20
"""Epochs unless told otherwise, of a step's winner and of the answer."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Training inside a search (step 6 of patent CN112183742B), and of its answer.

    Args:
        data: Training data, see `hq_optuna.training.TrainingData`; neither the calibration data nor
            those for validation and test.
        every: Steps after which their winner is trained; 1 as in the patent, 0 for never.
        settings: How a winner is trained.
        final: How the answer is trained; ``None``: it is not.
        augment: Changes a batch's inputs, see `hq_optuna.training.Trainer`.

    Raises:
        ValueError: Nothing is ever trained, or a number that is not allowed.
        DataError: Unusable training data.
    """

    data: Any = field(repr=False)
    every: int = 0
    settings: TrainingSettings = field(default_factory=lambda: TrainingSettings(epochs=STEP_EPOCHS))
    final: TrainingSettings | None = field(
        default_factory=lambda: TrainingSettings(epochs=FINAL_EPOCHS)
    )
    augment: Augment | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not is_whole(self.every) or self.every < 0:
            raise ValueError(f"every is a whole number of 0 or more; got {self.every!r}.")
        object.__setattr__(self, "every", int(self.every))
        if not self.every and self.final is None:
            raise ValueError(
                "This plan trains nothing: give every (steps) or final (settings), or no plan."
            )
        for settings in self.used:
            settings.data(self.data, self.augment)

    @property
    def used(self) -> list[TrainingSettings]:
        """The settings that anything is trained with."""
        winners = [self.settings] if self.every else []
        return winners if self.final is None else [*winners, self.final]

    def digest(self) -> str:
        """Return what tells this plan from others: settings and data."""
        data = self.used[0].data(self.data, self.augment)
        augment = getattr(self.augment, "__qualname__", type(self.augment).__name__)
        said = [self.to_json(), data.digest(), augment]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """Return what is written down of it in the study."""
        return {
            "every": self.every,
            "settings": self.settings.to_json() if self.every else None,
            "final": None if self.final is None else self.final.to_json(),
        }
