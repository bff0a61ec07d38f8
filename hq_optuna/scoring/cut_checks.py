"""Whether parts of a network give what the whole gives, tried before any of it is relied on.

What tracing takes for constant, and what modules hand on to each other beside their arguments and
results, shows only when both are run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from hq_optuna.batches import Batches, forward
from hq_optuna.bit_config import LayerBits
from hq_optuna.layers import FLOAT_BITS
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.prepare import get_bits, set_bits, weight_quantizer
from hq_optuna.scoring.graph import NetworkGraph, UncuttableError, equal

MOST_CHECKED = 8
"""Layers of which a candidate is run from what is kept, and as a whole."""
_ROUNDED_TO = 3

RunNodes = Callable[[Any, Mapping[fx.Node, Any], Sequence[fx.Node], frozenset[fx.Node], Any], Any]
"""Runs a batch's inputs from known values by a plan, and puts values to keep into a dictionary."""


class CutChecks:
    """Runs parts and whole side by side on the first batch.

    Args:
        graph: The network's; `check_parts` measures it.
        data: Batches on the network's device.
        correction: Corrects the statistics of each candidate.
        nodes: Runs a part of the graph.
    """

    def __init__(
        self,
        graph: NetworkGraph,
        data: Batches,
        correction: StatisticsCorrection | None,
        nodes: RunNodes,
    ) -> None:
        self.graph, self.prepared = graph, graph.network
        self.data, self.correction, self.nodes = data, correction, nodes

    @torch.no_grad()
    def check_parts(self) -> None:
        """Run the network in float, with weights rounded, and corrected.

        Raises:
            UncuttableError: All its parts together are not the whole.
        """
        inputs, correction = self.data[0].inputs, self.correction
        in_float, rounded = self._floats(), self._rounded()
        with self._as_before():
            for bits, other, run in (
                (in_float, rounded, self.graph.measure),
                (rounded, in_float, self._all),
            ):
                set_bits(self.prepared, bits)
                whole = forward(self.prepared, inputs)  # before, so that times are not first times
                self._disturb(other)
                set_bits(self.prepared, bits)
                _compare(run(inputs), whole)
            if correction is not None:
                used = set().union(*(self.graph.inside.get(n, ()) for n in self.graph.needed({})))
                names = [n for n in correction.modules if self.prepared.get_submodule(n) in used]
                whole = correction.apply()
                state = correction.state(names)
                self._disturb(in_float)
                set_bits(self.prepared, rounded)
                _compare(correction.apply(lambda: self._all(inputs)), whole)
                _compare(correction.state(names), state)
                # The other batches run with what was corrected on the first.
                _compare(self._all(inputs), forward(self.prepared, inputs))

    @torch.no_grad()
    def check_reuse(self, searched: Sequence[str], cuts: frozenset[fx.Node]) -> None:
        """Run candidates from what is kept, after the network has seen something else.

        Args:
            searched: Layers whose bits change.
            cuts: Nodes whose values are kept.

        Raises:
            UncuttableError: They are not what they are as a whole.
        """
        inputs, found = self.data[0].inputs, dict[fx.Node, Any]()
        rounded = self._rounded()
        with self._as_before():
            set_bits(self.prepared, rounded)
            self.nodes(inputs, {}, self.graph.needed({}), cuts, found)
            for name in searched[:: -(-len(searched) // MOST_CHECKED) or 1]:
                bits = {**rounded, name: LayerBits(FLOAT_BITS, FLOAT_BITS)}
                set_bits(self.prepared, bits)
                whole = forward(self.prepared, inputs)
                self._disturb(self._floats())
                set_bits(self.prepared, bits)
                changed = self.graph.downstream[name]
                known = {node: value for node, value in found.items() if node not in changed}
                plan = self.graph.needed(known)
                _compare(self.nodes(inputs, known, plan, frozenset(), {}), whole)

    def _all(self, inputs: Any) -> Any:
        return self.nodes(inputs, {}, self.graph.needed({}), frozenset(), {})

    def _disturb(self, bits: Mapping[str, LayerBits]) -> None:
        """Let the network see another batch at other bits: nothing of it may be left."""
        set_bits(self.prepared, bits)
        forward(self.prepared, self.data[-1].inputs)

    def _floats(self) -> dict[str, LayerBits]:
        return dict.fromkeys(get_bits(self.prepared), LayerBits(FLOAT_BITS, FLOAT_BITS))

    def _rounded(self) -> dict[str, LayerBits]:
        """Return bits that each layer's quantizer can do and that change every weight."""
        found = {}
        for name in get_bits(self.prepared):
            all_bits = weight_quantizer(self.prepared.get_submodule(name)).quantizer.all_bits
            found[name] = _ROUNDED_TO if _ROUNDED_TO in all_bits else all_bits[0]
        return {name: LayerBits(bits, FLOAT_BITS) for name, bits in found.items()}

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Put bits and statistics back, and say of any error that the network cannot be cut."""
        before, correction = get_bits(self.prepared), self.correction
        state = None if correction is None else correction.state(correction.modules)
        try:
            yield
        except UncuttableError:
            raise
        except Exception as error:  # whatever the network's own code raises on being cut
            raise UncuttableError(f"its parts do not run: {error}") from error
        finally:
            set_bits(self.prepared, before)
            if correction is not None and state is not None:
                correction.restore(state)


def _compare(parts: Any, whole: Any) -> None:
    """Refuse parts that give other outputs than the whole.

    Raises:
        UncuttableError: They do.
    """
    if not equal(parts, whole):
        raise UncuttableError("its parts do not give the outputs of the whole")
