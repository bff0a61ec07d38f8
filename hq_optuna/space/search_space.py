"""The search space: which bits each layer may have, and what moves together.

A *variable* is one thing the search can lower: the bits of one layer (weights and activations
together), of its weights alone, of its activations alone, or of several tied layers. Its *notches*
are its allowed bits, widest first. A state of the search is one number of bits per variable.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from hq_optuna.errors import SpaceError
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.layers import FLOAT_BITS, MAX_BITS, MIN_BITS, LayerSpec, is_whole

Part = Literal["both", "weights", "activations"]
ActivationBits = Literal["same"] | int | Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Variable:
    """One thing the search can lower: a ``part`` of one layer's bits, or of several that are tied.

    ``name`` is that of the Optuna parameter; ``bits`` are the allowed ones, widest first.
    """

    name: str
    layers: tuple[str, ...]
    part: Part
    bits: tuple[int, ...]

    def applied(self, to: LayerBits, bits: int) -> LayerBits:
        """Return a layer's bits after this variable takes ``bits``."""
        return LayerBits(
            to.weight_bits if self.part == "activations" else bits,
            to.activation_bits if self.part == "weights" else bits,
        )


@dataclass(frozen=True)
class SearchSpace:
    """Layers, variables, and the bits of what is fixed.

    Build it with `SearchSpace.build`. `start` holds every layer at its widest bits; layers that no
    variable touches keep them.
    """

    layers: tuple[LayerSpec, ...]
    variables: tuple[Variable, ...]
    start: BitConfig

    @classmethod
    def build(
        cls,
        layers: Sequence[LayerSpec],
        *,
        bits: Iterable[int] = range(2, 9),
        activation_bits: ActivationBits = "same",
        pin_first_last: int | None = 8,
        pins: Mapping[str, int | tuple[int, int]] | None = None,
        allowed: Mapping[str, Iterable[int]] | None = None,
        tied: Iterable[Sequence[str]] = (),
    ) -> SearchSpace:
        """Describe which bits each layer may have.

        Args:
            layers: Quantizable layers in the order the network calls them.
            bits: Bits a searched layer may have, each 1 to 16.
            activation_bits: ``"same"``: a layer's input has the bits of its weights. An integer:
                fixed for all layers. A sequence: searched apart from the weights. ``None``:
                activations stay in float.
            pin_first_last: Bits of the first and the last layer called, weights and activations;
                ``None`` searches them too.
            pins: Glob over layer names to fixed bits, one number or ``(weights, activations)``.
            allowed: Glob over layer names to the bits allowed there instead of ``bits``; the last
                matching glob counts.
            tied: Groups of layer names that share their bits.

        Raises:
            SpaceError: Bits outside 1 to 16, a glob or name without a match, tied layers with
                different choices, or nothing left to search.
        """
        if not layers:
            raise SpaceError(
                "There are no layers to search. Give a network with quantizable layers."
            )
        names = [layer.name for layer in layers]
        choices = dict.fromkeys(names, _notches(bits, "bits"))
        activations = _Activations.of(activation_bits)
        fixed: dict[str, LayerBits] = {}
        if pin_first_last is not None:
            pin = _pin(pin_first_last, "pin_first_last", activations)
            fixed |= {names[0]: pin, names[-1]: pin}
        for glob, pair in _globs(pins, "pins").items():
            for name in match_layers(glob, names, "pins"):
                fixed[name] = _pin(pair, f"pins[{glob!r}]", activations)
        for glob, values in _globs(allowed, "allowed").items():
            for name in match_layers(glob, names, "allowed"):
                choices[name] = _notches(values, f"allowed[{glob!r}]")
        start = {name: activations.widest(choices[name]) for name in names} | fixed
        variables = [
            variable
            for group in _groups(names, tied, fixed)
            for variable in _variables(group, choices, activations)
        ]
        if not variables:
            raise SpaceError(
                f"Nothing is left to search: each of the {len(names)} layers is pinned or has one "
                "allowed number of bits. Remove a pin (pin_first_last=None) or allow more bits."
            )
        return cls(tuple(layers), tuple(variables), BitConfig(start))

    @property
    def top(self) -> tuple[int, ...]:
        """The widest bits of each variable: the state a search starts from."""
        return tuple(variable.bits[0] for variable in self.variables)

    @property
    def bottom(self) -> tuple[int, ...]:
        """The narrowest bits of each variable."""
        return tuple(variable.bits[-1] for variable in self.variables)

    @property
    def levels(self) -> tuple[int, ...]:
        """All bits that a layer may have, pinned ones too, fewest first."""
        found = {bits for variable in self.variables for bits in variable.bits}
        return tuple(sorted(found | {bits for pair in self.start.values() for bits in pair}))

    def config(self, state: Sequence[int]) -> BitConfig:
        """Return the bits of all layers when the variables have the bits ``state``."""
        bits = dict(self.start.items())
        for variable, value in zip(self.variables, state, strict=True):
            for name in variable.layers:
                bits[name] = variable.applied(bits[name], value)
        return BitConfig(bits)

    def parameters(self, state: Sequence[int]) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Return ``{parameter: (bits, choices)}`` for all layers, fixed ones included.

        These are the Optuna parameters of a trial that shows a whole assignment: the variables
        first, then one parameter with a single choice for every part no variable sets.
        """
        shown = {v.name: (b, v.bits) for v, b in zip(self.variables, state, strict=True)}
        covered = {(name, v.part) for v in self.variables for name in v.layers}
        for name, bits in self.start.items():
            if (name, "both") in covered:
                continue
            pairs = zip(("weights", "activations"), bits, strict=True)
            parts = {part: b for part, b in pairs if (name, part) not in covered}
            if len(parts) == 2 and bits.weight_bits == bits.activation_bits:
                shown[name] = (bits.weight_bits, (bits.weight_bits,))
                continue
            for part, b in parts.items():
                if len(parts) == 2 or b != FLOAT_BITS:
                    shown[f"{name}:{part}"] = (b, (b,))
        return shown

    def to_json(self) -> dict[str, Any]:
        """Return the space as JSON data, the inverse of `from_json`."""
        return {
            "layers": [layer.to_json() for layer in self.layers],
            "variables": [
                {"name": v.name, "layers": list(v.layers), "part": v.part, "bits": list(v.bits)}
                for v in self.variables
            ],
            "start": self.start.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Rebuild a space from `to_json`'s data."""
        variables = tuple(
            Variable(v["name"], tuple(v["layers"]), v["part"], tuple(v["bits"]))
            for v in data["variables"]
        )
        layers = tuple(LayerSpec.from_json(layer) for layer in data["layers"])
        return cls(layers, variables, BitConfig.from_json(data["start"]))

    @functools.cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name this space."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _notches(values: Iterable[int], where: str) -> tuple[int, ...]:
    """Return the values widest first, checked."""
    try:
        values = list(values)
    except TypeError:
        raise SpaceError(f"{where} is a sequence such as (8, 4); got {values!r}.") from None
    if not values:
        raise SpaceError(f"{where} is empty. Give at least one number of bits, for example (8, 4).")
    for value in values:
        if not is_whole(value) or not MIN_BITS <= value <= MAX_BITS:
            raise SpaceError(
                f"{where} holds {value!r}; bits are whole numbers from {MIN_BITS} to {MAX_BITS}."
            )
    return tuple(sorted({int(value) for value in values}, reverse=True))


