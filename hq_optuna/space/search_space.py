"""The search space: which bits each layer may have, and what moves together.

A *variable* is one thing the search can lower: the bits of one layer (weights and activations
together), of its weights alone, of its activations alone, or of several tied layers. Its *notches*
are its allowed bits, widest first; where hardware has only some pairs of weight and activation
bits, they are these pairs. A state of the search is one number of bits per variable, or the code of
a pair.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from hq_optuna.errors import SpaceError
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.cost import METRICS, CostModel, Metric
from hq_optuna.space.latency import LatencyTable
from hq_optuna.space.layers import FLOAT_BITS, MAX_BITS, MIN_BITS, LayerSpec, is_whole
from hq_optuna.space.memory import MemoryMap

Part = Literal["both", "weights", "activations", "factors", "pair"]
ActivationBits = Literal["same"] | int | Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Variable:
    """One thing the search can lower: a ``part`` of one layer's bits, or of several that are tied.

    ``name`` is that of the Optuna parameter; ``bits`` are the allowed ones, widest first. Those of
    the part ``"pair"`` are `LayerBits.code` numbers; ``"factors"`` are both factors of a product of
    activations, whose bits are chosen as those of activations are.
    """

    name: str
    layers: tuple[str, ...]
    part: Part
    bits: tuple[int, ...]

    def applied(self, to: LayerBits, bits: int) -> LayerBits:
        """Return a layer's bits after this variable takes ``bits``."""
        if self.part == "pair":
            return LayerBits.of_code(bits)
        return LayerBits(
            to.weight_bits if self.part == "activations" else bits,
            to.activation_bits if self.part == "weights" else bits,
        )

    def shown(self, bits: int) -> int | str:
        """Return what people see of a notch: a number of bits, or a pair such as ``"W4A8"``."""
        return str(LayerBits.of_code(bits)) if self.part == "pair" else bits

    def read(self, shown: Any) -> int | None:
        """Return the notch that is shown so, ``None`` where there is no such."""
        return next((bits for bits in self.bits if self.shown(bits) == shown), None)

    def below(self, bits: int) -> tuple[int, ...]:
        """Return the notches that one move leads to: the next, and pairs lower in both parts.

        Of pairs, those that no other such pair is between.
        """
        place = self.bits.index(bits)
        after = self.bits[place + 1 :]
        if self.part != "pair":
            return after[:1]
        now = LayerBits.of_code(bits)
        lower = [b for b in after if _lower(LayerBits.of_code(b), now)]
        covers = [
            b
            for b in lower
            if not any(_lower(LayerBits.of_code(b), LayerBits.of_code(c)) for c in lower if c != b)
        ]
        return tuple(dict.fromkeys((*after[:1], *covers)))

    def error(self, bits: int) -> float:
        """Return how the squared rounding error goes with a notch: 4⁻ᵇ, of pairs both parts'."""
        parts = LayerBits.of_code(bits) if self.part == "pair" else (bits,)
        return sum(4.0**-b for b in parts)


