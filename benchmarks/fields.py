"""What mixed bits keep of each field's own metric, against uniform bits of equal cost.

A network of each field, its data, its metric (`studies/`). A budget is the bit operations of
uniform bits, first and last layer at 8 in both. The answer is the exact optimum of the table of
Hessian traces: no network is trained and no candidate measured. Metrics are of samples that nothing
else reads; differences are paired, with 95 % intervals. Figures that end in ``_loss`` or hold it
are points (or dB) below the float network; ``uniform_…`` is the same figure of uniform bits.
Further metrics, COCO's AP, SSIM and top-5, are told beside them and in the details.
``worse_than_uniform`` counts the cases in which uniform bits are better beyond the interval.

    python -m benchmarks.fields --data ZOO [--networks kws vww …] [--out FILE]
    python -m benchmarks.fields --data ZOO --quick      the two smallest
    python -m benchmarks.fields --data ZOO --networks minilm --products --costs 8,8 4,8
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.outcome import Outcome
from benchmarks.zoo import data_folder, unpacked
from hq_optuna import BitSearch, Budget, Metric
from hq_optuna.network.batches import Batches, forward, read_batches
from hq_optuna.search.uniform import uniform_states
from studies import (
    efficientnet_lite0,
    espnet,
    fastestdet,
    keywords,
    sentences,
    super_resolution,
    visual_wake_words,
)


@torch.no_grad()
def right(network: nn.Module, data: Batches) -> list[float]:
    """Return 100 for each sample whose class is right, else 0."""
    found = [forward(network, b.inputs).argmax(1) == b.labels for b in data]
    return (100 * torch.cat(found).double()).tolist()


ACCURACY = Metric(name="accuracy", unit="%", per_sample=right)


@dataclass(frozen=True)
class Field:
    """A study, its budgets as weight and activation bits, and what its figures are called.

    ``{}`` in a name is the budget. Figures are losses but for those of ``absolute``.
    """

    study: Any
    budgets: tuple[tuple[int, int], ...]
    figure: str
    metric: Metric = ACCURACY
    network: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    final: str = "validation"
    bits: Sequence[int] = range(2, 9)
    absolute: bool = False
    more: tuple[Metric, ...] = ()


FIELDS: dict[str, Field] = {
    "kws": Field(keywords, ((4, 4), (3, 3)), "accuracy_loss_kws_{}"),
    "vww": Field(visual_wake_words, ((4, 4), (3, 3)), "accuracy_loss_vww_{}"),
    "rlfn": Field(
        *(super_resolution, ((8, 8), (4, 4)), "psnr_loss_rlfn_{}", super_resolution.evaluate),
        bits=range(2, 13),
        more=(super_resolution.similarity,),
    ),
    "mobilesr": Field(
        *(super_resolution, ((8, 8), (4, 4)), "psnr_loss_mobilesr_{}", super_resolution.evaluate),
        network={"model": "mobilesr"},
        bits=range(2, 13),
        more=(super_resolution.similarity,),
    ),
    "fastestdet": Field(
        *(fastestdet, ((6, 6), (4, 4)), "ap50_fastestdet_{}", fastestdet.evaluate),
        absolute=True,
        more=(fastestdet.precision,),
    ),
    "espnet": Field(espnet, ((6, 6), (4, 4)), "miou_loss_espnet_{}", espnet.evaluate, final="test"),
    "minilm": Field(
        *(sentences, ((4, 8),), "spearman_loss_minilm_{}", sentences.evaluate),
        bits=(2, 3, 4, 5, 6, 8),
    ),
    "lite0": Field(
        *(efficientnet_lite0, ((6, 6), (4, 4)), "top1_loss_lite0_{}"),
        calibration={"n_calibration": 128},
        more=(efficientnet_lite0.top5,),
    ),
}


class Bench:
    """A field's network with its table, and what is measured of its answers."""

    def __init__(
        self, one: Field, data: Path, settings: Mapping[str, Any], verify: int = 0
    ) -> None:
        self.one, self.verify = one, verify
        given = dict(one.network)
        if "data" in inspect.signature(one.study.network).parameters:
            given["data"] = data
        network = one.study.network(**given)
        calibration = one.study.calibration(data, **one.calibration)
        self.unseen = read_batches(getattr(one.study, one.final)(data), batch_size=64)
        started = time.process_time()
        self.search = BitSearch(
            *(network, calibration, getattr(one.study, "loss", None)),
            rise=getattr(one.study, "rise", None),
            bits=one.bits,
            activation_bits=one.bits,
            budget="1 bops",
            **{"scorer": "hessian_trace", **settings},
        )
        self.study = self.search.open()
        self.seconds = time.process_time() - started
        self.space = self.search.space
        self.metrics = one.metric, *one.more
        self.records = self.measured(network)

    @torch.no_grad()
    def measured(self, network: nn.Module) -> list[Any]:
        """Return the records of the unseen samples, of each metric."""
        return [metric.records(network, self.unseen) for metric in self.metrics]

    def case(self, bits: tuple[int, int]) -> dict[str, Any]:
        """Return the metrics of float, uniform bits and the answer, and their differences."""
        model = self.space.costs("bops")
        uniform = self.space.config(uniform_states(self.space)[bits])
        limit = model.cost(uniform)
        answer = self.search.exact(self.study, Budget.absolute(bops=limit), verify=self.verify)
        other = self.measured(self.search.quantized(uniform))
        mine = self.measured(answer.network)
        compared = [*map(_compared, self.metrics, self.records, other, mine)]
        return {
            **compared[0],
            "more": {m.name: c for m, c in zip(self.metrics, compared, strict=True)},
            "cost_over_limit": answer.cost / limit,
            "promised": answer.score / self._table(uniform),
            "mean_bits": [
                statistics.fmean(answer.config[x.name][part] for x in self.space.layers)
                for part in (0, 1)
            ],
        }

    def _table(self, config: Any) -> float:
        return sum(self.search.objective.prepare(self.study).sensitivity.score(config))


