"""The report's parts in the terms of hardware."""

from hq_optuna.report.data import report_data
from hq_optuna.report.text import blocks, render_markdown
from hq_optuna.space.latency import LatencyRow, LatencyTable
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.memory import LiveTensor, MemoryMap
from hq_optuna.space.search_space import SearchSpace
from tests.fake_search import fake_study

LAYERS = [LayerSpec(name, "Linear", (8, 8), 0, 64_000, 1, 8) for name in "abc"]
MEMORY = MemoryMap(
    tuple("abc"),
    (
        LiveTensor("input", 1000, 0, 0, ("a",)),
        LiveTensor("a", 3000, 0, 2, ("b",)),
        LiveTensor("b", 1000, 1, 2, ("c",)),
        LiveTensor("c", 100, 2, 2),
    ),
)
TABLE = LatencyTable(
    tuple(LatencyRow(name, b, b, 1e-3 * (2 if b == 8 else 3)) for name in "abc" for b in (8, 4)),
    rest_s=1e-3,
)


def test_a_report_has_the_memory_map_and_the_share_of_time_of_each_layer() -> None:
    space = SearchSpace.build(
        LAYERS, bits=(8, 4), pin_first_last=None, memory=MEMORY, latency=TABLE
    )
    data = report_data(fake_study(space))
    config = {row["name"]: (row["weight_bits"], row["activation_bits"]) for row in data["layers"]}
    width = config["b"][1]
    rows = {row["moment"]: row for row in data["memory"]}
    assert rows["a"]["bytes"] == 1000 * config["a"][1] / 8 + 3000 * width / 8
    assert rows["a"]["int8"] == 4000
    assert rows["c"]["tensors"][0] == ["a", width, 3000 * width / 8]
    assert ["c", 32, 400.0] in rows["c"]["tensors"]
    seconds = {row["layer"]: row["seconds"] for row in data["latency"]}
    assert seconds[""] == 1e-3
    assert all(seconds[n] == (2e-3 if config[n] == (8, 8) else 3e-3) for n in "abc")
    found = {block.key: block for block in blocks(data)}
    shares = [float(cell.split()[0]) for cell in dict(found["latency"].columns)["share"][:-1]]
    assert abs(sum(shares) - 100) < 0.3
    text = render_markdown(data)
    slower = ", ".join(name for name in "abc" if seconds[name] > 2e-3)
    assert f"Slower than with 8 bits: {slower}." in text
    assert "The peak is" in found["memory"].lines[0]


def test_a_report_without_a_map_and_a_table_has_no_such_parts() -> None:
    data = report_data(fake_study(SearchSpace.build(LAYERS, bits=(8, 4), pin_first_last=None)))
    assert data["memory"] is data["latency"] is None
    assert not {"memory", "latency"} & {block.key for block in blocks(data)}
