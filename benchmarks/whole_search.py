"""How well tables rank assignments of equal cost, and what their answers gain over uniform bits.

A budget is the bit operations of uniform b bits, first and last layer at 8. The truth of an
assignment is the smooth rise ½ Δzᵀ H̄ Δz on samples that nothing here has read, with H̄ the mean
Hessian of their softmax at temperature 3, of the quantized network as the search would hand it
over: rounded, and its statistics corrected. The KL divergence stands beside it.

Ranking: assignments of nearly equal cost are drawn, half of them around uniform bits and half
around the exact optima of all tables in turn. ``spearman_TABLE_NETWORK_b`` is a table's rank
correlation with the truth. ``ceiling_NETWORK_b`` is the truth's reliability: the mean Spearman
correlation r between two random halves of the unseen samples, stepped up to all of them by
Spearman and Brown's 2r / (1 + r). A table without any error could reach its square root.

The answer: the exact optimum of each table against uniform bits, ``smooth_ratio_TABLE_NETWORK_b``
and ``kl_ratio_…`` (answer / uniform, below 1 is better), with the standard error of a bootstrap
over samples, paired. ``uniform_ratio_NETWORK_b`` is the smooth rise of uniform bits where rounding
leaves out the samples that the first table reads, over that where it reads all.

Price: processor seconds of the search's preparation over those of a float pass over the calibration
set, ``table_passes_TABLE_NETWORK`` of the table alone, ``passes_prepare_NETWORK`` of all of it.
``--price`` measures nothing else, of the search's own table only; ``passes_door_NETWORK`` are the
checks before it. ``mobilenet_v2`` is torchvision's with random weights, on 64 images of 160 pixels.
Details hold the parts, and the rise of the peak of memory.

``--search`` runs whole searches with the measured end instead: ``passes_NETWORK`` from the
checks to the answer at uniform 4 bits' cost (without the dashboard's pages),
``passes_another_budget_NETWORK`` for each further budget, and the answers' ratios as
``answer_smooth_NETWORK_b`` and ``answer_kl_NETWORK_b``, the accuracy gained as
``answer_points_NETWORK_b``, with paired standard errors. ``uniform_better`` counts the cases where
uniform bits are better beyond two of them in any. With ``--seeds`` figures and errors are means.

Networks that tell no class a sample are judged by their own rise: by H̄ for the smooth rise, and by
each sample's Hessian in place of the divergence.

    python -m benchmarks.whole_search --networks resnet20 --budgets 4 3 --data DIR
    python -m benchmarks.whole_search --search --networks resnet20 kws vww --data DIR
    python -m benchmarks.whole_search --networks resnet20 --activation-bits same --data DIR
    python -m benchmarks.whole_search --price --networks resnet20 mobilenet_v2 --data DIR
    python -m benchmarks.whole_search --quick
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.outcome import Outcome
from benchmarks.zoo import ZOO, Trained, data_folder, load_trained
from hq_optuna import BitSearch, Budget
from hq_optuna.answer.measured_end import measured_end
from hq_optuna.network.batches import Batches, forward, read_batches
from hq_optuna.objective.preparation import Preparation
from hq_optuna.protocol.history import read_history
from hq_optuna.protocol.pieces import Piece
from hq_optuna.rises import Rise
from hq_optuna.search.additive import Additive
from hq_optuna.search.uniform import uniform_states
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.search_space import SearchSpace

TABLES = ("hessian_trace", "diagonal")
"""The first one is the search's own: figures without a table's name are of it."""
PARTS = ("layers", "statistics", "table")
"""What preparation consists of, by what its pieces' names begin with."""
TABLE_PART = "table"
MOBILENET = "mobilenet_v2"
TEMPERATURE = 3.0
REACH = 2  # notches that a drawn assignment may be away from its centre, in each variable
TOLERANCE = 0.005  # of the cost, to begin with