@dataclass(frozen=True)
class SearchSpace:
    """Layers, variables, and the bits of what is fixed.

    Build it with `SearchSpace.build`. `start` holds every layer at its widest bits; layers that no
    variable touches keep them. `memory` and `latency` tell what assignments cost in these, where
    that is known.
    """

    layers: tuple[LayerSpec, ...]
    variables: tuple[Variable, ...]
    start: BitConfig
    memory: MemoryMap | None = None
    latency: LatencyTable | None = None

    def __post_init__(self) -> None:
        if self.latency is not None:
            self.latency.check(self.layers, self.pairs)

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
        tie_inputs: bool = True,
        memory: MemoryMap | None = None,
        latency: LatencyTable | None = None,
    ) -> SearchSpace:
        """Describe which bits each layer may have.

        Args:
            layers: Quantizable layers in the order the network calls them.
            bits: Bits a searched layer may have, each 1 to 16.
            activation_bits: ``"same"``: a layer's input has the bits of its weights. An integer:
                fixed for all layers. A sequence: searched apart from the weights. ``None``:
                activations stay in float.
            pin_first_last: Bits of the first and the last layer called, weights and activations,
                unless ``pins`` or ``allowed`` names them; ``None`` searches them too.
            pins: Layer name or glob to fixed bits, one number or ``(weights, activations)``.
            allowed: Layer name or glob to the bits allowed there instead of ``bits``. Here and in
                ``pins``, what names a layer goes before globs, and then the last glob counts.
            tied: Groups of layer names that share their bits.
            tie_inputs: Whether layers that read the same tensor (`LayerSpec.input_of`) share its
                bits: one variable of their activations, or one of all where those are ``"same"``.
                Layers that are pinned, tied or allowed other bits than the group's stay apart.
            memory: What is in memory when, from `introspect`.
            latency: How long each layer takes at each of its bits.

        Raises:
            SpaceError: Bits outside 1 to 16, a glob or name without a match, tied layers with
                different choices, pinned bits that are not allowed, nothing left to search, or a
                table of latencies with holes.
        """
        if not layers:
            raise SpaceError(
                "There are no layers to search. Give a network with quantizable layers."
            )
        names = [layer.name for layer in layers]
        activations = _Activations.of(activation_bits)
        pinned = by_layer(pins, layers, "pins", functools.partial(_pin, activations=activations))
        limited = by_layer(allowed, layers, "allowed", notches)
        choices = dict.fromkeys(names, notches(bits, "bits"))
        products = {layer.name for layer in layers if layer.is_product}
        choices |= activations.of_products(products)
        choices |= {name: said.value for name, said in limited.items()}
        named = {name for name, said in limited.items() if said.exact}
        fixed = {name: said.value for name, said in pinned.items()}
        for name in named & set(fixed):
            if fixed[name].weight_bits not in choices[name]:
                raise SpaceError(
                    f"allowed[{limited[name].key!r}] allows {choices[name]}, and "
                    f"pins[{pinned[name].key!r}] fixes that layer at {fixed[name]}. Remove one."
                )
        if pin_first_last is not None:
            pin = _pin(pin_first_last, "pin_first_last", activations)
            ends = [name for name in (names[0], names[-1]) if name not in named]
            fixed = dict.fromkeys(ends, pin) | fixed
        start = {name: activations.widest(choices[name]) for name in names}
        start |= {name: LayerBits(choices[name][0], choices[name][0]) for name in products}
        fixed |= {n: of_product(pair) for n, pair in fixed.items() if n in products}
        start |= fixed
        groups = groups_of(layers, tied, fixed)
        joined = same_input(layers, groups, choices) if tie_inputs else {}
        if activations.same:
            groups = list(dict.fromkeys(joined.get(group[0], group) for group in groups))
            joined = {}
        variables = [
            variable
            for group in groups
            for variable in (
                _of_products(group, choices, activations)
                if products & set(group)
                else _variables(group, choices, activations, joined.get(group[0], group))
            )
        ]
        if not variables:
            raise SpaceError(
                f"Nothing is left to search: each of the {len(names)} layers is pinned or has one "
                "allowed number of bits. Remove a pin (pin_first_last=None) or allow more bits."
            )
        check_parameters([v.name for v in variables], names)
        return cls(tuple(layers), tuple(variables), BitConfig(start), memory, latency)

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
        found = {bits for pair in self.start.values() for bits in pair}
        for v in self.variables:
            for bits in v.bits:
                found |= set(LayerBits.of_code(bits)) if v.part == "pair" else {bits}
        return tuple(sorted(found))

    def costs(self, metric: Metric) -> CostModel:
        """Return what assignments of this space cost in a metric.

        Raises:
            SpaceError: What the metric needs is not known of this network.
        """
        return CostModel(self.layers, metric, memory=self.memory, latency=self.latency)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics in which it is known what assignments of this space cost."""
        unknown = set[str]()
        if self.memory is None or not self.memory.moments:
            unknown.add("activation_bytes")
        if self.latency is None:
            unknown.add("latency_s")
        return tuple(metric for metric in METRICS if metric not in unknown)

    @property
    def pairs(self) -> dict[str, set[LayerBits]]:
        """The (weight, activation) bits that each layer may have."""
        found = {name: {bits} for name, bits in self.start.items()}
        for variable in self.variables:
            for name in variable.layers:
                found[name] |= {variable.applied(p, b) for p in found[name] for b in variable.bits}
        return found

    def config(self, state: Sequence[int]) -> BitConfig:
        """Return the bits of all layers when the variables have the bits ``state``."""
        if len(state) != len(self.variables):
            raise ValueError(f"A state has bits of {len(self.variables)} variables; got {state!r}.")
        bits = dict(self.start.items())
        for name, places, known in self._settings:
            values = places(state)
            if values not in known:
                known[values] = self._set(name, state)
            bits[name] = known[values]
        return BitConfig(bits, pairs=bits)

    def _set(self, name: str, state: Sequence[int]) -> LayerBits:
        """Return one layer's bits when the variables have the bits ``state``."""
        bits = self.start[name]
        for place in self._variables_of[name]:
            bits = self.variables[place].applied(bits, operator.index(state[place]))
        return bits

    @functools.cached_property
    def _variables_of(self) -> dict[str, list[int]]:
        """The places of the variables that set each layer."""
        found: dict[str, list[int]] = {}
        for place, variable in enumerate(self.variables):
            for name in variable.layers:
                found.setdefault(name, []).append(place)
        return found

    @functools.cached_property
    def _settings(self) -> list[tuple[str, Callable[[Any], Any], dict[Any, LayerBits]]]:
        """Of each layer that is set: its name, what takes its values of a state, what they make."""
        return [(name, operator.itemgetter(*at), {}) for name, at in self._variables_of.items()]

    def parameters(
        self, state: Sequence[int]
    ) -> dict[str, tuple[int | str, tuple[int | str, ...]]]:
        """Return ``{parameter: (bits, choices)}`` for all layers, fixed ones included.

        These are the Optuna parameters of a trial that shows a whole assignment: the variables
        first, then one parameter with a single choice for every part no variable sets.
        """
        shown: dict[str, tuple[int | str, tuple[int | str, ...]]] = {
            v.name: (v.shown(b), tuple(map(v.shown, v.bits)))
            for v, b in zip(self.variables, state, strict=True)
        }
        covered = {(name, v.part) for v in self.variables for name in v.layers}
        for name, bits in self.start.items():
            if {(name, "both"), (name, "factors"), (name, "pair")} & covered:
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
            "memory": None if self.memory is None else self.memory.to_json(),
            "latency": None if self.latency is None else self.latency.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Rebuild a space from `to_json`'s data."""
        variables = tuple(
            Variable(v["name"], tuple(v["layers"]), v["part"], tuple(v["bits"]))
            for v in data["variables"]
        )
        layers = tuple(LayerSpec.from_json(layer) for layer in data["layers"])
        memory, latency = data["memory"], data["latency"]
        return cls(
            layers,
            variables,
            BitConfig.from_json(data["start"]),
            None if memory is None else MemoryMap.from_json(memory),
            None if latency is None else LatencyTable.from_json(latency),
        )

    @functools.cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name this space."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _lower(one: LayerBits, other: LayerBits) -> bool:
    """Return whether a pair is another one with fewer bits in a part, and more in none."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def notches(values: Iterable[int], where: str) -> tuple[int, ...]:
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
            return cls(fixed=notches([activation_bits], "activation_bits")[0])
        return cls(notches=notches(activation_bits, "activation_bits"))

    @property
    def in_float(self) -> bool:
        """Whether they are not quantized."""
        return not self.same and self.notches is None and self.fixed == FLOAT_BITS

    def of_products(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the bits that both factors of products of activations may have.

        Raises:
            SpaceError: Activations stay in float, so that products would too.
        """
        found = dict.fromkeys(names, self.notches or (self.fixed,))
        if found and self.in_float:
            raise SpaceError(
                "Products of activations are searched, and activation_bits leaves activations in "
                "float. Give activation_bits, or search without products."
            )
        return {} if self.same else found

    def widest(self, weights: tuple[int, ...]) -> LayerBits:
        """Return the widest bits of a layer whose weights have these choices."""
        top = weights[0]
        if self.same:
            return LayerBits(top, top)
        return LayerBits(top, self.fixed if self.notches is None else self.notches[0])


