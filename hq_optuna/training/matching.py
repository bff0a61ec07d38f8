"""Batch-norm in training that follows the teacher on the same batch.

In training mode batch-norm normalizes with a batch's own statistics, while the teacher, which does
not train, normalizes with those it stored. The student is then asked to make up for a difference
that has nothing to do with rounding: the float network itself would have a loss. So a channel
leaves batch-norm not with mean β and spread γ, but with the mean and the spread that it has in the
teacher on the same batch:

    y = γ · ((x − μ) / σ · σ_teacher + μ_teacher − μ_stored) / σ_stored + β

Where nothing is rounded that is the teacher's own output, and there is nothing to learn. It is
`hq_optuna.quantization.correction` for each batch, and the running statistics are a mean of what
that correction would store.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.network.layer_types import BatchNorm, has_statistics
from hq_optuna.quantization.correction import corrected_statistics
from hq_optuna.quantization.observers import first_input


class _Seen(NamedTuple):
    """Mean and variance of one batch-norm layer's input on one batch, each ``(C,)``."""

    mean: Tensor
    var: Tensor


@dataclass
class MatchedNorms:
    """The batch-norm layers of a network and those of its teacher, in pairs by name.

    A batch with one value a channel or none, in either network, is normalized as in evaluation.
    """

    pairs: dict[str, tuple[BatchNorm, BatchNorm]]
    _seen: dict[str, list[_Seen | None]] = field(
        default_factory=lambda: defaultdict(list), repr=False
    )
    _calls: dict[str, int] = field(default_factory=lambda: defaultdict(int), repr=False)

    @classmethod
    def of(cls, network: nn.Module, teacher: nn.Module) -> MatchedNorms:
        """Pair the layers that have stored statistics and PyTorch's own forward pass."""
        theirs = dict(teacher.named_modules())
        return cls(
            {
                name: (module, theirs[name])
                for name, module in network.named_modules()
                if _is_plain(module) and _is_plain(theirs.get(name))
            }
        )

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Let the network's layers follow the teacher's; run the teacher first on each batch.

        Layers in eval mode use their running statistics.
        """
        with ExitStack() as stack:
            for name, (module, theirs) in self.pairs.items():
                read = self._reads(name, module)
                reads = theirs.register_forward_pre_hook(read, with_kwargs=True)
                stack.callback(reads.remove)
                module.forward = self._follows(name, module, theirs)  # type: ignore[assignment]
                stack.callback(module.__dict__.pop, "forward")
            stack.callback(self.next_batch)
            yield

    def next_batch(self) -> None:
        """Forget what the teacher saw."""
        self._seen.clear()
        self._calls.clear()

    def _reads(self, name: str, module: BatchNorm) -> Callable[[nn.Module, Any, Any], None]:
        def read(theirs: nn.Module, args: Any, kwargs: Any) -> None:
            if module.training:
                x = first_input(args, kwargs).detach()
                seen = _normalized(theirs, x, None, None)[1] if _has_spread(theirs, x) else None
                self._seen[name].append(seen)

        return read

    def _follows(
        self, name: str, module: BatchNorm, theirs: BatchNorm
    ) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            if not module.training or not self._seen[name]:
                return type(module).forward(module, input)
            # A layer that is called twice has two; activation checkpointing calls it again.
            seen = self._seen[name][self._calls[name] % len(self._seen[name])]
            self._calls[name] += 1
            if seen is None or not _has_spread(module, input):
                running = module.running_mean, module.running_var
                own = module.weight, module.bias
                return functional.batch_norm(input, *running, *own, False, 0.0, module.eps)
            stored_mean: Any = theirs.running_mean
            stored_var: Any = theirs.running_var
            spread = (stored_var + module.eps).sqrt()
            gain = (seen.var + module.eps).sqrt() / spread
            shift = (seen.mean - stored_mean) / spread
            weight, bias = gain, shift
            if module.affine:
                weight, bias = module.weight * gain, module.weight * shift + module.bias
            out, found = _normalized(module, input, weight, bias)
            with torch.no_grad():
                _update_running_(
                    module, *corrected_statistics((stored_mean, stored_var), seen, found)
                )
            return out

        return forward


def _is_plain(module: Any) -> bool:
    """Say whether a module normalizes as `_normalized` does; a single process synchronizes none."""
    return has_statistics(module) and type(module).forward in (
        BatchNorm.forward,
        nn.SyncBatchNorm.forward,
    )


def _has_spread(module: Any, x: Tensor) -> bool:
    """Say whether there are two values of each channel: one has no spread, none no mean."""
    return x.numel() > len(module.running_mean)


def _normalized(
    module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, _Seen]:
    """Return a batch normalized by its own statistics, and these."""
    mean, var = torch.zeros_like(module.running_mean), torch.zeros_like(module.running_var)
    out = functional.batch_norm(x, mean, var, weight, bias, True, 1.0, module.eps)
    n = x.numel() // len(mean)  # values a channel; PyTorch stores variances times n / (n - 1)
    return out, _Seen(mean, var * ((n - 1) / n))


def _update_running_(module: Any, mean: Tensor, var: Tensor) -> None:
    """Update the running statistics with those of a batch."""
    module.num_batches_tracked.add_(1)
    share = module.momentum
    if share is None:  # a mean of all batches
        share = 1 / float(module.num_batches_tracked)
    module.running_mean.lerp_(mean, share)
    module.running_var.lerp_(var, share)