Array = NDArray[np.float64]
State = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Rises:
    """The smooth rise and the KL divergence of each sample, and whether its class is right.

    ``changed`` is the share of samples that the float network gives another class.

    Of outputs that are no classes of a sample: the rise by H̄, and by each sample's own Hessian.
    """

    smooth: Array
    kl: Array
    right: Array | None = None
    changed: float = math.nan

    @property
    def accuracy(self) -> float:
        """The share of samples whose class is right; NaN where samples have none."""
        return math.nan if self.right is None else float(self.right.mean())


class Unseen:
    """Samples that nothing has read, and what they say of a quantized network."""

    def __init__(self, trained: Trained) -> None:
        self.data = read_batches(trained.unseen, batch_size=64, labelled=False)
        self.network, self.rise = trained.network, trained.rise
        if self.rise is not None:
            outputs = (self.rise.run(self.network, batch.inputs) for batch in self.data)
            with torch.inference_mode():
                self.rise = self.rise.fitted(outputs, self.data)
            return
        self.labels = trained.unseen[1]
        self.outputs = outputs_of(self.network, self.data).double()
        p = (self.outputs / TEMPERATURE).softmax(1)
        self.hessian = torch.diag(p.mean(0)) - p.T @ p / len(p)

    def rises(self, network: nn.Module) -> Rises:
        """Return what a network's outputs cost, sample by sample."""
        if self.rise is not None:
            return self._by_rise(network, self.rise)
        moved = outputs_of(network, self.data).double()
        change = moved - self.outputs
        smooth = 0.5 * ((change @ self.hessian) * change).sum(1)
        p, q = self.outputs.log_softmax(1), moved.log_softmax(1)
        kl = (p.exp() * (p - q)).sum(1)
        right = (moved.argmax(1) == self.labels).double()
        changed = (moved.argmax(1) != self.outputs.argmax(1)).double().mean()
        return Rises(smooth.numpy(), kl.numpy(), right.numpy(), float(changed))

    @torch.inference_mode()
    def _by_rise(self, network: nn.Module, rise: Rise) -> Rises:
        found = list[tuple[Tensor, Tensor]]()
        for batch in self.data:
            z, moved = (rise.run(net, batch.inputs) for net in (self.network, network))
            ways = (rise.averaged(), rise)
            one, other = (way.of_samples(z, moved, batch) for way in ways)
            found.append((one, other))
        smooth, kl = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        return Rises(smooth, kl)


@torch.inference_mode()
def outputs_of(network: nn.Module, data: Batches) -> Tensor:
    """Return a network's outputs on all samples, one tensor."""
    return torch.cat([forward(network, batch.inputs) for batch in data])


@torch.inference_mode()
def run_all(network: nn.Module, data: Batches) -> None:
    """Run a network on all samples."""
    for batch in data:
        forward(network, batch.inputs)


def pass_seconds(network: nn.Module, data: Batches, n: int = 3) -> float:
    """Return the processor seconds of a float pass over data, the median of some."""
    seconds = []
    for _ in range(n):
        started = time.process_time()
        run_all(network, data)
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Give the processor seconds spent in each part of preparation while it runs."""
    seconds = dict.fromkeys(PARTS, 0.0)
    compute = Preparation._compute

    def timed(preparation: Preparation, piece: Piece) -> Any:
        started = time.process_time()
        try:
            return compute(preparation, piece)
        finally:
            seconds[piece.name.partition(":")[0]] += time.process_time() - started

    with mock.patch.object(Preparation, "_compute", timed):
        yield seconds


def search_of(trained: Trained, activation_bits: Any, **options: Any) -> BitSearch:
    """Return the search of a network's bits, by its rise where it has one."""
    options |= {} if trained.rise is None else {"rise": trained.rise}
    return BitSearch(
        trained.network, trained.calibration, activation_bits=activation_bits, **options
    )