def _of_products(
    group: tuple[str, ...], choices: Mapping[str, tuple[int, ...]], activations: _Activations
) -> list[Variable]:
    """Return what can be searched in products of activations: the bits of both factors."""
    found = _variables(group, choices, _Activations(same=True), group)
    return found if activations.same else [replace(one, part="factors") for one in found]


def _variables(
    group: tuple[str, ...],
    choices: Mapping[str, tuple[int, ...]],
    activations: _Activations,
    readers: tuple[str, ...],
) -> list[Variable]:
    """Return what can be searched in a group of tied layers; a single choice is no variable.

    ``readers`` share the bits of their input; these are searched with the first of them.
    """
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
        found = [Variable(f"{name}:weights", group, "weights", notches)]
        if readers[0] == group[0]:
            shown = f"{'='.join(readers)}:activations"
            found.append(Variable(shown, readers, "activations", activations.notches))
    return [variable for variable in found if len(variable.bits) > 1]


def check_parameters(variables: Sequence[str], layers: Sequence[str]) -> None:
    """Refuse names of layers that are those of Optuna's parameters of others."""
    parts = {f"{name}:{part}" for name in layers for part in ("weights", "activations")}
    tied = {name for name in variables if variables.count(name) > 1}
    for name in layers:
        if name in parts | tied:
            raise SpaceError(
                f"The layer {name!r} has the name of a parameter of other layers (`a=b` of tied "
                "ones, `a:weights` of a part). Call it otherwise in the network."
            )


