"""What an objective writes into its study about the search: fingerprint, description, budget."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from optuna.study import Study
from torch import nn

from hq_optuna import attributes
from hq_optuna.objective import fingerprint
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.scoring import output_rise_of
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel

if TYPE_CHECKING:
    from hq_optuna.objective.hessian import HessianObjective


def fingerprint_of(objective: HessianObjective, study: Study) -> dict[str, str | int]:
    """Return what a search depends on, by name."""
    mine: dict[str, str | int] = {
        "network": fingerprint.network_digest(objective.model),
        "data": objective.data.digest(),
        "space": objective.space.digest,
        "quantizers": fingerprint.quantizers(objective.setup.quantizers),
        "scorer": objective.setup.scorer,
        "rounding": objective.setup.rounding,
        "correction": objective.setup.correction,
        "observer": objective.setup.observer,
        "precision": objective.setup.precision,
        "loss": _name(objective.loss_fn),
    }
    rise = objective.setup.output_rise
    if rise is not None and _name(rise) != _name(output_rise_of(objective.loss_fn)):
        mine["output_rise"] = _name(rise)
    if objective.training is not None:
        mine["training"] = objective.training.plan.digest()
    budget = budget_of(study)
    if budget is not None:
        mine["budget"] = str(budget)
    if isinstance(study.sampler, ProgressiveBitSampler):
        sampler = study.sampler
        mine |= {
            "rule": sampler.rule,
            "n_candidates": sampler.n_candidates,
            "seed": sampler.seed,
            "refine": sampler.refine,
            **({"train_every": sampler.train_every} if sampler.train_every else {}),
            "encoding": sampler.encoding,
        }
    return mine


def info_of(objective: HessianObjective, study: Study) -> attributes.StudyInfo:
    """Return what a study says of its search."""
    budget = budget_of(study)
    metric = "bops" if budget is None else budget.metric
    model = CostModel(objective.space.layers, metric)
    sampler = study.sampler
    ours = sampler if isinstance(sampler, ProgressiveBitSampler) else None
    return attributes.StudyInfo(
        metric=metric,
        limit=model.float32 if budget is None else budget.limit(objective.space.layers),
        budget="none" if budget is None else str(budget),
        int8=model.int8,
        float32=model.float32,
        scorer=objective.setup.scorer,
        rounding=objective.setup.rounding,
        quantizers=dict(objective.setup.quantizers),
        correction=objective.setup.correction,
        rule=type(sampler).__name__ if ours is None else ours.rule,
        n_candidates=1 if ours is None else ours.n_candidates,
        seed=0 if ours is None else ours.seed,
        training=None if objective.training is None else objective.training.plan.to_json(),
        skipped=objective.skipped,
        warnings=tuple(objective.warnings),
    )


def _name(function: object) -> str:
    """Return a function's name; of a module and of `functools.partial` also what it was made with.

    What a function closes over, or reads from elsewhere, cannot be told.
    """
    if isinstance(function, partial):
        given = ", ".join(f"{name}={value!r:.80}" for name, value in function.keywords.items())
        return f"{_name(function.func)}({given})"
    name = str(getattr(function, "__qualname__", type(function).__name__))
    if not isinstance(function, nn.Module):
        return name
    own = ((k, v) for k, v in vars(function).items() if not k.startswith("_"))
    plain = {k: v for k, v in own if isinstance(v, (str, int, float)) and k != "training"}
    held = fingerprint.network_digest(function) if function.state_dict() else ""
    return f"{name}({', '.join(f'{k}={plain[k]}' for k in sorted(plain))}){held}"


def budget_of(study: Study) -> Budget | None:
    """Return the budget of a study: its sampler's, or its pruner's."""
    if isinstance(study.sampler, ProgressiveBitSampler) and study.sampler.budget is not None:
        return study.sampler.budget
    return study.pruner.budget if isinstance(study.pruner, CostBudgetPruner) else None