class Prepared:
    """A search with one scorer, prepared: its table, its networks, and what they took."""

    def __init__(self, scorer: str, trained: Trained, activation_bits: Any) -> None:
        started = time.process_time()
        self.search = search_of(trained, activation_bits, scorer=scorer)
        door = time.process_time() - started
        objective, self.space = self.search.objective, self.search.space
        one = pass_seconds(trained.network, objective.data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with timed_parts() as seconds:
            started = time.process_time()
            table = objective.prepare().sensitivity
            spent = time.process_time() - started
        self.peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        one = min(one, pass_seconds(trained.network, objective.data))
        self.passes = {name: value / one for name, value in seconds.items()}
        self.passes["preparation"] = spent / one
        self.passes["door"] = door / one
        by_layer = {
            name: {"weights": table.weights[name], "activations": table.activations[name]}
            for name in table.weights
        }
        costs = self.space.costs("bops")
        self.table = Additive(self.space, by_layer, costs)
        self.cost = costs.cost

    def measured(self, config: BitConfig, unseen: Unseen) -> Rises:
        """Return what the network of an assignment costs on unseen samples."""
        return unseen.rises(self.search.objective.quantized(config))


def state_of(space: SearchSpace, config: BitConfig) -> State:
    """Return the bits of each variable in an assignment."""
    return tuple(
        config[v.layers[0]].activation_bits
        if v.part == "activations"
        else config[v.layers[0]].weight_bits
        for v in space.variables
    )


def drawn(
    space: SearchSpace,
    cost: Callable[[BitConfig], float],
    limit: float,
    centre: State,
    n: int,
    draw: random.Random,
    taken: set[State],
) -> list[BitConfig]:
    """Return assignments around one, within a small tolerance below the limit.

    Some variables are moved by up to two notches, and then one at a time, up or down, until the
    cost fits. The tolerance doubles where too few are found. ``taken`` are those to leave out;
    what is found is added.
    """
    notches = []
    for variable, bits in zip(space.variables, centre, strict=True):
        at = variable.bits.index(bits)
        notches.append(variable.bits[max(at - REACH, 0) : at + REACH + 1])  # widest first

    def attempt(tolerance: float) -> State | None:
        state = list(centre)
        for v in draw.sample(range(len(state)), draw.randint(2, max(2, 2 * len(state) // 3))):
            state[v] = draw.choice(notches[v])
        for _ in range(20 * len(state)):
            over = cost(space.config(state)) / limit - 1
            if -tolerance <= over <= 0:
                return tuple(state)
            v = draw.randrange(len(state))
            place = notches[v].index(state[v]) + (1 if over > 0 else -1)
            if 0 <= place < len(notches[v]):
                state[v] = notches[v][place]
        return None

    found: list[BitConfig] = []
    tolerance = TOLERANCE
    while len(found) < n and tolerance < 0.5:
        for _ in range(20 * n):
            state = attempt(tolerance)
            if state is not None and state not in taken:
                taken.add(state)
                found.append(space.config(state))
                if len(found) == n:
                    break
        tolerance *= 2
    return found


def reliability(per_sample: Array, n: int = 50) -> tuple[float, float]:
    """Return the mean rank agreement of random halves of the samples, and that of all of them.

    ``per_sample`` is ``(assignments, samples)``. The second value is Spearman and Brown's.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        order = rng.permutation(per_sample.shape[1])
        a, b = np.array_split(order, 2)
        found.append(spearmanr(per_sample[:, a].mean(1), per_sample[:, b].mean(1))[0])
    half = float(np.mean(found))
    return half, 2 * half / (1 + half)


def ratio(answer: Array, uniform: Array, n: int = 1000) -> tuple[float, float]:
    """Return the ratio of two means over the same samples, and its standard error."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(answer), (n, len(answer)))
    ratios = answer[picks].mean(1) / uniform[picks].mean(1)
    return float(answer.mean() / uniform.mean()), float(ratios.std(ddof=1))


def points(gained: Array) -> tuple[float, float]:
    """Return the mean of paired differences in percentage points, and its standard error."""
    error = float(gained.std(ddof=1)) / math.sqrt(len(gained))
    return 100 * float(gained.mean()), 100 * error


def rank_error(score: Array, truth: Array, n: int = 500) -> float:
    """Return the standard error of a Spearman correlation, by a bootstrap over assignments."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(truth), (n, len(truth)))
    return float(np.nanstd([spearmanr(score[p], truth[p])[0] for p in picks], ddof=1))


class Bench:
    """One network with its samples dealt, prepared for every table."""

    def __init__(self, name: str, trained: Trained, activation_bits: Any, seed: int) -> None:
        self.name, self.seed = name, seed
        self.unseen = Unseen(trained)
        known = TABLES if trained.rise is None else TABLES[:1]  # others need labels
        self.prepared = {t: Prepared(t, trained, activation_bits) for t in known}
        self.first = self.prepared[TABLES[0]]
        self.space = self.first.space
        uniform = uniform_states(self.space)
        self.uniform = {b: self.space.config(state) for (b, a), state in uniform.items() if a == b}

    def figures(self) -> dict[str, float]:
        """Return the price of preparation."""
        found = {f"passes_prepare_{self.name}": self.first.passes["preparation"]}
        for table, prepared in self.prepared.items():
            found[f"table_passes_{table}_{self.name}"] = prepared.passes.get(TABLE_PART, math.nan)
        return found

    def ranked(self, b: int, n: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Draw assignments of equal cost, and return how well each table ranks them."""
        uniform, first = self.uniform[b], self.first
        limit = first.cost(uniform)
        optima = [self._optimum(table, limit) for table in self.prepared]
        centres = {"uniform": state_of(self.space, uniform)}
        centres |= {
            table: state_of(self.space, config)
            for table, config in zip(self.prepared, optima, strict=True)
        }
        draw = random.Random(1000 * self.seed + b)
        taken = {*centres.values()}
        configs, groups = [], []
        rest, tables = n - n // 2, len(self.prepared)
        for place, (group, centre) in enumerate(centres.items()):  # uniform bits come first
            shares = n // 2 if group == "uniform" else (rest + tables - place) // tables
            found = drawn(self.space, first.cost, limit, centre, shares, draw, taken)
            configs += found
            groups += ["uniform" if group == "uniform" else "optimum"] * len(found)
        per_sample = np.stack([first.measured(config, self.unseen).smooth for config in configs])
        truth = per_sample.mean(1)
        half, ceiling = reliability(per_sample)
        key = f"{self.name}_{b}"
        figures = {f"ceiling_{key}": ceiling}
        details: dict[str, Any] = {
            "drawn": dict(Counter(groups)),
            "cost_over_limit": [round(first.cost(config) / limit, 4) for config in configs],
            "smooth": truth.tolist(),
            "halves_agree": half,
        }
        details["spearman_cost"] = float(spearmanr(details["cost_over_limit"], truth)[0])
        for table, prepared in self.prepared.items():
            score = np.array([prepared.table.score(config) for config in configs])
            figures[f"spearman_{table}_{key}"] = float(spearmanr(score, truth)[0])
            details[table] = {
                "standard_error": rank_error(score, truth),
                "score": score.tolist(),
                # How far the level is off, once one factor is taken out.
                "log_residual": float(np.std(np.log(score) - np.log(truth))),
                "level": float(np.exp(np.mean(np.log(score) - np.log(truth)))),
            }
            for group in ("uniform", "optimum"):
                mine = [place for place, of in enumerate(groups) if of == group]
                details[table][f"around_{group}"] = float(spearmanr(score[mine], truth[mine])[0])
        return figures, details

    def _optimum(self, table: str, limit: float) -> BitConfig:
        found = self.prepared[table].table.exact(limit)
        assert found is not None, "uniform bits are within the limit"
        return found.config

    def answered(self, b: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Return each table's exact answer over uniform bits of the same cost."""
        key, limit = f"{self.name}_{b}", self.first.cost(self.uniform[b])
        figures: dict[str, float] = {}
        details: dict[str, Any] = {}
        uniform: dict[str, Rises] = {}
        for table, prepared in self.prepared.items():
            config = self._optimum(table, limit)
            answer = prepared.measured(config, self.unseen)
            uniform[table] = prepared.measured(self.uniform[b], self.unseen)
            for truth in ("smooth", "kl"):
                value, error = ratio(getattr(answer, truth), getattr(uniform[table], truth))
                figures[f"{truth}_ratio_{table}_{key}"] = value
                figures[f"{truth}_ratio_{table}_{key}_standard_error"] = error
            details[table] = {
                "bits": [list(config[layer.name]) for layer in self.space.layers],
                "cost_over_limit": prepared.cost(config) / limit,
                # What the table says of the ratio.
                "promised": prepared.table.score(config) / prepared.table.score(self.uniform[b]),
                "accuracy_answer": answer.accuracy,
                "accuracy_uniform": uniform[table].accuracy,
                "kl_uniform": float(uniform[table].kl.mean()),
                "smooth_uniform": float(uniform[table].smooth.mean()),
            }
        if (other := uniform.get("diagonal")) is not None:  # rounding reads all samples there
            figures[f"uniform_ratio_{key}"] = ratio(uniform[TABLES[0]].smooth, other.smooth)[0]
        return figures, details


def searched(
    name: str, trained: Trained, activation_bits: Any, budgets: Sequence[int], seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return price and gain of whole searches: one, and further budgets of its study."""
    unseen = Unseen(trained)
    first = 4 if 4 in budgets else budgets[0]
    started = time.process_time()
    space = search_of(trained, activation_bits).space
    uniform = {b: space.config(s) for (b, a), s in uniform_states(space).items() if a == b}
    limits = {b: Budget.absolute(bops=space.costs("bops").cost(uniform[b])) for b in budgets}
    door = time.process_time() - started
    search = search_of(trained, activation_bits, budget=limits[first])
    started = time.process_time()
    study = search.open(seed=seed)
    search.work(study, pages=False)
    whole = door + time.process_time() - started
    one = pass_seconds(trained.network, search.objective.data)
    figures, details = {f"passes_{name}": whole / one}, dict[str, Any]()
    others = list[float]()
    for b in budgets:
        started = time.process_time()
        if b == first:
            found = search.result(study)
            end = measured_end(read_history(study))
        else:
            found = search.exact(study, limits[b], verify=6)
            end = found.facts["measured_end"]
            others.append((time.process_time() - started) / one)
        answer = unseen.rises(found.network)
        beside = unseen.rises(search.quantized(uniform[b]))
        for truth in ("smooth", "kl"):
            value, error = ratio(getattr(answer, truth), getattr(beside, truth))
            figures[f"answer_{truth}_{name}_{b}"] = value
            figures[f"answer_{truth}_{name}_{b}_standard_error"] = error
        if answer.right is not None and beside.right is not None:
            value, error = points(answer.right - beside.right)
            figures[f"answer_points_{name}_{b}"] = value
            figures[f"answer_points_{name}_{b}_standard_error"] = error
        details[str(b)] = {
            "accuracy_answer": answer.accuracy,
            "accuracy_uniform": beside.accuracy,
            "changed_answer": answer.changed,
            "changed_uniform": beside.changed,
            "kl_uniform": float(beside.kl.mean()),
            "measured_end": end,
        }
        smooth, kl = (figures[f"answer_{truth}_{name}_{b}"] for truth in ("smooth", "kl"))
        print(
            f"{name}_{b}: smooth {smooth:.3f}  kl {kl:.3f}  accuracy {beside.accuracy:.4f} -> "
            f"{answer.accuracy:.4f}",
            flush=True,
        )
    if others:
        figures[f"passes_another_budget_{name}"] = statistics.fmean(others)
    print(f"{name}: {whole / one:.1f} float passes, another budget {others}", flush=True)
    return figures, details


def answers_summed_up(figures: Mapping[str, float]) -> dict[str, float]:
    """Return geometric means, the worst, and how often uniform bits are better."""
    found: dict[str, float] = {}
    worse = set[str]()
    for truth, sign, even in (("smooth", 1, 1.0), ("kl", 1, 1.0), ("points", -1, 0.0)):
        cases = {
            key.removeprefix(f"answer_{truth}_"): value
            for key, value in figures.items()
            if key.startswith(f"answer_{truth}_") and not key.endswith("_standard_error")
        }
        if truth != "points":
            found[f"{truth}_ratio_geomean"] = statistics.geometric_mean(cases.values())
            found[f"{truth}_ratio_max"] = max(cases.values())
        for case, value in cases.items():
            error = figures[f"answer_{truth}_{case}_standard_error"]
            if sign * (value - even) > 2 * error:
                worse.add(case)
    found["uniform_better"] = len(worse)
    return found


def mobilenet_v2() -> Trained:
    """Return torchvision's network with random weights, for its price alone."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.mobilenet_v2(weights=None).eval()
        samples = torch.randn(64, 3, 160, 160), torch.randint(0, 1000, (64,))
    return Trained(network, samples, samples)


def priced(name: str, trained: Trained, activation_bits: Any, outcome: Outcome) -> None:
    """Measure what a search prepares, and its checks before."""
    one = Prepared(TABLES[0], trained, activation_bits)
    price, door = one.passes["preparation"], one.passes["door"]
    found = {f"passes_prepare_{name}": price, f"passes_door_{name}": door}
    found[f"table_passes_{TABLES[0]}_{name}"] = one.passes[TABLE_PART]
    outcome.figures |= {figure: round(value, 4) for figure, value in found.items()}
    outcome.details[name] = {"passes": one.passes, "peak_kib": one.peak_kib}
    parts = ", ".join(f"{part} {value:.1f}" for part, value in one.passes.items())
    print(f"{name}: {parts}; peak of memory +{one.peak_kib / 1024:.0f} MiB", flush=True)


def summed_up(figures: Mapping[str, float], cases: Sequence[str]) -> dict[str, float]:
    """Return medians, geometric means and the worst over networks and budgets."""
    found: dict[str, float] = {}

    def of(what: str) -> list[float]:
        """Return a figure of all cases that have it: those without labels have one table."""
        return [figures[f"{what}_{case}"] for case in cases if f"{what}_{case}" in figures]

    found["ceiling_median"] = statistics.median(of("ceiling"))
    for table in (t for t in TABLES if of(f"spearman_{t}")):
        found[f"spearman_{table}_median"] = statistics.median(of(f"spearman_{table}"))
        for truth in ("smooth", "kl"):
            values = of(f"{truth}_ratio_{table}")
            found[f"{truth}_ratio_{table}_geomean"] = statistics.geometric_mean(values)
    own = TABLES[0]
    found["iso_spearman_median"] = found[f"spearman_{own}_median"]
    for truth in ("smooth", "kl"):
        found[f"{truth}_ratio_geomean"] = found[f"{truth}_ratio_{own}_geomean"]
        found[f"{truth}_ratio_max"] = max(of(f"{truth}_ratio_{own}"))
    found["uniform_better"] = sum(
        figures[f"smooth_ratio_{own}_{case}"]
        > 1 + 2 * figures[f"smooth_ratio_{own}_{case}_standard_error"]
        for case in cases
    )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=[*ZOO, MOBILENET], default=list(ZOO))
    parser.add_argument("--price", action="store_true", help="the price of preparation alone")
    parser.add_argument("--search", action="store_true", help="whole searches and their answers")
    parser.add_argument("--budgets", nargs="+", type=int, default=[6, 5, 4, 3], metavar="BITS")
    parser.add_argument("--data", type=Path, default=data_folder(), help="the shared data")
    parser.add_argument("--assignments", type=int, default=42, help="drawn for each budget")
    parser.add_argument("--calibration", type=int, help="samples; by default all")
    parser.add_argument("--unseen", type=int, help="samples; by default all")
    parser.add_argument(
        "--activation-bits",
        choices=["apart", "same"],
        default="apart",
        help="whether bits of a layer's input are searched apart from those of its weights",
    )
    parser.add_argument("--seeds", type=int, default=1, help="figures are means over so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the digits alone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    networks = ["digits"] if arguments.quick else arguments.networks
    activation_bits = range(2, 9) if arguments.activation_bits == "apart" else "same"

    outcome = Outcome("whole_search")
    outcome.details["options"] = {name: str(value) for name, value in vars(arguments).items()}
    if arguments.price:
        for name in networks:
            trained = (
                mobilenet_v2()
                if name == MOBILENET
                else load_trained(name, arguments.data, n_calibration=arguments.calibration)
            )
            priced(name, trained, activation_bits, outcome)
        outcome.finish(arguments.out)
        return
    if arguments.search:
        found: dict[str, list[float]] = {}
        for name, seed in itertools.product(networks, range(arguments.seeds)):
            samples = {"n_calibration": arguments.calibration, "n_unseen": arguments.unseen}
            trained = load_trained(name, arguments.data, seed=seed, **samples)
            here, outcome.details[f"{name}_seed{seed}"] = searched(
                name, trained, activation_bits, arguments.budgets, seed
            )
            for figure, value in here.items():
                found.setdefault(figure, []).append(value)
        outcome.details["each_seed"] = found
        figures = {name: statistics.fmean(values) for name, values in found.items()}
        figures |= answers_summed_up(figures)
        outcome.figures |= {name: round(value, 4) for name, value in figures.items()}
        outcome.finish(arguments.out)
        return
    if MOBILENET in networks:
        parser.error(f"{MOBILENET} has random weights: give --price.")
    each: dict[str, list[float]] = {}
    for name in networks:
        for seed in range(arguments.seeds):
            trained = load_trained(
                name,
                arguments.data,
                seed=seed,
                n_calibration=arguments.calibration,
                n_unseen=arguments.unseen,
            )
            bench = Bench(name, trained, activation_bits, seed)
            here = bench.figures()
            details: dict[str, Any] = {
                "calibration_samples": bench.first.search.objective.data.n_samples,
                "unseen_samples": bench.unseen.data.n_samples,
                "passes": {table: one.passes for table, one in bench.prepared.items()},
            }
            prices = ", ".join(
                f"{t} {here[f'table_passes_{t}_{name}']:.1f}" for t in bench.prepared
            )
            print(f"{name}: {here[f'passes_prepare_{name}']:.1f} float passes; tables: {prices}")
            for b in arguments.budgets:
                ranked, details[f"ranked_{b}"] = bench.ranked(b, arguments.assignments)
                answered, details[f"answered_{b}"] = bench.answered(b)
                here |= ranked | answered
                _tell(f"{name}_{b}", here)
            outcome.details[f"{name}_seed{seed}"] = details
            for figure, value in here.items():
                each.setdefault(figure, []).append(value)
    figures = {name: statistics.fmean(values) for name, values in each.items()}
    cases = [f"{name}_{b}" for name in networks for b in arguments.budgets]
    figures |= summed_up(figures, cases)
    outcome.figures |= {name: round(value, 4) for name, value in figures.items()}
    outcome.details["each_seed"] = each
    outcome.finish(arguments.out)


def _tell(case: str, figures: Mapping[str, float]) -> None:
    print(f"{case}: ceiling {figures[f'ceiling_{case}']:.2f}")
    for table in TABLES:
        if f"spearman_{table}_{case}" not in figures:
            continue
        said = [f"spearman {figures[f'spearman_{table}_{case}']:+.2f}"]
        for truth in ("smooth", "kl"):
            name = f"{truth}_ratio_{table}_{case}"
            said.append(f"{truth} {figures[name]:.3f} ± {figures[f'{name}_standard_error']:.3f}")
        print(f"  {table:14} {'  '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
