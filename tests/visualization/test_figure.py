"""Colours and axes that all pictures share."""

import re
import subprocess
import sys
from itertools import pairwise

import pytest
from plotly.colors import sample_colorscale, unlabel_rgb

from hq_optuna.space.cost import format_cost
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization import palette
from tests.fake_search import fake_space


def _luminance(colour):
    """Relative luminance of WCAG 2.1, from 0 (black) to 1 (white)."""
    if colour.startswith("#"):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    else:
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("bits", [(2, 8), (2, 4, 8), tuple(range(2, 9)), tuple(range(1, 17))])
def test_fewer_bits_have_a_visibly_brighter_colour(bits):
    light = [_luminance(colour) for colour in palette.bit_colours(bits)]
    assert all(fewer > more for fewer, more in pairwise(light))


def test_float_has_its_own_colour_and_does_not_shift_the_others():
    assert palette.bit_colours((2, 4, 8, 32)) == [
        *palette.bit_colours((2, 4, 8)),
        palette.FLOAT_COLOUR,
    ]


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_colours_are_those_of_plotlys_viridis(n):
    places = [1 - 0.9 * i / max(1, n - 1) for i in range(n)]
    expected = [unlabel_rgb(colour) for colour in sample_colorscale("Viridis", places)]
    for colour, parts in zip(palette.bit_colours(range(1, n + 1)), expected, strict=True):
        assert bytes.fromhex(colour[1:]) == pytest.approx(parts, abs=1)  # rounded otherwise at .5


def test_the_terminals_colours_need_no_plotly():
    code = (
        "import sys, hq_optuna.cli.tables, hq_optuna.report.data; "
        "print({'plotly', 'scipy.stats'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_one_number_of_bits_has_a_colour():
    assert len(palette.bit_colours((8,))) == 1


def test_the_grey_of_texts_has_the_contrast_of_wcag_on_white_and_reads_on_black():
    grey = _luminance(palette.GREY)
    assert 1.05 / (grey + 0.05) >= 4.5  # WCAG 2.1, 1.4.3 level AA
    assert (grey + 0.05) / 0.05 >= 4.5


@pytest.mark.parametrize(
    ("n_layers", "height"), [(2, 120), (20, 440), (30, 660), (50, 660), (150, 1650), (1000, 2000)]
)
def test_the_height_grows_with_the_layers_up_to_2000_pixels(n_layers, height):
    assert f.layers_height(n_layers) == height


@pytest.mark.parametrize("n", [1, 2, 20, 60, 150, 151, 400, 1000])
def test_labels_of_layers_never_stand_closer_than_11_pixels(n):
    axis = f.layers_axis([f"layer{i}" for i in range(n)])
    assert len(axis["tickvals"]) == len(axis["ticktext"])
    assert f.layers_height(n) / len(axis["tickvals"]) >= min(11, f.layers_height(n))
    if n <= 150:
        assert len(axis["tickvals"]) == n


def test_the_first_layer_stands_on_top():
    assert f.layers_axis(["a", "b", "c"])["range"] == [2.5, -0.5]


def test_long_names_lose_their_middle():
    name = "encoder." * 10 + "layers.11.attention.query"
    short = f.shorten(name)
    assert len(short) == 40
    assert short.startswith("encoder.")
    assert short.endswith(".attention.query")
    assert f.shorten("conv1") == "conv1"


@pytest.mark.parametrize("characters", [13, 20, 40])
@pytest.mark.parametrize(
    "names",
    [
        [f"net.body.encoder.{i // 6}.blocks.{i}.attention.self.query_{i % 3}" for i in range(150)],
        [f"net.{'x' * 50}.{i}.{'y' * 50}" for i in range(150)],
        [f"{'x' * 50}{i}{'y' * 50}" for i in range(150)],
        ["fc", *(f"net.{'x' * 50}.{i}" for i in range(150))],
        [f"layer{i}" for i in range(150)],
        ["a" * 100],
    ],
)
def test_short_names_tell_layers_apart(names, characters):
    short = f.short_names(names, characters)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= characters


def test_names_that_fit_stay_whole():
    assert f.short_names(["net.a", "net.b"]) == ["net.a", "net.b"]


@pytest.mark.parametrize("dark", [False, True])
def test_texts_of_both_pages_have_the_contrast_of_wcag(dark):
    page, text = (_luminance(colour) for colour in palette.PAGES[dark])
    assert (page < text) == dark
    light, dim = max(page, text), min(page, text)
    assert (light + 0.05) / (dim + 0.05) >= 7  # WCAG 2.1, 1.4.6 level AAA


@pytest.mark.parametrize("colour", [palette.BLUE, palette.GREEN, palette.VERMILION, palette.GREY])
@pytest.mark.parametrize("dark", [False, True])
def test_lines_have_the_contrast_of_wcag_on_both_pages(colour, dark):
    page, line = _luminance(palette.PAGES[dark][0]), _luminance(colour)
    assert (max(page, line) + 0.05) / (min(page, line) + 0.05) >= 3  # WCAG 2.1, 1.4.11


@pytest.mark.parametrize("metric", ["bops", "size_bytes"])
@pytest.mark.parametrize("cost", [3.0, 5e3, 7.5e6, 2.5e9, 4e13])
def test_the_unit_of_an_axis_is_the_one_costs_are_written_in(cost, metric):
    factor, unit = f.cost_unit(cost, metric)
    assert f"{cost / factor:.4g} {unit}" == format_cost(cost, metric)


def test_the_levels_are_all_bits_that_any_layer_may_have():
    space = fake_space(5, bits=(6, 3), pin_first_last=8, activation_bits=None)
    assert space.levels == (3, 6, 8, 32)


def test_a_log_axis_holds_all_positive_values_and_ignores_the_rest():
    low, high = f.log_range([0.0, 1e-3, 10.0])
    assert low < -3 < 1 < high
    assert f.log_range([0.0, -1.0]) is None


def test_steps_are_whole_numbers_however_few():
    assert f.step_axis([0, 1])["dtick"] == 1
    assert "dtick" not in f.step_axis(range(500))


def test_a_log_axis_over_little_has_ticks_between_its_powers_of_ten():
    assert f.log_axis([1e-5, 1e-2])["dtick"] == 1
    assert f.log_axis([2e-3, 6e-3])["dtick"] == "D2"
    assert f.log_axis([2e-3, 6e-3])["range"] == f.log_range([2e-3, 6e-3])
    assert f.log_axis([])["range"] is None
