"""What a search depends on, so that a resumed search is the same search or is refused."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import optuna
import torch
from optuna.study import Study
from torch import nn

from hq_optuna import attributes
from hq_optuna._version import __version__
from hq_optuna.errors import ResumeError
from hq_optuna.network.containers import digest_of, unsaved_buffers
from hq_optuna.network.layer_types import plain_settings
from hq_optuna.quantization.quantizers.choice import describe_quantizers
from hq_optuna.settings import Group, SearchSettings, settings_of

QUANTIZERS = "weights: symmetric per channel, squared error; activations: affine per tensor"

_WORDS = {
    "network": "the network's weights or structure",
    "data": "the calibration data",
    "space": "the search space (layers, allowed bits, pins or ties)",
    "quantizers": "the quantizers",
    "loss": "the loss function",
    "rise": "the rise",
    "hardware": "the hardware, or what its file says",
    "training": "the training (its data or settings)",
}
"""What differs, in words, beside settings, which say it themselves."""


def of_settings(owner: Any, group: Group) -> dict[str, Any]:
    """Return the settings of a group that tell searches apart, by name.

    ``owner`` has them as attributes: settings, or a sampler.
    """
    found = {
        name: getattr(owner, name)
        for name, one in settings_of(SearchSettings).items()
        if one.group == group and one.differs and name != "budget"  # which may be the pruner's
    }
    if not found.get("train_every"):  # a search that never trains does not say so
        found.pop("train_every", None)
    return found


def quantizers(chosen: Mapping[str, str]) -> str:
    """Return what rounds weights and activations, given the layers whose weights are not uniform.

    Example:
        >>> quantizers({"conv2": "ternary"}).partition("; activations")[0]
        'weights: symmetric per channel, squared error; ternary for conv2'
    """
    if not chosen:
        return QUANTIZERS
    weights, activations = QUANTIZERS.split("; ")
    return f"{weights}; {describe_quantizers(chosen)}; {activations}"


def network_digest(network: nn.Module) -> str:
    """Return sixteen hexadecimal digits that name weights, buffers and the modules' settings."""
    held = {**network.state_dict(), **unsaved_buffers(network)}
    about = f"{network}{plain_settings(network)}"
    return digest_of(sorted(held.items()), about=about, digits=16)


def versions() -> dict[str, str]:
    """Return the versions a result was made with."""
    return {
        "hq_optuna": __version__,
        "optuna": optuna.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def check_or_write(study: Study, mine: Mapping[str, Any], *, is_mine: bool | None = None) -> bool:
    """Write the fingerprint into a new study, or refuse a study with another one.

    With ``is_mine`` the study's first trial belongs to this very search. Then another fingerprint
    there is that of a search which was started at the same moment, wrote last and was refused, and
    is written over. Returns whether that was so. Raises `ResumeError`, which names what changed.
    """
    stored = study.user_attrs.get(attributes.FINGERPRINT)
    changed: tuple[str, ...] = ()
    if stored is not None:
        # Searches without these do not name them.
        names = dict.fromkeys([*mine, "training", "rise"])
        changed = tuple(name for name in names if stored.get(name) != mine.get(name))
        if not changed:
            return False
    if stored is None or is_mine:
        study.set_user_attr(attributes.FINGERPRINT, {**mine, "versions": versions()})
        return bool(changed)
    said = settings_of(SearchSettings).items()
    words = {name: one.differs for name, one in said if one.differs} | _WORDS
    described = "; ".join(
        f"{words.get(name, name)} (study: {stored.get(name, 'none')}, "
        f"now: {mine.get(name, 'none')})"
        for name in changed
    )
    raise ResumeError(
        f"Study {study.study_name!r} is another search. Changed: {described}. "
        "Undo the change to go on with it, or give a new study name (--name).",
        changed=changed,
    )
