"""What a terminal shows: the strip of bits, colours and their absence, plain lines, JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console

from hq_optuna.cli import tables
from hq_optuna.cli.progress import END, END_S, STEPS_S, TO_BUDGET, Pace, SearchProgress
from hq_optuna.cli.status import line, panel
from hq_optuna.cli.tables import LABEL, LINES, strips
from hq_optuna.protocol.status import read_status
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.space.budget import Budget
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.visualization.palette import bit_colours
from tests.fake_search import fake_space, fake_study
from tests.samplers.tables import ours

Command = Callable[..., Result]
LEVELS = (2, 3, 4, 5, 6, 7, 8)
SGR = re.compile(r"\x1b\[[0-9;]*m")


def terminal(width: int = 80, **options: object) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, **options)  # type: ignore[arg-type]


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def long_names() -> SearchSpace:
    """Layers with names as those of torchvision's detectors."""
    layers = [
        dataclasses.replace(x, name=f"backbone.features.{i}.block.{i}.0.fully_connected.{x.name}")
        for i, x in enumerate(fake_space(6).layers)
    ]
    return SearchSpace.build(layers, bits=(8, 4, 2))


def same(*bits: int) -> list[tuple[int, int]]:
    return [(b, b) for b in bits]


# The strip


def test_a_strip_is_one_digit_a_layer_in_network_order() -> None:
    (found,) = strips(same(8, 3, 4, 8), LEVELS, 80)
    assert found.plain == f"{'bits':<{LABEL}}8348"


def test_weights_and_activations_are_told_apart_where_they_differ() -> None:
    both = strips([(8, 8), (3, 4)], LEVELS, 80)
    assert [text.plain.split() for text in both] == [["weights", "83"], ["activations", "84"]]
    (only,) = strips([(8, 32), (3, 32)], (*LEVELS, 32), 80)
    assert only.plain.split() == ["weights", "83"]


def test_more_than_nine_bits_are_letters_and_float_is_a_dot() -> None:
    weights, activations = strips([(16, 8), (10, 32)], (8, 10, 16, 32))
    assert weights.plain.split()[1] == "ga"
    assert activations.plain.split()[1] == "8·"


def test_digits_stand_on_the_colours_of_the_pictures() -> None:
    (found,) = strips(same(2, 8), LEVELS, 80)
    shown = [span.style.bgcolor.triplet for span in found.spans]  # type: ignore[union-attr]
    wanted = [tuple(bytes.fromhex(colour[1:])) for colour in bit_colours(LEVELS)]
    assert shown == [wanted[0], wanted[-1]]


