"""`TrainingPlan`: when a search trains its winners, how, and on what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from hq_optuna.errors import StudyFileError
from hq_optuna.settings import SearchSettings
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


def plan_of(
    given: SearchSettings,
    train: Callable[[], Any] | None,
    augment: Augment | None,
    typed: Collection[str] = (),
) -> TrainingPlan | None:
    """Return the training plan from settings, or ``None`` where they ask for no training.

    Args:
        given: Settings of the search.
        train: Returns the training data; called only where they are needed.
        augment: Changes a batch's inputs.
        typed: Names of settings from the command line. ``train_epochs`` alone is refused there; a
            study file may give it for runs that do train.

    Raises:
        StudyFileError: Training is asked for without training data or without saying when to
            train, or a setting is not understood.
        DataError: Unusable training data.
    """
    every, final = given.train_every, given.final_epochs
    if final is None:
        final = FINAL_EPOCHS if every else 0
    if not every and "train_epochs" in typed:
        raise StudyFileError(
            "--train-epochs is of winners, and without --train-every none is trained. Say after "
            "how many steps theirs is (--train-every 4), or train the answer alone "
            "(--final-epochs 20, without --train-epochs)."
        )
    if not every and not final:
        return None
    if train is None:
        raise StudyFileError(
            "Training (--train-every, --final-epochs) needs data: let the study file define "
            "train(), which returns (inputs, labels), a Dataset or batches."
        )

    def settings(epochs: int, *names: str) -> TrainingSettings:
        # A short training has no epoch to spare for warming up.
        found: dict[str, Any] = {"warmup_epochs": 0.0} if epochs == 1 else {}
        for name in names:
            further = getattr(given, name)
            if "epochs" in further:
                raise StudyFileError(
                    f"Give train_epochs and final_epochs instead of {name}['epochs']."
                )
            found |= further
        try:
            return TrainingSettings.from_json({**found, "epochs": epochs})
        except (TypeError, ValueError) as error:
            said = " and ".join(f"SETTINGS[{name!r}]" for name in names if getattr(given, name))
            raise StudyFileError(f"{said or 'Training'}: {error}") from None

    return TrainingPlan(
        data=train(),
        every=every,
        settings=settings(given.train_epochs or STEP_EPOCHS, "training"),
        final=settings(final, "training", "final_training") if final else None,
        augment=augment,
    )