def allowed_activations(activation_bits: Any) -> tuple[int, ...] | None:
    """Return the bits that a setting allows inputs, ``None`` where it says ``"same"``."""
    read = _Activations.of(activation_bits)
    return None if read.same else read.notches or (read.fixed,)


def read_pin(value: Any, where: str) -> LayerBits:
    """Return the pair that a pin fixes: one number for both parts, or two."""
    return _pin(value, where, _Activations(same=True))


def of_product(pair: LayerBits) -> LayerBits:
    """Return the bits of a product of activations: both factors have those of activations."""
    return LayerBits(pair.activation_bits, pair.activation_bits)


def _pin(value: Any, where: str, activations: _Activations) -> LayerBits:
    pair = (value, value) if is_whole(value) else value
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise SpaceError(f"{where} is one number or (weight bits, activation bits); got {value!r}.")
    weights, inputs = (b if b == FLOAT_BITS else notches([b], where)[0] for b in pair)
    # Where activations stay in float, one number pins the weights alone.
    return LayerBits(weights, FLOAT_BITS if is_whole(value) and activations.in_float else inputs)


class Said(NamedTuple):
    """What a setting says of a layer: a value, under which key, and if that is the layer's name."""

    value: Any
    key: str
    exact: bool


def by_layer(
    setting: Any,
    layers: Sequence[LayerSpec],
    where: str,
    read: Callable[[Any, str], Any] = lambda value, where: value,
) -> dict[str, Said]:
    """Return what a setting by layer names and globs says of each layer that it is about.

    A key that is a layer's name, or another name of the same module, is for that layer alone,
    whatever characters it holds, and goes before globs; of globs, as in `fnmatch` and
    case-sensitive, the last that matches counts. Brackets in a glob are brackets where layers have
    them in their names, and choices of characters otherwise.

    Args:
        setting: The mapping; ``None`` is an empty one.
        layers: All layers.
        where: Name of the setting, for messages.
        read: Called with a value and where it stands; returns the value to keep.

    Raises:
        SpaceError: No mapping, a key without a match, or two names of one layer with two values.

    Example:
        >>> layers = [LayerSpec(n, "Linear", (1, 1), 0, 1, 1, 1) for n in ("a[0].x", "a0.x", "b")]
        >>> found = by_layer({"b": 8, "a[0].*": 6, "a[01].*": 5, "*": 4}, layers, "pins")
        >>> {name: said.value for name, said in found.items()}
        {'a[0].x': 4, 'a0.x': 4, 'b': 8}
    """
    if setting is not None and not isinstance(setting, Mapping):
        raise SpaceError(
            f"{where} is a mapping from layer names or globs to bits; got {setting!r}. "
            "Write for example {'head.*': 8}."
        )
    names, globs = dict[str, Said](), dict[str, Said]()
    for key, value in (setting or {}).items():
        found, exact = _matching(key, layers, where)
        said = Said(read(value, f"{where}[{key!r}]"), key, exact)
        for name in found:
            if exact and names.setdefault(name, said).value != said.value:
                raise SpaceError(
                    f"{where}: {names[name].key!r} and {key!r} are one module under two names, "
                    "with two values. Remove one."
                )
            globs |= {} if exact else {name: said}
    return globs | names


