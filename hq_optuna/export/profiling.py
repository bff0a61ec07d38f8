"""Latency of each layer in onnxruntime, measured: the table that budgets such as ``8 ms`` follow.

The network is exported with the same bits everywhere, once for each pair of bits, and once more
with the pairs dealt out in turn, so that each layer is seen beside others. Each file is cut where
codes enter a layer: a piece is a layer and what follows it up to the next rounding, with batch
normalization, activation function and additions. Pieces that compute the same are timed once; a
layer's time is the mean of its pieces. Sums of pieces are not the network: a session has its own
cost, and an optimizer works across cuts. So the whole files are timed too, in the same turns, and
the pieces of each pair are scaled so that their sums come nearest to what whole files take. With
further files of drawn mixed bits each entry of the table is moved too, by least squares that hold
it near its piece: a layer whose runtime's kernel hangs on its neighbours then has the mean over
such neighbours.
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from scipy.optimize import nnls
from torch import Tensor, nn

from hq_optuna.errors import ExportError
from hq_optuna.export.check import quantizer_of, roundings, session
from hq_optuna.export.deployed import CODES
from hq_optuna.export.job import Weights
from hq_optuna.export.tracing import sample_axis, take
from hq_optuna.export.writing import write
from hq_optuna.network.batches import Batches
from hq_optuna.network.containers import tensors
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.latency import REST, LatencyRow, LatencyTable
from hq_optuna.space.search_space import SearchSpace

_EIGHT = LayerBits(8, 8)

WIDE = 0.2
"""Spread above which a machine was not idle."""

HANGS = 1.5
"""Ratio of a layer's pieces above which its time hangs on its neighbours."""

LEAST_S = 5e-6
"""Difference of pieces that a timer tells from nothing."""

MOST_NAMED = 6

REPEATS = 3
"""Runs in one turn of a file; the quickest counts."""

Feed = Mapping[str, NDArray[Any]]


