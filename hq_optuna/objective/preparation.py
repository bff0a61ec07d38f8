"""What all candidates share, made in pieces that workers share: the network, and the table.

The first stage is of layers, group by group (ranges, scales and rounded weights from one pass), of
the statistics that are right, and of what rounds outputs. The second is the table of rises, batch
by batch. A piece's result is a set of tensors: the same whoever computes it, kept in the artifact
store by its hash, and loaded by those who need it. `hq_optuna.protocol.pieces` says who is at which
piece.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from optuna.study import Study
from torch import Tensor, nn

from hq_optuna.artifacts.store import Artifacts, Reference
from hq_optuna.errors import ArtifactError
from hq_optuna.network.batches import Batches
from hq_optuna.network.loss_weights import counting
from hq_optuna.network.losses import LossFunction
from hq_optuna.objective.tensors import get_tensors, put_tensors
from hq_optuna.protocol.pieces import Piece, PieceBoard
from hq_optuna.quantization.compensation import fitting_memory
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.fitting import fit_layers, fitted_tensors, load_fitted_
from hq_optuna.quantization.outputs import (
    add_output_quantizers_,
    find_places,
    output_quantizers,
    outputs_always,
    put_output_quantizers_,
)
from hq_optuna.quantization.ranges import AffineRange
from hq_optuna.rises import Rise
from hq_optuna.scoring import LayerSumName, Sensitivity, measure_layer_sums
from hq_optuna.scoring.hessian_trace import HessianTrace
from hq_optuna.scoring.layer_sums import LayerSums, completed
from hq_optuna.scoring.measured import outputs_rise, with_outputs
from hq_optuna.scoring.sensitivity import check_finite
from hq_optuna.settings import SearchSettings
from hq_optuna.space.search_space import SearchSpace, bits_needed
from hq_optuna.training.trained import TrainedNetwork

logger = logging.getLogger(__name__)

MOST_GROUPS = 4
"""Groups of layers that a network is fitted in, where their moments fit memory."""
GROUP_MACS = 4e9
"""Multiply-accumulates of a pass over the data for each of them: it costs a pass of its own."""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.02, 1.0

LAYERS, STATISTICS, OUTPUTS, TABLE = "layers", "statistics", "outputs", "table"

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of)."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shared:
    """Where workers share pieces: ``search`` names all that these depend on."""

    study: Study
    artifacts: Artifacts
    search: str


class Setup(Protocol):
    """What of `hq_optuna.objective.scorer_setup.ScorerSetup` a preparation depends on."""

    @property
    def settings(self) -> SearchSettings:
        """How candidates are scored."""

    @property
    def space(self) -> SearchSpace:
        """The layers, and the bits that each may have."""

    @property
    def data(self) -> Batches:
        """All calibration batches."""

    @property
    def loss_fn(self) -> LossFunction:
        """The mean loss of a batch."""

    @property
    def rise(self) -> Rise | None:
        """That of the outputs."""

    @property
    def layer_sum(self) -> LayerSumName:
        """What the table is of."""

    @property
    def rounding_data(self) -> Batches:
        """What ranges and rounding are found on."""

    @property
    def table_data(self) -> Batches:
        """What rises are measured on."""

    @property
    def statistics_places(self) -> tuple[int, ...]:
        """The batches that statistics are measured on."""

    def prepared(self, network: nn.Module) -> nn.Module:
        """Return a prepared copy of a network, without ranges."""


class Table(NamedTuple):
    """A table of rises, with sentences and figures for readers."""

    sensitivity: Sensitivity
    warnings: list[str]
    facts: dict[str, float]


class Preparation:
    """The pieces of one network's preparation, and what they make: see the module.

    Args:
        setup: How assignments are scored, and on what.
        network: The float network in eval mode.
        base: What its training learned, where it was trained.
        moments: The curvature of weights that the training told, by layer.
        shared: Where other workers do pieces too; ``None``: all are done here.
        progress: Called with (what, work done, work).
    """

    def __init__(
        self,
        setup: Setup,
        network: nn.Module,
        *,
        base: TrainedNetwork | None = None,
        moments: Tensors | None = None,
        shared: Shared | None = None,
        progress: Progress = lambda what, done, of: None,
    ) -> None:
        self.setup, self._network, self._shared = setup, network, shared
        self._moments, self._progress = moments, progress
        self._at = None if base is None else base.config
        self.prepared = setup.prepared(network)
        if base is not None:
            base.restore_learned_(self.prepared)
        self._bits = {name: (set(w), set(a)) for name, (w, a) in bits_needed(setup.space).items()}
        for name, bits in ({} if base is None else base.config).items():
            self._bits[name][0].discard(bits.weight_bits)
        self._compensates = setup.settings.rounding != "nearest"
        self._table_data = counting(setup.table_data)
        self._traces = setup.layer_sum == "hessian_trace"
        layers, n = setup.space.layers, setup.rounding_data.n_samples
        macs = n * sum(layer.macs for layer in layers)
        n_groups = int(max(1, min(MOST_GROUPS, macs // GROUP_MACS)))
        work = [layer.macs + 1.0 for layer in layers]
        self._groups = fitting_memory(self.prepared, layers, work, n_groups)
        self.correction: StatisticsCorrection | None = None
        self._results: dict[str, Tensors] = {}  # of the table
        self._loaded: set[str] = set()
        self._trace: HessianTrace | None = None
        self._done = self._outputs_rise = 0.0
        self.pieces = tuple(self._all_pieces())

    def _all_pieces(self) -> list[Piece]:
        found = [Piece(f"{LAYERS}:{i}", 1.0) for i in range(len(self._groups))]
        if self.setup.settings.correction:
            found.append(Piece(STATISTICS, 1.0))
        if self.setup.settings.output_bits is not None:
            found.append(Piece(OUTPUTS, 1.0))
        n = len(self._table_data) if self._traces else 1
        return found + [Piece(f"{TABLE}:{i}", 1.0, stage=1) for i in range(n)]

    # The stages

    def network(self) -> tuple[nn.Module, StatisticsCorrection | None]:
        """Return the prepared network and what corrects its statistics, whole.

        Nothing is written: what a study's workers have not recorded is computed here.
        """
        self._take([piece for piece in self.pieces if piece.stage == 0])
        return self.prepared, self.correction

    def table(self) -> Table:
        """Return the table, for which all pieces are done here, or by other workers.

        Among its facts is by how many MiB this process's peak of memory rose.
        """
        before = _peak_mib()
        found = self._table()
        found.facts["preparation_peak_mib"] = round(_peak_mib() - before)
        return found

    def _table(self) -> Table:
        if self._shared is None:
            self.network()
        else:
            self._share(self._shared)
        # Of the layers a worker loads what it needs.
        self._take([p for p in self.pieces if p.stage == 1 or p.name in (STATISTICS, OUTPUTS)])
        parts = [self._results.pop(p.name) for p in self.pieces if p.stage == 1]
        if not self._traces:
            told = json.loads(bytes(parts[0]["json"].tolist()))
            table = Sensitivity.from_json(told["table"])
            return self._with_outputs(Table(table, told["warnings"], told["facts"]))
        sensitivity, curvature = self._hessian_trace().table(parts)
        check_finite(sensitivity)
        setup = self.setup
        if curvature.unknown:  # measured, on the network as it will be
            self.network()
        given = self.prepared, setup.data, setup.loss_fn, setup.rise
        with outputs_always(self.prepared, False):  # the table is of one layer at a time
            return self._with_outputs(_told(completed(sensitivity, curvature, *given)))

    def _with_outputs(self, table: Table) -> Table:
        """Return the table with the rise of rounded outputs."""
        layers = [name.rpartition(".")[0] for name in output_quantizers(self.prepared)]
        if not layers:
            return table
        facts = {**table.facts, "output_quantizers": len(layers)}
        sensitivity = with_outputs(table.sensitivity, layers, self._outputs_rise)
        return table._replace(sensitivity=sensitivity, facts=facts)

    def _take(self, pieces: list[Piece]) -> None:
        """Load what came of pieces, here or elsewhere; compute what is nowhere."""
        todo = [piece for piece in pieces if piece.name not in self._loaded]
        done: Mapping[str, Mapping[str, Any]] = {}
        if self._shared is not None and todo:
            done = self._board(self._shared).read()
        for piece in todo:
            found = None
            if self._shared is not None and piece.name in done:
                try:
                    reference = Reference.from_json(done[piece.name])
                    found = get_tensors(self._shared.artifacts, reference)
                except ArtifactError as error:
                    logger.warning("Piece %s is computed here again: %s", piece.name, error)
            if found is None:
                self._take([p for p in self.pieces if p.stage < piece.stage])
                found = self._compute(piece)
            self._load(piece, found)

    def _share(self, shared: Shared) -> None:
        """Do pieces that nobody is at until all are done."""
        board, wait_s = self._board(shared), SHORTEST_WAIT_S
        board.announce()
        while True:
            done = board.read()
            self._done = sum(p.work for p in self.pieces if p.name in done)
            if len(done) == len(self.pieces):
                return
            piece = board.claim()
            if piece is None:
                self._say("waiting", 0.0)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            wait_s = SHORTEST_WAIT_S
            self._one(shared, board, piece)

    def _board(self, shared: Shared) -> PieceBoard:
        return PieceBoard(shared.study, shared.search, self.pieces)

    def _one(self, shared: Shared, board: PieceBoard, piece: Piece) -> None:
        """Do a claimed piece."""
        started = time.monotonic()
        with board.holding(piece):
            self._take([p for p in self.pieces if p.stage < piece.stage])
            found = self._compute(piece)
            mine = put_tensors(shared.artifacts, found).to_json()
            counts = board.finish(piece, mine, time.monotonic() - started)
        if counts == mine:
            self._load(piece, found)

    # The pieces

    def _compute(self, piece: Piece) -> dict[str, Tensor]:
        """Return what comes of a piece; stages before are loaded."""
        kind, _, number = piece.name.partition(":")
        setup = self.setup

        def inside(done: int, of: int) -> None:
            self._say(kind, piece.work * done / of)

        if kind == LAYERS:
            group = self._groups[int(number)]
            given = self.prepared, group, setup.rounding_data, self._bits
            fit_layers(*given, compensate=self._compensates, progress=inside)
            return fitted_tensors(self.prepared, group, self._bits)
        if kind == STATISTICS:
            self.correction = self._correction()
            return self.correction.tensors()
        if kind == OUTPUTS:
            return self._outputs()
        if self._traces:
            return self._hessian_trace().part(int(number))
        return self._other_table(inside)

    def _load(self, piece: Piece, found: Tensors) -> None:
        """Take what came of a piece, here or elsewhere."""
        kind, _, number = piece.name.partition(":")
        if kind == LAYERS:
            load_fitted_(self.prepared, self._groups[int(number)], self._bits, found)
        elif kind == STATISTICS:
            if self.correction is None:
                self.correction = self._correction(found)
        elif kind == OUTPUTS:
            self._load_outputs(found)
        else:
            self._results[piece.name] = found
        self._loaded.add(piece.name)
        self._done = max(self._done, sum(p.work for p in self.pieces if p.name in self._loaded))
        self._say(kind, 0.0)

    def _correction(self, known: Tensors | None = None) -> StatisticsCorrection:
        setup = self.setup
        return StatisticsCorrection(
            *(self.prepared, setup.data, setup.settings.precision, self._at),
            places=setup.statistics_places,
            known=known,
        )

    def _outputs(self) -> dict[str, Tensor]:
        """Give the network output quantizers; return their ranges and their rise."""
        setup, bits = self.setup, self.setup.settings.output_bits
        assert bits is not None
        names = [layer.name for layer in setup.space.layers]
        given = self.prepared, names, setup.rounding_data, bits, setup.settings.observer
        add_output_quantizers_(*given)
        ranges = [list(q.range(bits)) for q in output_quantizers(self.prepared).values()]
        rise = outputs_rise(self.prepared, setup.table_data, setup.loss_fn, setup.rise)
        # Double precision: single precision's scale and a zero point up to 2¹⁶, both exact.
        kind: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        return {"ranges": torch.tensor(ranges, **kind), "rise": torch.tensor(rise, **kind)}

    def _load_outputs(self, found: Tensors) -> None:
        self._outputs_rise = float(found["rise"])
        bits, names = self.setup.settings.output_bits, [s.name for s in self.setup.space.layers]
        if bits is None or output_quantizers(self.prepared):
            return
        places, calls = find_places(self.prepared, names, self.setup.data[0].inputs)
        told = zip(places, found["ranges"].tolist(), strict=True)
        ranges = {place.name: AffineRange(scale, int(zero)) for place, (scale, zero) in told}
        put_output_quantizers_(self.prepared, places, calls, bits, ranges)

    def _hessian_trace(self) -> HessianTrace:
        if self._trace is None:
            takes = {} if self.correction is None else self.correction.takes
            assert self.setup.rise is not None, "ScorerSetup.checked asks for one"
            given = self.prepared, self.setup.space, self._table_data, self.setup.rise
            self._trace = HessianTrace(*given, takes)
        return self._trace

    def _other_table(self, progress: Callable[[int, int], None]) -> dict[str, Tensor]:
        """Return the table of another sum over layers, as JSON in bytes."""
        setup = self.setup
        with outputs_always(self.prepared, False):
            sums = measure_layer_sums(
                *(setup.layer_sum, self._network, self.prepared, setup.space, setup.table_data),
                setup.loss_fn,
                progress=lambda what, done, of: progress(done, of),
                moments=self._moments,
                correction=self.correction,
                rise=setup.rise,
                whole=setup.data,
            )
        table, warnings, facts = _told(sums)
        said = json.dumps({"table": table.to_json(), "warnings": warnings, "facts": facts})
        return {"json": torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8)}

    def _say(self, what: str, more: float) -> None:
        total = sum(p.work for p in self.pieces)
        self._progress(what, round(1000 * (self._done + more)), round(1000 * total))


def _peak_mib() -> float:
    """Return the most memory that this process ever had, MiB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _told(sums: LayerSums) -> Table:
    curvature = sums.curvature
    facts: dict[str, float] = {"curvature_samples": curvature.n_samples}
    if curvature.largest_error < float("inf"):  # one batch alone has none
        facts["curvature_standard_error"] = round(curvature.largest_error, 4)
    return Table(sums.sensitivity, sums.warnings, facts)
