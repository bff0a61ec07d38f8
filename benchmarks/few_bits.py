"""What rounding in the order of running keeps at few bits, and what it costs.

Uniform bits ``WxAy``, first and last layer at 8 (of the keyword network the first alone), and
``mixed``: the exact optimum of the table at the cost of uniform bits. Each assignment is built
twice, by ``rounding="compensated"`` and by ``"in_order"``, from one preparation. The metric is of
samples that nothing has read; so is ``kl_…``, the mean KL divergence from the float network in
nats, or for networks that are no classifiers ``error_…``, the squared change of the outputs over
their variance. Figures that end in ``_compensated`` are of that rounding. Details hold paired
differences of each with standard errors. ``worse_at_6_8`` counts the cases at 6 and 8 bits in which
the divergence or error rises by more than two of them.

``passes_NETWORK`` is the price of preparation, its table where there are mixed bits, and of fitting
one answer in order, in float passes over the calibration set; ``passes_NETWORK_compensated`` of the
same without.

``--without ranges`` or ``regression`` leaves a part of it out: ranges stay those of least squared
error, weights are rounded without being fitted to quantized inputs first.

    python -m benchmarks.few_bits --networks resnet20 kws --settings W3A3 W6A6 --data DIR
    python -m benchmarks.few_bits --quick
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.fields import ACCURACY
from benchmarks.outcome import Outcome
from benchmarks.zoo import data_folder, load_trained, unpacked
from hq_optuna import BitSearch, Budget, Metric
from hq_optuna.network.batches import Batches, forward, read_batches
from hq_optuna.network.containers import tensors
from hq_optuna.quantization import in_order
from hq_optuna.scoring import Sensitivity
from hq_optuna.search.uniform import uniform_states
from studies import efficientnet_lite0, fastestdet, sentences, super_resolution

ROUNDINGS = {"": True, "_compensated": False}
"""Ends of figures, and whether the network is fitted in order."""

PARTS: dict[str, tuple[str, Any]] = {
    "ranges": ("output_range", lambda weight, rows, bits, before, *, normed: before),
    "regression": ("RIDGES", ()),
}
"""Parts of rounding in order, and what takes the place of each when it is left out."""


@dataclass(frozen=True)
class Case:
    """A network with its data, and the settings whose answers are measured.

    ``study`` has network, data and loss or rise; without it they are those of the zoo.
    """

    settings: tuple[str, ...]
    study: Any = None
    metric: Metric = ACCURACY
    network: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)


CASES = {
    "digits": Case(("W4A4", "W3A3", "mixed3", "W6A6", "W8A8")),
    "resnet20": Case(("W4A4", "W3A3", "W2A4", "W6A6", "W8A8")),
    "kws": Case(
        ("W3A3", "mixed3", "W6A6", "W8A8"), search={"pin_first_last": None, "pins": {"first.*": 8}}
    ),
    "lite0": Case(
        ("W4A4", "W3A3", "mixed4", "mixed3", "W6A6", "W8A8"), efficientnet_lite0, data={"size": 160}
    ),
    "vww": Case(("W4A4", "W3A3", "W6A6", "W8A8")),
    "fastestdet": Case(("W4A4", "mixed4", "W6A6", "W8A8"), fastestdet, fastestdet.evaluate),
    "rlfn": Case(("W4A4", "W6A6", "W8A8"), super_resolution, super_resolution.evaluate),
    "mobilesr": Case(
        *(("W4A4", "W6A6", "W8A8"), super_resolution, super_resolution.evaluate),
        network={"model": "mobilesr"},
    ),
    "minilm": Case(("W4A4", "W4A8", "W8A8"), sentences, sentences.evaluate),
}


@torch.no_grad()
def outputs_of(network: nn.Module, data: Batches) -> list[list[Tensor]]:
    """Return the float tensors of a network's outputs on each batch."""
    found = [[*tensors(forward(network, batch.inputs))] for batch in data]
    return [[t.double() for t in one if t.is_floating_point()] for one in found]