@dataclass
class Timed:
    """A session and what its turns took, in seconds: the quickest run of each."""

    session: Any
    feed: Feed
    turns: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """Run some times, and keep the quickest."""
        quickest = math.inf
        for _ in range(REPEATS):
            started = time.process_time()
            self.session.run(None, self.feed)
            quickest = min(quickest, time.process_time() - started)
        self.turns.append(quickest)

    @property
    def seconds(self) -> float:
        """The median of the turns."""
        return statistics.median(self.turns)

    @property
    def spread(self) -> float:
        """The distance of the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.turns, n=4)
        return (high - low) / self.seconds


def in_turns(timed: Sequence[Timed], turns: int) -> None:
    """Time sessions in turns, so that what else the machine does meets all of them alike.

    A first turn warms up and does not count.
    """
    for _ in range(turns + 1):
        for one in timed:
            one.turn()
    for one in timed:
        del one.turns[0]


@dataclass(frozen=True)
class Profile:
    """What `profile` measured.

    Attributes:
        table: Seconds by layer and pair.
        spreads: By layer and pair, the distance of the quartiles as a share of the median.
        whole: For each file of the fit, what its pieces sum up to before and after scaling, and
            what it takes as a whole, in seconds.
        pieces: Different pieces that were timed.
        checked: For each assignment that was timed as a whole, what the table predicts and what it
            takes, in seconds.
        by_neighbours: Layers and pairs whose pieces take by far not the same time beside other
            neighbours: the least and the most of them, in seconds.
    """

    table: LatencyTable
    spreads: Mapping[tuple[str, LayerBits], float]
    whole: tuple[tuple[float, float, float], ...]
    pieces: int
    checked: tuple[tuple[float, float], ...] = ()
    by_neighbours: Mapping[tuple[str, LayerBits], tuple[float, float]] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """The largest error of a prediction, as a share of what was measured."""
        return max((abs(told / took - 1) for told, took in self.checked), default=None)

    @property
    def sentences(self) -> list[str]:
        """What there is to know beside the table."""
        spread = statistics.median(self.spreads.values())
        said = [
            f"{self.pieces} different pieces; half of a piece's turns are within {spread:.0%} of "
            f"its median; {1e6 * self.table.rest_s:.3g} us are in no layer"
        ]
        if spread > WIDE:
            said.append(
                "[yellow]That is a wide spread: something else kept this machine busy. Measure "
                "again when it is idle, or give more --turns.[/]"
            )
        if self.by_neighbours:
            named = [
                f"{name} {bits} ({1e6 * low:.3g} to {1e6 * high:.3g} us)"
                for (name, bits), (low, high) in self.by_neighbours.items()
            ]
            more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
            said.append(
                "[yellow]The runtime takes another kernel for some layers beside other neighbours, "
                "which a table by layers has only the mean of: "
                f"{', '.join(named[:MOST_NAMED])}{more}.[/]"
            )
        if self.error is not None:
            said.append(
                f"{len(self.checked)} mixed assignments: predicted within {self.error:.1%} of what "
                "they take as a whole"
            )
        return said

    def to_json(self) -> dict[str, Any]:
        """Return what was measured as JSON data."""
        spreads = [[name, str(bits), spread] for (name, bits), spread in self.spreads.items()]
        return {
            "table": self.table.to_json(),
            "spreads": spreads,
            "files": [list(file) for file in self.whole],
            "pieces": self.pieces,
            "checked": [list(pair) for pair in self.checked],
        }


def drawn(space: SearchSpace, n: int) -> list[BitConfig]:
    """Return assignments of a space, drawn at random, the same each time."""
    chance = random.Random(0)
    return [
        space.config([chance.choice(variable.bits) for variable in space.variables])
        for _ in range(n)
    ]


def profile(
    space: SearchSpace,
    quantized: Callable[[BitConfig], nn.Module],
    data: Batches,
    *,
    weights: Weights = "int4",
    turns: int = 300,
    fit: Sequence[BitConfig] = (),
    check: Sequence[BitConfig] = (),
    tell: Callable[[str], None] = lambda said: None,
) -> Profile:
    """Measure how long each layer takes at each pair of bits that it may have.

    Args:
        space: The search space; W8A8 of all layers is measured too.
        quantized: Returns the network with the bits of an assignment, see `BitSearch.quantized`.
        data: Calibration data, of which one sample is run.
        weights: The smallest type of weights in the files, as for `write`.
        turns: How many times each file is timed, in turns; processor time counts.
        fit: Assignments whose files are timed as a whole to move the entries of the table.
        check: Assignments whose files are timed as a whole too, beside what the table predicts.
        tell: Called with what is done.

    Raises:
        ExportError: The network cannot be exported, or onnxruntime refuses it.
    """
    pairs = {name: sorted({_EIGHT, *of}, reverse=True) for name, of in space.pairs.items()}
    pieces: dict[str, Timed] = {}
    seen: dict[tuple[str, LayerBits], list[str]] = {}
    whole: list[tuple[BitConfig, Timed]] = []
    for config in _designs(pairs):
        tell(f"exporting file {len(whole) + 1}")
        model = exported(quantized(config), data, weights)
        feed, found = cut(model, list(pairs), data)
        whole.append((config, Timed(session(model.SerializeToString(), optimize=True), feed)))
        for name, piece in found.items():
            seen.setdefault((name, config.get(name, _EIGHT)), []).append(piece.key)
            if piece.key not in pieces:
                made = session(piece.model.SerializeToString(), optimize=True)
                pieces[piece.key] = Timed(made, piece.feed)
    mixed = []
    for i, config in enumerate([*fit, *check], start=1):
        tell(f"exporting mixed bits, {i} of {len(fit) + len(check)}")
        model = exported(quantized(config), data, weights)
        feed = _first_sample(model, data)
        mixed.append(Timed(session(model.SerializeToString(), optimize=True), feed))
    tell(f"timing {len(pieces)} pieces and {len(whole) + len(mixed)} whole files, {turns} turns")
    call = _call_cost()
    in_turns([call, *pieces.values(), *(one for _, one in whole), *mixed], turns)
    whole += zip(fit, mixed, strict=False)
    checked = mixed[len(fit) :]
    fitted = _fitted(pairs, seen, pieces, whole, call.seconds, moved=bool(fit))
    told = [fitted.table.total(config) for config in check]
    return replace(fitted, checked=tuple(zip(told, (one.seconds for one in checked), strict=True)))


def _designs(pairs: Mapping[str, Sequence[LayerBits]]) -> list[BitConfig]:
    """Return assignments to export: each layer has each of its pairs, beside equals and others."""
    every = sorted({pair for of in pairs.values() for pair in of}, reverse=True)
    uniform = [BitConfig({n: p if p in of else _EIGHT for n, of in pairs.items()}) for p in every]
    most = max(len(of) for of in pairs.values())
    dealt = [
        BitConfig({n: of[(i + shift) % len(of)] for i, (n, of) in enumerate(pairs.items())})
        for shift in range(most if most > 1 else 0)
    ]
    return list(dict.fromkeys([*uniform, *dealt]))


def exported(network: nn.Module, data: Batches, weights: Weights) -> onnx.ModelProto:
    """Return a network's file for a single sample, with the shapes of all values."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write(network, path, data, weights=weights, check=0)
        model = onnx.load(path)
    for value in model.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_param"):
                axis.dim_value = 1
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