def test_every_digit_is_readable_on_its_colour() -> None:
    def light(part: float) -> float:  # WCAG 2.1, relative luminance
        return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4

    def luminance(colour: tuple[int, ...]) -> float:
        r, g, b = (light(part / 255) for part in colour)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    (found,) = strips(same(*LEVELS), LEVELS, 80)
    for span in found.spans:
        ink, paper = (
            luminance(tuple(part.triplet))
            for part in (span.style.color, span.style.bgcolor)  # type: ignore[union-attr]
        )
        low, high = sorted((ink, paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("width", [20, 40, 80, 120])
@pytest.mark.parametrize("n", [1, 20, 150, 1000])
def test_a_strip_fits_the_terminal_and_keeps_both_ends(n: int, width: int) -> None:
    bits = [LEVELS[(3 * i) % 7] for i in range(n)]
    lines = [text.plain for text in strips(same(*bits), LEVELS, width)]
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= width
    digits = "".join(text[LABEL:] for text in lines)
    whole = "".join(map(str, bits))
    if "…" in digits:
        head, _, tail = digits.partition("…")
        assert whole.startswith(head)
        assert whole.endswith(tail)
        assert abs(len(head) - len(tail)) <= 1
    else:
        assert digits == whole


def test_where_no_width_is_known_the_strip_is_one_whole_line() -> None:
    (found,) = strips(same(*[8] * 1000), LEVELS)
    assert found.plain.count("8") == 1000


# Colours


@pytest.mark.parametrize("coloured", [True, False])
def test_no_color_is_respected(coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not coloured:
        monkeypatch.setenv("NO_COLOR", "1")
    study = fake_study(6)
    console = terminal(color_system="truecolor")
    tables.status(console, study, read_status(study))
    tables.result(console, study)
    console.print(panel(read_status(study), 80))
    codes = {code for sgr in SGR.findall(written(console)) for code in sgr[2:-1].split(";")}
    assert bool(codes & {"38", "48", "31", "32", "33"}) is coloured
    assert "bits        " in SGR.sub("", written(console))


def test_without_a_terminal_there_are_no_escapes_and_the_strip_is_whole() -> None:
    study = fake_study(fake_space(150, bits=(8, 4)), n_candidates=8, n_trials=60)
    console = Console(file=io.StringIO(), width=80)
    tables.status(console, study, read_status(study))
    text = written(console)
    assert "\x1b" not in text
    (strip,) = re.findall(r"^bits +(\d+)$", text, re.MULTILINE)
    assert len(strip) == 150


@pytest.mark.parametrize(("width", "lines"), [(200, 1), (80, 2)])
def test_a_long_name_takes_two_lines_and_no_figure_is_cut(width: int, lines: int) -> None:
    study = fake_study(long_names())
    console = terminal(width, color_system=None)
    tables.result(console, study)
    rows = written(console).split("cost  ")[1].splitlines()
    assert "…" not in written(console)
    first = next(i for i, row in enumerate(rows) if row.startswith("backbone"))
    assert " %" in rows[first]
    assert (" %" in rows[first + 1]) is (lines == 1)


def test_without_a_terminal_each_layer_is_a_line() -> None:
    console = Console(file=io.StringIO(), width=40)
    study = fake_study(long_names())
    tables.result(console, study)
    names = [layer.name for layer in long_names().layers]
    rows = [row for row in written(console).splitlines() if row.startswith("backbone")]
    assert [row.split()[0] for row in rows] == names
    assert console.width == 40


# The live display


def begun(n_trials: int) -> StepLog:
    study = fake_study(6, n_trials=n_trials)
    return ours(study).log(study)


def test_the_live_display_has_bar_line_and_strip() -> None:
    console = terminal(100, color_system=None)
    progress = SearchProgress(console, fake_space(6), Budget.fraction(bops=0.4))
    assert progress.live
    log = begun(7)
    progress.search(log)
    console.print(progress.show())
    lines = written(console).splitlines()
    assert lines[0].startswith("search")
    assert " %" in lines[0]
    assert lines[1].startswith(f"step {log.incumbent.step}  {len(log.results)} candidates  score ")
    bits = fake_space(6).config(log.incumbent.state).values()
    assert lines[2] == f"{'bits':<{LABEL}}{''.join(str(b.weight_bits) for b in bits)}"


def test_the_rate_is_of_what_was_scored_since_the_search_was_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("hq_optuna.cli.progress.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200)
    progress = SearchProgress(console, fake_space(6), Budget.fraction(bops=0.4))
    early, late = begun(7), begun(16)
    progress.search(early)
    now[0] += 30
    progress.search(late)
    scored = len(late.results) - len(early.results)
    assert scored > 4
    first, second = written(console).splitlines()
    assert "a minute" not in first
    assert f"  {2 * scored} a minute" in second
    assert re.search(r"\d+ s left$", second)


def test_the_time_left_is_of_all_that_follows_and_each_part_tells_its_own_pace() -> None:
    now = [0.0]
    pace = Pace(now=lambda: now[0])
    pace.preparing(0.0)
    assert pace.left_s is None
    now[0] = 25.0
    pace.preparing(0.25)  # 100 s in all
    assert pace.left_s == pytest.approx(75 + 100 * END + STEPS_S + END_S)
    assert pace.share == pytest.approx(25 / (25 + pace.left_s))
    now[0] = 100.0
    pace.preparing(1.0)
    pace.stepping(0.0)
    assert pace.left_s == pytest.approx(100 * END + STEPS_S + END_S)
    now[0] = 104.0
    pace.stepping(0.5)
    assert pace.left_s == pytest.approx(4 / (0.5 * TO_BUDGET) - 4 + 100 * END + END_S)
    pace.ending(0, 8)
    assert pace.left_s == pytest.approx(100 * END + END_S)
    now[0] = 110.0
    pace.ending(2, 8)
    assert pace.left_s == pytest.approx(18.0)
    pace.ending(8, 8)
    assert (pace.left_s, pace.share) == (0.0, 1.0)


def test_a_search_by_passes_tells_its_time_from_its_steps_alone() -> None:
    now = [0.0]
    pace = Pace(by_table=False, now=lambda: now[0])
    pace.preparing(0.0)
    now[0] = 10.0
    pace.preparing(0.5)
    assert (pace.left_s, pace.share) == (None, 0.0)
    pace.stepping(0.0)
    now[0] = 20.0
    pace.stepping(0.25)
    assert pace.left_s == pytest.approx(10 / (0.25 * TO_BUDGET) - 10)


def test_plain_lines_are_short_whatever_the_network() -> None:
    console = Console(file=io.StringIO(), width=80)
    study = fake_study(fake_space(150, bits=(8, 4)), n_candidates=8, n_trials=30)
    progress = SearchProgress(console, fake_space(150, bits=(8, 4)), Budget.fraction(bops=0.4))
    progress.search(ours(study).log(study))
    assert len(written(console).splitlines()) == 1
    assert len(written(console)) < 150


def test_the_panel_of_a_running_search_has_bar_line_and_strip() -> None:
    current = read_status(fake_study(6, n_trials=7))
    console = terminal(100, color_system=None)
    console.print(panel(current, 100))
    lines = [text.rstrip() for text in written(console).splitlines()]
    assert set(lines[0]) <= set("━╸╺ ")
    assert lines[1] == line(current)
    assert lines[2].startswith("bits ")
    assert len(current.bits) == 6


# JSON


def test_every_command_has_json_alone_on_standard_output(study: Path, command: Command) -> None:
    def objects(*arguments: object) -> list[dict[str, object]]:
        result = command(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return [json.loads(text) for text in result.stdout.splitlines()]

    (run,) = objects("run", study)
    (launched,) = objects("launch", study, "--workers", 1, "--name", "launched")
    assert launched["layers"] == run["layers"]
    (status,) = objects("status", study)
    watched = objects("status", study, "--watch")
    assert status["current"] == watched[-1]
    assert watched[-1]["state"] == "finished"
    bits = [(row["weight_bits"], row["activation_bits"]) for row in run["layers"]]  # type: ignore[attr-defined]
    assert [tuple(pair) for pair in watched[-1]["bits"]] == bits  # type: ignore[attr-defined]
