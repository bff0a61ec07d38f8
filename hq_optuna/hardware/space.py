"""The search space of a network on some hardware, from the settings of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hq_optuna.hardware.description import Hardware
from hq_optuna.settings import SearchSettings, settings_of
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.pairs import space_of_pairs
from hq_optuna.space.search_space import SearchSpace


def space_on(
    hardware: Hardware, layers: Sequence[LayerSpec], settings: SearchSettings, **known: Any
) -> SearchSpace:
    """Return what may be searched on some hardware.

    Where hardware has only some pairs of bits, they are what is searched, and the settings ``bits``
    and ``activation_bits`` narrow them down where they are not at their defaults.

    Args:
        hardware: The target.
        layers: Quantizable layers in the order the network calls them.
        settings: What is searched.
        **known: What else `SearchSpace.build` is told of the network.

    Raises:
        HardwareError: The hardware knows no layers of a kind, or pins what is no layer.
        SpaceError: As for `SearchSpace.build`, or the settings leave nothing of the hardware's.
    """
    taken = ("activation_bits", "pin_first_last", "pins", "allowed", "tie_inputs")
    told = {name: getattr(settings, name) for name in taken} | known
    told["tied"] = (*settings.tied, *hardware.ties)
    fixed = hardware.pin_of(layers)
    if not hardware.restricts:
        pins = {name: tuple(pair) for name, pair in fixed.items()}
        told["pins"] = pins | dict(told["pins"])
        return SearchSpace.build(layers, bits=settings.bits, **told)
    default = settings_of(SearchSettings)["bits"].default
    return space_of_pairs(
        *(layers, {layer.name: hardware.pairs(layer) for layer in layers}),
        f"the hardware {hardware.name!r}",
        bits=None if settings.bits == default else settings.bits,
        fixed=fixed,
        **told,
    )