@dataclass(frozen=True)
class Piece:
    """A part of a file as a file, what it is run on, and a key that equal pieces share."""

    model: onnx.ModelProto
    feed: Feed
    key: str


def cut(
    model: onnx.ModelProto, layers: Sequence[str], data: Batches
) -> tuple[Feed, dict[str, Piece]]:
    """Return what the file is run on, and its pieces by layer; `REST` is what comes before any.

    Args:
        model: A file with the shapes of all values.
        layers: Names of the layers.
        data: Calibration data; the first sample is run.
    """
    feed = _first_sample(model, data)
    owners = _owners(model, layers)
    stored = {item.name for item in model.graph.initializer}
    made_by = {name: owner for owner, node in owners for name in node.output}
    crossing = {
        name
        for owner, node in owners
        for name in node.input
        if name and name not in stored and made_by.get(name, owner) != owner
    }
    values = dict(feed) | _values(model, feed, sorted(crossing))
    last = {value.name for value in model.graph.output}
    found = {}
    for owner in dict.fromkeys(owner for owner, _ in owners):
        nodes = [node for other, node in owners if other == owner]
        own = {name for node in nodes for name in node.output}
        taken = [n for node in nodes for n in node.input if n and n not in own | stored]
        given = [name for node in nodes for name in node.output if name in crossing | last]
        if given:
            found[owner] = _piece(model, nodes, list(dict.fromkeys(taken)), given, values)
    return feed, found


def _owners(model: onnx.ModelProto, layers: Sequence[str]) -> list[tuple[str, Any]]:
    """Return the nodes in order, each with its layer.

    A node belongs to the layer whose codes or weight it reads, and otherwise to the last layer
    before it.
    """
    stored = {item.name for item in model.graph.initializer}
    known = set(layers)
    entering = {node.input[0]: quantizer_of(node).rpartition(".")[0] for node in roundings(model)}
    entering |= {node.output[0]: quantizer_of(node).rpartition(".")[0] for node in roundings(model)}
    place: dict[str, int] = {REST: -1}
    weight_of: dict[str, str] = {}
    for name in stored:
        layer = name.partition(CODES)[0]
        if CODES in name and layer in known:
            weight_of[name] = layer
    owner_of: dict[str, str] = {}
    nodes = list(model.graph.node)
    for node in nodes:  # which values are weights
        data = [name for name in node.input if name and name not in stored]
        layer = next((weight_of[name] for name in node.input if name in weight_of), None)
        if layer is not None and not data and node.op_type != "Conv":
            weight_of |= dict.fromkeys(node.output, layer)
    for at, node in enumerate(nodes):
        layer = next((weight_of[name] for name in node.input if name in weight_of), None)
        if layer is not None:
            place.setdefault(layer, at)
    owners = []
    for node in nodes:
        layer = next((weight_of[name] for name in node.input if name in weight_of), None)
        is_code = node.op_type in ("Clip", "DequantizeLinear") and node.output[0] in entering
        if layer is None and is_code and entering[node.output[0]] in place:
            layer = entering[node.output[0]]
        before = [owner_of[name] for name in node.input if name in owner_of]
        options = [*before, layer or REST]
        owner = max(options, key=lambda name: place.get(name, -1))
        owner_of |= dict.fromkeys(node.output, owner)
        owners.append((owner, node))
    return owners