@dataclass(frozen=True)
class _Activations:
    """How the bits of activations are chosen.

    They are those of the weights (``same``), or have choices of their own (``notches``), or are
    fixed.
    """

    same: bool = False
    notches: tuple[int, ...] | None = None
    fixed: int = FLOAT_BITS

    @classmethod
    def of(cls, activation_bits: Any) -> _Activations:
        """Read the argument of `SearchSpace.build`."""
        if isinstance(activation_bits, str):
            if activation_bits != "same":
                raise SpaceError(
                    f"activation_bits is 'same', a number, a sequence or None; "
                    f"got {activation_bits!r}."
                )
            return cls(same=True)
        if activation_bits is None or (is_whole(activation_bits) and activation_bits == FLOAT_BITS):
            return cls()
        if is_whole(activation_bits):
            return cls(fixed=_notches([activation_bits], "activation_bits")[0])
        return cls(notches=_notches(activation_bits, "activation_bits"))

    @property
    def in_float(self) -> bool:
        """Whether they are not quantized."""
        return not self.same and self.notches is None and self.fixed == FLOAT_BITS

    def widest(self, weights: tuple[int, ...]) -> LayerBits:
        """Return the widest bits of a layer whose weights have these choices."""
        top = weights[0]
        if self.same:
            return LayerBits(top, top)
        return LayerBits(top, self.fixed if self.notches is None else self.notches[0])


