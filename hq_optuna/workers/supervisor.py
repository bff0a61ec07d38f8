"""`Supervisor`: keeps a number of workers at work until the search is over.

It knows nothing of processes or clusters: a `WorkerHandle` is whatever can be polled and ended. A
worker that dies is started again after a pause; one that dies again and again without having scored
anything is given up. An error that a worker reports itself (its study file, a network, a storage
that stays away) would meet the next one too, and ends them all.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hq_optuna.errors import WorkerError

DEATHS_UNTIL_GIVEN_UP = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class WorkerHandle(Protocol):
    """A worker that was started once."""

    def poll(self) -> int | None:
        """Return its exit status, negative for a signal, or ``None`` while it runs."""

    def events(self) -> list[dict[str, Any]]:
        """Return what it told since the last call."""

    def last_lines(self) -> Sequence[str]:
        """Return the last lines of its standard error, once it has ended."""

    def terminate(self) -> None:
        """Ask it to give its candidate back and end."""

    def kill(self) -> None:
        """End it at once."""

    def close(self) -> None:
        """Let go of what has ended."""


@dataclass
class Member:
    """One worker, however often it is started again."""

    index: int
    doing: str = "starting"  # its last event, "starting", "died", "given up" or "done"
    name: str = ""  # `host:pid`, once it told
    scored: int = 0  # over all starts
    restarts: int = 0
    last_lines: tuple[str, ...] = ()  # of its last process's standard error
    handle: WorkerHandle | None = None
    _scored_before: int = 0
    _deaths: int = 0
    _next_start: float = 0.0
    _error: str | None = None

    @property
    def over(self) -> bool:
        """Whether it will not be started again."""
        return self.doing in ("done", "given up")

    def poll(self, start: Callable[[int], WorkerHandle], now: float) -> str | None:
        """Read what the worker told, or start it if it is time; return news of its death.

        Raises `WorkerError` where it reports an error itself.
        """
        if self.handle is not None:
            return self._read(self.handle, now)
        if not self.over and now >= self._next_start:
            self.handle = start(self.index)
            self.doing, self.name = "starting", ""
            self._scored_before, self._error = self.scored, None
        return None

    def retire(self) -> None:
        """Start it no more: the search is over."""
        if self.handle is None and not self.over:
            self.doing = "done"

    def close(self) -> None:
        """Let go of its process."""
        if self.handle is not None:
            self.handle.close()
            self.handle = None

    def _read(self, handle: WorkerHandle, now: float) -> str | None:
        code = handle.poll()  # before the events, so that none that came first is missed
        for event in handle.events():
            if "error" in event and "message" in event:
                interrupted = event["error"] == "Interrupted"
                self._error = None if interrupted else str(event["message"])
            elif "event" in event:  # else JSON that the study file prints
                self.doing = event["event"]
                self.name = event.get("worker", self.name)
                self.scored = self._scored_before + event.get("scored", 0)
        if code is None:
            return None
        self.last_lines = tuple(handle.last_lines())
        self.close()
        if code == 0:
            self.doing = "done"
            return None
        if self._error is not None:
            raise WorkerError(self._error)
        return self._note_death(code, now)

    def _note_death(self, code: int, now: float) -> str:
        who = f"Worker {self.index + 1}" + (f" ({self.name})" if self.name else "")
        self._deaths = self._deaths + 1 if self.scored == self._scored_before else 1
        if self._deaths >= DEATHS_UNTIL_GIVEN_UP:
            self.doing = "given up"
            news = f"{who} died {self._deaths} times without scoring a candidate, and is given up"
            return f"{news}: {self.last_lines[-1]}" if self.last_lines else news
        pause_s = min(FIRST_PAUSE_S * 2 ** (self._deaths - 1), LONGEST_PAUSE_S)
        self._next_start = now + pause_s
        self.doing = "died"
        self.restarts += 1
        return f"{who} died ({_exit_text(code)}) and is started again in {pause_s:g} s"


class Supervisor:
    """Keeps workers at work.

    ``start`` starts the worker with an index; ``on_news`` is called with a sentence when one dies,
    is started again or is given up.
    """

    def __init__(
        self,
        start: Callable[[int], WorkerHandle],
        n_workers: int,
        *,
        on_news: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._on_news = on_news
        self._clock = clock
        self.members = [Member(index) for index in range(n_workers)]

    def poll(self) -> bool:
        """See to every worker once; return whether there is work to do.

        Raises `WorkerError` where one says what is wrong, or all died again and again.
        """
        for member in self.members:
            if (news := member.poll(self._start, self._clock())) is not None:
                self._on_news(news)
        if any(member.doing == "done" for member in self.members):  # the search is over
            for member in self.members:
                member.retire()
        if all(member.doing == "given up" for member in self.members):
            worst = self.members[-1]
            raise WorkerError(
                f"{'Every worker' if len(self.members) > 1 else 'The worker'} died "
                f"{DEATHS_UNTIL_GIVEN_UP} times without scoring a candidate. The last one said:\n"
                + "\n".join(worst.last_lines or ("(nothing)",))
            )
        return not all(member.over for member in self.members)

    def end(self, grace_s: float = 20.0) -> None:
        """End every worker: ask first, so that candidates are given back, and then insist."""
        handles = [member.handle for member in self.members if member.handle is not None]
        try:
            for handle in handles:
                if handle.poll() is None:
                    handle.terminate()
            until = self._clock() + grace_s
            while any(handle.poll() is None for handle in handles) and self._clock() < until:
                time.sleep(0.05)
        finally:  # also when Ctrl-C comes again
            for handle in handles:
                if handle.poll() is None:
                    handle.kill()
            for member in self.members:
                member.close()


def _exit_text(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"
    return f"exit status {code}"
