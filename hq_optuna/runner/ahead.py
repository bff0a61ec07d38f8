"""Scores of candidates that were scored along with an earlier one, for when they are asked for.

A trial asks for one candidate. Where several in one pass take less time (`Scorer.score_together`),
the next ones of its step are scored with it, and their trials find their scores here. They are the
same numbers, so nothing but time depends on which were scored together, nor on who scored them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from weakref import ReferenceType, ref

from hq_optuna.bit_config import BitConfig, LayerBits
from hq_optuna.errors import ScoreError
from hq_optuna.scoring import Score, Scorer


class Ahead:
    """What one process scored ahead, of one step."""

    def __init__(self) -> None:
        self._origin: Mapping[str, LayerBits] | None = None
        self._scorer: ReferenceType[Scorer] | None = None
        self._found: dict[BitConfig, tuple[Score, float]] = {}

    def score(
        self,
        scorer: Scorer,
        config: BitConfig,
        origin: Mapping[str, LayerBits],
        coming: Iterable[BitConfig],
    ) -> tuple[Score, float]:
        """Return a candidate's score, and the seconds it took, as a share of its pass.

        Args:
            scorer: Of the open step's candidates; another one where they are made from another
                network.
            config: The candidate.
            origin: What it was made from.
            coming: The candidates of its step that this process is likely to be asked for next.
        """
        if self._scorer is None or self._scorer() is not scorer or self._origin != origin:
            self._scorer, self._origin, self._found = ref(scorer), origin, {}
        known = self._found.pop(config, None)
        if known is not None:
            return known
        started, group = time.perf_counter(), [config]
        if scorer.most_together > 1:
            others = (c for c in coming if c != config and c not in self._found)
            group += list(dict.fromkeys(others))[: scorer.most_together - 1]
        try:
            scores = scorer.score_together(group, origin)
        except ScoreError:  # of whichever: it is raised when that one is asked for
            group = [config]
            scores = scorer.score_together(group, origin)
        seconds = (time.perf_counter() - started) / len(group)
        self._found |= dict(zip(group[1:], ((score, seconds) for score in scores[1:]), strict=True))
        return scores[0], seconds
