"""Searches on hardware: presets, exact optima under several limits, and impossible limits.

    python -m benchmarks.hardware [--data DIR] [--quick] [--out FILE]

- *Presets*: the digits, and ResNet-20 and FastestDet where ``--data`` has them, are searched on
  every ready-made hardware, a fifth of the way from the cheapest bit operations to the widest
  ones, and half of the way in size. Every layer of the answer, of every candidate and of the saved
  result must have a pair that the preset has, and every range of inputs must be on its grid. With
  the export's packages, each answer is written as ONNX and checked.
- *Optimum*: 200 random spaces with pairs, products and ties, and 1 to 4 random limits, some of
  them the largest of several sums, against SciPy's ``milp`` on sums that are written down here.
- *Impossible*: limits that no assignment meets, alone or together, pins and settings that
  contradict the hardware, and wrong descriptions; each must be refused within 5 seconds.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
from scipy.optimize import LinearConstraint, milp
from torch import nn

import hq_optuna as hq
from benchmarks.outcome import Outcome
from benchmarks.zoo import data_folder, load_trained, unpacked
from hq_optuna.errors import ExportError, HqOptunaError
from hq_optuna.hardware import Hardware, presets, read_hardware, space_on
from hq_optuna.hardware.description import parse_hardware
from hq_optuna.protocol.history import read_history
from hq_optuna.quantization import get_bits
from hq_optuna.quantization.prepare import input_quantizer, prepared_layers
from hq_optuna.search import check_reachable
from hq_optuna.search.several import SeveralLimits
from hq_optuna.settings import SearchSettings
from hq_optuna.space import FLOAT_BITS, LayerBits, LayerSpec
from hq_optuna.space.budget import Budget, parse_budget
from hq_optuna.space.cost import Row
from hq_optuna.space.search_space import SearchSpace
from studies import fastestdet

SPACES = 200
REFUSED_S = 5.0
"""Seconds within which what is impossible must be refused."""


class Case(NamedTuple):
    """A network, what calibrates it, and what its search is told besides."""

    network: nn.Module
    calibration: Any
    told: dict[str, Any]


def cases(data: Path, quick: bool) -> dict[str, Case]:
    """Return the networks to search, by name."""
    found = {}
    names = ["digits"] if quick else ["digits", "resnet20"]
    for name in names:
        try:
            trained = load_trained(name, data, n_calibration=64 if quick else 128)
        except (OSError, HqOptunaError):
            continue
        found[name] = Case(trained.network, trained.calibration, {})
    if not quick:
        try:
            with unpacked(data) as zoo:
                network, images = fastestdet.network(zoo), fastestdet.calibration(zoo, 32)
        except (OSError, HqOptunaError):
            return found
        found["fastestdet"] = Case(network, images, {"rise": fastestdet.rise})
    return found


def budget_of(space: SearchSpace) -> Budget:
    """Return limits between the widest and the cheapest assignment."""
    limits = []
    for metric, share in (("bops", 0.2), ("size_bytes", 0.5)):
        model = space.costs(metric)  # type: ignore[arg-type]
        low, high = (model.cost(space.config(s)) for s in (space.bottom, space.top))
        low, high = min(low, high), max(low, high)
        limits.append(Budget.absolute(**{metric: low + share * (high - low)}))
    return Budget.together(*limits)


def searched(case: Case, name: str, folder: Path) -> dict[str, Any]:
    """Search a network on a preset, and count what is not as the preset says."""
    target = read_hardware(name)
    told = {**case.told, "hardware": name, "verify": 4}
    space = hq.BitSearch(case.network, case.calibration, budget="1600% bops", **told).space
    search = hq.BitSearch(case.network, case.calibration, budget=budget_of(space), **told)
    study = search.optimize()
    history, result = read_history(study), search.result(study)
    layers = {layer.name: layer for layer in search.space.layers}
    tried = [search.space.config(candidate.state) for candidate in history.candidates]
    result.save(folder / name)
    network = hq.load(folder / name, case.network)
    return {
        "layers": len(layers),
        "variables": len(search.space.variables),
        "candidates": len(history.candidates),
        "within_limits": history.met,
        "outside": outside(target, layers, [*tried, result.config, get_bits(network)]),
        "off_grid": off_grid(target, network),
        "score": result.score,
        "exported": exported(search, network, folder / f"{name}.onnx"),
    }


def exported(search: hq.BitSearch, network: nn.Module, path: Path) -> str:
    """Return what an export's check says, or why the answer cannot be written."""
    try:
        from hq_optuna.export import write
    except ModuleNotFoundError as error:
        return f"not installed: {error.name}"
    try:
        written = write(network, path, search.objective.data, check=16)
    except ExportError as error:
        return f"refused: {error}"
    return "written" if written.check is None else f"written; {written.check.sentence}"


