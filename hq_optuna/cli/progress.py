"""Progress of a search while it runs: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from hq_optuna.cli.options import say
from hq_optuna.cli.tables import strips
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import format_cost
from hq_optuna.space.search_space import SearchSpace

LINE_EVERY_S = 10.0
"""Where there is no terminal, a line is printed this often."""


END, END_S = 0.22, 0.3
"""What finalists cost: this share of the preparation, and so many seconds whatever the network."""
STEPS_S = 2.0
"""Steps that look scores up, before the first of them tells."""
TO_BUDGET = 0.8
"""Share of the steps' time until the budget is met; swaps come after it."""


class Pace:
    """How much time a search has left, and its share, from preparation to the last finalist.

    Of a search by a table the preparation is most; the measured end runs the network a few times
    more, so it costs a share of that. Steps and finalists tell their own pace once they are seen.
    """

    def __init__(self, by_table: bool = True, now: Callable[[], float] | None = None) -> None:
        self._by_table, self._now = by_table, now or time.monotonic
        self._began = self._phase_began = self._now()
        self._phase, self._first = "", 0.0
        self._prepared_s = 0.0
        self.left_s: float | None = None

    def preparing(self, share: float) -> None:
        """Take in which share of the preparation is done."""
        gained, seconds = self._gained("preparing", share)
        self._prepared_s = seconds
        self.left_s = None
        if gained > 0 and self._by_table:
            whole_s = seconds / gained
            self.left_s = whole_s * (1 - share + END * (1 - self._first)) + STEPS_S + END_S

    def stepping(self, share: float) -> None:
        """Take in which share of the way to the budget is done."""
        gained, seconds = self._gained("steps", share)
        end_s = END * self._prepared_s + END_S if self._by_table else 0.0
        if gained > 0:
            self.left_s = seconds * ((1 - self._first) / (TO_BUDGET * gained) - 1) + end_s
        else:
            self.left_s = STEPS_S + end_s if self._by_table and self._prepared_s else None

    def ending(self, done: int, of: int) -> None:
        """Take in how many finalists are measured; all of them are where there are none."""
        gained, seconds = self._gained("end", done)
        if done >= of:
            self.left_s = 0.0
        elif gained > 0:
            self.left_s = seconds * (of - done) / gained
        elif self._prepared_s:
            self.left_s = (END * self._prepared_s + END_S) * (of - done) / of

    @property
    def share(self) -> float:
        """Return which share of the time is over."""
        seconds = self._now() - self._began
        return seconds / (seconds + self.left_s) if self.left_s is not None and seconds else 0.0

    def _gained(self, phase: str, value: float) -> tuple[float, float]:
        """Return what was gained since a phase was first seen, and in how many seconds."""
        if phase != self._phase:
            self._phase, self._first, self._phase_began = phase, value, self._now()
        return value - self._first, self._now() - self._phase_began


