"""Writing notes and figures into a study, as optuna-dashboard reads them.

optuna-dashboard's own `save_note` and `save_plotly_graph_object` cut texts into parts of 2,045
characters, and write and commit each alone: fifty commits for the pages of a large search, and
a reader in between gets half of a figure. Here parts are as long as every database allows,
only what changed is written, and all at once (`hq_optuna.storages.writing`). What stands in the
study is the same format, in fewer parts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study

from hq_optuna import attributes
from hq_optuna.artifacts.store import Reference
from hq_optuna.dashboard.notes import (
    change_of,
    preparation_note,
    study_note,
    trial_note,
    with_readers_part,
)
from hq_optuna.optuna_internals import id_of, place_of, storage_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.history import History, StepRecord, read_history
from hq_optuna.protocol.status import SearchStatus, read_status
from hq_optuna.storages import RetryingStorage
from hq_optuna.storages.writing import set_study_system_attrs
from hq_optuna.visualization import figure_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

STAMP = "hq:pages"
"""Study system attribute: when the pages were written, by whom, and after which step."""

NOTE, PLOT = "dashboard:", "dashboard:plot_data:"
"""What optuna-dashboard's study system attributes of notes and of figures begin with."""

LONGEST_PART = 60_000
"""Bytes of a part as JSON: a MySQL TEXT column ends at 65,535."""

FIGURES = ("steps", "bits", "sensitivity", "training")
"""Ids of the figures, in the order they are shown in; the last where winners are trained."""

FIGURE_STEPS = 120
"""Steps that a figure shows at most: its cards are some 500 pixels wide."""

CARD_PX = 450
"""Height of the dashboard's cards for figures; what is higher would lie over the next card."""

NOTED_STEPS = 50
"""Steps whose records get notes. optuna-dashboard compares every trial with every attribute of its
study at each refresh, and all workers read them when they join, so a study of thousands of trials
with a note each cannot be opened. `hq-optuna dashboard` shows a line for every trial nevertheless,
made from the trial's attributes when it is read."""


def write_pages(study: Study, *, current: SearchStatus | None = None) -> bool:
    """Bring the study's note, figures and trial notes up to date; return whether any was not.

    Two processes that do this at the same moment leave what one of them wrote. Where the search
    stands is read if it is not given.

    Raises:
        ResumeError: The study is not a bit search.
    """
    changed = changed_pages(study, current=current)
    if changed:
        storage, study_id = place_of(study)
        set_study_system_attrs(unwrapped(storage), study_id, changed)
    return bool(changed)


def write_preparation(study: Study, current: SearchStatus) -> None:
    """Say in the study's note how far a preparation is that workers share, if it changed."""
    storage, study_id = unwrapped(storage_of(study)), id_of(study)
    stored = storage.get_study_system_attrs(study_id)
    text = with_readers_part(preparation_note(study.study_name, current), note_in(stored))
    if text != note_in(stored):
        version = int(stored.get(f"{NOTE}note_ver", 0)) + 1
        changed = {**parts(f"{NOTE}note_str:", text, stored), f"{NOTE}note_ver": version}
        set_study_system_attrs(storage, study_id, changed)


def changed_pages(study: Study, *, current: SearchStatus | None = None) -> dict[str, Any]:
    """Return the attributes of a study that would bring its pages up to date; empty if they are.

    What readers added to the study's note is kept, and notes that trials have are left alone. Where
    the search stands is read if it is not given.

    Raises:
        ResumeError: The study is not a bit search.
    """
    storage, study_id = unwrapped(storage_of(study)), id_of(study)
    stored = storage.get_study_system_attrs(study_id)
    if storage is not storage_of(study):
        study = optuna.load_study(study_name=study.study_name, storage=storage)
    history = read_history(study)
    current = read_status(study) if current is None else current
    stamp, files = stored.get(STAMP) or {}, artifacts_in(stored)

    def body(written: str) -> str:
        ours = study_note(history, current, study_id, files, written)
        return with_readers_part(ours, note_in(stored))

    wanted: dict[str, Any] = {}
    for name, figure in figures(history).items():
        wanted |= parts(f"{PLOT}{name}:", figure.to_json(), stored)
    noted = min(len(history.records), NOTED_STEPS)
    for record in history.records[stamp.get("noted", 0) : noted]:
        number = record.number
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        if f"{NOTE}{trial_id}:note_ver" not in stored:
            text = _record_note(history, record)
            wanted |= {f"{NOTE}{trial_id}:note_ver": 1, f"{NOTE}{trial_id}:note_str:0": text}
    changed = {key: value for key, value in wanted.items() if stored.get(key) != value}
    if not changed and body(stamp.get("written", "")) == note_in(stored):
        return {}
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    changed |= parts(f"{NOTE}note_str:", body(written), stored)
    changed[f"{NOTE}note_ver"] = int(stored.get(f"{NOTE}note_ver", 0)) + 1
    changed[STAMP] = {
        "written": written,
        "at": time.time(),
        "by": worker_identity.worker_id(),
        "noted": noted,
    }
    return changed


