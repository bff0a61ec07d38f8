"""`TrainingSettings`: how one assignment is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args

from hq_optuna.network.batches import check_precision
from hq_optuna.settings import Precision
from hq_optuna.space.layers import is_whole
from hq_optuna.training.data import Augment, TrainingData

OptimizerName = Literal["adamw", "sgd"]
Start = Literal["float", "rounded", "moved"]
"""Where trained weights begin where compensated ones are known: at the float weights, at the
rounded ones, or at the float ones moved only as far as it takes to round to the rounded ones."""
OutOfRange = Literal["pass", "stop"]
"""What becomes of the gradient of a weight that its grid clips."""
BatchNorm = Literal["matched", "batch"]
"""What batch-norm makes of a batch in training: the mean and spread that each channel has in the
teacher on that batch (`hq_optuna.training.matching`), or PyTorch's normalization."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a training; the defaults are those of docs/results/training.md.

    Attributes:
        epochs: Passes over the training data.
        optimizer: ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        learning_rate: At its peak; a cosine takes it to zero.
        step_rate: Learning rate of the logarithms of step sizes, as a multiple of the others'.
        weight_decay: Per step and learning rate, taken from weights directly (decoupled, for SGD
            too); one-dimensional parameters and step sizes do not decay.
        beta2: AdamW's second decay. Its window of 1 / (1 − β₂) steps is also the time over which
            the second moments are a mean.
        batch_size: Samples a step, for tensors and datasets; a loader keeps its own.
        warmup_epochs: Epochs over which the learning rate rises from zero; may be a fraction.
        label_weight: Share of the loss in labels; the rest is distillation from the teacher.
        temperature: Of the softened outputs in distillation.
        blend: Share of the samples that are blended with another one of their batch, by a share
            drawn evenly from 0 to 1 (mixup, Zhang et al., 2018), for distillation alone: the
            teacher says what it makes of them (Beyer et al., 2022). Inputs must be one tensor of
            floats.
        teacher_views: How many augmentations of a sample the teacher's outputs are a mean of: the
            one that is trained on, and others drawn anew. On unseen samples that mean is right
            more often than one output, and the network is trained towards it instead of towards
            the float network's own output. Above 1 needs an augmentation, and class scores
            ``(N, C)``.
        batch_norm: How batch-norm normalizes in training; ``"matched"`` needs a teacher, and is
            ``"batch"`` without one.
        frozen_statistics_epochs: Last epochs in which batch-norm keeps its statistics and uses
            them.
        frozen_ranges_epochs: Last epochs in which step sizes stay.
        clip_norm: Largest norm of all gradients of weights together; ``None``: no limit.
        out_of_range: Whether the gradient of a weight beyond its grid passes or stops.
        start: Where weights begin where compensated ones are known.
        precision: Of forward and backward passes.
        channels_last: Lay images out with their channels innermost, which convolutions on CPUs
            and GPUs like. Networks that call ``view`` on a convolution's output cannot have it.
        seed: Of the order of the data, of augmentation and of dropout.
    """

    epochs: int = 6
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 5e-4
    step_rate: float = 1.0
    weight_decay: float = 0.0
    beta2: float = 0.999
    batch_size: int = 64
    warmup_epochs: float = 0.5
    label_weight: float = 0.0
    temperature: float = 4.0
    blend: float = 0.0
    teacher_views: int = 1
    batch_norm: BatchNorm = "matched"
    frozen_statistics_epochs: int = 0
    frozen_ranges_epochs: int = 0
    clip_norm: float | None = None
    out_of_range: OutOfRange = "pass"
    start: Start = "moved"
    precision: Precision = "float32"
    channels_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "teacher_views"):
            self._check_whole(name, least=1)
        for name in ("frozen_statistics_epochs", "frozen_ranges_epochs", "seed"):
            self._check_whole(name, least=0)
        for name in ("learning_rate", "temperature"):
            self._check(name, 0, math.inf, without_ends=True)
        for name in ("step_rate", "weight_decay", "warmup_epochs"):
            self._check(name, 0, math.inf)
        for name in ("label_weight", "blend"):
            self._check(name, 0, 1)
        if self.blend and self.label_weight:
            raise ValueError(
                "Labels do not hold for blended samples: give blend=0, or label_weight=0 to train "
                "by distillation alone."
            )
        if self.teacher_views > 1 and self.label_weight == 1:
            raise ValueError(
                f"teacher_views is {self.teacher_views}, and label_weight=1 leaves no teacher: "
                "give teacher_views=1, or a smaller label_weight."
            )
        self._check("beta2", 0, 1, without_ends=True)
        if self.clip_norm is not None:
            self._check("clip_norm", 0, math.inf, without_ends=True)
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs is less than epochs, {self.epochs}; got {self.warmup_epochs}."
            )
        choices = {"optimizer": OptimizerName, "start": Start, "out_of_range": OutOfRange}
        for name, kind in {**choices, "batch_norm": BatchNorm}.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}."
                )
        check_precision(self.precision)
        if not isinstance(self.channels_last, bool):
            raise TypeError(f"channels_last is True or False; got {self.channels_last!r}.")

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not is_whole(value) or value < least:
            raise ValueError(f"{name} is a whole number of {least} or more; got {value!r}.")
        object.__setattr__(self, name, int(value))  # NumPy's numbers are not JSON's

    def _check(self, name: str, low: float, high: float, without_ends: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not low <= value <= high or (without_ends and value in (low, high)):
            if math.isinf(high):
                allowed = f"a number above {low}" if without_ends else f"a number of {low} or more"
            else:
                allowed = f"between {low} and {high}" + (", without these" if without_ends else "")
            raise ValueError(f"{name} is {allowed}; got {value!r}.")
        object.__setattr__(self, name, int(value) if is_whole(value) else float(value))

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON data, the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingSettings:
        """Rebuild settings from `to_json`'s data; what is not named has its default.

        Raises `ValueError` for a name that is no setting, or a value that is not allowed.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(
                f"Unknown training settings: {', '.join(unknown)}. Known are: "
                f"{', '.join(sorted(known))}."
            )
        return cls(**data)

    def data(self, data: Any, augment: Augment | None) -> TrainingData:
        """Return training data as these settings read them."""
        return TrainingData(
            data, self.batch_size, augment, views=self.teacher_views, blend=self.blend
        )

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0: warm-up, then a cosine to zero.

        Example:
            >>> settings = TrainingSettings(epochs=2, learning_rate=1.0, warmup_epochs=1)
            >>> [round(settings.learning_rate_at(step, 2), 2) for step in range(4)]
            [0.5, 1.0, 1.0, 0.5]
        """
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        after = self.epochs * steps_per_epoch - warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / after))