def _variables(
    group: tuple[str, ...], choices: Mapping[str, tuple[int, ...]], activations: _Activations
) -> list[Variable]:
    """Return what can be searched in a group of tied layers; a single choice is no variable."""
    notches = choices[group[0]]
    for name in group:
        if choices[name] != notches:
            raise SpaceError(
                f"Tied layers must allow the same bits: {group[0]!r} allows {notches}, "
                f"{name!r} allows {choices[name]}."
            )
    name = "=".join(group)
    if activations.same:
        found = [Variable(name, group, "both", notches)]
    elif activations.notches is None:
        found = [Variable(name, group, "weights", notches)]
    else:
        found = [
            Variable(f"{name}:weights", group, "weights", notches),
            Variable(f"{name}:activations", group, "activations", activations.notches),
        ]
    return [variable for variable in found if len(variable.bits) > 1]


def _globs(value: Any, where: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise SpaceError(
            f"{where} is a mapping from layer names or globs to bits; got {value!r}. "
            "Write for example {'head.*': 8}."
        )
    return value or {}


def _pin(value: Any, where: str, activations: _Activations) -> LayerBits:
    pair = (value, value) if is_whole(value) else value
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise SpaceError(f"{where} is one number or (weight bits, activation bits); got {value!r}.")
    weights, inputs = (b if b == FLOAT_BITS else _notches([b], where)[0] for b in pair)
    # Where activations stay in float, one number pins the weights alone.
    return LayerBits(weights, FLOAT_BITS if is_whole(value) and activations.in_float else inputs)


def match_layers(glob: str, names: Sequence[str], where: str) -> list[str]:
    """Return the names that a glob matches, as in `fnmatch`, case-sensitive.

    Raises `SpaceError`, which names the setting ``where`` the glob stands, for one without a match.
    """
    if not isinstance(glob, str):
        raise SpaceError(f"{where}: names of layers are text; got {glob!r}. Write {str(glob)!r}.")
    found = [name for name in names if fnmatchcase(name, glob)]
    if not found:
        raise SpaceError(f"{where}: {glob!r} matches no layer. The layers are: {_listed(names)}.")
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _groups(
    names: Sequence[str], tied: Iterable[Sequence[str]], fixed: Mapping[str, LayerBits]
) -> list[tuple[str, ...]]:
    """Return the groups of free layers in network order; a lone layer is a group of one."""
    group_of: dict[str, tuple[str, ...]] = {}
    for group in tied:
        if isinstance(group, str):
            raise SpaceError(f"tied holds groups of layers, [('a', 'b'), …]; got {group!r} as one.")
        for name in group:
            if name not in names:
                raise SpaceError(
                    f"tied: {name!r} is no layer (groups hold names, not globs). "
                    f"The layers are: {_listed(names)}."
                )
            if name in fixed:
                raise SpaceError(f"tied: {name!r} is pinned to {fixed[name]}; untie or unpin it.")
            if name in group_of:
                raise SpaceError(f"tied: {name!r} stands in two groups. Join them into one.")
            group_of[name] = ()
        ordered = tuple(sorted(group, key=names.index))
        group_of |= dict.fromkeys(ordered, ordered)
    groups = dict.fromkeys(group_of.get(name, (name,)) for name in names if name not in fixed)
    return list(groups)


def bits_needed(space: SearchSpace) -> dict[str, tuple[set[int], set[int]]]:
    """Return the weight bits and activation bits each layer may have in the space."""
    needed = {
        name: ({bits.weight_bits}, {bits.activation_bits}) for name, bits in space.start.items()
    }
    for variable in space.variables:
        for name in variable.layers:
            if variable.part != "activations":
                needed[name][0].update(variable.bits)
            if variable.part != "weights":
                needed[name][1].update(variable.bits)
    for weights, activations in needed.values():
        weights.discard(FLOAT_BITS)
        activations.discard(FLOAT_BITS)
    return needed
