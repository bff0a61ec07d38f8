"""`ProgressiveBitSampler`: the step protocol as an Optuna sampler.

A worker asks for a trial; the trial's number is its ticket to one slot of the open step. The
sampler replays the record, takes the u-th free slot (u: running trials with a lower number that
have no ticket yet) and writes one attribute. When all slots of a step are done, one more trial
closes the step; being finished, it is immutable, and is the record of the step.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from typing import Any, Literal, get_args

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hq_optuna import attrs, workers
from hq_optuna.attrs import Ticket
from hq_optuna.cost import Budget, CostModel, check_reachable
from hq_optuna.errors import ResumeError
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.samplers.log import OpenStep, StepLog, settings
from hq_optuna.search import ProgressiveSearch, Rule
from hq_optuna.space import SearchSpace

logger = logging.getLogger(__name__)

Encoding = Literal["layers", "compact"]
MAX_VARIABLES_AS_LAYERS = 30
"""Above this many variables, writing them all with each candidate costs more than it shows."""


class ProgressiveBitSampler(BaseSampler):
    """Lower one layer by one notch a step (patent CN112183742B), with any number of workers.

    The history is a function of the arguments and the scores alone: the same with one worker or
    sixteen, on every storage, and after a worker was killed. The sampler keeps no state that the
    study does not have, so `optuna.load_study` with an equal sampler goes on where it stopped.

    Args:
        space: What may be lowered.
        budget: Where the search ends. ``None``: the budget of the study's `CostBudgetPruner`, or,
            if it has none, when every variable is at its fewest bits.
        n_candidates: Candidates a step; with at least as many as variables a step is exhaustive.
        rule: ``"ratio"``: smallest rise of the score per cost saved. ``"min"``: smallest score, as
            in the patent.
        seed: Seed of the draws.
        encoding: ``"layers"``: each candidate has the bits of every layer as parameters, which the
            dashboard draws. ``"compact"``: two parameters, ``layer`` and ``bits``. Step records
            always have all layers. ``None``: ``"layers"`` up to 30 variables.

    Parameters that are not in the space are sampled independently at random, as Optuna's own
    relative samplers do. The objective's value must be deterministic.

    Raises:
        BudgetError: The budget is below the cheapest assignment of the space.

    Example:
        >>> import optuna
        >>> from hq_optuna.layers import LayerSpec
        >>> layers = [LayerSpec(n, "Linear", (8, 8), 0, 64, 1, 8) for n in ("a", "b", "c")]
        >>> space = SearchSpace.build(layers, bits=(8, 4, 2), pin_first_last=None)
        >>> sampler = ProgressiveBitSampler(space, budget=Budget.fraction(size_bytes=0.5))
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(sampler=sampler)
        >>> def objective(trial):
        ...     return sum(2.0 ** -trial.suggest_categorical(n, (8, 4, 2)) for n in "abc")
        >>> study.optimize(objective)
        >>> sampler.log(study).incumbent.cost
        96.0
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        budget: Budget | None = None,
        n_candidates: int = 8,
        rule: Rule = "ratio",
        seed: int = 0,
        encoding: Encoding | None = None,
    ) -> None:
        if encoding is None:
            few = len(space.variables) <= MAX_VARIABLES_AS_LAYERS
            encoding = "layers" if few else "compact"
        if encoding not in get_args(Encoding):
            raise ValueError(
                f"encoding is one of {', '.join(get_args(Encoding))}; got {encoding!r}."
            )
        if budget is not None:
            check_reachable(space, budget)
        self.space = space
        self.budget = budget
        self.n_candidates = n_candidates
        self.rule: Rule = rule
        self.seed = seed
        self.encoding: Encoding = encoding
        self._search(None)  # refuse bad settings now
        self._independent = RandomSampler(seed=seed)
        self._logs: dict[int, StepLog] = {}
        self._checked: dict[int, str | None] = {}
        self._tickets: dict[int, Ticket] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # Locks cannot be copied; logs are rebuilt from the study.
        return {**self.__dict__, "_lock": None, "_logs": {}, "_checked": {}, "_tickets": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    # What the study says

    def log(self, study: Study) -> StepLog:
        """Return the record of the search as it stands in the storage now."""
        trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
        with self._lock:
            log = self._logs.get(study._study_id)
            if log is None:
                log = self._logs[study._study_id] = StepLog(self._search(study))
            log.update(trials)
            return log

    def finished(self, study: Study) -> bool:
        """Return whether the budget is met, or nothing is left to lower."""
        return self.log(study).finished

    def _search(self, study: Study | None) -> ProgressiveSearch:
        budget = self.budget
        if budget is None and study is not None and isinstance(study.pruner, CostBudgetPruner):
            budget = study.pruner.budget
        model = CostModel(self.space.layers, "bops" if budget is None else budget.metric)
        return ProgressiveSearch(
            space=self.space,
            cost=model.cost,
            limit=-math.inf if budget is None else budget.limit(self.space.layers),
            n_candidates=self.n_candidates,
            rule=self.rule,
            seed=self.seed,
        )

    # Optuna's interface

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Give the trial its ticket. Never raises for what the study holds, and never waits."""
        ticket = Ticket.read(trial.system_attrs)  # a retried trial keeps its slot
        if ticket is not None and ticket.worker == workers.worker_id():
            return
        with self._lock:
            self._check_settings(study)
            if "fixed_params" in trial.system_attrs:  # study.enqueue_trial: not a trial of ours
                ticket = Ticket("free", -1, -1, "", (), worker=workers.worker_id())
            else:
                ticket = self._ticket(self.log(study), trial.number)
        study._storage.set_trial_system_attr(trial._trial_id, attrs.TICKET, ticket.to_json())
        self._tickets[trial._trial_id] = ticket
        if ticket.kind == "surplus":
            self._stop(study)

    def _ticket(self, log: StepLog, number: int) -> Ticket:
        worker, step = workers.worker_id(), log.open
        if step is None:
            assert log.incumbent is not None
            last = log.incumbent
            return Ticket("surplus", last.step + 1, 0, "", last.state, worker=worker)
        record = log.closed[-1].number if log.closed else None
        if step.complete:
            incumbent, winner = log.close_open_step()
            return Ticket(
                "incumbent",
                step.step,
                incumbent.origin[1],
                step.parent,
                incumbent.state,
                origin=winner,
                worker=worker,
            )
        slot = _slot(step, log.untagged_before(number))
        move = step.moves[slot]
        return Ticket(
            "candidate",
            step.step,
            slot,
            step.parent,
            step.states[slot],
            origin=record,
            variable=None if move is None else self.space.variables[move.variable].name,
            from_bits=None if move is None else move.from_bits,
            worker=worker,
        )

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that the trial's ticket sets."""
        self._raise_on_other_settings(study)
        ticket = self.ticket(study, trial._trial_id)
        if ticket is None:
            return {}
        values = self._values(ticket)
        return {name: CategoricalDistribution(choices) for name, (_, choices) in values.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the bits that the trial's ticket names."""
        ticket = self.ticket(study, trial._trial_id)
        if ticket is None or not search_space:
            return {}
        return {name: value for name, (value, _) in self._values(ticket).items()}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Sample a parameter that is not of the space.

        Raises:
            ValueError: The objective asks for a variable of the space with other choices.
        """
        ticket = self.ticket(study, trial._trial_id)
        values = {} if ticket is None else self._values(ticket)
        if param_name in values:
            raise ValueError(
                f"Parameter {param_name!r} allows {param_distribution} in the objective, but "
                f"{values[param_name][1]} in the sampler's space. Give both the same space."
            )
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """End the study with the record that meets the budget."""
        ticket = self.ticket(study, trial._trial_id)
        self._tickets.pop(trial._trial_id, None)
        if ticket is None or ticket.kind != "incumbent" or state != TrialState.COMPLETE:
            return
        with self._lock:
            log = self.log(study)
            if log.open is None or (
                (log.open.step, log.open.parent) == (ticket.step, ticket.parent)
                and log.search.finished(log.close_open_step()[0])
            ):
                self._stop(study)

    def reseed_rng(self) -> None:
        """Reseed what draws parameters outside the space; draws of the search never change."""
        self._independent.reseed_rng()

    # Details

    def parameters(self, ticket: Ticket) -> dict[str, tuple[int | str, tuple[int | str, ...]]]:
        """Return ``{parameter: (value, choices)}`` that a trial with this ticket shows."""
        if ticket.kind == "candidate" and self.encoding == "compact":
            names = tuple(variable.name for variable in self.space.variables)
            bits = tuple(sorted({b for v in self.space.variables for b in v.bits}, reverse=True))
            if ticket.variable is None:
                return {}
            to_bits = ticket.bits[names.index(ticket.variable)]
            return {"layer": (ticket.variable, names), "bits": (to_bits, bits)}
        return dict(self.space.parameters(ticket.bits))

    def _values(self, ticket: Ticket) -> dict[str, tuple[int | str, tuple[int | str, ...]]]:
        return self.parameters(ticket) if ticket.kind in ("candidate", "incumbent") else {}

    def ticket(self, study: Study, trial_id: int) -> Ticket | None:
        """Return the ticket of a trial, by its id in the storage."""
        # Optuna hands samplers the trial as it was before its ticket was written. Tickets of
        # trials that run in this process are kept; a ticket never changes.
        if trial_id in self._tickets:
            return self._tickets[trial_id]
        return Ticket.read(study._storage.get_trial(trial_id).system_attrs)

    def _check_settings(self, study: Study) -> None:
        """Remember whether the study was made with other settings; the first worker writes them."""
        if study._study_id in self._checked:
            return
        mine = settings(self._search(study))
        stored = study._storage.get_study_system_attrs(study._study_id).get(attrs.SETTINGS)
        if stored is None:
            study._storage.set_study_system_attr(study._study_id, attrs.SETTINGS, mine)
            stored = mine
        changed = [name for name in mine if stored.get(name) != mine[name]]
        self._checked[study._study_id] = (
            None
            if not changed
            else ", ".join(
                f"{name} (study: {stored.get(name)!r}, sampler: {mine[name]!r})" for name in changed
            )
        )

    def _raise_on_other_settings(self, study: Study) -> None:
        # Raised here, inside the objective, and not in before_trial: there Optuna would leave the
        # trial running for ever.
        changed = self._checked.get(study._study_id)
        if changed:
            raise ResumeError(
                f"Study {study.study_name!r} was made with another sampler: {changed}. "
                "Use the same settings, or another study name.",
                changed=tuple(changed.split(", ")),
            )

    def _stop(self, study: Study) -> None:
        # study.stop() raises outside of optimize(), for example in a loop of ask and tell.
        if getattr(study._thread_local, "in_optimize_loop", False):
            study.stop()


def _slot(step: OpenStep, untagged: int) -> int:
    """Return the slot for a worker, given how many lower tickets still wait for theirs."""
    free = step.free
    if untagged < len(free):
        return free[untagged]
    # Nothing is free: back up the slot with the fewest runners. This is what keeps a search alive
    # whose workers died unseen, and costs one evaluation otherwise.
    waiting = [slot for slot in range(len(step.states)) if slot not in step.done]
    return min(waiting, key=lambda slot: (len(step.running.get(slot, ())), slot))
