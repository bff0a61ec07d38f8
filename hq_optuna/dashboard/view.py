"""A search as `hq-optuna dashboard` shows it: optuna-dashboard, told what it cannot know.

optuna-dashboard is used as it is. It is given a storage that answers four of its questions for a
bit search (which trial is the answer, which attributes and files people want to see, what each
layer decides), and its answers are made shorter and clearer on their way to the browser. Nothing is
written.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from hq_optuna import attributes
from hq_optuna.attributes import StudyInfo, quantizers_text
from hq_optuna.dashboard.notes import change, trial_note
from hq_optuna.dashboard.pages import FIGURES, NOTE, artifacts_in
from hq_optuna.optuna_internals import ARTIFACTS_ATTR_PREFIX, FrozenStudy, id_of
from hq_optuna.protocol.status import StatusReader
from hq_optuna.search import Additive
from hq_optuna.space.cost import format_cost
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.storages import RetryingStorage

IMPORTANCES_VIEW = "get_param_importances"
"""Name of the function of optuna-dashboard that answers for the card of importances."""

NOTE_VERSION = f"{NOTE}note_ver"
"""Study system attribute that counts the changes of a study's note."""

MOST_IMPORTANT = 20
"""Bars that the card has room to name."""


_INTEGERS = {attributes.STEP, attributes.SLOT, attributes.WINNER}
_INTEGERS |= {attributes.FROM_BITS, attributes.TO_BITS}


class ShownStorage(RetryingStorage):
    """A storage whose bit searches are shown to people; other studies are as they are."""

    def __init__(self, storage: BaseStorage) -> None:
        super().__init__(storage, retry_for_s=0.0)
        self._watches: dict[int, StatusReader] = {}
        self._pages: dict[int, tuple[Any, Mapping[str, Any]]] = {}
        self._lock = threading.Lock()

    def show_pages(self, study_id: int, pages: Mapping[str, Any]) -> None:
        """Show what `changed_pages` returned in place of a study's own, until its note changes."""
        version = super().get_study_system_attrs(study_id).get(NOTE_VERSION)
        self._pages[study_id] = version, pages

    def _with_pages(self, study_id: int, stored: dict[str, Any]) -> dict[str, Any]:
        version, pages = self._pages.get(study_id, (None, {}))
        return {**stored, **pages} if stored.get(NOTE_VERSION) == version else stored

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the system attributes of a study, its pages up to date."""
        return self._with_pages(study_id, super().get_study_system_attrs(study_id))

    def info(self, study_id: int) -> StudyInfo | None:
        """Return what a search is about; ``None`` for studies of other kinds."""
        data = self.get_study_user_attrs(study_id).get(attributes.INFO)
        return None if data is None else StudyInfo.from_json(data)

    def importances(self, study_id: int) -> list[dict[str, Any]] | None:
        """Return what each layer decides, as the dashboard's card of importances reads it.

        Optuna judges a parameter by the best tenth of all trials. Those of a bit search are its
        first, all near the widest bits, and with the compact encoding no parameter is in all
        trials. What the search knows says it better: how far the predicted loss rises when this
        parameter alone goes from its widest to its fewest bits, as a share of the sum over all.

        Returns:
            The first `MOST_IMPORTANT`; ``None`` for other studies, and for searches that hold no
            whole table of sensitivities: Optuna's own judgement is shown.
        """
        info = self.info(study_id)
        if info is None:
            return None
        system = self.get_study_system_attrs(study_id)
        table = attributes.join(attributes.SENSITIVITY, system) or {}
        space = SearchSpace.from_json(attributes.join(attributes.SPACE, system) or {})
        rises = {
            layer: {part: {int(b): nats for b, nats in row.items()} for part, row in parts.items()}
            for layer, parts in table.items()
        }
        model = space.costs(info.metric)
        try:
            sums = Additive(space, rises, model)
        except ValueError:
            return None
        spread = {
            variable.name: max(0.0, rise[variable.bits[-1]] - rise[variable.bits[0]])
            for variable, rise in zip(space.variables, sums.rises, strict=True)
        }
        total = math.fsum(spread.values())
        if total <= 0:
            return None
        most = sorted(spread, key=lambda name: -spread[name])[:MOST_IMPORTANT]
        kind = {"distribution": CategoricalDistribution.__name__}
        return [{"name": name, "importance": spread[name] / total, **kind} for name in most]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """Return the incumbent, which is the answer in the end; Optuna's best ignores the budget.

        Raises:
            ValueError: No trial is complete.
        """
        if self.info(study_id) is not None:
            with self._lock:  # requests are answered by several threads
                if study_id not in self._watches:
                    name = self.get_study_name_from_id(study_id)
                    study = optuna.load_study(study_name=name, storage=self)
                    self._watches[study_id] = StatusReader(study)
                self._watches[study_id].read()
                number = self._watches[study_id].record
            if number is not None:
                return self.get_trial(
                    self.get_trial_id_from_study_id_trial_number(study_id, number)
                )
        return super().get_best_trial(study_id)

    def delete_study(self, study_id: int) -> None:
        """Delete a study; SQLite may give its id to the next one."""
        super().delete_study(study_id)
        with self._lock:
            self._watches.pop(study_id, None)

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return all studies by age, with attributes for people."""
        found = sorted(super().get_all_studies(), key=id_of)
        studies = [copy.copy(study) for study in found]
        for study in studies:
            study.system_attrs = self._with_pages(id_of(study), study.system_attrs)
            if attributes.INFO in study.user_attrs:
                study.system_attrs = without_superseded(study.system_attrs)
                study.user_attrs = for_people(study.user_attrs)
        return studies


