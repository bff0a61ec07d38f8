"""What a process knows of one study, and whether it may go on with it.

Everything here is read from the storage and is read again where it is missing. A study belongs to
the search of its first ticket: settings, network and data. Of two searches that are started in one
new study at the same moment, both may find it empty and write their settings; the lower trial
number is the one thing they agree on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.errors import ResumeError
from hq_optuna.optuna_internals import id_of, place_of, storage_of, trial_id_of
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.stopping import Failures
from hq_optuna.protocol.tickets import constrained
from hq_optuna.search import Limits
from hq_optuna.settings import Encoding
from hq_optuna.space.budget import Budget
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.storages import refuses_writing
from hq_optuna.storages.trials import read_rows
from hq_optuna.storages.writing import set_study_system_attrs, set_trial_attrs

logger = logging.getLogger(__name__)


@dataclass
class StudyView:
    """One study as this process last read it."""

    space: SearchSpace
    encoding: Encoding
    log: StepLog
    search: str  # what this process's search depends on, as tickets say it
    budget: Budget | None
    lock: threading.RLock  # held while the log is read, so that threads read trials in order
    changed: dict[str, str] | None = None  # settings unlike the study's, once compared
    checked_at: tuple[int, int] = (0, 1)  # closed steps and searches at the last check
    tickets: dict[int, Ticket] = field(default_factory=dict)  # of this process, by trial id
    failures: Failures = field(default_factory=Failures)

    def name_search(self, digest: str) -> None:
        """Add the digest of what the search depends on besides the sampler: it has our objective.

        What was told before, or by others, does not count then: the record is read anew.
        """
        self.search = f"{self.search.partition('/')[0]}/{digest}"
        if not self.log.signed:
            before, self.log = self.log, StepLog(self.log.search, signed=True, sums=self.log.sums)
            self.log.limit(before.limits)

    def constrained(self, bits: Sequence[int]) -> dict[str, Any]:
        """Return the system attributes by which trials over the budget are known, of any bits."""
        if self.budget is None:
            return {}
        search = self.log.search
        return constrained(search.costs_of(bits), search.limits)

    def write_ticket(self, study: Study, trial_id: int, ticket: Ticket) -> None:
        """Write a running trial's ticket, and whether it is over the budget.

        So that is known whoever ends the trial, and whatever it is told.
        """
        over = self.constrained(ticket.bits) if ticket.bits else {}
        said = over | {attributes.TICKET: ticket.to_json()}
        set_trial_attrs(storage_of(study), trial_id, said, system=True)

    def constrain(self, study: Study, trial: FrozenTrial) -> None:
        """Write whether a running trial that is none of the search is over the budget.

        Variables that it does not have count at their widest bits.
        """
        given, widest = trial.params, self.space.top
        over = self.constrained(
            [
                most if (bits := variable.read(given.get(variable.name))) is None else bits
                for variable, most in zip(self.space.variables, widest, strict=True)
            ]
        )
        if not over.keys() <= trial.system_attrs.keys():
            set_trial_attrs(storage_of(study), trial_id_of(trial), over, system=True)

    @property
    def is_mine(self) -> bool | None:
        """Whether the first tickets are of this process's search; ``None`` without tickets."""
        if not self.log.searches:
            return None
        return attributes.same_search(self.log.searches[0], self.search)

    @property
    def is_surely_mine(self) -> bool:
        """Whether they are of it by all that it depends on."""
        return bool(self.log.searches) and self.log.searches[0] == self.search

    @property
    def met_another(self) -> bool:
        """Whether there are tickets of another search than the first ones'."""
        return len(self.log.searches) > 1

    def read(self, study: Study) -> StepLog:
        """Return the log as it stands in the storage now."""
        with self.lock:
            self.log.update(read_rows(*place_of(study), self.log.cursor))
            self._refresh(study)
            return self.log

    def _refresh(self, study: Study) -> None:
        """Take in what others wrote into the study itself, where something happened since."""
        log, now = self.log, (len(self.log.closed), len(self.log.searches))
        if now == self.checked_at and not log.stopped_by:
            return
        changed = now != self.checked_at
        if self.is_mine and changed and compare_settings(study, self.space, log.settings):
            # Another search was started here at the same moment and found no settings either, but
            # wrote last. Its limits are not ours.
            write_settings(study, self.space, log.settings)
            if stored_limits(study) != log.limits:
                _store_limits(study, log.limits)
        self.checked_at = now
        log.limit(limits_of(study))  # somebody may have raised them, or set the first

    def refuse_another_search(self, study: Study) -> None:
        """Raise a `ResumeError` for a study whose first trial belongs to another search."""
        if self.is_mine is False:
            raise ResumeError(
                f"Study {study.study_name!r} is another search: its first trial was made with "
                "other settings, another network or other data. Use the same, or another study "
                "name.",
                changed=("search",),
            )

    def check_settings(self, study: Study) -> None:
        """Refuse a study that was made with other settings; write them into one that has none.

        Raises:
            ResumeError: The study was made with other settings; the message names them.
            ValueError: The study maximizes.
        """
        if study.direction == StudyDirection.MAXIMIZE:
            raise ValueError(
                "The score is a loss and is minimized. Create the study with direction='minimize'."
            )
        mine = self.log.settings
        if self.changed is None:
            self.changed = compare_settings(study, self.space, mine)
            if not self.changed:
                write_limits(study)
        if self.changed and self.read(study) and self.is_mine:
            # Another search was started here at the same moment, wrote last, and was refused.
            write_settings(study, self.space, mine)
            self.changed = {}
        if self.changed:
            raise ResumeError(
                f"Study {study.study_name!r} was made with another sampler: "
                f"{', '.join(self.changed.values())}. Use the same settings, or another study "
                "name.",
                changed=tuple(self.changed),
            )


