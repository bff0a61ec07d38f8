"""Descriptions of hardware: what they say, and which are refused, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hq_optuna.errors import HardwareError, HqOptunaError, SpaceError
from hq_optuna.hardware import presets, read_hardware, space_on
from hq_optuna.hardware.description import parse_hardware
from hq_optuna.settings import SearchSettings
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import LayerSpec

WHOLE = "name: mine\nsource: my data sheet\nlayers:\n  '*': [W8A8, W4A8]\n"


def layer(name: str, kind: str = "Conv2d", shape: tuple[int, ...] = (8, 4, 3, 3)) -> LayerSpec:
    return LayerSpec(name, kind, shape, 0, 8 * 4 * 9 * 16, 1, 64)


LAYERS = [
    layer("stem"),
    layer("depthwise", shape=(8, 1, 3, 3)),
    layer("middle"),
    layer("up", "ConvTranspose2d"),
    layer("fc", "Linear", (8, 16)),
    layer("head", "Linear", (10, 8)),
]


def test_the_ready_made_descriptions_are_whole_and_name_their_sources() -> None:
    names = ["any", "cmsis-nn", "finn", "imx500", "litert", "onnxruntime-cpu", "qnn-htp"]
    assert presets() == [*names, "tensorrt", "xnnpack"]
    for name in presets():
        found = read_hardware(name)
        assert found.name == name
        assert found.summary
        assert found.restricts == (name != "any")
        if found.restricts:
            assert "https://" in found.source
            space = space_on(found, LAYERS, SearchSettings(pin_first_last=None))
            for one in LAYERS:
                assert space.start[one.name] in found.pairs(one)


def test_every_state_of_a_space_is_made_of_pairs_that_the_hardware_has() -> None:
    for name in presets():
        target = read_hardware(name)
        if not target.restricts:
            continue
        space = space_on(target, LAYERS, SearchSettings(pin_first_last=8))
        for variable in space.variables:
            for bits in variable.bits:
                for one in variable.layers:
                    for state in (space.top, space.bottom):
                        changed = variable.applied(space.config(state)[one], bits)
                        assert changed in target.pairs(next(x for x in LAYERS if x.name == one))


def test_sets_of_pairs_become_the_variables_that_fit_them() -> None:
    settings = SearchSettings(pin_first_last=None)
    cmsis = space_on(read_hardware("cmsis-nn"), LAYERS, settings)
    parts = {v.name: (v.part, [v.shown(b) for b in v.bits]) for v in cmsis.variables}
    assert parts["middle"] == ("pair", ["W8A16", "W8A8", "W4A8"])
    assert "up" not in parts  # a single pair is no choice
    litert = {v.name: v.bits for v in space_on(read_hardware("litert"), LAYERS, settings).variables}
    assert litert["middle:weights"] == (8, 4)
    assert litert["middle:activations"] == litert["depthwise:activations"] == (16, 8)
    imx = space_on(read_hardware("imx500"), LAYERS, settings)
    assert {v.part for v in imx.variables} == {"weights"}
    assert set(imx.start.values()) == {(8, 8)}


def test_a_move_leads_to_the_next_lower_pair_and_never_past_one() -> None:
    target = parse_hardware(WHOLE.replace("W8A8, W4A8", "W8A8, W8A4, W4A8, W2A4, W4A2"), "mine")
    variable = space_on(target, LAYERS, SearchSettings(pin_first_last=None)).variables[0]
    below = {
        variable.shown(b): {variable.shown(lower) for lower in variable.below(b)}
        for b in variable.bits
    }
    assert below["W8A8"] == {"W8A4", "W4A8"}
    assert below["W8A4"] == {"W4A8", "W2A4", "W4A2"}  # the next in the list is no lower pair
    assert below["W4A8"] == {"W4A2", "W2A4"}
    assert variable.error(LayerBits(4, 8).code) == 4.0**-4 + 4.0**-8


def test_settings_narrow_the_hardware_down_and_refuse_what_leaves_nothing() -> None:
    target = read_hardware("qnn-htp")
    only = space_on(target, LAYERS, SearchSettings(activation_bits=8, pin_first_last=None))
    assert {v.part for v in only.variables} == {"weights"}
    assert {v.bits for v in only.variables} == {(8, 4)}
    some = space_on(target, LAYERS, SearchSettings(allowed={"middle": (4,)}, pin_first_last=None))
    assert [v.bits for v in some.variables if v.name == "middle:activations"] == [(16, 8)]
    with pytest.raises(SpaceError, match=r"has for 'stem', W16A16, .* leave nothing"):
        space_on(target, LAYERS, SearchSettings(bits=(6, 3)))
    with pytest.raises(SpaceError, match="'fc' is pinned at W6A6, which the hardware 'qnn-htp'"):
        space_on(target, LAYERS, SearchSettings(pins={"fc": 6}))


def test_pins_and_ties_of_the_hardware_hold() -> None:
    text = WHOLE + "ties: [[middle, fc]]\npins: {first: W8A8, head: W4A8}\n"
    space = space_on(parse_hardware(text, "mine"), LAYERS, SearchSettings(pin_first_last=None))
    assert space.start["stem"] == (8, 8)
    assert space.start["head"] == (4, 8)
    assert [v.layers for v in space.variables] == [("depthwise",), ("middle", "fc"), ("up",)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is no YAML"),
        ("[1, 2]", "it is a mapping of keys to values"),
        (WHOLE + "colour: blue", "no key 'colour'; known are activations, containers"),
        (WHOLE.replace("source: my data sheet\n", ""), "source is missing"),
        ("name: mine\nsource: s\n", "layers is missing"),
        (WHOLE + "name: twice", "key 'name' stands there twice"),
        (WHOLE.replace("W4A8", "4x8"), r"layers\.\* has '4x8'; a pair is written W4A8"),
        (WHOLE.replace("W4A8", "W4A99"), "has 99 bits; they are whole numbers from 1 to 16"),
        (WHOLE.replace("[W8A8, W4A8]", "[]"), "allows no pair"),
        (WHOLE.replace("[W8A8, W4A8]", "{weights: [8]}"), "weights and activations with a list"),
        (WHOLE + "weights: {symmetric: false}", "weights.symmetric is False, which .* cannot do"),
        (WHOLE + "weights: {power_of_two: true}", "Only power_of_two: false can be kept"),
        (WHOLE + "weights: {per_channel: false}", "Only per_channel: true can be kept"),
        (WHOLE + "activations: {dynamic: true}", "activations.dynamic is True, which cannot"),
        (WHOLE + "activations: {per_channel: true}", "activations.per_channel is True"),
        (WHOLE + "activations: {symmetric: [4]}", "symmetric has 4 bits, which no pair has"),
        (WHOLE + "activations: {unsigned: true}", "no width is symmetric"),
        (WHOLE + "containers: [8]", "allows W4A8, and containers has no 4 bits"),
        (WHOLE + "ties: [inputs of add]", "Inputs of additions and concatenations cannot be tied"),
        (WHOLE + "pins: {first: 8}", "pins.first has 8; a pair is written W4A8"),
    ],
)
def test_a_description_that_is_wrong_is_refused_by_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(HardwareError, match=words) as caught:
        parse_hardware(text, "mine.yaml")
    assert str(caught.value).startswith("Hardware mine.yaml")


def test_hardware_that_is_not_there_or_knows_no_such_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match=r"no hardware 'gpu9000'.*cmsis-nn, finn"):
        read_hardware("gpu9000")
    with pytest.raises(HardwareError, match="cannot be read"):
        read_hardware(tmp_path / "none.yaml")
    with pytest.raises(HardwareError, match="says nothing of Conv3d layers, and 'deep' is one"):
        space_on(read_hardware("cmsis-nn"), [layer("deep", "Conv3d")], SearchSettings())
    text = WHOLE + "pins: {'nowhere.*': W8A8}"
    with pytest.raises(HardwareError, match=r"pins 'nowhere\.\*', which is no layer here"):
        space_on(parse_hardware(text, "mine"), LAYERS, SearchSettings())
    assert issubclass(HardwareError, HqOptunaError)


def test_what_a_description_says_tells_searches_apart_and_its_name_does_not() -> None:
    plain = parse_hardware(WHOLE, "mine")
    assert plain.digest == parse_hardware(WHOLE.replace("mine", "yours"), "yours").digest
    assert plain.digest != parse_hardware(WHOLE + "activations: {symmetric: true}", "x").digest
    assert plain.digest != parse_hardware(WHOLE.replace("W4A8", "W3A8"), "x").digest