def for_people(user_attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user attributes of a search as people want to read them."""
    info = StudyInfo.from_json(user_attrs[attributes.INFO])
    shown: dict[str, Any] = {
        "budget": f"{info.budget} ({format_cost(info.limit, info.metric)})",
        "all-8-bit cost": format_cost(info.int8, info.metric),
        "scorer": info.settings["scorer"],
        "rule": info.settings["rule"],
        "candidates a step": info.settings["n_candidates"],
        "seed": info.settings["seed"],
        "rounding": info.settings["rounding"],
        "quantizers": quantizers_text(info.quantizers),
        "statistics corrected": "yes" if info.settings["correction"] else "no",
    }
    for key, value in user_attrs.items():
        name = key.removeprefix(f"{attributes.REPORT}:")
        if name != key and not isinstance(value, list | dict):
            shown[name.replace("_", " ")] = value
        elif not key.startswith("hq:"):
            shown[key] = value
    return shown


def without_superseded(system_attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the system attributes without files that a newer one of the same name replaced."""
    current = {reference.id for reference in artifacts_in(system_attrs).values()}
    named = {
        json.loads(value)["filename"]
        for key, value in system_attrs.items()
        if key.removeprefix(ARTIFACTS_ATTR_PREFIX) in current and value != "null"
    }
    return {
        key: value
        for key, value in system_attrs.items()
        if not key.startswith(ARTIFACTS_ATTR_PREFIX)
        or key.removeprefix(ARTIFACTS_ATTR_PREFIX) in current
        or (json.loads(value) or {}).get("filename") not in named
    }


def clearer(storage: ShownStorage) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a plugin for the dashboard's web framework that makes its answers clearer."""

    def plugin(view: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(view)
        def answer(*arguments: Any, **named: Any) -> Any:
            if view.__name__ == IMPORTANCES_VIEW:
                found = storage.importances(named["study_id"])
                if found is not None:
                    return {"param_importances": [found]}
            body = view(*arguments, **named)
            if isinstance(body, dict) and "union_search_space" in body:
                make_clearer(body, storage.info(named["study_id"]))
            return body

        return answer

    return plugin


def make_clearer(body: dict[str, Any], info: StudyInfo | None) -> None:
    """Change what optuna-dashboard tells the browser of a study, in place.

    Every trial without a note gets one line that says what it was. And the choices of parameters
    are told once, with the search space, which is all the page reads, and not again with every
    parameter of every trial: with sixty layers that is nine tenths of what is sent. The body is
    ``/api/studies/ID`` of optuna-dashboard 0.21, before it is written as JSON. Trials of studies
    that are no bit search, without ``info``, get no notes.
    """
    # It comes in the order of a set.
    body["plotly_graph_objects"].sort(key=lambda figure: _place(figure["id"]))
    trials = [*body["trials"], *body["best_trials"]]
    by_number = {trial["number"]: trial for trial in trials}
    for trial in trials:
        for parameter in trial["params"]:
            distribution = parameter["distribution"]
            if "choices" in distribution:
                parameter["distribution"] = {**distribution, "choices": []}
        if info is not None and not trial["note"]["body"]:
            what = _typed(trial)
            won = by_number.get(what.get(attributes.WINNER))
            values = trial.get("values") or [None]
            text = trial_note(
                what,
                info,
                state=trial["state"].upper(),
                score=values[0] if isinstance(values[0], float) else None,
                took="" if won is None else change(_typed(won)),
            )
            trial["note"] = {**trial["note"], "body": text}


def _place(name: str) -> tuple[int, str]:
    return (FIGURES.index(name) if name in FIGURES else len(FIGURES), name)


def _typed(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Return user attributes that the dashboard turned into texts, with their numbers."""
    found = {item["key"]: item["value"] for item in trial["user_attrs"]}
    for key in _INTEGERS & set(found):
        found[key] = int(found[key]) if found[key].lstrip("-").isdigit() else None
    if attributes.TRAINING in found:
        try:
            found[attributes.TRAINING] = json.loads(found[attributes.TRAINING])
        except ValueError:  # the dashboard cuts long attributes
            del found[attributes.TRAINING]
    return found