def _record_note(history: History, record: StepRecord) -> str:
    won = record.winner
    closes = {
        **{attributes.KIND: "incumbent", attributes.STEP: record.step},
        **{attributes.WINNER: won.number, attributes.COST: won.cost},
        attributes.TRAINING: record.training,
    }
    return trial_note(closes, history.info, score=won.score, took=change_of(won))


def figures(history: History) -> dict[str, go.Figure]:
    """Return the figures of the dashboard by their fixed ids, made for its cards."""
    found: dict[str, go.Figure] = {}
    if history.records:
        few = thinned(history)
        found = {name: figure_of(name, few) for name in ("steps", "bits")}
    if history.sensitivity:
        found["sensitivity"] = figure_of("sensitivity", history)
    trained = tuple(record for record in history.records if record.training is not None)
    if trained:
        few = thinned(dataclasses.replace(history, records=trained))
        found["training"] = figure_of("training", few)
    return {name: as_card(figure) for name, figure in found.items()}


def thinned(history: History) -> History:
    """Return the history with at most `FIGURE_STEPS` of its steps, evenly, the last among them."""
    records = history.records
    every = math.ceil(len(records) / FIGURE_STEPS)
    if every <= 1:
        return history
    return dataclasses.replace(history, records=records[(len(records) - 1) % every :: every])


def as_card(figure: go.Figure) -> go.Figure:
    """Fit a figure into the dashboard's cards; labels of rows become fewer where they must."""
    margin = figure.layout.margin
    plot_px = CARD_PX - (margin.t or 0) - (margin.b or 0)
    # The dashboard brings its own template; plotly's is 7 kB in every figure.
    figure.update_layout(height=CARD_PX, template=None, title_font_size=13)
    for axis in figure.select_yaxes():
        if axis.type == "category" and axis.tickvals:
            every = math.ceil(12 * len(axis.categoryarray or ()) / max(1, plot_px))
            shown = max(1, every * len(axis.tickvals) // max(1, len(axis.categoryarray)))
            axis.tickvals, axis.ticktext = axis.tickvals[::shown], axis.ticktext[::shown]
    return figure


def parts(prefix: str, text: str, stored: Mapping[str, Any]) -> dict[str, str]:
    """Return a text as attributes ``prefix0``, ``prefix1``, … that the dashboard joins again.

    Parts of an earlier, longer text are emptied.

    Example:
        >>> longer = {"dashboard:note_str:0": "a longer", "dashboard:note_str:1": " one"}
        >>> parts("dashboard:note_str:", "short", longer)
        {'dashboard:note_str:0': 'short', 'dashboard:note_str:1': ''}
    """
    cut = _cut(text)
    cut += [""] * (len(_parts_in(prefix, stored)) - len(cut))
    return {f"{prefix}{i}": part for i, part in enumerate(cut)}


def _parts_in(prefix: str, stored: Mapping[str, Any]) -> list[str]:
    places = itertools.takewhile(
        stored.__contains__, map(f"{prefix}{{}}".format, itertools.count())
    )
    return [stored[place] for place in places]


def _cut(text: str) -> list[str]:
    if len(json.dumps(text)) <= LONGEST_PART:
        return [text]
    half = len(text) // 2
    return _cut(text[:half]) + _cut(text[half:])


def note_in(stored: Mapping[str, Any]) -> str:
    """Return the note of a study from its system attributes."""
    return "".join(_parts_in(f"{NOTE}note_str:", stored))


def artifacts_in(stored: Mapping[str, Any]) -> dict[str, Reference]:
    """Return the artifacts of a study by name, from its system attributes."""
    prefix = f"{attributes.ARTIFACT}:"
    return {
        key.removeprefix(prefix): Reference.from_json(value)
        for key, value in stored.items()
        if key.startswith(prefix)
    }


def unwrapped(storage: BaseStorage) -> BaseStorage:
    """Return the storage without trying again: pages that are late are worth no wait."""
    return storage.wrapped if isinstance(storage, RetryingStorage) else storage
