"""A target's description in YAML, read and checked.

A description is data: which pairs of weight and activation bits each kind of layer has, how inputs
are rounded, and which layers are pinned or tied. What it asks for and the quantizers cannot do is
refused by name; nothing in it is ignored. `docs/guides/hardware.md` explains every key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hq_optuna.errors import HardwareError
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import FLOAT_BITS, MAX_BITS, MIN_BITS, LayerSpec, is_whole

ANY = "any"
"""The description that restricts nothing."""

_KEYS = {"name", "summary", "source", "layers", "weights", "activations", "containers", "ties"}
_KEYS |= {"pins"}
_WEIGHTS = {"symmetric": (True,), "per_channel": (True,), "power_of_two": (False,)}
"""What weights may be asked to be: what `hq_optuna.quantization` does."""


@dataclass(frozen=True)
class Hardware:
    """What one target executes.

    Attributes:
        name: Its name.
        summary: What it is, in a sentence.
        source: Where its limits come from.
        layers: Kind of layer (``"Conv2d"``, ``"Linear"``, a glob, ``":depthwise"`` behind it) to
            allowed pairs; the last kind that matches counts. Empty: anything is allowed.
        symmetric_bits: Widths at which an input's zero is the middle of its grid.
        unsigned: Whether inputs without negative values have an unsigned grid there.
        power_of_two: Whether scales of inputs are powers of two.
        ties: Groups of layer names that share their bits.
        pins: Layer names or globs, ``first`` and ``last`` to fixed pairs.
    """

    name: str
    summary: str = ""
    source: str = ""
    layers: Mapping[str, tuple[LayerBits, ...]] = field(default_factory=dict)
    symmetric_bits: tuple[int, ...] = ()
    unsigned: bool = False
    power_of_two: bool = False
    ties: tuple[tuple[str, ...], ...] = ()
    pins: Mapping[str, LayerBits] = field(default_factory=dict)

    @property
    def restricts(self) -> bool:
        """Whether the pairs of bits are limited."""
        return bool(self.layers)

    def pairs(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        """Return the pairs that a layer may have.

        Raises:
            HardwareError: The description says nothing of layers of this kind.
        """
        found: tuple[LayerBits, ...] = ()
        names = [layer.kind]
        if layer.kind.startswith("Conv") and layer.weight_shape[1] == 1:
            names.append(f"{layer.kind}:depthwise")  # one input channel a group
        for kind, pairs in self.layers.items():
            if any(fnmatchcase(name, kind) for name in names):
                found = pairs
        if not found:
            raise HardwareError(
                f"Hardware {self.name!r} says nothing of {layer.kind} layers, and {layer.name!r} "
                f"is one; it knows {', '.join(self.layers)}. Add the kind to its layers, or '*'."
            )
        return found

    def pin_of(self, layers: Sequence[LayerSpec]) -> dict[str, LayerBits]:
        """Return the fixed pairs by the names of the layers."""
        found: dict[str, LayerBits] = {}
        for key, pair in self.pins.items():
            ends = {"first": layers[:1], "last": layers[-1:]}
            named = ends.get(key, [one for one in layers if fnmatchcase(one.name, key)])
            if not named:
                raise HardwareError(f"Hardware {self.name!r} pins {key!r}, which is no layer here.")
            found |= {one.name: pair for one in named}
        return found

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name what is described, whatever it is called."""
        said = {
            "layers": {kind: [list(p) for p in pairs] for kind, pairs in self.layers.items()},
            "inputs": [list(self.symmetric_bits), self.unsigned, self.power_of_two],
            "ties": [list(group) for group in self.ties],
            "pins": {key: list(pair) for key, pair in self.pins.items()},
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def presets() -> list[str]:
    """Return the names of the descriptions that come with the package."""
    files = resources.files("hq_optuna.hardware").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def read_hardware(given: str | Path) -> Hardware:
    """Return a description by the name of a ready-made one, or from a file of the user's.

    Raises:
        HardwareError: There is no such description or file, or what it says cannot be read, is
            contradictory, or is something that the quantizers cannot do.

    Example:
        >>> read_hardware("cmsis-nn").layers["Linear"]
        (LayerBits(weight_bits=8, activation_bits=16), LayerBits(weight_bits=8, \
activation_bits=8), LayerBits(weight_bits=4, activation_bits=8))
    """
    name, path = str(given), Path(given)
    if name in presets():
        text = resources.files("hq_optuna.hardware").joinpath(f"{name}.yaml").read_text("utf-8")
        return parse_hardware(text, name)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise HardwareError(
            f"There is no hardware {name!r}. Give the path of a YAML file, or one of "
            f"{', '.join(presets())}."
        )
    try:
        return parse_hardware(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise HardwareError(f"Hardware file {path} cannot be read: {error}.") from None


def parse_hardware(text: str, where: str) -> Hardware:
    """Return the description that a text in YAML gives; ``where`` it stands goes into errors."""
    try:
        _check_doubles(yaml.compose(text, Loader=yaml.SafeLoader), where)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise HardwareError(f"Hardware {where} is no YAML: {error}") from None
    return _Reader(where).read(data)


def _check_doubles(node: Any, where: str) -> None:
    """Refuse keys that stand twice, of which YAML would take the last without a word."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for key, value in node.value:
            if keys.count(key.value) > 1:
                raise HardwareError(f"Hardware {where}: key {key.value!r} stands there twice.")
            _check_doubles(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_doubles(value, where)


class _Reader:
    """Reads one description; says in errors where it stands."""

    def __init__(self, where: str) -> None:
        self.where = where

    def refuse(self, said: str) -> HardwareError:
        return HardwareError(f"Hardware {self.where}: {said}")

    def read(self, data: Any) -> Hardware:
        """Return the description that parsed YAML gives."""
        data = self.mapping(data, "it", _KEYS)
        for key in ("name", "source"):
            if not isinstance(data.get(key), str) or not data[key].strip():
                raise self.refuse(f"{key} is missing: a line of text, so that readers know {key}.")
        kinds = self.mapping(data.get("layers"), "layers")
        if not kinds and data["name"] != ANY:
            raise self.refuse("layers is missing: it says which pairs each kind of layer has.")
        layers = {str(kind): self.pairs(said, f"layers.{kind}") for kind, said in kinds.items()}
        self.check_weights(data.get("weights"))
        self.check_containers(data.get("containers"), layers)
        pins = self.mapping(data.get("pins"), "pins")
        return Hardware(
            name=data["name"],
            summary=str(data.get("summary", "")),
            source=data["source"],
            layers=layers,
            ties=self.ties(data.get("ties")),
            pins={str(key): self.pair(said, f"pins.{key}") for key, said in pins.items()},
            **self.activations(data.get("activations"), layers),
        )

    def mapping(self, data: Any, what: str, known: set[str] | None = None) -> dict[str, Any]:
        if data is None:
            return {}
        if not isinstance(data, dict):
            raise self.refuse(f"{what} is a mapping of keys to values; got {data!r:.60}.")
        for key in data:
            if known is not None and key not in known:
                raise self.refuse(
                    f"{what} has no key {key!r}; known are {', '.join(sorted(known))}."
                )
        return data

    def pairs(self, said: Any, what: str) -> tuple[LayerBits, ...]:
        """Return the pairs of one kind of layer, as listed or as all of weights × activations."""
        if isinstance(said, list):
            found = [self.pair(one, what) for one in said]
        else:
            told = self.mapping(said, what, {"weights", "activations"})
            if set(told) != {"weights", "activations"}:
                raise self.refuse(
                    f"{what} is a list of pairs, [W8A8, W4A8], or weights and activations with a "
                    "list of bits each."
                )
            widths = {part: self.widths(bits, f"{what}.{part}") for part, bits in told.items()}
            found = [LayerBits(w, a) for w in widths["weights"] for a in widths["activations"]]
        if not found:
            raise self.refuse(f"{what} allows no pair. Leave the kind out, or list some.")
        return tuple(dict.fromkeys(found))

    def pair(self, said: Any, what: str) -> LayerBits:
        try:
            pair = LayerBits.parse(said)
        except ValueError:
            raise self.refuse(
                f"{what} has {said!r}; a pair is written W4A8, and Wfloat or Afloat where numbers "
                "stay in float."
            ) from None
        for bits in pair:
            self.width(bits, what)
        return pair

    def widths(self, said: Any, what: str) -> list[int]:
        if not isinstance(said, list) or not said:
            raise self.refuse(f"{what} is a list of bits, [8, 4]; got {said!r:.60}.")
        return [self.width(FLOAT_BITS if bits == "float" else bits, what) for bits in said]

    def width(self, bits: Any, what: str) -> int:
        if not is_whole(bits) or not (MIN_BITS <= bits <= MAX_BITS or bits == FLOAT_BITS):
            raise self.refuse(
                f"{what} has {bits!r} bits; they are whole numbers from {MIN_BITS} to {MAX_BITS}, "
                "or float."
            )
        return int(bits)

    def check_weights(self, said: Any) -> None:
        for key, value in self.mapping(said, "weights", set(_WEIGHTS)).items():
            if value not in _WEIGHTS[key] or not isinstance(value, bool):
                raise self.refuse(
                    f"weights.{key} is {value!r}, which the quantizers of weights cannot do: they "
                    "have symmetric grids with a scale per channel that may be any number. Only "
                    f"{key}: {str(_WEIGHTS[key][0]).lower()} can be kept."
                )

    def activations(self, said: Any, layers: Mapping[str, tuple[LayerBits, ...]]) -> dict[str, Any]:
        """Return how inputs are rounded."""
        known = {"symmetric", "unsigned", "power_of_two", "per_channel", "dynamic"}
        told = self.mapping(said, "activations", known)
        for key in ("per_channel", "dynamic"):
            if told.get(key, False) is not False:
                raise self.refuse(
                    f"activations.{key} is {told[key]!r}, which cannot be done: an input has one "
                    "range, found on the calibration data. Leave the pairs out that need it."
                )
        for key in ("unsigned", "power_of_two"):
            if not isinstance(told.get(key, False), bool):
                raise self.refuse(f"activations.{key} is true or false; got {told[key]!r}.")
        symmetric = told.get("symmetric", False)
        widths = {pair.activation_bits for pairs in layers.values() for pair in pairs}
        if isinstance(symmetric, bool):
            symmetric = sorted(widths - {FLOAT_BITS}) if symmetric else []
        at = self.widths(symmetric, "activations.symmetric") if symmetric else []
        if told.get("unsigned", False) and not at:
            raise self.refuse(
                "activations.unsigned says which grid symmetric inputs have that are never "
                "negative, and no width is symmetric. Set activations.symmetric, or leave it out."
            )
        for bits in at:
            if bits not in widths:
                raise self.refuse(f"activations.symmetric has {bits} bits, which no pair has.")
            if bits == 1:
                raise self.refuse("activations.symmetric has 1 bit, which has no middle code.")
        return {
            "symmetric_bits": tuple(at),
            "unsigned": told.get("unsigned", False),
            "power_of_two": told.get("power_of_two", False),
        }

    def check_containers(self, said: Any, layers: Mapping[str, tuple[LayerBits, ...]]) -> None:
        """Refuse pairs whose numbers have no container of their width."""
        if said is None:
            return
        widths = self.widths(said, "containers")
        for kind, pairs in layers.items():
            for pair in pairs:
                for bits in pair:
                    if bits not in (*widths, FLOAT_BITS):
                        raise self.refuse(
                            f"layers.{kind} allows {pair}, and containers has no {bits} bits "
                            f"({', '.join(map(str, widths))}). Narrower numbers would take as much "
                            "room as the next container: leave the pair out, or add the container."
                        )

    def ties(self, said: Any) -> tuple[tuple[str, ...], ...]:
        if said is None:
            return ()
        fits = isinstance(said, list) and all(
            isinstance(group, list) and len(group) > 1 and all(isinstance(n, str) for n in group)
            for group in said
        )
        if not fits:
            raise self.refuse(
                f"ties are groups of layer names, [[a, b], [c, d]]; got {said!r:.60}. Inputs of "
                "additions and concatenations cannot be tied by rule: sums are computed in float "
                "here, and only what enters a layer is rounded."
            )
        return tuple(tuple(group) for group in said)