def _first_sample(model: onnx.ModelProto, data: Batches) -> dict[str, NDArray[Any]]:
    """Return the file's inputs for one sample."""
    batch = data[0]
    names = [value.name for value in model.graph.input]
    taken = [
        x for x in tensors(take(batch.inputs, sample_axis(batch), 0, 1)) if isinstance(x, Tensor)
    ]
    if len(taken) != len(names):
        raise ExportError(
            f"The file has {len(names)} inputs and the calibration data {len(taken)} tensors."
        )
    return {name: x.numpy() for name, x in zip(names, taken, strict=True)}


def _values(model: onnx.ModelProto, feed: Feed, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return values within a file when it is run."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    kinds = {value.name: value for value in model.graph.value_info}
    for name in names:
        kind = kinds[name].type.tensor_type.elem_type if name in kinds else 0
        changed.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    if not names:
        return {}
    run = session(changed.SerializeToString(), optimize=False)
    return dict(zip(names, run.run(None, dict(feed)), strict=True))


def _piece(
    model: onnx.ModelProto,
    nodes: Sequence[Any],
    taken: Sequence[str],
    given: Sequence[str],
    values: Feed,
) -> Piece:
    """Return some nodes of a file as a file of their own."""
    kinds = {v.name: v for v in (*model.graph.value_info, *model.graph.output)}
    used = {name for node in nodes for name in node.input}
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape
        )
        for name in taken
    ]
    graph = helper.make_graph(
        nodes,
        "piece",
        inputs,
        [kinds[name] for name in given],
        [item for item in model.graph.initializer if item.name in used],
    )
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return Piece(made, {name: values[name] for name in taken}, _key(made))


def _key(model: onnx.ModelProto) -> str:
    """Return a digest of operators, shapes and types: what time depends on, and names not."""
    names: dict[str, str] = {}

    def short(name: str) -> str:
        return names.setdefault(name, str(len(names))) if name else ""

    said = [
        [short(v.name), v.type.tensor_type.SerializeToString(deterministic=True).hex()]
        for v in model.graph.input
    ]
    shapes = {i.name: [i.data_type, *i.dims] for i in model.graph.initializer}
    for node in model.graph.node:
        attributes = [a.SerializeToString(deterministic=True).hex() for a in node.attribute]
        held = [shapes.get(name) for name in node.input]
        said.append([node.op_type, *map(short, node.input), *map(short, node.output)])
        said += [[str(held)], attributes]
    return hashlib.sha256(str(said).encode()).hexdigest()[:16]


def _call_cost() -> Timed:
    """Return a session that does nothing: what a call costs by itself."""
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = helper.make_node("Relu", ["x"], ["y"])
    opset = [helper.make_opsetid("", 21)]
    graph = helper.make_graph([node], "nothing", [value], [other])
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    return Timed(session(model.SerializeToString(), optimize=True), {"x": np.zeros(1, np.float32)})