class Bench:
    """A prepared search, and what is measured of its assignments on unseen samples."""

    def __init__(
        self,
        name: str,
        data: Path,
        seed: int,
        samples: dict[str, int | None],
        settings: Sequence[str],
    ) -> None:
        self.case = case = CASES[name]
        self.classifies = case.metric is ACCURACY
        if case.study is None:
            trained = load_trained(name, data, seed=seed, **samples)
            network, seen, unseen = trained.network, trained.calibration, trained.unseen
            told: dict[str, Any] = {}
        else:
            network, seen, unseen = _of_study(case, data, seed, samples)
            told = {"rise": getattr(case.study, "rise", None)}
            told["loss_fn"] = getattr(case.study, "loss", None)
        # Only a table needs weights at all bits.
        searched = any(setting.startswith("mixed") for setting in settings)
        few = {int(b) for setting in settings for b in re.findall(r"\d+", setting)}
        bits = range(2, 9) if searched else sorted({8, *few})
        self.network, self.unseen = network, read_batches(unseen, batch_size=64)
        self.search = BitSearch(
            *(network, seen),
            **{**told, "bits": bits, "activation_bits": bits, "budget": "1 bops"},
            **{"scorer": "hessian_trace", "rounding": "in_order", **case.search},
        )
        objective = self.search.objective
        runs = [self._seconds_of(lambda: outputs_of(network, objective.data)) for _ in range(3)]
        self.one = min(seconds for _, seconds in runs)
        self.study, preparation = self._seconds_of(self.search.open) if searched else (None, 0.0)
        if self.study is not None:
            self.scorer = objective.prepare(self.study)
        else:
            built = objective.setup.build(network, Sensitivity({}, {}), lambda what, done, of: None)
            self.scorer = built.scorer
        _, seconds = self._seconds_of(lambda: self.scorer.prepared)
        self.passes = (preparation + seconds) / self.one
        self.expected = outputs_of(network, self.unseen)
        self.records = case.metric.records(network, self.unseen)
        self.space = self.search.space
        self.uniform = {
            f"W{w}A{a}": self.space.config(s) for (w, a), s in uniform_states(self.space).items()
        }

    @staticmethod
    def _seconds_of(run: Any) -> tuple[Any, float]:
        started = time.process_time()
        found = run()
        return found, time.process_time() - started

    def config(self, setting: str) -> Any:
        """Return uniform bits, or the optimum at their cost."""
        if not setting.startswith("mixed"):
            return self.uniform[setting]
        bits = setting.removeprefix("mixed")
        assert self.study is not None, "there is a table for mixed bits"
        limit = self.space.costs("bops").cost(self.uniform[f"W{bits}A{bits}"])
        return self.search.exact(self.study, Budget.absolute(bops=limit)).config

    def measured(self, setting: str) -> dict[str, Any]:
        """Return metric, divergences and price of both roundings, and paired differences."""
        config, found = self.config(setting), dict[str, Any]()
        records, moved = dict[str, Any](), dict[str, Tensor]()
        for end, fits in ROUNDINGS.items():
            network, seconds = self._seconds_of(
                lambda fitted=fits: self.scorer.network(config, in_order=fitted)
            )
            records[end] = self.case.metric.records(network, self.unseen)
            moved[end] = self._moved(network)
            found[f"metric{end}"] = self.case.metric.of(records[end])
            found[f"moved{end}"] = float(moved[end].mean())
            found[f"passes{end}"] = seconds / self.one
        found["float"] = self.case.metric.of(self.records)
        over = moved[""] - moved["_compensated"]
        found["moved_difference"] = float(over.mean())
        found["moved_standard_error"] = float(over.std() / math.sqrt(len(over)))
        found["metric_difference"] = self.case.metric.difference(
            records["_compensated"], records[""]
        )
        return found

    def _moved(self, network: nn.Module) -> Tensor:
        """Return each sample's divergence from float, or each batch's relative error."""
        found = []
        for ours, theirs in zip(outputs_of(network, self.unseen), self.expected, strict=True):
            if self.classifies:
                p, q = theirs[0].log_softmax(1), ours[0].log_softmax(1)
                found.append((p.exp() * (p - q)).sum(1))
            else:
                errors = [
                    (a - b).square().mean() / b.var() for a, b in zip(ours, theirs, strict=True)
                ]
                found.append(torch.stack(errors).mean()[None])
        return torch.cat(found)


