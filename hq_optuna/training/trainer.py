"""Quantization-aware training of one assignment, epoch by epoch.

The trainer takes a prepared network with its bits set, training data and settings. It has nothing
to do with trials, steps or searches, and never sees validation or test data. Statistics corrected
for these bits (`StatisticsCorrection`) are a better start than those of the float network.

Random numbers depend on the seed and the epoch alone, so training that resumes from a checkpoint
gives the same weights as uninterrupted training, on a CPU bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from hq_optuna.atomic_files import write_atomically
from hq_optuna.errors import CheckpointError, DataError, TrainingError
from hq_optuna.network.batches import Batch, autocast, forward, move, outputs_in_single
from hq_optuna.network.checks import explain_errors
from hq_optuna.network.containers import digest_of, is_plain
from hq_optuna.network.copies import copied
from hq_optuna.network.layer_types import BatchNorm
from hq_optuna.network.losses import LossFunction
from hq_optuna.quantization.functional import along
from hq_optuna.quantization.prepare import float_weight, get_bits, prepared_layers, weight_quantizer
from hq_optuna.quantization.quantizers import UNIFORM, WeightQuantizer
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.training.data import Augment, epoch_seed, seeded
from hq_optuna.training.learned import LearnedSteps
from hq_optuna.training.losses import mean_of_views, right_and_counted, training_loss
from hq_optuna.training.matching import MatchedNorms
from hq_optuna.training.optimizer import (
    SecondMoments,
    build_optimizer,
    second_moments,
    set_learning_rate,
)
from hq_optuna.training.settings import Start, TrainingSettings
from hq_optuna.training.trained import load_trained_, trained_tensors

_FORMAT = "hq_optuna training checkpoint"
_VERSION = 1
_ABOUT = "hq_optuna"
_STEP, _OPTIMIZER = "step.", "optimizer."

MARGIN = 0.1
"""How far inside its cell a moved weight lies, in steps of the grid."""


@dataclass(frozen=True)
class Epoch:
    """One epoch's result; epochs count from 1.

    ``loss`` is the mean over its steps of what was trained on, nats for cross-entropy and
    distillation. ``training_accuracy`` is the share of right classes among the samples trained on,
    augmented, each seen before its step changed the weights; ``None`` where there are no classes,
    and where samples are blended. ``learning_rate`` is that of its last step.
    """

    epoch: int
    loss: float
    training_accuracy: float | None
    seconds: float
    learning_rate: float


class Trainer:
    """Trains a prepared network in place, one epoch each time it is asked for one.

    Between epochs the network is an ordinary prepared network in eval mode with the scales and
    ranges learned so far, and can be measured. Do not change it or its bits until the training is
    done.

    The float network is the ``teacher``, needed unless ``settings.label_weight`` is 1 and left as
    it is; ``loss_fn`` is needed unless that is 0. ``augment`` changes a batch's inputs, drawing
    random numbers from the generator it is given. The teacher sees the same inputs, and with
    ``settings.teacher_views`` others too. The file ``checkpoint`` is written after each epoch. If
    it exists, training resumes from it: give the network as it was when that training began.
    `history` holds the epochs that are done, also those before a checkpoint.

    Raises:
        ValueError: No teacher, loss function or augmentation where the settings need one.
        DataError: Unusable training data.
        CheckpointError: The checkpoint is damaged, or of another training.

    Example:
        >>> from hq_optuna import introspect, prepare, set_bits
        >>> from hq_optuna.quantization import observe_inputs
        >>> from hq_optuna.network.batches import read_batches
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> x, y = torch.randn(64, 4), torch.randint(0, 2, (64,))
        >>> layers = introspect(net, x).layers
        >>> prepared = prepare(net, layers, observe_inputs(net, ["0", "2"], read_batches((x, y))))
        >>> set_bits(prepared, {"0": (2, 4), "2": (2, 4)})
        >>> trainer = Trainer(prepared, (x, y), TrainingSettings(epochs=2), teacher=net)
        >>> [result.epoch for result in trainer.epochs()]
        [1, 2]
    """

    def __init__(
        self,
        network: nn.Module,
        data: Any,
        settings: TrainingSettings | None = None,
        *,
        teacher: nn.Module | None = None,
        loss_fn: LossFunction | None = None,
        augment: Augment | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.network = network
        self.settings = settings = settings or TrainingSettings()
        _check_given(network, settings, teacher, loss_fn)
        self.data = settings.data(data, augment)
        self.loss_fn = loss_fn
        self.checkpoint = checkpoint
        self.device = next(network.parameters()).device
        self.teacher, self._norms = None, MatchedNorms({})
        if teacher is not None and settings.label_weight < 1:
            self.teacher = copied(teacher).to(self.device).requires_grad_(False)
            if settings.batch_norm == "matched":
                self._norms = MatchedNorms.of(network, self.teacher)
        self.history: list[Epoch] = []
        self._interrupted = False
        self._belongs = self._identity()
        known = self._read(checkpoint)  # refused before anything has changed
        start_weights_(network, settings.start)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            network.requires_grad_(True)  # frozen for inference, not for training
        self.steps = LearnedSteps.of(network, passes=settings.out_of_range == "pass")
        self._trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self._log_scales = dict(self.steps.named_parameters())
        if not self._trained and not self._log_scales:
            raise TrainingError("Nothing to train: no parameter takes gradient, no layer has bits.")
        self.optimizer = build_optimizer(self._trained, self._log_scales, settings)
        if known is not None:
            self._load(*known)

    def _read(self, checkpoint: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return a checkpoint's content, ``None`` where there is none yet."""
        if checkpoint is None or not checkpoint.exists():
            return None
        try:
            return self._checked(checkpoint.read_bytes())
        except CheckpointError as error:
            raise CheckpointError(f"Checkpoint {checkpoint}: {error}") from None

    def _checked(self, content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, about = _parse(content)
        self._check_belongs(about["belongs"])
        return tensors, about

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree with, by name."""
        teacher = "none" if self.teacher is None else _digest(self.teacher.state_dict())
        return {
            "settings": self.settings.to_json(),
            "network": _digest(trained_tensors(self.network)),
            "quantizers": {
                name: weight_quantizer(module).quantizer.name
                for name, module in prepared_layers(self.network).items()
            },
            "bits": {n: list(bits) for n, bits in get_bits(self.network).items()},
            "data": self.data.digest(),
            "teacher": teacher,
        }

    def epochs(self) -> Iterator[Epoch]:
        """Train epoch by epoch and yield each one's result, after its checkpoint is written.

        Stop asking, and training stops; ask again, and it goes on. Raises `TrainingError` where the
        loss is NaN or infinite, or an epoch was broken off before.
        """
        while len(self.history) < self.settings.epochs:
            result = self._epoch()
            self.history.append(result)
            if self.checkpoint is not None:
                write_atomically(self.checkpoint, self.dump())
            yield result

    def _epoch(self) -> Epoch:
        if self._interrupted:
            raise TrainingError(
                "An epoch was broken off half-way, so the network is between two epochs. Prepare "
                "it anew and go on from the checkpoint."
            )
        started = time.perf_counter()
        index = len(self.history)
        seed = epoch_seed(self.settings.seed, index)
        losses, right, counted = [], 0, 0
        rate = 0.0
        self._interrupted = True
        with seeded(seed, self.device), self._training_mode(index):
            generator = torch.Generator().manual_seed(seed)
            for step, (batch, views) in enumerate(self.data.epoch(generator)):
                rate = self.settings.learning_rate_at(
                    index * self.data.steps + step, self.data.steps
                )
                set_learning_rate(self.optimizer, rate)
                loss, n_right, n = self._step(batch, views)
                losses.append(loss)
                right, counted = right + n_right, counted + n
        self._interrupted = False
        for name, tensor in {**self._trained, **self._log_scales}.items():
            if not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"Training made {name} NaN or infinite in epoch {index + 1}. Lower "
                    "learning_rate, set clip_norm, or check the training data."
                )
        return Epoch(
            epoch=index + 1,
            loss=math.fsum(losses) / len(losses),
            training_accuracy=right / counted if counted else None,
            seconds=time.perf_counter() - started,
            learning_rate=rate,
        )

    @contextmanager
    def _training_mode(self, index: int) -> Iterator[None]:
        left = self.settings.epochs - index  # this epoch counts
        frozen_ranges = left <= self.settings.frozen_ranges_epochs
        frozen_statistics = left <= self.settings.frozen_statistics_epochs
        self.network.train()
        try:
            for module in self.network.modules():
                if frozen_statistics and isinstance(module, BatchNorm):
                    module.eval()
            for log_scale in self._log_scales.values():
                log_scale.requires_grad_(not frozen_ranges)
            learned = self.steps.used_in(self.network)
            with learned, self._norms.in_training(), torch.enable_grad():
                yield
        finally:
            self.network.eval()
            self.optimizer.zero_grad(set_to_none=True)

    def _step(self, batch: Batch, views: list[Any]) -> tuple[float, int, int]:
        settings = self.settings
        inputs, labels = move(batch.inputs, self.device), move(batch.labels, self.device)
        if settings.channels_last and isinstance(inputs, Tensor) and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        targets = None
        self._norms.next_batch()
        with autocast(self.network, settings.precision):
            if self.teacher is not None:
                # The batch itself comes first: its statistics are those that batch-norm follows.
                batches = (inputs, *(move(view, self.device) for view in views))
                with torch.no_grad():
                    targets = mean_of_views([forward(self.teacher, x) for x in batches])
            outputs = outputs_in_single(self._outputs(inputs), settings.precision)
        loss = training_loss(
            outputs, labels, targets, self.loss_fn, settings.label_weight, settings.temperature
        )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"The training loss became {value} in epoch {len(self.history) + 1}. Lower "
                "learning_rate, set clip_norm, or check the training data."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._trained.values(), settings.clip_norm)
        self.optimizer.step()
        return value, *right_and_counted(outputs, None if settings.blend else labels, self.loss_fn)

    def _outputs(self, inputs: Any) -> Any:
        try:
            return forward(self.network, inputs)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                f"Batch-norm cannot normalize a training batch of one sample: {error}. Leave it "
                "out, as DataLoader(drop_last=True) does."
            ) from error

    def second_moments(self) -> SecondMoments | None:
        """Return the second moments of the weights' gradients; ``None`` where none are kept (SGD).

        They are moments of the gradients of what was trained on, see `SecondMoments`.
        """
        return second_moments(
            self.network, self.optimizer, self.steps, self.settings, self.data.batch_size
        )

    def dump(self) -> bytes:
        """Return a checkpoint: all that is needed to go on, between two epochs."""
        tensors = trained_tensors(self.network)
        tensors |= {f"{_STEP}{n}": p.detach() for n, p in self._log_scales.items()}
        for name, parameter in {**self._trained, **self._log_scales}.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{_OPTIMIZER}{key}:{name}"] = torch.as_tensor(value)
        epochs = [asdict(epoch) for epoch in self.history]
        return _dump(tensors, {"belongs": self._belongs, "epochs": epochs})

    def restore(self, content: bytes) -> None:
        """Go on from what `dump` returned. On a `CheckpointError` nothing changes."""
        self._load(*self._checked(content))

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(_OPTIMIZER):
                key, _, owner = name.removeprefix(_OPTIMIZER).partition(":")
                states.setdefault(owner, {})[key] = tensor
        load_trained_(self.network, tensors)
        for name, log_scale in self._log_scales.items():
            log_scale.copy_(tensors[f"{_STEP}{name}"])
        for name, parameter in {**self._trained, **self._log_scales}.items():
            self.optimizer.state.pop(parameter, None)
            if name in states:
                # The number of steps stays on the CPU, as the optimizer has it.
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in states[name].items()
                }
        self.history = [Epoch(**epoch) for epoch in about["epochs"]]
        self._interrupted = False

    def _check_belongs(self, belongs: Mapping[str, Any]) -> None:
        differ = [name for name, own in self._belongs.items() if belongs.get(name) != own]
        if not differ:
            return
        if differ == ["settings"]:
            theirs = belongs["settings"]
            own = self._belongs["settings"]
            differ = [
                f"settings ({name}: {theirs.get(name)!r} there, {own.get(name)!r} here)"
                for name in sorted({*theirs, *own})
                if theirs.get(name) != own.get(name)
            ]
        raise CheckpointError(
            f"It belongs to another training: {', '.join(differ)} differ. Give what that training "
            "began with, or another file."
        )


def _check_given(
    network: nn.Module,
    settings: TrainingSettings,
    teacher: nn.Module | None,
    loss_fn: LossFunction | None,
) -> None:
    """Refuse a training that lacks its teacher or its loss, or a network that is not prepared."""
    if settings.label_weight < 1 and teacher is None:
        raise ValueError(
            f"label_weight is {settings.label_weight}, so part of the loss is distillation: "
            "give the float network as teacher, or train on labels (label_weight=1)."
        )
    if settings.label_weight > 0 and loss_fn is None:
        raise ValueError(
            f"label_weight is {settings.label_weight}: give loss_fn, or label_weight=0 to "
            "train by distillation alone."
        )
    if not prepared_layers(network):
        raise ValueError("The network is not prepared for quantization; call prepare() first.")


def check_trainable(
    model: nn.Module,
    data: Any,
    settings: TrainingSettings,
    loss_fn: LossFunction,
    augment: Augment | None,
) -> None:
    """Refuse what cannot be trained, before a search works for hours: try the first batch.

    A copy of the float network runs on it in training mode, and the loss is computed.

    Raises:
        DataError: The data, the augmentation, the network in training mode, or the loss fail.
        ValueError: The settings need an augmentation.
    """
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise DataError(
            "Steps of the optimizer vanish in half precision (float16), so this network cannot be "
            "trained. Give network.float(), and precision='bfloat16' for speed."
        )
    odd = [name for name, tensor in model.state_dict().items() if not is_plain(tensor)]
    if odd:
        raise DataError(
            f"No checkpoint of a training can hold {odd[0]!r}, which is sparse or nested. Keep it "
            "in a plain attribute of the network, or as a dense tensor."
        )
    reader = settings.data(data, augment)
    device = next(model.parameters()).device
    network, teacher = copied(model, training=True), copied(model)
    seed = epoch_seed(settings.seed, 0)
    with seeded(seed, device), torch.no_grad():
        with explain_errors(
            "The first training batch cannot be read or augmented",
            "Training data are (inputs, labels), and augment is called with (inputs, generator).",
        ):
            batch, views = next(reader.epoch(torch.Generator().manual_seed(seed)))
        inputs, labels = move(batch.inputs, device), move(batch.labels, device)
        targets = None
        with autocast(network, settings.precision):
            if settings.label_weight < 1:
                others = [move(view, device) for view in views]
                with explain_errors(
                    "The network fails on the first training batch",
                    "Give training inputs that are prepared as the calibration data are.",
                ):
                    targets = mean_of_views([forward(teacher, view) for view in (inputs, *others)])
            with explain_errors(
                "The network fails in training mode on the first training batch",
                "What wants more than its inputs to be trained cannot be trained here.",
            ):
                outputs = outputs_in_single(forward(network, inputs), settings.precision)
        hint = "It is called with (outputs, labels); in training mode outputs may be others."
        with explain_errors("The loss fails on the first training batch", hint):
            training_loss(
                outputs, labels, targets, loss_fn, settings.label_weight, settings.temperature
            )
        with explain_errors("The classes of the first training batch cannot be counted", hint):
            right_and_counted(outputs, labels, loss_fn)


@torch.no_grad()
def start_weights_(network: nn.Module, start: Start) -> None:
    """Set the float weights of a prepared network, at its bits, to where training begins: `Start`.

    Weights that are not compensated, that other parametrizations compute, or that another module
    shares (an embedding tied to the last layer) stay.
    """
    owners = Counter(id(p) for m in network.modules() for p in m._parameters.values())
    for module in prepared_layers(network).values():
        quantizer = weight_quantizer(module)
        parametrizations = module.parametrizations.weight  # type: ignore[union-attr]
        if start == "float" or quantizer.bits == FLOAT_BITS or len(parametrizations) > 1:  # type: ignore[arg-type]
            continue
        weight: Tensor = float_weight(module)
        if owners[id(weight)] > 1:
            continue
        kept = quantizer.kept(weight, quantizer.bits)
        if kept is None:
            continue
        scale = quantizer.scale(weight, quantizer.bits)
        begin = quantizer.training_start(weight, quantizer.bits)
        if start != "moved":
            begin = kept
        elif begin is None:
            step = along(scale, weight, quantizer.channel_axis)
            begin = moved(weight, kept, step, quantizer.bits, quantizer.quantizer)
        weight.copy_(begin)


def moved(
    weight: Tensor, rounded: Tensor, scale: Tensor, bits: int, quantizer: WeightQuantizer = UNIFORM
) -> Tensor:
    """Return each weight at the nearest value that rounds to what ``rounded`` holds.

    The quantizer's codes are evenly spaced; the scale broadcasts over the weight.

    Example:
        >>> w, rounded = torch.tensor([0.2, 0.9, 3.0]), torch.tensor([1.0, 1.0, 1.0])
        >>> moved(w, rounded, torch.tensor(1.0), bits=2)
        tensor([0.6000, 0.9000, 3.0000])
    """
    largest = quantizer.largest_code(bits)
    # Codes are 1 apart where one of them is 0, and 2 apart where they are odd.
    step = 2.0 if bits == 1 or quantizer.name == "midrise" else 1.0
    codes = (rounded / scale).round()
    reach = step / 2 - MARGIN * step
    low = torch.where(codes == -largest, -torch.inf, (codes - reach) * scale)
    high = torch.where(codes == largest, torch.inf, (codes + reach) * scale)
    return weight.maximum(low).minimum(high)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return digest_of(sorted(tensors.items()))


def _dump(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Return tensors and JSON data as the content of a safetensors file."""
    plain = {n: t.detach().cpu().clone().contiguous() for n, t in sorted(tensors.items())}
    checked = {**about, "format": _FORMAT, "version": _VERSION, "tensors": _digest(plain)}
    return safetensors.save(plain, {_ABOUT: json.dumps(checked, sort_keys=True)})


def _parse(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON data of a file's content, unless it is cut off or altered."""
    try:
        tensors = safetensors.load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        about: dict[str, Any] = json.loads(header["__metadata__"][_ABOUT])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"It is no training checkpoint, or damaged ({type(error).__name__}: {error!s:.120}). "
            "Remove it to train from the start."
        ) from None
    if about.get("format") != _FORMAT or about.get("version") != _VERSION:
        raise CheckpointError(
            f"It is a {about.get('format')!r} of version {about.get('version')!r}; expected "
            f"{_FORMAT!r} of version {_VERSION}. Remove it to train from the start."
        )
    if _digest(tensors) != about.get("tensors"):
        raise CheckpointError(
            "Its tensors are not those that were written: the file is damaged. Remove it to train "
            "from the start."
        )
    return tensors, about