class SearchProgress:
    """Shows one bar for a search, from its preparation to the answer, and one for each training.

    Attributes:
        was_finished: Whether the search was over when it was first looked at.
        first_step: The open step at that moment.
        first_candidates: Candidates scored until then.
    """

    def __init__(
        self, console: Console, space: SearchSpace, budget: Budget, *, by_table: bool = True
    ) -> None:
        self.console = console
        self.pace = Pace(by_table)
        self.space = space
        self.live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[says]}"),
            console=console,
        )
        self._bits: tuple[tuple[int, int], ...] = ()
        self._says = ""
        self._tasks: dict[str, TaskID] = {}
        self._printed = -float("inf")
        self._looked = False
        self._began: dict[str, tuple[float, float]] = {}
        self.was_finished = False
        self.first_step = 0
        self.first_candidates = 0

    def __enter__(self) -> Self:
        if self.live:
            options: dict[str, Any] = {"transient": True, "refresh_per_second": 4}
            self._live = Live(get_renderable=self.show, console=self.console, **options)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self._live.stop()

    def show(self) -> RenderableType:
        """Return bars, a line about the search, and the incumbent's bits."""
        if not self._bits:
            return self._bars
        says = Text(self._says, no_wrap=True, overflow="ellipsis")
        shown = strips(self._bits, self.space.levels, self.console.width)
        return Group(self._bars, says, *shown)

    def phase(self, what: str, done: int, of: int) -> None:
        """Show a training, epoch by epoch, or the preparation: ``what`` is at work, if anything."""
        if what == "training":
            self._show(what, done / of, f"epoch {done} of {of}", always=done == of)
            return
        self.pace.preparing(done / of)
        says = f"preparing, {100 * done / of:.0f} %" + (f"  {what}" if what else "")
        self._show("search", self.pace.share, says, always=done == of)

    def search(self, log: StepLog) -> None:
        """Show where the search stands."""
        incumbent, step = log.incumbent, log.open
        if not self._looked:
            self._looked = True
            self.was_finished = step is None
            self.first_step = 0 if step is None else step.step
            self.first_candidates = len(log.results)
        if incumbent is None:
            self.pace.stepping(0.0)
            self._show("search", self.pace.share, "scoring the start")
            return
        self._bits = tuple(self.space.config(incumbent.state).values())
        share = log.search.progress(incumbent.state)
        if step is not None and log.closed and len(log.closed) > 1:
            # Between two steps the bar follows the candidates done.
            ahead = share - log.search.progress(log.closed[-2].incumbent.state)
            share = min(share + ahead * len(step.done) / (len(step.states) + 1), 1.0)
        spent = zip(log.search.costs_of(incumbent.state), log.search.limits.items(), strict=True)
        says = (
            f"step {incumbent.step}  {len(log.results)} candidates  "
            f"score {incumbent.score:.3g} nats  "
            + ", ".join(f"{format_cost(c, m)} -> {format_cost(most, m)}" for c, (m, most) in spent)
            + f"{self._rate(len(log.results))}"
        )
        if step is None or step.measures:
            self.pace.ending(*((1, 1) if step is None else (len(step.done), len(step.states))))
        else:
            self.pace.stepping(share)
        self._show("search", 1.0 if step is None else self.pace.share, says, always=step is None)

    def _gained(self, what: str, value: float) -> tuple[float, float]:
        """Return the seconds since a value was first shown, and how much it grew."""
        now = time.monotonic()
        began, first = self._began.setdefault(what, (now, value))
        return now - began, value - first

    def _rate(self, scored: int) -> str:
        """Return candidates a minute, of all workers, since the search was first looked at."""
        seconds, gained = self._gained("scored", scored)
        return f"  {format_rate(60 * gained / seconds)}" if gained and seconds >= 1 else ""

    def _show(self, what: str, share: float, says: str, *, always: bool = False) -> None:
        if self.live:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(f"{what:<11}", total=1.0, says="")
            if what == "search" and self._bits:
                self._says, says = says, ""
            says = f"{says}{self._left(what, share)}".strip()
            self._bars.update(self._tasks[what], completed=share, says=says)
        elif always or time.monotonic() - self._printed > LINE_EVERY_S:
            self._printed = time.monotonic()
            says += self._left(what, share)
            say(self.console, f"{what}: {100 * share:.0f} %  {says}")

    def _left(self, what: str, share: float) -> str:
        """Return the time left in words, if it is known."""
        left_s = self.pace.left_s
        if what == "training":
            seconds, gained = self._gained(what, share)
            left_s = seconds * (1 - share) / gained if gained > 0 else None
        return "" if left_s is None or share >= 1 else f"  {format_seconds(left_s)} left"


def format_rate(per_minute: float) -> str:
    """Return a rate for people.

    Example:
        >>> format_rate(1267.3), format_rate(3.14159)
        ('1,267 a minute', '3.14 a minute')
    """
    number = f"{per_minute:,.0f}" if per_minute >= 100 else f"{per_minute:.3g}"
    return f"{number} a minute"


def format_seconds(seconds: float) -> str:
    """Return a duration for people.

    Example:
        >>> format_seconds(42.4), format_seconds(125), format_seconds(7300)
        ('42 s', '2 min 5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
