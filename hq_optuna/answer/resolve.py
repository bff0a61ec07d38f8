"""Another budget for a finished search: solved exactly on the stored table, nothing scored again.

The table of predicted loss rises, by layer and bits, is in the study. The least sum over layers
within any budget is an integer program that takes milliseconds: no network, no data.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study

from hq_optuna import attributes
from hq_optuna.artifacts.store import Artifacts, attach
from hq_optuna.atomic_files import write_atomically
from hq_optuna.errors import RecipeError, ResumeError
from hq_optuna.protocol.history import History, read_history
from hq_optuna.search import Additive, Point, Trade, check_reachable
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.budget import Budget, parse_budget
from hq_optuna.space.cost import Metric

FORMAT = "hq_optuna assignment"
FORMAT_VERSION = 1

ASSIGNMENT = "assignment"
"""Name of the artifact that holds the bits of every layer."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """The exact assignment for a budget.

    Attributes:
        study_name: Where the table is from.
        config: Bits of every layer.
        budget: The budget in words.
        metric: What `cost` counts, one of `hq_optuna.space.METRICS`.
        limit: The budget in that unit.
        cost: Cost of the assignment.
        int8: Cost with 8 bits everywhere.
        score: Sum over layers of the predicted loss rise, nats.
        fingerprint: What the search depended on: network, data, ….
    """

    study_name: str
    config: BitConfig
    budget: str
    metric: Metric
    limit: float
    cost: float
    int8: float
    score: float
    fingerprint: Any

    def to_json(self) -> dict[str, Any]:
        """Return what `save` writes."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "study": self.study_name,
            "budget": {"text": self.budget, "metric": self.metric, "limit": self.limit},
            "cost": {"metric": self.metric, "value": self.cost, "all_8_bit": self.int8},
            "score_nats": {"sum_over_layers": self.score},
            "assignment": self.config.to_json(),
            "assignment_digest": self.config.digest,
            "fingerprint": self.fingerprint,
        }

    def save(self, path: str | Path) -> None:
        """Write the assignment as JSON; `load_assignment` reads it.

        Raises:
            OSError: The file cannot be written; an earlier one stays as it was.
        """
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(Path(path), text.encode())


def sums_of(history: History, metric: Metric | None = None) -> Additive:
    """Return the sums over layers of a search; refuse a study without a whole table of them."""
    sums = history.additive(metric)
    if sums is None:
        raise ResumeError(
            f"Study {history.study_name!r} holds no sensitivity of every layer at all of its bits, "
            "so no other budget can be solved for. Start the search once; it measures them first."
        )
    return sums


def sums_for(history: History, budget: Budget) -> Additive:
    """Return the sums over layers of a search for another budget, its further limits included."""
    first, *beside = budget.bounds(history.space)
    sums = sums_of(history, first.metric)
    return Additive(sums.space, sums.table, first.model, beside)


def optimum(history: History, budget: Budget) -> tuple[Additive, float, Point]:
    """Return a search's sums for a budget, its limit, and the exact assignment within it.

    Raises:
        ResumeError: The study holds no table.
        BudgetError: The budget is below the cheapest assignment.
    """
    check_reachable(history.space, budget)
    sums, limit = sums_for(history, budget), budget.limit(history.space)
    found = sums.exact(limit)
    assert found is not None, "the budget was found reachable"
    return sums, limit, found


def resolve(study: Study, budget: Budget | str) -> Resolved:
    """Return the assignment with the least sum over layers within a budget.

    Args:
        study: A study of a bit search; finished or not, its table is there from the start.
        budget: Any budget, also in another metric than the search's: a `Budget`, or text as on the
            command line, ``"0.2 bops"``.

    Raises:
        SettingError: Text that is no budget.
        ResumeError: The study is not a bit search, or holds no table.
        BudgetError: The budget is below the cheapest assignment.
    """
    budget = parse_budget(budget)
    history = read_history(study)
    _, limit, found = optimum(history, budget)
    return Resolved(
        study_name=study.study_name,
        config=found.config,
        budget=str(budget),
        metric=budget.metric,
        limit=limit,
        cost=found.cost,
        int8=history.space.costs(budget.metric).int8,
        score=found.score,
        fingerprint=study.user_attrs.get(attributes.FINGERPRINT),
    )