def _matching(key: Any, layers: Sequence[LayerSpec], where: str) -> tuple[list[str], bool]:
    """Return the layers that a key of a setting is about, and whether it is a name of one."""
    if not isinstance(key, str):
        raise SpaceError(f"{where}: names of layers are text; got {key!r}. Write {str(key)!r}.")
    if key in (known := _names(layers)):
        return [known[key]], True
    for glob in (key.replace("[", "[[]"), key):
        if found := [known[name] for name in known if fnmatchcase(name, glob)]:
            return list(dict.fromkeys(found)), False
    inside = any(name.startswith(f"{key}.") for name in known)
    raise SpaceError(
        f"{where}: {key!r} matches no layer. "
        + (f"For all layers in it write {f'{key}.*'!r}. " if inside else "")
        + f"The layers are: {_listed(layers)}."
    )


def _names(layers: Sequence[LayerSpec]) -> dict[str, str]:
    """Return all names of layers, each with the one that the space knows the layer by."""
    aliases = {alias: layer.name for layer in layers for alias in layer.aliases}
    return aliases | {layer.name: layer.name for layer in layers}


def _listed(layers: Sequence[LayerSpec]) -> str:
    return ", ".join(layer.name for layer in layers[:8]) + (", …" if len(layers) > 8 else "")


def groups_of(
    layers: Sequence[LayerSpec], tied: Iterable[Sequence[str]], fixed: Mapping[str, LayerBits]
) -> list[tuple[str, ...]]:
    """Return the groups of free layers in network order; a lone layer is a group of one."""
    names, known = [layer.name for layer in layers], _names(layers)
    group_of: dict[str, tuple[str, ...]] = {}
    for group in tied:
        if isinstance(group, str):
            raise SpaceError(f"tied holds groups of layers, [('a', 'b'), …]; got {group!r} as one.")
        for name in group:
            if name not in known:
                raise SpaceError(
                    f"tied: {name!r} is no layer (groups hold names, not globs). "
                    f"The layers are: {_listed(layers)}."
                )
        group = [known[name] for name in group]
        for name in group:
            if name in fixed:
                raise SpaceError(f"tied: {name!r} is pinned to {fixed[name]}; untie or unpin it.")
            if name in group_of:
                raise SpaceError(f"tied: {name!r} stands in two groups. Join them into one.")
            group_of[name] = ()
        ordered = tuple(sorted(group, key=names.index))
        group_of |= dict.fromkeys(ordered, ordered)
    groups = dict.fromkeys(group_of.get(name, (name,)) for name in names if name not in fixed)
    return list(groups)


def same_input(
    layers: Sequence[LayerSpec],
    groups: Sequence[tuple[str, ...]],
    choices: Mapping[str, tuple[Any, ...]],
) -> dict[str, tuple[str, ...]]:
    """Return for each free layer that shares its input, and nothing else, all that read it."""
    alone = {group[0] for group in groups if len(group) == 1}
    readers: dict[tuple[str, tuple[Any, ...]], list[str]] = {}
    for layer in layers:
        if layer.name in alone:
            key = layer.input_of or layer.name, choices[layer.name]
            readers.setdefault(key, []).append(layer.name)
    return {name: tuple(found) for found in readers.values() for name in found if len(found) > 1}


def bits_needed(space: SearchSpace) -> dict[str, tuple[set[int], set[int]]]:
    """Return the weight bits and activation bits each layer may have in the space.

    A product of activations has no weights.
    """
    needed = {
        name: ({bits.weight_bits}, {bits.activation_bits}) for name, bits in space.start.items()
    }
    for variable in space.variables:
        for name in variable.layers:
            for bits in variable.bits:
                pair = variable.applied(space.start[name], bits)
                needed[name][0].add(pair.weight_bits)
                needed[name][1].add(pair.activation_bits)
    for layer in space.layers:
        weights, activations = needed[layer.name]
        weights.discard(FLOAT_BITS)
        activations.discard(FLOAT_BITS)
        if layer.is_product:
            weights.clear()
    return needed
