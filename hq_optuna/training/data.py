"""Training data: shuffled batches of one epoch, the same ones for the same seed and epoch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hq_optuna.errors import DataError
from hq_optuna.network.batches import (
    Batch,
    Whole,
    bounded,
    counted,
    is_whole,
    own_chance,
    pair_of,
    read_batches,
)
from hq_optuna.network.containers import digest_of, leaves
from hq_optuna.network.devices import preserve_rng_state

Augment = Callable[[Any, torch.Generator], Any]
"""Returns changed inputs of one batch; draws all random numbers from the generator."""


class TrainingData:
    """What a training reads, epoch by epoch.

    ``(inputs, labels)`` tensors of equal length and a map-style ``Dataset`` are shuffled anew each
    epoch and cut into batches of ``batch_size``; the incomplete last one is left out, because
    batch-norm and the second moments want equal batches. Any other iterable of ``(inputs, labels)``
    batches, such as a ``DataLoader``, is read once an epoch as it is, with PyTorch's, NumPy's,
    Python's and its own random generators seeded.

    ``augment`` changes the inputs of each batch, which it may not write into, ``views`` times. A
    share ``blend`` of the samples is blended with another one, the same one in all views.

    Raises:
        DataError: Empty, unlabelled, or not one label per input.
        ValueError: Several views, and nothing that makes them differ.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        augment: Augment | None = None,
        *,
        views: int = 1,
        blend: float = 0.0,
    ) -> None:
        if views > 1 and augment is None:
            raise ValueError(
                f"teacher_views is {views}, and without an augmentation all views are alike: give "
                "augment, or teacher_views=1."
            )
        self.augment, self.views, self.blend = augment, views, blend
        self._whole: Whole | None = None
        self._dataset: Dataset[Any] | None = None
        self._iterable: Iterable[Any] = ()
        if isinstance(data, Tensor):
            raise DataError("The training data have no labels; give (inputs, labels).")
        if is_whole(data):
            self._whole = Whole.of(data, "training")
            n = self._whole.n
            # Checks what can be wrong with tensors, in one batch.
            read_batches(data, batch_size=max(n, 1), what="training")
        elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            n = len(data)  # type: ignore[arg-type]
            self._dataset = data
        elif isinstance(data, Iterator):
            raise DataError(
                "The training data can be read only once (an iterator); give something that can "
                "be read each epoch, such as a list of batches or a DataLoader."
            )
        elif isinstance(data, Iterable):
            self._iterable = data
            n = -1
        else:
            raise DataError(
                f"The training data are a {type(data).__name__}; give (inputs, labels) tensors, a "
                "Dataset, or an iterable of (inputs, labels) batches such as a DataLoader."
            )
        if n == 0:
            raise DataError("The training data are empty. Give at least one labelled batch.")
        self._n = n
        self.batch_size = min(batch_size, n) if n > 0 else 0
        self.steps = n // self.batch_size if n > 0 else self._count()

    def _count(self) -> int:
        """Return the batches of an epoch; learn the size of the first."""
        steps = 0
        with seeded(0):
            for item in bounded(self._iterable, "training", MOST_STEPS):
                if not steps:
                    self.batch_size = _labelled(item).n
                    if type(self._iterable) is DataLoader and not isinstance(
                        self._iterable.dataset, IterableDataset
                    ):
                        return len(self._iterable)
                steps += 1
        if not steps:
            raise DataError("The training data are empty. Give at least one labelled batch.")
        return steps

    def digest(self) -> str:
        """Return what tells these data from others: all of tensors, the size of anything else."""
        if self._whole is None:
            return f"{self._n if self._n > 0 else self.steps} of {self.batch_size}"
        return digest_of(("", leaf) for leaf in leaves((self._whole.inputs, self._whole.labels)))

    def epoch(self, generator: torch.Generator) -> Iterator[tuple[Batch, list[Any]]]:
        """Yield the batches of one epoch, and beside each the further views of its inputs.

        The generator decides order, augmentation and blending. Raises `DataError` for samples that
        cannot be blended.
        """
        for batch in self._batches(generator):
            inputs: list[Any] = [batch.inputs]
            if self.augment is not None:
                inputs = [self.augment(batch.inputs, generator) for _ in range(self.views)]
            if self.blend:
                inputs = [*blended(inputs, self.blend, generator)]
            yield Batch(inputs[0], batch.labels, batch.n), inputs[1:]

    def _batches(self, generator: torch.Generator) -> Iterator[Batch]:
        if self._whole is not None:
            order = torch.randperm(self._n, generator=generator, device="cpu")
            for step in range(self.steps):
                taken = order[step * self.batch_size : (step + 1) * self.batch_size]
                yield Batch(*self._whole.take(taken), len(taken))
            return
        loader: Iterable[Any] = self._iterable
        if self._dataset is not None:
            shuffled = torch.randperm(self._n, generator=generator, device="cpu").tolist()
            loader = DataLoader(self._dataset, self.batch_size, sampler=shuffled, drop_last=True)
        with own_chance(loader, generator.initial_seed()):
            for item in loader:
                yield _labelled(item)


def blended(views: list[Any], share: float, generator: torch.Generator) -> list[Tensor]:
    """Return views of a batch in which about ``share`` of the samples are blended with another one.

    Raises `DataError` where the inputs are not one tensor of floats.
    """
    for inputs in views:
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            what = str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise DataError(
                f"blend needs inputs that are one tensor of floats; got {what}. Give blend=0."
            )
    n = len(views[0])
    other = torch.randperm(n, generator=generator, device="cpu")
    drawn = torch.rand(2, n, generator=generator, device="cpu", dtype=torch.float32)
    part = torch.where(drawn[1] < share, drawn[0], 1.0)

    def blend(inputs: Tensor) -> Tensor:
        own = part.to(inputs).reshape(-1, *[1] * (inputs.dim() - 1))
        return own * inputs + (1 - own) * inputs[other.to(inputs.device)]

    return [blend(inputs) for inputs in views]


@contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Seed PyTorch, NumPy and Python in the body, and put their random states back after it."""
    with preserve_rng_state(devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch: no random state need be kept to go on from any of them."""
    text = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return int.from_bytes(text[:6], "little")


def _labelled(item: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    return counted([(*pair_of(item, "training"), None)], "training")[0]


MOST_STEPS = 2**20
"""Batches of an epoch of data that say no length; more have no end."""
