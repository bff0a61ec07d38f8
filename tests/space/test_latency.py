"""Latency tables: read strictly, summed plainly."""

from pathlib import Path

import pytest

from hq_optuna.errors import BudgetError, SpaceError
from hq_optuna.space import (
    BitConfig,
    Budget,
    CostModel,
    LatencyTable,
    LayerBits,
    LayerSpec,
    SearchSpace,
    read_latency,
)
from hq_optuna.space.budget import parse_budget
from hq_optuna.space.cost import format_cost
from hq_optuna.space.latency import LatencyRow, write_latency

LAYERS = [
    LayerSpec(name, "Linear", (10, 10), 0, macs=10**6, n_calls=1, n_inputs=10) for name in "abc"
]
CSV = """layer,weight_bits,activation_bits,ms
a,8,8,2
b,8,8,4
b,4,4,1.5
c,8,8,1
(rest),,,0.5
"""


def table(tmp_path: Path, text: str = CSV, name: str = "t.csv") -> LatencyTable:
    (tmp_path / name).write_text(text)
    return read_latency(tmp_path / name)


def test_the_latency_is_the_sum_of_the_rows_and_the_rest(tmp_path: Path) -> None:
    found = table(tmp_path)
    model = CostModel(LAYERS, "latency_s", latency=found)
    config = BitConfig({"a": (8, 8), "b": (4, 4), "c": (8, 8)})
    assert model.cost(config) == pytest.approx(0.005, rel=1e-12)
    assert model.int8 == pytest.approx(0.0075, rel=1e-12)
    assert model.float32 is None
    assert model.known_cost(dict.fromkeys("abc", LayerBits(3, 3))) is None
    assert model.rows[0].fixed == 0.0005
    assert model.per_layer(config).tolist() == [0.002, 0.0015, 0.001]
    with pytest.raises(SpaceError, match="no W2A2 of 'a'"):
        model.layer_cost("a", LayerBits(2, 2))


@pytest.mark.parametrize("name", ["t.csv", "t.json"])
def test_a_table_comes_back_from_a_file(tmp_path: Path, name: str) -> None:
    written = LatencyTable(
        (LatencyRow("a", 8, 8, 0.25), LatencyRow("a", 32, 32, 1 / 3)), 0.125, "here"
    )
    write_latency(written, tmp_path / name)
    found = read_latency(tmp_path / name)
    assert (found.rows, found.rest_s) == (written.rows, written.rest_s)


def test_json_names_pairs(tmp_path: Path) -> None:
    found = table(tmp_path, '{"unit": "us", "layers": {"a": {"W8A8": 3, "WfloatA8": 5}}}', "t.json")
    assert found.seconds("a", LayerBits(32, 8)) == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layer,weight_bits,activation_bits,seconds\n", "unit 'seconds'; it is one of s, ms, us"),
        ("layer,bits,ms\n", "has the columns"),
        ("", "has the columns"),
        ("layer,weight_bits,activation_bits,ms\n", "no rows"),
        (CSV + "a,8,8,3\n", "line 7: W8A8 of 'a' is given twice"),
        (CSV + "a,4,4,-3\n", "'-3' is no time above 0"),
        (CSV + "a,4,4,0\n", "'0' is no time above 0"),
        (CSV + "a,4,4,\n", "'' is no time. A pair that cannot run is left out"),
        (CSV + "a,4,4,nan\n", "'nan' is no time"),
        (CSV + "a,4,x,1\n", "'x' is no number of bits"),
        (CSV + "a,0,4,1\n", "'0' is no number of bits"),
        (CSV + "a,4,4\n", "has 3 cells in place of 4"),
        (CSV + "(rest),,,1\n", "has \\(rest\\) 2 times"),
        (CSV.replace("0.5", "-0.5"), "'-0.5' is no time above 0"),
    ],
)
def test_a_csv_file_that_is_wrong_is_refused_with_its_place(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(SpaceError, match=said):
        table(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object with"),
        ('{"layers": {}}', "no JSON object with"),
        ('{"unit": "ms", "layers": {}, "speed": 1}', "no JSON object with"),
        ('{"unit": "m", "layers": {}}', "unit 'm'"),
        ('{"unit": "s", "layers": {"a": 1}}', "object of objects"),
        ('{"unit": "s", "layers": {"a": {"w8a8": 1}}}', "'w8a8' is no pair of bits"),
        ('{"unit": "s", "layers": {"a": {"W8A8": true}}}', "layer 'a': True is no time"),
    ],
)
def test_a_json_file_that_is_wrong_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpaceError, match=said):
        table(tmp_path, text, "t.json")


def test_other_endings_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"a \.csv or \.json file"):
        table(tmp_path, CSV, "t.txt")
    with pytest.raises(SpaceError, match="cannot be read"):
        read_latency(tmp_path / "none.csv")


def build(found: LatencyTable, **options: object) -> SearchSpace:
    return SearchSpace.build(LAYERS, bits=(8, 4), latency=found, **options)  # type: ignore[arg-type]


def test_a_space_takes_a_table_that_has_all_of_its_pairs(tmp_path: Path) -> None:
    space = build(table(tmp_path))
    assert space.metrics == ("bops", "size_bytes", "latency_s")
    assert SearchSpace.from_json(space.to_json()).costs("latency_s").int8 == 0.0075
    with pytest.raises(SpaceError, match="holes: a W4A4, c W4A4"):
        build(table(tmp_path), pin_first_last=None)
    with pytest.raises(SpaceError, match="has 'd', which the network has not"):
        build(table(tmp_path, CSV + "d,8,8,1\n"))
    with pytest.raises(SpaceError, match="--latency FILE"):
        SearchSpace.build(LAYERS).costs("latency_s")


def test_a_wrong_unit_is_found_by_what_no_hardware_does_and_by_the_budget(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="too slow for any hardware"):
        build(table(tmp_path, CSV.replace(",ms", ",s").replace("a,8,8,2", "a,8,8,60")))
    with pytest.raises(SpaceError, match="too fast"):
        build(table(tmp_path, CSV.replace(",ms", ",us").replace("8,8,", "8,8,1e-6")[:-14]))
    space = build(table(tmp_path))
    for wrong in ("8 s", "8 us"):
        with pytest.raises(BudgetError, match="Is one of the units wrong by 1,000"):
            parse_budget(wrong).limit(space)
    assert parse_budget("8 ms").limit(space) == 0.008


def test_budgets_of_latency_are_read_and_written() -> None:
    assert parse_budget("8 ms") == Budget.absolute(latency_s=0.008)
    assert parse_budget("0.5 latency") == Budget.fraction(latency_s=0.5)
    assert parse_budget(parse_budget("8 ms").text) == parse_budget("8 ms")
    assert (format_cost(0.0081234, "latency_s"), format_cost(3e-7, "latency_s")) == (
        "8.123 ms",
        "0.3 us",
    )
    for wrong in ("8 ms activations", "8 KiB latency", "8% ms", "8 ms seconds", "0 ms"):
        with pytest.raises(ValueError, match=r"budget|mixes|neither"):
            parse_budget(wrong)
