"""The cost of assignments, against arithmetic by hand and published totals."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import CostModel, Metric, format_cost, macs
from hq_optuna.space.layers import LayerSpec


def layer(name: str, n_macs: int, shape: tuple[int, ...]) -> LayerSpec:
    return LayerSpec(name, "Conv2d", shape, 0, macs=n_macs, n_calls=1, n_inputs=1)


def resnet18() -> list[LayerSpec]:
    """ResNet-18 at 224² from the table of He et al. 2015: (channels in, out, kernel, map)."""
    rows = [("conv1", 3, 64, 7, 112)]
    width = 64
    for stage, (out, side) in enumerate([(64, 56), (128, 28), (256, 14), (512, 7)], start=1):
        for block in (0, 1):
            rows.append((f"{stage}.{block}.1", width, out, 3, side))
            rows.append((f"{stage}.{block}.2", out, out, 3, side))
            if width != out:
                rows.append((f"{stage}.{block}.down", width, out, 1, side))
            width = out
    rows.append(("fc", 512, 1000, 1, 1))
    return [layer(name, i * o * k * k * side * side, (o, i, k, k)) for name, i, o, k, side in rows]


TWO = [layer("conv", 1000, (4, 3, 3, 3)), layer("fc", 640, (10, 64))]
MIXED = BitConfig({"conv": (8, 8), "fc": (3, 5)})


def test_bops_are_macs_times_weight_bits_times_activation_bits() -> None:
    assert CostModel(TWO).per_layer(MIXED).tolist() == [1000 * 8 * 8, 640 * 3 * 5]
    assert CostModel(TWO).cost(MIXED) == 64_000 + 9_600


def test_size_is_weights_times_their_bits_in_bytes_whatever_the_activations() -> None:
    model = CostModel(TWO, "size_bytes")
    assert model.per_layer(MIXED).tolist() == [108.0, 240.0]
    assert model.cost(MIXED.replace("fc", activation_bits=32)) == 348.0


def test_float_counts_as_32_bits() -> None:
    assert CostModel(TWO).float32 == 1640 * 1024
    assert CostModel(TWO, "size_bytes").float32 == (108 + 640) * 4


def test_the_order_of_the_assignment_does_not_matter() -> None:
    turned = BitConfig({"fc": (3, 5), "conv": (8, 8)})
    assert CostModel(TWO).per_layer(turned).tolist() == CostModel(TWO).per_layer(MIXED).tolist()


def test_resnet18_costs_what_the_literature_says() -> None:
    # The configurations HAWQ-V3 (Yao et al. 2021) reports for ResNet-18, rounded there: float,
    # W8A8, and 4 bits with first and last layer at 8, in GBOPs and in MiB of weights.
    layers = resnet18()
    assert len(layers) == 21
    assert macs(layers) == 1_814_073_344
    assert sum(spec.n_weights for spec in layers) == 11_678_912
    bops, size = CostModel(layers), CostModel(layers, "size_bytes")
    mixed = BitConfig.uniform([spec.name for spec in layers], 4, 4)
    for name in ("conv1", "fc"):
        mixed = mixed.replace(name, weight_bits=8, activation_bits=8)
    assert [round(c / 1e9, 1) for c in (bops.float32, bops.int8, bops.cost(mixed))] == [
        1857.6,
        116.1,
        34.7,
    ]
    assert [round(c / 2**20, 2) for c in (size.float32, size.int8, size.cost(mixed))] == [
        44.55,
        11.14,
        5.82,
    ]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**9), st.integers(1, 10**6), st.integers(1, 32), st.integers(1, 32)
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["bops", "size_bytes"]),
)
def test_sums_are_exact(rows: list[tuple[int, int, int, int]], metric: Metric) -> None:
    layers = [layer(f"l{k}", row[0], (row[1],)) for k, row in enumerate(rows)]
    config = BitConfig({f"l{k}": (row[2], row[3]) for k, row in enumerate(rows)})
    if metric == "bops":
        expected = sum(Fraction(m * w * a) for m, _, w, a in rows)
    else:
        expected = sum((Fraction(n * w, 8) for _, n, w, _ in rows), Fraction(0))
    assert Fraction(CostModel(layers, metric).cost(config)) == expected


def test_a_layer_missing_from_the_assignment_is_an_error() -> None:
    with pytest.raises(KeyError, match="fc"):
        CostModel(TWO).cost(BitConfig({"conv": (8, 8)}))


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="metric is one of bops, size_bytes"):
        CostModel(TWO, "flops")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cost", "metric", "text"),
    [
        (1.8576e12, "bops", "1.858 TBOPs"),
        (116.1e9, "bops", "116.1 GBOPs"),
        (24e6, "bops", "24 MBOPs"),
        (1000.0, "bops", "1 kBOPs"),
        (0.0, "bops", "0 BOPs"),
        (2.0**31, "size_bytes", "2 GiB"),
        (44.55 * 2**20, "size_bytes", "44.55 MiB"),
        (1536.0, "size_bytes", "1.5 KiB"),
        (1023.0, "size_bytes", "1023 bytes"),
    ],
)
def test_costs_are_printed_with_units(cost: float, metric: Metric, text: str) -> None:
    assert format_cost(cost, metric) == text