def compare_settings(study: Study, space: SearchSpace, mine: dict[str, Any]) -> dict[str, str]:
    """Return what differs from the settings in the study, by name and in words.

    The first worker finds none there, and writes its own and the space.
    """
    stored = storage_of(study).get_study_system_attrs(id_of(study)).get(attributes.SETTINGS)
    if stored is None:
        write_settings(study, space, mine)
        return {}
    return {
        name: f"{name} (study: {stored.get(name)!r}, sampler: {mine.get(name)!r})"
        for name in dict.fromkeys([*mine, *stored])
        if stored.get(name) != mine.get(name)
    }


def write_settings(study: Study, space: SearchSpace, mine: dict[str, Any]) -> None:
    """Write settings and space into the study."""
    # `hq_optuna.assignment` reads the space; the settings come last and say it is complete.
    parts = attributes.split(attributes.SPACE, space.to_json())
    set_study_system_attrs(*place_of(study), {**parts, attributes.SETTINGS: mine})


def stored_limits(study: Study) -> Limits:
    """Return the limits that the study holds."""
    storage, study_id = place_of(study)  # a study of one bracket of `HyperbandPruner` has no more
    return Limits.from_json(storage.get_study_user_attrs(study_id).get(attributes.LIMITS))


def limits_of(study: Study) -> Limits:
    """Return the limits of the study, raised by those of its pruner."""
    stored = stored_limits(study)
    given = getattr(study.pruner, "limits", None)  # a `CostBudgetPruner` has some
    return stored.raised_to(given) if isinstance(given, Limits) else stored


def write_limits(study: Study) -> None:
    """Write the limits of the study's pruner into the study, where they raise its own."""
    limits = limits_of(study)
    if limits != stored_limits(study):
        _store_limits(study, limits)


def _store_limits(study: Study, limits: Limits) -> None:
    storage, study_id = place_of(study)
    storage.set_study_user_attr(study_id, attributes.LIMITS, limits.to_json())


def write_user_attrs(study: Study, user_attrs: Mapping[str, Any]) -> None:
    """Write into the study what it does not say already; nothing where it can only be read."""
    stored = study.user_attrs
    for key, value in user_attrs.items():
        if stored.get(key) == value:
            continue
        try:
            study.set_user_attr(key, value)
        except Exception as error:
            if not refuses_writing(error):
                raise
            logger.warning("Study %r can only be read: figures stay unwritten.", study.study_name)
            return


def refuse_lower_limits(study: Study, given: Limits) -> None:
    """Raise a `ResumeError` that names those limits which are lower than the study's."""
    stored = stored_limits(study)
    if lowered := stored.lowered_by(given):
        before, now = stored.to_json(), given.to_json()
        words = ", ".join(
            f"{name} (study: {before[name]:g}, now: {now[name]:g})" for name in lowered
        )
        raise ResumeError(
            f"Study {study.study_name!r} has higher limits already: {words}. A search that goes on "
            "may raise them, or leave them out.",
            changed=lowered,
        )
