"""What a sampler has read of one study; rebuilt from the storage where it is missing."""

from __future__ import annotations

from dataclasses import dataclass, field

from hq_optuna import attrs
from hq_optuna.attrs import Ticket
from hq_optuna.cost import Budget
from hq_optuna.samplers.log import StepLog
from hq_optuna.samplers.stopping import Failures


@dataclass
class Known:
    """What is known of one study.

    Attributes:
        log: Its record.
        search: What this process's search depends on, as tickets say it.
        budget: Its budget, if it has one.
        changed: Settings that differ from the study's; ``None`` before they are compared.
        looked_at: How many closed steps and searches there were when settings and limits were last
            read.
        tickets: Those of trials that run in this process, by id in the storage.
        failures: Trials of this process that brought no result.
    """

    log: StepLog
    search: str
    budget: Budget | None = None
    changed: dict[str, str] | None = None
    looked_at: tuple[int, int] = (0, 1)
    tickets: dict[int, Ticket] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)

    def name_search(self, digest: str) -> None:
        """Add the digest of what the search depends on besides the sampler."""
        self.search = f"{self.search.partition('/')[0]}/{digest}"

    @property
    def is_mine(self) -> bool | None:
        """Whether the first tickets are of this process's search; ``None`` without tickets."""
        if not self.log.searches:
            return None
        return attrs.same_search(self.log.searches[0], self.search)

    @property
    def is_surely_mine(self) -> bool:
        """Whether they are of it by all that it depends on."""
        return bool(self.log.searches) and self.log.searches[0] == self.search

    @property
    def met_another(self) -> bool:
        """Whether there are tickets of another search than the first ones'."""
        return len(self.log.searches) > 1
