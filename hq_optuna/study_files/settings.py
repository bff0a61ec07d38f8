"""SETTINGS of a study file: `hq_optuna.SearchSettings` by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hq_optuna.errors import SettingError, StudyFileError
from hq_optuna.settings import SearchSettings, settings_of


def check_settings(settings: Any, path: Path) -> None:
    """Refuse SETTINGS with unknown keys, or values of another kind than the key has.

    Args:
        settings: As written in the study file.
        path: The study file, for messages.

    Raises:
        StudyFileError: Names the file, the key and what it takes.
    """
    if not isinstance(settings, Mapping):
        raise StudyFileError(f"{path}: SETTINGS must be a dict; got {type(settings).__name__}.")
    known = settings_of(SearchSettings)
    for key, value in settings.items():
        if key not in known:
            raise StudyFileError(
                f"{path}: SETTINGS has the unknown key {key!r}. It may set: {', '.join(known)}."
            )
        try:
            SearchSettings(**{key: value})
        except SettingError as error:
            said = str(error).removeprefix(key).lstrip()
            colon = "" if said.startswith("is ") else ":"
            raise StudyFileError(f"{path}: SETTINGS[{key!r}]{colon} {said}") from None