def outside(target: Hardware, layers: dict[str, LayerSpec], configs: Sequence[Any]) -> int:
    """Return how many layers of assignments are at a pair that the hardware does not have."""
    if not target.restricts:
        return 0
    return sum(
        pair not in target.pairs(layers[name])
        for config in configs
        for name, pair in config.items()
    )


def off_grid(target: Hardware, network: nn.Module) -> int:
    """Return how many inputs have a range that the hardware does not take."""
    wrong = 0
    for module in prepared_layers(network).values():
        quantizer = input_quantizer(module)
        if quantizer.bits == FLOAT_BITS:
            continue
        scale, zero = quantizer.range(quantizer.bits)
        middle = 2 ** (quantizer.bits - 1)
        if quantizer.bits in target.symmetric_bits:
            wrong += zero not in ((0, middle) if target.unsigned else (middle,))
        if target.power_of_two:
            wrong += math.log2(scale) != round(math.log2(scale))
    return wrong


# Exact optima


def random_space(rng: np.random.Generator, n: int) -> SearchSpace:
    """Return a space of layers with random sets of pairs, some tied."""
    widths = [16, 8, 6, 4, 3, 2]
    kinds, layers = {}, []
    for k in range(n):
        pairs = [LayerBits(w, a) for w in widths for a in widths if rng.random() < 0.15]
        kinds[f"Kind{k}"] = tuple(pairs or [LayerBits(8, 8), LayerBits(4, 8)])
        shape = (int(rng.integers(4, 65)), int(rng.integers(4, 65)))
        macs = math.prod(shape) * int(rng.integers(1, 200))
        layers.append(LayerSpec(f"l{k}", f"Kind{k}", shape, 0, macs, 1, shape[1]))
    ties: tuple[tuple[str, ...], ...] = ()
    if n > 3 and rng.random() < 0.5:
        kinds["Kind2"] = kinds["Kind1"]
        ties = (("l1", "l2"),)
    target = Hardware("random", layers=kinds, ties=ties)
    return space_on(target, layers, SearchSettings(pin_first_last=None))


