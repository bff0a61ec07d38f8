"""Pieces of work before the first trial, which workers share: claimed, recorded, taken over.

A piece is a study's attribute and no trial: it has no bits and no value, so `study.best_trial`,
samplers that learn from trials, and numbers of trials know nothing of it. A worker claims a piece
by swapping no attribute for its claim, and ends it by swapping the claim for the result; databases
swap in one transaction, so of several workers one succeeds. Elsewhere two may do the same piece,
and what was recorded first counts. A result is a small JSON object, such as a reference to an
artifact; it is the same whoever found it, so who did what changes no search.

Death is told as for trials (`hq_optuna.protocol.owners`): by processes of this host that are gone,
and by claims that do not change for a while, by the observer's own clock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from optuna.study import Study

from hq_optuna import attributes
from hq_optuna.optuna_internals import place_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.heartbeat import heartbeat
from hq_optuna.protocol.owners import GRACE_S
from hq_optuna.storages.writing import set_study_system_attrs, swap_study_system_attr

_claims = itertools.count(1)
_held: set[int] = set()  # claims of this process that are at work


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Attributes:
        name: Its name among the pieces of a search.
        work: Estimate of how much work it is, in a unit of all pieces of a search.
        stage: Pieces of a stage need all those of the stages before.
    """

    name: str
    work: float
    stage: int = 0


@dataclass(frozen=True)
class PieceState:
    """Where a piece stands, for readers of a study."""

    name: str
    work: float
    worker: str = ""  # who is at it, or did it; empty: nobody
    done: bool = False
    seconds: float = 0.0  # that it took


class PieceBoard:
    """The pieces of one search of a study.

    Args:
        study: The study.
        search: A digest of all that results depend on, so that no other search takes them.
        pieces: The same ones for every worker.
        grace_s: How long a claim of another host may stay unchanged.
    """

    def __init__(
        self, study: Study, search: str, pieces: Sequence[Piece], grace_s: float = GRACE_S
    ) -> None:
        self.pieces = tuple(pieces)
        self._storage, self._study_id = place_of(study)
        self._search, self._grace_s = search, grace_s
        self._stored: dict[str, dict[str, Any]] = {}
        self._signs: dict[str, tuple[Any, float]] = {}  # name → (claim, first seen)

    def announce(self) -> None:
        """Write which pieces there are, for readers of the study."""
        told = {"search": self._search, "pieces": [[p.name, p.work] for p in self.pieces]}
        stored = self._storage.get_study_system_attrs(self._study_id)
        if attributes.join(attributes.PIECES, stored) != told:
            parts = attributes.split(attributes.PIECES, told)
            set_study_system_attrs(self._storage, self._study_id, parts)

    def read(self) -> dict[str, dict[str, Any]]:
        """Read where the pieces stand; return the results by name."""
        stored = self._storage.get_study_system_attrs(self._study_id)
        keys = {piece.name: _key(self._search, piece.name) for piece in self.pieces}
        self._stored = {name: stored[key] for name, key in keys.items() if key in stored}
        now = time.monotonic()
        for name, told in self._stored.items():
            if self._signs.get(name, (None, 0.0))[0] != told:
                self._signs[name] = (told, now)
        return {name: told["result"] for name, told in self._stored.items() if "result" in told}

    def claim(self) -> Piece | None:
        """Claim a piece that nobody is at, as it was read last; ``None`` where there is none.

        Each of several workers begins at another one, so that they seldom meet.
        """
        me = worker_identity.worker_id()
        todo = [p for p in self.pieces if "result" not in self._stored.get(p.name, {})]
        stage = min((piece.stage for piece in todo), default=0)
        free = [p for p in todo if p.stage == stage and self._is_free(p.name)]
        at_work = {told["worker"] for told in self._stored.values() if "result" not in told}
        first = sorted(at_work | {me}).index(me) % max(len(free), 1)
        for piece in free[first:] + free[:first]:
            number = next(_claims)
            mine = {"worker": me, "claim": number, "beats": 0}
            _held.add(number)
            if self._swap(piece.name, self._stored.get(piece.name), mine):
                self._stored[piece.name] = mine
                return piece
            _held.discard(number)
        return None

    @contextmanager
    def holding(self, piece: Piece) -> Iterator[None]:
        """Show signs of life while a claimed piece is worked on; give it back on an error."""

        def beat(count: int) -> None:
            before = self._stored[piece.name]
            after = {**before, "beats": count}
            if "result" not in before and self._swap(piece.name, before, after):
                self._stored[piece.name] = after

        number = self._stored[piece.name]["claim"]
        try:
            with heartbeat(self._storage, beat):
                yield
        except BaseException:
            # The mark of a claim that is nobody's.
            self._swap(piece.name, self._stored[piece.name], {"worker": "", "claim": 0, "beats": 0})
            raise
        finally:
            _held.discard(number)

    def finish(self, piece: Piece, result: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
        """Record what came of a piece; return what counts: another worker's, if that was first."""
        me = worker_identity.worker_id()
        done = {"worker": me, "seconds": round(seconds, 3), "result": dict(result)}
        before: dict[str, Any] | None = self._stored.get(piece.name)
        while not self._swap(piece.name, before, done):
            found = self.read()  # somebody took this worker for dead
            if piece.name in found:
                return found[piece.name]
            before = self._stored.get(piece.name)
        self._stored[piece.name] = done
        return result

    def _swap(self, name: str, before: Any, after: Any) -> bool:
        key = _key(self._search, name)
        return swap_study_system_attr(self._storage, self._study_id, key, before, after)

    def _is_free(self, name: str) -> bool:
        told = self._stored.get(name)
        if told is None or not told["worker"]:
            return True
        if told["worker"] == worker_identity.worker_id():
            return told["claim"] not in _held
        quiet_s = time.monotonic() - self._signs[name][1]
        return worker_identity.is_dead(told["worker"]) or quiet_s >= self._grace_s


def _key(search: str, name: str) -> str:
    return f"{attributes.PIECE}:{search}:{name}"


def read_pieces(system_attrs: Mapping[str, Any]) -> tuple[PieceState, ...]:
    """Return where a study's pieces stand, from its system attributes; empty where it has none."""
    told = attributes.join(attributes.PIECES, system_attrs)
    if told is None:
        return ()
    found = []
    for name, work in told["pieces"]:
        stored = system_attrs.get(_key(told["search"], name)) or {}
        worker, done = stored.get("worker", ""), "result" in stored
        if not done and worker_identity.is_dead(worker):
            worker = ""
        found.append(PieceState(name, work, worker, done, stored.get("seconds", 0.0)))
    return tuple(found)