def answer(study: Study) -> Resolved | None:
    """Return the incumbent of a search in the form of `resolve`'s, ``None`` before there is one."""
    history = read_history(study)
    info, record = history.info, history.incumbent
    if record is None:
        return None
    return Resolved(
        study_name=study.study_name,
        config=record.config,
        budget=info.budget,
        metric=info.metric,
        limit=info.limit,
        cost=record.winner.cost,
        int8=info.int8,
        score=sums_of(history).score(record.config),
        fingerprint=study.user_attrs.get(attributes.FINGERPRINT),
    )


def pareto(study: Study, *, metric: Metric | None = None, n: int = 33) -> list[Point]:
    """Return the exact Pareto curve of score against cost, the cheapest first.

    Args:
        study: A study of a bit search.
        metric: What is counted; by default what the search's budget counts. The search's budget is
            one of the points then.
        n: How many budgets are solved for.

    Raises:
        ResumeError: The study is not a bit search, or holds no table.
    """
    history = read_history(study)
    own = metric in (None, history.info.metric)
    return sums_of(history, metric).frontier([history.info.limit] if own else (), n=n)


def trades(
    study: Study,
    *,
    against: Metric,
    metric: Metric | None = None,
    within: float | None = None,
    n: int = 33,
) -> list[Trade]:
    """Return the exact Pareto curve of two costs, among assignments of a predicted rise.

    Args:
        study: A study of a bit search.
        against: What is least at each cost: ``"latency_s"``, ``"activation_bytes"``, ….
        metric: The cost; by default what the search's budget counts. Its further limits hold.
        within: Most that the sum over layers may be, nats; by default that of the search's answer.
        n: How many limits are solved for.

    Raises:
        ResumeError: The study is not a bit search, holds no table, or has no answer yet.
        SpaceError: The space does not know what is counted.
        ValueError: The two costs are one, or no assignment has such a sum.
    """
    history = read_history(study)
    sums = sums_of(history, metric)
    if sums.model.metric == against:
        raise ValueError(f"Two costs are traded for each other; got {against} twice.")
    if within is None:
        if history.incumbent is None:
            raise ResumeError(
                f"Study {study.study_name!r} has no answer yet whose predicted rise would say what "
                "is as good. Say it in nats (within)."
            )
        within = sums.score(history.incumbent.config)
    found = sums.trades(history.space.costs(against), within, n=n)
    if not found:
        raise ValueError(f"No assignment has a sum over layers of {within:.3g} nats or less.")
    return found


def layers_digest(layers: Any) -> str:
    """Return the hash of a recipe's layers that the recipe holds too."""
    text = json.dumps(layers, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def load_assignment(path: str | Path) -> BitConfig:
    """Return the bits of every layer from a file that `Resolved.save` or `SearchResult.save` wrote.

    Args:
        path: The file of an assignment, or ``recipe.json`` of a saved result.

    Raises:
        RecipeError: The file is missing, damaged, altered, or of a newer format.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise RecipeError(f"{path} is damaged: {error}.") from None
    kind = data.get("format") if isinstance(data, dict) else None
    if kind not in (FORMAT, "hq_optuna recipe"):
        raise RecipeError(f"{path} holds no assignment of hq_optuna.")
    if data.get("format_version") != FORMAT_VERSION:
        raise RecipeError(
            f"{path} has format {data.get('format_version')}, this version reads {FORMAT_VERSION}. "
            "Update hq_optuna."
        )
    try:
        if kind == FORMAT:
            config = BitConfig.from_json(data["assignment"])
            if config.digest != data["assignment_digest"]:
                raise RecipeError(f"{path} was altered after it was saved: its digest differs.")
            return config
        if layers_digest(data["layers"]) != data["layers_sha256"]:
            raise RecipeError(
                f"{path} was altered after it was saved: the hash of its layers differs."
            )
        layers = data["layers"].items()
        return BitConfig({n: (e["weight_bits"], e["activation_bits"]) for n, e in layers})
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise RecipeError(f"{path} is damaged: {type(error).__name__} {error}.") from None


def publish_answer(study: Study, artifacts: Artifacts) -> None:
    """Attach the incumbent's bits of every layer, as `hq_optuna.load_assignment` reads them."""
    found = answer(study)
    if found is not None:
        stored = artifacts.put_json(found.to_json())
        attach(study, ASSIGNMENT, stored, filename="assignment.json", mimetype="application/json")