def _fitted(
    pairs: Mapping[str, Sequence[LayerBits]],
    seen: Mapping[tuple[str, LayerBits], Sequence[str]],
    pieces: Mapping[str, Timed],
    whole: Sequence[tuple[BitConfig, Timed]],
    call: float,
    *,
    moved: bool = False,
) -> Profile:
    """Return the table of pieces, those of each pair scaled to what whole files take.

    ``moved``: each entry is moved towards what whole files take, too.
    """
    alone = {
        at: [max(pieces[key].seconds - call, _LEAST * pieces[key].seconds) for key in keys]
        for at, keys in seen.items()
    }
    seconds = {at: statistics.fmean(found) for at, found in alone.items()}
    rest = seconds.get((REST, _EIGHT), 0.0) + call
    every = sorted({pair for of in pairs.values() for pair in of}, reverse=True)
    # (files, pairs): what the pieces of each pair sum up to in each file
    sums = np.array(
        [
            [math.fsum(seconds[n, p] for n, p in config.items() if p == pair) for pair in every]
            for config, _ in whole
        ]
    )
    took = np.array([one.seconds for _, one in whole])
    # Least squares of relative errors; a scale that files hardly tell stays near 1.
    left = np.vstack([sums / took[:, None], _PRIOR * np.eye(len(every))])
    right = np.concatenate([(took - rest) / took, np.full(len(every), _PRIOR)])
    found, _ = nnls(left, right)
    scale = dict(zip(every, np.maximum(found, _LEAST).tolist(), strict=True))
    entries = {
        (name, pair): scale[pair] * seconds[name, pair] for name, of in pairs.items() for pair in of
    }
    if moved:
        entries, rest = _moved(entries, rest, whole)
    rows = tuple(LatencyRow(name, *pair, time) for (name, pair), time in entries.items())
    spreads = {
        (name, pair): max(pieces[key].spread for key in seen[name, pair])
        for name, of in pairs.items()
        for pair in of
    }
    table = LatencyTable(rows, rest, "onnxruntime, one thread, one sample")
    told = tuple(
        (rest + float(row.sum()), table.total(config), float(t))
        for row, (config, _), t in zip(sums, whole, took, strict=True)
    )
    hangs = {
        at: (min(found), max(found))
        for at, found in alone.items()
        if at[0] != REST and max(found) > max(HANGS * min(found), min(found) + LEAST_S)
    }
    return Profile(table, spreads, told, len(pieces), by_neighbours=hangs)


def _moved(
    entries: Mapping[tuple[str, LayerBits], float],
    rest: float,
    whole: Sequence[tuple[BitConfig, Timed]],
) -> tuple[dict[tuple[str, LayerBits], float], float]:
    """Return entries, and the rest, that come nearer to whole files, and stay near themselves.

    Least squares of relative errors, with a penalty on each entry's relative change.
    """
    place = {at: i for i, at in enumerate(entries)}
    before = np.array([*entries.values(), rest])
    size = np.maximum(before, _SMALL * before.mean())
    has = np.zeros((len(whole), len(before)))
    for i, (config, _) in enumerate(whole):
        has[i, [place[at] for at in config.items()]] = 1
        has[i, -1] = 1
    took = np.array([one.seconds for _, one in whole])
    left = np.vstack([has * size / took[:, None], _FIRM * np.eye(len(before))])
    right = np.concatenate([1 - has @ before / took, np.zeros(len(before))])
    change, *_ = np.linalg.lstsq(left, right, rcond=None)
    after = np.maximum(before + change * size, _LEAST * before)
    return {at: float(after[i]) for at, i in place.items()}, float(after[-1])


_LEAST = 0.05
"""Least that is left of a piece's time without the call's, and of a scale."""

_FIRM = 0.3
"""How firmly entries are held where their pieces put them, beside relative errors of files."""

_SMALL = 0.3
"""Entries below such a share of their mean move as far as one of that size."""

_PRIOR = 0.1
"""How firmly scales are held at 1, beside relative errors of whole files."""
