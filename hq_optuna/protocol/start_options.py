"""What a search was started with, so that whoever joins it need not be told again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optuna.study import Study

from hq_optuna import attributes
from hq_optuna.storages import redact_url


@dataclass(frozen=True)
class StartOptions:
    """What was given on a command line, as typed.

    A worker, or a resumed run, takes these instead of the defaults, and what it is given itself
    instead of these. Whether the result is the same search is told by the fingerprint, so options
    that contradict are refused there, in words.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)  # {"budget": "0.3 bops", "seed": 3}
    options: Mapping[str, Any] = field(default_factory=dict)  # of the study file; absolute paths
    command: str = ""  # whole, for reports; passwords masked

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], options: Mapping[str, Any], command: str = ""
    ) -> StartOptions:
        """Return the record of what was given; options may hold paths."""
        written = {
            name: str(value.absolute()) if isinstance(value, Path) else value
            for name, value in options.items()
        }
        return cls(dict(settings), written, mask(command))

    @classmethod
    def read(cls, study: Study) -> StartOptions:
        """Return what the study was started with; nothing where it is not known or not binding."""
        stored = study.user_attrs
        data = stored.get(attributes.STARTED)
        if attributes.FINGERPRINT not in stored or not isinstance(data, dict):
            return cls()
        return cls(data.get("settings", {}), data.get("options", {}), data.get("command", ""))

    def remember(self, study: Study) -> None:
        """Write this into a study that is new, or that nobody has worked on."""
        if attributes.FINGERPRINT not in study.user_attrs:
            study.set_user_attr(attributes.STARTED, asdict(self))


def mask(command: str) -> str:
    """Return the command with passwords in URLs as ``***``.

    Example:
        >>> mask("hq-optuna run x --storage mysql://me:secret@db/hq")
        "hq-optuna run x --storage 'mysql://me:***@db/hq'"
    """
    try:
        words = shlex.split(command)
    except ValueError:  # nothing that a shell would take
        words = [command]
    return shlex.join(redact_url(word) if "://" in word else word for word in words)
