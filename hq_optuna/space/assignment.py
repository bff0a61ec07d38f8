"""An assignment: the bits of every layer, weights and activations."""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hq_optuna.space.layers import FLOAT_BITS


class LayerBits(NamedTuple):
    """Bits of one layer; `FLOAT_BITS` (32) means not quantized."""

    weight_bits: int
    activation_bits: int

    def __str__(self) -> str:
        w, a = ("float" if b == FLOAT_BITS else str(b) for b in self)
        return f"W{w}A{a}"

    @classmethod
    def parse(cls, text: Any) -> LayerBits:
        """Read a pair as it is printed.

        Raises:
            ValueError: The text is no pair.

        Example:
            >>> LayerBits.parse("W4A8"), str(LayerBits.parse("W8Afloat"))
            (LayerBits(weight_bits=4, activation_bits=8), 'W8Afloat')
        """
        match = _PAIR.fullmatch(str(text).strip())
        if match is None:
            raise ValueError(f"{text!r} is no pair of bits, such as W4A8.")
        w, a = (FLOAT_BITS if bits.lower() == "float" else int(bits) for bits in match.groups())
        return cls(w, a)

    @property
    def code(self) -> int:
        """A number that stands for the pair in the state of a search: ``W4A8`` is 408."""
        return 100 * self.weight_bits + self.activation_bits

    @classmethod
    def of_code(cls, code: int) -> LayerBits:
        """Return the pair that a `code` stands for."""
        return cls(*divmod(code, 100))


_PAIR = re.compile(r"W(\d+|float)A(\d+|float)", re.I)


class BitConfig(Mapping[str, LayerBits]):
    """Immutable mapping from layer name to `LayerBits`, in the order of the network.

    Two assignments are equal when they give every layer the same bits, whatever the order.
    ``pairs``, where known, are the same bits as `LayerBits` of plain integers: kept, not copied.

    Example:
        >>> config = BitConfig({"conv": (8, 8), "fc": (4, 8)})
        >>> config["fc"].weight_bits
        4
        >>> config.replace("fc", weight_bits=3)["fc"]
        LayerBits(weight_bits=3, activation_bits=8)
    """

    __slots__ = ("_bits", "_digest")

    def __init__(
        self, bits: Mapping[str, tuple[int, int]], *, pairs: dict[str, LayerBits] | None = None
    ) -> None:
        # Searches make thousands of assignments, of pairs that they know.
        self._digest: str | None = None
        if pairs is not None:
            self._bits = pairs
            return
        # Plain integers, also where NumPy's are given, so that JSON can hold them.
        self._bits = {name: LayerBits(*map(operator.index, pair)) for name, pair in bits.items()}

    def __getitem__(self, name: str) -> LayerBits:
        return self._bits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"BitConfig({{{', '.join(f'{n!r}: {tuple(b)}' for n, b in self.items())}}})"

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name this assignment, the same on every machine."""
        if self._digest is None:
            text = json.dumps(sorted((n, *b) for n, b in self.items()), separators=(",", ":"))
            self._digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self._digest

    def replace(
        self, name: str, *, weight_bits: int | None = None, activation_bits: int | None = None
    ) -> BitConfig:
        """Return a copy in which one layer has other bits."""
        old = self[name]
        new = LayerBits(
            old.weight_bits if weight_bits is None else weight_bits,
            old.activation_bits if activation_bits is None else activation_bits,
        )
        return BitConfig({**self._bits, name: new})

    def to_json(self) -> dict[str, list[int]]:
        """Return ``{name: [weight_bits, activation_bits]}``."""
        return {name: list(bits) for name, bits in self.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, list[int]]) -> BitConfig:
        """Rebuild an assignment from `to_json`'s data."""
        return cls({name: (pair[0], pair[1]) for name, pair in data.items()})

    @classmethod
    def uniform(
        cls,
        names: Iterator[str] | list[str] | tuple[str, ...],
        weight_bits: int,
        activation_bits: int,
    ) -> BitConfig:
        """Give every named layer the same bits."""
        return cls(dict.fromkeys(names, (weight_bits, activation_bits)))