def random_rows(space: SearchSpace, rng: np.random.Generator, n: int) -> list[list[Row]]:
    """Return the rows of ``n`` limits: bit operations, size, a latency in no order, a peak."""
    every = {layer.name: {} for layer in space.layers}
    for name in every:
        for w, a in itertools.product((16, 8, 6, 4, 3, 2), repeat=2):
            every[name][w, a] = float(rng.uniform(0.5, 1.5) * (w + a)) * 1e-6
    inputs = {layer.name: layer.n_inputs for layer in space.layers}
    moments = [rng.permutation(list(inputs))[: max(2, len(inputs) // 2)] for _ in range(4)]

    def held(at: Sequence[str]) -> Callable[[str, LayerBits], float]:
        names = set(at)
        return lambda name, bits: inputs[name] * bits[1] / 8 if name in names else 0.0

    found = [
        list(space.costs("bops").rows),
        list(space.costs("size_bytes").rows),
        [Row(lambda name, bits: every[name][tuple(bits)], 1e-5)],
        [Row(held(at), 64.0) for at in moments],
    ]
    return [found[i] for i in rng.permutation(4)[:n]]


def by_milp(
    space: SearchSpace, rises: list[dict[int, float]], rows: list[Row], limits: list[float]
) -> float | None:
    """Return the optimum by SciPy, over whole assignments of each group of layers."""
    blocks: list[list[int]] = []
    for v, variable in enumerate(space.variables):
        shared = [b for b in blocks if any(
            set(space.variables[u].layers) & set(variable.layers) for u in b)]  # fmt: skip
        merged = sorted([v, *itertools.chain(*shared)])
        blocks = [b for b in blocks if b not in shared] + [merged]
    columns, costs, gains = [], [], []
    base = space.start
    touched = {name for v in space.variables for name in v.layers}
    fixed = [
        row.fixed + sum(row.layer_cost(n, b) for n, b in base.items() if n not in touched)
        for row in rows
    ]
    for index, block in enumerate(blocks):
        for bits in itertools.product(*(space.variables[v].bits for v in block)):
            state = list(space.top)
            for v, b in zip(block, bits, strict=True):
                state[v] = b
            config = space.config(state)
            names = {n for v in block for n in space.variables[v].layers}
            costs.append([sum(row.layer_cost(n, config[n]) for n in names) for row in rows])
            gains.append(sum(rises[v][b] for v, b in zip(block, bits, strict=True)))
            columns.append(index)
    one = (np.arange(len(blocks))[:, None] == np.array(columns)[None]).astype(float)
    room = np.array(limits) - fixed
    scale = np.maximum(np.abs(np.array(costs)).max(0), 1e-300)
    unit = 1e3 / max(min(gains, key=abs) or max(gains), max(gains) * 1e-6)
    found = milp(
        np.array(gains) * unit,
        integrality=np.ones(len(columns)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(np.array(costs).T / scale[:, None], -np.inf, room / scale),
        ],
        options={"mip_rel_gap": 0.0},
    )
    return None if found.x is None else float(np.array(gains)[found.x > 0.5].sum())


def optima(n: int) -> dict[str, Any]:
    """Compare optima of random spaces, and return how many differ, and what they took."""
    unequal, over, infeasible, seconds = [], 0, 0, []
    for seed in range(n):
        rng = np.random.default_rng(seed)
        space = random_space(rng, int(rng.integers(3, 13)))
        limits = random_rows(space, rng, 1 + seed % 4)
        rises = [{b: float(rng.lognormal(0, 2)) for b in v.bits} for v in space.variables]
        rows = [row for one in limits for row in one]
        states = [[int(rng.choice(v.bits)) for v in space.variables] for _ in range(50)]
        drawn = [
            [r.fixed + sum(r.layer_cost(n, b) for n, b in space.config(s).items()) for r in rows]
            for s in states
        ]
        share = float(rng.uniform(0.0, 0.6))
        most = [float(np.quantile([d[i] for d in drawn], share)) for i in range(len(rows))]
        at = 0
        for one in limits:  # a peak has one limit for all its moments
            most[at : at + len(one)] = [max(most[at : at + len(one)])] * len(one)
            at += len(one)
        started = time.perf_counter()
        found = SeveralLimits(space, rises, rows).best(most)
        seconds.append(time.perf_counter() - started)
        expected = by_milp(space, rises, rows, most)
        if found is None or expected is None:
            infeasible += found is None
            unequal += [seed] if (found is None) != (expected is None) else []
            continue
        score = sum(r[b] for r, b in zip(rises, found, strict=True))
        config = space.config(found)
        spent = [r.fixed + sum(r.layer_cost(n, b) for n, b in config.items()) for r in rows]
        over += any(s > m * (1 + 1e-12) for s, m in zip(spent, most, strict=True))
        if not math.isclose(score, expected, rel_tol=1e-6):
            unequal.append(seed)
    return {
        "spaces": n,
        "unequal": unequal,
        "over_a_limit": over,
        "infeasible": infeasible,
        "median_s": float(np.median(seconds)),
        "most_s": max(seconds),
    }


# What cannot be


def impossible() -> dict[str, Callable[[], Any]]:
    """Return what must be refused, by name."""
    layers = [LayerSpec(f"l{k}", "Linear", (64, 64), 0, 4096 * (k + 1), 1, 64) for k in range(40)]
    settings = SearchSettings(pin_first_last=None)
    text = "name: a\nsource: b\nlayers: {'*': [W8A2, W4A8]}\n"
    # Each limit can be met, but where weights are narrow, inputs are so wide that operations are
    # many.
    crossed = space_on(parse_hardware(text, "a"), layers, settings)
    wide = SearchSpace.build(layers, bits=(8, 4), pin_first_last=None)
    size = crossed.costs("size_bytes").int8
    weights = SearchSpace.build(
        layers, bits=range(2, 9), activation_bits=range(2, 9), pin_first_last=None
    )

    return {
        "bops below the least": lambda: check_reachable(wide, parse_budget("0.2 bops")),
        "size below the least": lambda: check_reachable(weights, parse_budget("10 bytes")),
        "one of two limits": lambda: check_reachable(
            wide, parse_budget(["0.9 bops", f"{0.4 * size} size_bytes absolute"])
        ),
        "two limits that contradict": lambda: check_reachable(
            crossed, parse_budget(["0.3 bops", f"{0.6 * size} size_bytes absolute"])
        ),
        "two limits of one metric": lambda: parse_budget(["0.5 bops", "24 GBOPs"]),
        "a unit that is none": lambda: parse_budget("8 lightyears"),
        "a pin the hardware lacks": lambda: space_on(
            read_hardware("cmsis-nn"), layers, SearchSettings(pins={"l3": 6})
        ),
        "bits the hardware lacks": lambda: space_on(
            read_hardware("litert"), layers, SearchSettings(bits=(3, 5))
        ),
        "a kind the hardware lacks": lambda: space_on(
            parse_hardware(text.replace("*", "Conv2d"), "a"), layers, settings
        ),
        "nothing left to search": lambda: space_on(
            parse_hardware(text.replace("[W8A2, W4A8]", "[W8A8]"), "a"), layers, settings
        ),
        "hardware that is not there": lambda: read_hardware("gpu9000"),
        "asymmetric weights": lambda: parse_hardware(
            text + "weights: {symmetric: false}", "a"
        ),
        "dynamic activations": lambda: parse_hardware(
            text + "activations: {dynamic: true}", "a"
        ),
        "a pair without a container": lambda: parse_hardware(text + "containers: [8]", "a"),
    }  # fmt: skip


def refusals() -> list[dict[str, Any]]:
    """Try what is impossible, and return what was said and how long it took."""
    rows = []
    for name, attempt in impossible().items():
        started, said = time.perf_counter(), ""
        try:
            attempt()
        except (HqOptunaError, ValueError) as error:
            said = str(error)
        rows.append({"what": name, "said": said, "seconds": time.perf_counter() - started})
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--quick", action="store_true", help="the digits, and fewer spaces")
    parser.add_argument("--out", type=Path, help="file for everything")
    parser.add_argument("--only", choices=("presets", "optimum", "impossible"))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcome, only = Outcome("hardware"), arguments.only
    if only in (None, "optimum"):
        found = optima(20 if arguments.quick else SPACES)
        print(found, flush=True)
        outcome.details["optimum"] = found
        outcome.figures["milp_unequal"] = len(found["unequal"])
        outcome.figures["milp_over_a_limit"] = found["over_a_limit"]
        outcome.figures["milp_seconds_median"] = found["median_s"]
    if only in (None, "impossible"):
        rows = refusals()
        outcome.details["impossible"] = rows
        outcome.figures["impossible"] = len(rows)
        outcome.figures["refused"] = sum(
            bool(row["said"]) and row["seconds"] < REFUSED_S for row in rows
        )
        outcome.figures["refused_seconds_max"] = max(row["seconds"] for row in rows)
        for row in rows:
            print(row, flush=True)
    if only in (None, "presets"):
        told = []
        with tempfile.TemporaryDirectory() as folder:
            for name, case in cases(arguments.data, arguments.quick).items():
                for preset in presets():
                    row = {"network": name, "hardware": preset}
                    row |= searched(case, preset, Path(folder))
                    print(row, flush=True)
                    told.append(row)
        outcome.details["presets"] = told
        outcome.figures["preset_searches"] = len(told)
        outcome.figures["preset_layers_outside"] = sum(row["outside"] for row in told)
        outcome.figures["preset_inputs_off_grid"] = sum(row["off_grid"] for row in told)
        outcome.figures["preset_over_limits"] = sum(not row["within_limits"] for row in told)
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