def _compared(metric: Metric, whole: Any, uniform: Any, answer: Any) -> dict[str, Any]:
    """Return a metric of float, uniform bits and the answer, from records of the same samples."""
    return {
        "float": metric.of(whole),
        "uniform": metric.of(uniform),
        "answer": metric.of(answer),
        "over_uniform": metric.difference(uniform, answer),
        "over_float": metric.difference(whole, answer),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder(), help="zoo, or its archive")
    parser.add_argument("--networks", nargs="+", choices=list(FIELDS), default=list(FIELDS))
    parser.add_argument(
        "--costs",
        nargs="+",
        metavar="W,A",
        type=lambda text: tuple(map(int, text.split(","))),
        help="uniform bits whose cost is the budget, 4,8; default: the field's own",
    )
    parser.add_argument(
        "--products", action="store_true", help="round and search products of activations too"
    )
    parser.add_argument("--observer", default="squared_error", help="how ranges are found")
    parser.add_argument("--rounding", default="compensated", help="how weights are rounded")
    parser.add_argument("--verify", type=int, default=0, help="finalists that are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the two smallest networks")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    settings = {"observer": arguments.observer, "rounding": arguments.rounding}
    settings |= {"products": True} if arguments.products else {}
    outcome, worse = Outcome("fields"), 0
    with unpacked(arguments.data) as folder:
        for name in ["kws", "vww"] if arguments.quick else arguments.networks:
            one = FIELDS[name]
            bench = Bench(one, folder, settings, arguments.verify)
            details: dict[str, Any] = {"seconds_of_table": round(bench.seconds, 1)}
            for bits in arguments.costs or one.budgets:
                said = str(bits[0]) if bits[0] == bits[1] else f"w{bits[0]}a{bits[1]}"
                case = details[said] = bench.case(bits)
                sign = 1 if one.metric.higher_is_better else -1
                over = case["over_uniform"]
                worse += over["high"] < 0 if sign > 0 else over["low"] > 0
                figure = one.figure.format(said) + "_products" * arguments.products
                for what, prefix in (("answer", ""), ("uniform", "uniform_")):
                    value = case[what] if one.absolute else sign * (case["float"] - case[what])
                    outcome.figures[prefix + figure] = round(value, 3)
                for metric in bench.metrics:
                    _tell(name, said, metric, case["more"][metric.name])
            outcome.details[name] = details
    outcome.figures["worse_than_uniform"] = worse
    outcome.finish(arguments.out)


def _tell(name: str, bits: str, metric: Metric, case: dict[str, Any]) -> None:
    def with_interval(what: str) -> str:
        return "{value:+.4g} [{low:+.4g}, {high:+.4g}]".format(**case[what])

    print(
        f"{name} at the cost of {bits}: {metric.name} float {case['float']:.4g}, uniform "
        f"{case['uniform']:.4g}, answer {case['answer']:.4g} {metric.unit}; answer - uniform "
        f"{with_interval('over_uniform')}, answer - float {with_interval('over_float')}",
        flush=True,
    )


if __name__ == "__main__":
    main()
