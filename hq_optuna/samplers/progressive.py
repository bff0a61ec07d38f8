"""`ProgressiveBitSampler`: the step protocol as an Optuna sampler.

Every trial has a ticket: one slot of the open step. Workers of this package (`ask`) create a trial
with its ticket, and of two in the same slot the lower number has it. In loops of Optuna's own the
sampler is called once the trial is there, takes the u-th free slot (u: running trials with a lower
number that have no ticket yet) and writes the ticket. When all slots of a step are done, one more
trial closes the step; being finished, it is immutable, and is the record of the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
from collections.abc import Sequence
from typing import Any, get_args
from weakref import WeakKeyDictionary

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import OptunaError
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.optuna_internals import (
    FIXED_PARAMS,
    loop_of,
    place_of,
    refuse_several_objectives,
    storage_of,
    trial_id_of,
)
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.claims import ClaimedTrial, claim
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.stopping import stop
from hq_optuna.protocol.study_view import StudyView, limits_of
from hq_optuna.protocol.table import stored_sums
from hq_optuna.protocol.tickets import (
    BITS,
    LAYER,
    Parameters,
    candidate_ticket,
    idle_ticket,
    parameters,
    record_ticket,
    slot_for,
)
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.search import ProgressiveSearch, check_reachable
from hq_optuna.settings import Encoding, Rule
from hq_optuna.space.budget import Budget
from hq_optuna.space.search_space import SearchSpace

logger = logging.getLogger(__name__)

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
        refine: Once the budget is met, try steps of swaps (raise here, lower there, within the
            budget) until one brings nothing.
        train_every: Steps after which the objective trains the winner, and the next ones are made
            from the trained network; 0 for never. The objective must know how.
        final: Whether the objective trains the answer when the search is over.
        verify: Assignments within the budget that the objective measures when the steps are over,
            and of which it takes the best (`hq_optuna.search.finalists`); 0 for none. The study
            must hold the objective's table of rises.
        backs_up: Whether a trial for which nothing is free repeats what another one is running, so
            that a search goes on whose workers died unseen. Turned off, such a trial is of the kind
            ``"surplus"``.
        encoding: ``"layers"``: each candidate has the bits of every layer as parameters, which the
            dashboard draws. ``"compact"``: two parameters, ``layer`` and ``bits``, and
            `hq_optuna.assignment` has the rest. Step records always have all layers. ``None``:
            ``"layers"`` up to 30 variables.

    Parameters that are not in the space are sampled independently at random, as Optuna's own
    relative samplers do. The objective's value must be deterministic. A trial that is asked for
    after the search is over shows the answer once more.

    Raises:
        BudgetError: The budget is below the cheapest assignment of the space.
        ValueError: Unknown encoding or rule, no candidates, or a layer whose name the compact
            encoding needs for itself.

    Example:
        >>> import optuna
        >>> from hq_optuna.space.layers import LayerSpec
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
        refine: bool = True,
        train_every: int = 0,
        final: bool = False,
        verify: int = 0,
        backs_up: bool = True,
        encoding: Encoding | None = None,
    ) -> None:
        taken = {LAYER, BITS} & set(space.parameters(space.top))
        if encoding is None:
            few = len(space.variables) <= MAX_VARIABLES_AS_LAYERS
            encoding = "layers" if few or taken else "compact"
        if encoding not in get_args(Encoding):
            raise ValueError(
                f"encoding is one of {', '.join(get_args(Encoding))}; got {encoding!r}."
            )
        if encoding == "compact" and taken:
            raise ValueError(
                f"The compact encoding has parameters {LAYER!r} and {BITS!r}, and a layer is named "
                f"{min(taken)!r}. Use encoding='layers'."
            )
        if budget is not None:
            check_reachable(space, budget)
            if verify:  # finalists are exact optima, which a peak of too many tensors has not
                for bound in budget.bounds(space):
                    _ = bound.model.rows
        self.space = space
        self.budget = budget
        self.n_candidates = n_candidates
        self.rule: Rule = rule
        self.seed = seed
        self.refine = refine
        self.train_every = train_every
        self.final = final
        self.verify = verify
        self.encoding: Encoding = encoding
        self.backs_up = backs_up
        self._search(None)  # refuse bad settings now
        self._independent = RandomSampler(seed=seed)
        # By storage, as studies of two storages may have the same id.
        self._views: WeakKeyDictionary[BaseStorage, dict[int, StudyView]] = WeakKeyDictionary()
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # Locks cannot be copied; what is known is rebuilt from the study.
        return {**self.__dict__, "lock": None, "_views": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._views = WeakKeyDictionary()
        self.lock = threading.RLock()

    # What the study says

    def log(self, study: Study) -> StepLog:
        """Return the record of the search as it stands in the storage now."""
        return self.view(study).read(study)

    def view(self, study: Study) -> StudyView:
        """Return what is known of a study, as far as it was read."""
        storage, study_id = place_of(study)
        with self.lock:
            studies = self._views.setdefault(storage, {})
            if study_id not in studies:
                known = storage.get_study_user_attrs(study_id)
                search = self._search(study)
                log = StepLog(
                    search,
                    signed=attributes.FINGERPRINT in known,
                    sums=stored_sums(study, search),
                )
                mine = attributes.digest(log.settings)
                log.limit(limits_of(study))
                studies[study_id] = StudyView(
                    self.space, self.encoding, log, mine, self._budget_of(study), self.lock
                )
            return studies[study_id]

    def name_search(self, study: Study, digest: str) -> None:
        """Say what the search depends on besides the sampler: network, data and so on.

        Tickets carry it, so that processes which start different searches in one new study at the
        same moment are told apart.
        """
        self.view(study).name_search(digest)

    def base(self, study: Study) -> int | None:
        """Return the number of the record whose trained network candidates are made from.

        ``None`` for the network as it was given. Reads nothing from the storage.
        """
        return self.view(study).log.base

    def finished(self, study: Study) -> bool:
        """Return whether the budget is met, or nothing is left to lower."""
        return self.log(study).open is None

    def ticket(self, study: Study, trial: Trial | FrozenTrial) -> Ticket | None:
        """Return the ticket of a trial."""
        # Optuna hands samplers the trial as it was before its ticket was written. Tickets of
        # trials that run in this process are kept; a ticket never changes.
        trial_id = trial_id_of(trial)
        kept = self.view(study).tickets.get(trial_id)
        return kept or Ticket.read(storage_of(study).get_trial(trial_id).system_attrs)

    def parameters(self, ticket: Ticket) -> Parameters:
        """Return ``{parameter: (value, choices)}`` that a trial with this ticket shows."""
        return parameters(ticket, self.space, self.encoding)

    def check_study(self, study: Study) -> None:
        """Refuse a study that this sampler cannot go on with.

        Raises:
            ResumeError: The study was made with other settings.
            ValueError: The study has several objectives, or maximizes.
        """
        refuse_several_objectives(self, study)
        self.view(study).check_settings(study)

    def _budget_of(self, study: Study | None) -> Budget | None:
        if self.budget is None and study is not None and isinstance(study.pruner, CostBudgetPruner):
            return study.pruner.budget
        return self.budget

    def _search(self, study: Study | None) -> ProgressiveSearch:
        budget = self._budget_of(study)
        bounds = () if budget is None else budget.bounds(self.space)
        model = bounds[0].model if bounds else self.space.costs("bops")
        return ProgressiveSearch(
            space=self.space,
            cost=model.cost,
            limit=bounds[0].limit if bounds else -math.inf,
            n_candidates=self.n_candidates,
            rule=self.rule,
            seed=self.seed,
            refine=self.refine,
            train_every=self.train_every,
            final=self.final,
            verify=self.verify,
            metric=model.metric,
            beside=bounds[1:],
        )

    # Asking

    def ask(self, study: Study, waited_s: float = math.inf) -> ClaimedTrial | None:
        """Claim work by creating its trial, complete with ticket, parameters and known facts.

        What workers use instead of `optuna.Study.ask`. End the trial with its ``finish``.

        Args:
            study: The study.
            waited_s: How long the caller has waited for work since it did some: who waited a
                little leaves others theirs, who waited long takes what there is.

        Returns:
            The trial, or ``None`` where other workers have all there is to do now.

        Raises:
            ResumeError: The study was made with other settings, or is another search.
            RuntimeError: What the search needs next was pruned again and again.
            ValueError: The study has several objectives, or maximizes.
        """
        self.check_study(study)
        return claim(self.view(study), study, waited_s)

    # Optuna's interface

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Give the trial its ticket. Never waits.

        Raises:
            ResumeError: The study was made with other settings, or is another search.
            RuntimeError: What the search needs next failed, or was pruned, again and again.
            ValueError: The study has several objectives, or maximizes.
        """
        tickets, trial_id = self.view(study).tickets, trial_id_of(trial)
        if trial_id in tickets:
            return  # created with it, see `ask`
        storage = storage_of(study)
        try:
            ticket = self._new_ticket(study, trial)
            self.view(study).write_ticket(study, trial_id, ticket)
        except BaseException:  # Ctrl-C too: what is raised here leaves a trial running for ever
            with contextlib.suppress(OptunaError):
                storage.set_trial_state_values(trial_id, TrialState.FAIL)
            raise
        tickets[trial_id] = ticket
        if ticket.kind == "surplus":
            stop(study)

    def _new_ticket(self, study: Study, trial: FrozenTrial) -> Ticket:
        self.check_study(study)
        ticket = Ticket.read(trial.system_attrs)
        if ticket is not None:  # a retried trial keeps its parameters, and so its slot
            return dataclasses.replace(ticket, worker=worker_identity.worker_id())
        if FIXED_PARAMS in trial.system_attrs or trial.params:  # enqueued: not a trial of ours
            return idle_ticket("free")
        with self.lock:
            log, view = self.log(study), self.view(study)
            view.refuse_another_search(study)
            step = log.open
            if step is None or not (self.backs_up or log.anything_left(trial.number)):
                return idle_ticket("surplus", log, view.search)
            if step.complete:
                ticket = record_ticket(log, view.search)
            else:
                slot = slot_for(step, log.untagged_before(trial.number))
                ticket = candidate_ticket(log, slot, view.search)
            told = loop_of(study) is not None
            view.failures.refuse_more(log.search.space, ticket, told=told)
            return ticket

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that the trial's ticket sets."""
        refuse_several_objectives(self, study)
        shown = self._shown(study, trial)
        return {name: CategoricalDistribution(choices) for name, (_, choices) in shown.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the bits that the trial's ticket names."""
        shown = self._shown(study, trial) if search_space else {}
        return {name: value for name, (value, _) in shown.items()}

    def _shown(self, study: Study, trial: FrozenTrial) -> Parameters:
        ticket = self.ticket(study, trial)
        return {} if ticket is None else self.parameters(ticket)

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
        refuse_several_objectives(self, study)
        shown = self._shown(study, trial)
        if param_name in shown:
            raise ValueError(
                f"Parameter {param_name!r} allows {param_distribution} in the objective, but "
                f"{shown[param_name][1]} in the sampler's space. Give both the same space."
            )
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """End the study with the record that meets the budget; constrain trials of others."""
        ticket, view = self.ticket(study, trial), self.view(study)
        view.tickets.pop(trial_id_of(trial), None)
        if ticket is None or ticket.kind == "free":
            if state == TrialState.COMPLETE:
                view.constrain(study, trial)
            return
        if ticket.kind == "surplus":
            return
        with self.lock:
            signed = attributes.SCORE_WEIGHTS in trial.user_attrs or not view.log.signed
            if state != TrialState.COMPLETE or not signed:
                view.failures.note(self.log(study), ticket, state)
            elif ticket.kind == "incumbent":
                log = self.log(study)
                step = log.open
                if step is None or (
                    step.needs(ticket)
                    and (step.final or not self.final)
                    and log.ends_with_open_step()
                ):
                    stop(study)

    def reseed_rng(self) -> None:
        """Reseed what draws parameters outside the space; draws of the search never change."""
        self._independent.reseed_rng()