def _of_study(
    case: Case, data: Path, seed: int, samples: dict[str, int | None]
) -> tuple[nn.Module, Any, Any]:
    """Return network, calibration and unseen samples of a study, as far as it can be told."""
    study, given = case.study, dict(case.network)
    if "data" in inspect.signature(study.network).parameters:
        given["data"] = data

    def loaded(read: Any) -> Any:
        wanted = {**case.data, **samples, "split_seed": seed}
        wanted["n_validation"] = wanted["n_unseen"]
        can = inspect.signature(read).parameters
        return read(data, **{k: v for k, v in wanted.items() if k in can and v is not None})

    return study.network(**given), loaded(study.calibration), loaded(study.validation)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder(), help="the shared data")
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--settings", nargs="+", help="W3A3, mixed3, …; by default a network's own")
    parser.add_argument("--calibration", type=int, help="samples; by default a network's own")
    parser.add_argument("--unseen", type=int, help="samples; by default all")
    parser.add_argument("--seeds", type=int, default=1, help="figures are means over so many")
    parser.add_argument("--without", nargs="+", choices=list(PARTS), default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the digits alone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    outcome, each, worse = Outcome("few_bits"), dict[str, list[float]](), 0
    samples = {"n_calibration": arguments.calibration, "n_unseen": arguments.unseen}
    with ExitStack() as stack:
        for part in arguments.without:
            stack.enter_context(mock.patch.object(in_order, *PARTS[part]))
        folder = None if arguments.quick else stack.enter_context(unpacked(arguments.data))
        for name in ["digits"] if arguments.quick else arguments.networks:
            data = arguments.data if folder is None or CASES[name].study is None else folder
            for seed in range(arguments.seeds):
                settings = arguments.settings or CASES[name].settings
                bench = Bench(name, data, seed, samples, settings)
                for setting in settings:
                    found = outcome.details[f"{name}_{setting}_{seed}"] = bench.measured(setting)
                    bits = setting.lower()
                    what = "kl" if bench.classifies else "error"
                    for end in ROUNDINGS:
                        each.setdefault(f"{name}_{bits}{end}", []).append(found[f"metric{end}"])
                        each.setdefault(f"{what}_{name}_{bits}{end}", []).append(
                            found[f"moved{end}"]
                        )
                        each.setdefault(f"passes_{name}{end}", []).append(
                            bench.passes + found[f"passes{end}"]
                        )
                    above = found["moved_difference"] > 2 * found["moved_standard_error"]
                    worse += setting in ("W6A6", "W8A8") and above
                    _tell(f"{name} {setting}", bench.case.metric, found)
    outcome.figures |= {name: round(statistics.fmean(v), 4) for name, v in each.items()}
    outcome.figures["worse_at_6_8"] = worse
    outcome.details["each_seed"] = each
    outcome.finish(arguments.out)


def _tell(case: str, metric: Metric, found: dict[str, Any]) -> None:
    said = [f"{metric.name} of float {found['float']:.2f}"]
    for end in reversed(ROUNDINGS):
        said.append(
            f"{end.removeprefix('_') or 'in order'} {found[f'metric{end}']:.2f} "
            f"(moved {found[f'moved{end}']:.4f}, {found[f'passes{end}']:.1f} passes)"
        )
    difference, error = found["moved_difference"], found["moved_standard_error"]
    print(f"{case}: {'; '.join(said)}; moved {difference:+.4f} ± {error:.4f}", flush=True)


if __name__ == "__main__":
    main()
