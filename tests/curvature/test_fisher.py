"""Fisher information against its definitions, full Jacobians, and the Hessian itself."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published_scores import empirical_fisher
from hq_optuna.curvature import fisher, output_curvature, probe_of
from hq_optuna.curvature.fisher import CrossEntropyProbe, SquaredErrorProbe
from hq_optuna.network.batches import Batches, read_batches
from tests.reference import curvature as slow
from tests.small_networks import (
    ConvNet,
    PartlyDetached,
    Residual,
    Twice,
    assert_unchanged,
    layers_of,
    make,
    seeded,
    snapshot,
)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


LABELS = torch.arange(11) % 3


# The random vectors.


def all_signs(monkeypatch, probe, z: Tensor) -> Tensor:
    """Return the mean of u uᵀ over all signs there are, for one sample ``(1, C)``."""
    found = []
    for signs in itertools.product((-1.0, 1.0), repeat=z.shape[1]):
        monkeypatch.setattr(
            fisher, "signs", lambda like, _, s=signs: torch.tensor([s], dtype=like.dtype)
        )
        u = probe.draw(z, seeded(0))[0]
        found.append(torch.outer(u, u))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_covariance_of_the_cross_entropys_vectors_is_its_hessian(monkeypatch, temperature):
    z = rows(1, 4)
    expected = slow.softmax_hessian(z[0], temperature)
    found = all_signs(monkeypatch, CrossEntropyProbe(temperature), z)
    torch.testing.assert_close(found, expected)
    if temperature == 1.0:
        exact = torch.func.hessian(lambda z: F.cross_entropy(z, torch.tensor([2])))(z)
        torch.testing.assert_close(found, exact[0, :, 0])


def test_the_covariance_of_the_squared_errors_vectors_is_its_hessian(monkeypatch):
    z = rows(1, 3)
    y = rows(1, 3, seed=1)
    exact = torch.func.hessian(lambda z: F.mse_loss(z, y))(z)
    torch.testing.assert_close(all_signs(monkeypatch, SquaredErrorProbe(), z), exact[0, :, 0])


def test_pixels_count_by_their_mean():
    z = rows(2, 3, 4, 5)
    exact = torch.func.hessian(lambda z: F.cross_entropy(z, torch.zeros(1, 4, 5).long()))(z[:1])
    trace = sum(exact.reshape(60, 60).diagonal())
    generator, probe = seeded(0), CrossEntropyProbe(1.0)
    drawn = [float(probe.draw(z, generator)[0].square().sum()) for _ in range(4000)]
    assert sum(drawn) / 4000 == pytest.approx(float(trace), rel=0.05)


def test_the_scale_brings_softened_curvature_back_to_the_outputs_own():
    probe, z = CrossEntropyProbe(3.0), rows(8, 3) * 4
    for part in z.split(5):
        probe.draw(part, seeded(0))
    own = sum(float(slow.softmax_hessian(row).trace()) for row in z)
    softened = sum(float(slow.softmax_hessian(row, 3.0).trace()) for row in z)
    assert probe.scale() == pytest.approx(own / softened, rel=1e-12)
    assert CrossEntropyProbe(1.0).scale() == 1.0  # nothing seen yet


def test_a_network_sure_of_everything_keeps_the_softened_scale():
    probe = CrossEntropyProbe(1e6)
    probe.draw(torch.tensor([[1e6, 0.0]], dtype=torch.float64), seeded(0))
    assert probe.scale() == 1.0


def test_only_known_losses_have_vectors():
    assert isinstance(probe_of(F.cross_entropy), CrossEntropyProbe)
    assert isinstance(probe_of(nn.MSELoss()), SquaredErrorProbe)
    assert probe_of(lambda z, y: z.sum()) is None
    with pytest.raises(ValueError, match="temperature is above 0; got 0"):
        CrossEntropyProbe(0.0)


# The curvature.


def test_one_output_and_one_sample_a_batch_are_exact():
    # u = ±√2 and its square is 2 whatever the sign: h = 2 x², the Hessian of a squared error.
    network, x = make(nn.Sequential(nn.Linear(3, 1, bias=False))), rows(7, 3)
    y = rows(7, 1, seed=1)
    data = read_batches((x, y), batch_size=1)
    found = output_curvature(network, layers_of(network, x), data, SquaredErrorProbe(), tolerance=0)
    exact = slow.hessian_diagonal(network, "0", x, y, F.mse_loss)
    torch.testing.assert_close(found.weights["0"], exact)
    w = network[0].weight.detach()[0]
    torch.testing.assert_close(found.inputs["0"][0].per_element / 7, 2 * w.square())
    assert (found.batch_size, found.n_samples, found.no_gradient) == (1, 7, ())


CASES = {
    "Residual": (lambda: make(Residual), rows(11, 3)),
    "Twice": (lambda: make(Twice), rows(11, 3)),
    "ConvNet": (lambda: make(ConvNet), rows(11, 2, 5, 5)),
}


def over_seeds(network, x, batch_size, temperature, n=60):
    """Return layer → (mean, standard error) of the mean curvature over seeds, and of inputs."""
    layers = layers_of(network, x)
    data = read_batches((x, LABELS), batch_size=batch_size)
    weights, inputs = {}, {}
    for seed in range(n):
        found = output_curvature(
            network, layers, data, CrossEntropyProbe(temperature), tolerance=0, seed=seed
        )
        for name, h in found.weights.items():
            weights.setdefault(name, []).append(float(h.mean()))
            inputs.setdefault(name, []).append([e.total / 11 for e in found.inputs[name]])
    return {name: (torch.tensor(weights[name]), torch.tensor(inputs[name])) for name in weights}


def assert_within(values: Tensor, exact: float):
    """Four standard errors of the mean over the seeds, which are a few per cent of it."""
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - exact) <= 4 * error + 1e-12
    assert error <= 0.15 * abs(exact)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_curvature_is_the_gauss_newton_diagonal_whatever_the_batch_size(name, batch_size):
    network, x = CASES[name][0](), CASES[name][1]
    z = network(x).detach()
    scale = sum(float(slow.softmax_hessian(row).trace()) for row in z) / sum(
        float(slow.softmax_hessian(row, 3.0).trace()) for row in z
    )
    for layer, (values, _) in over_seeds(network, x, batch_size, 3.0).items():
        exact = slow.gauss_newton_diagonal(
            network, layer, x, lambda z: slow.softmax_hessian(z, 3.0)
        )
        assert_within(values, scale * float(exact.mean()))


@pytest.mark.parametrize("name", ["ConvNet"])
def test_of_a_piecewise_linear_network_it_is_the_hessian_of_each_layers_weights_and_inputs(name):
    network, x = CASES[name][0](), CASES[name][1]
    for layer, (weights, inputs) in over_seeds(network, x, 4, 1.0).items():
        exact = slow.hessian_diagonal(network, layer, x, LABELS, F.cross_entropy)
        assert_within(weights, float(exact.mean()))
        traces = slow.input_hessian_traces(network, layer, x, LABELS, F.cross_entropy)
        for call, trace in enumerate(traces):
            assert_within(inputs[:, call], trace)


def test_labels_are_not_read():
    network, x = make(Residual), rows(11, 3)
    a, b = (
        output_curvature(
            network, layers_of(network, x), read_batches((x, y)), CrossEntropyProbe(), tolerance=0
        )
        for y in (LABELS, LABELS.flip(0))
    )
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_the_network_the_data_and_the_callers_random_state_are_left_as_they_were():
    network, x = make(ConvNet).train(), rows(11, 2, 5, 5)
    before, state = snapshot(network), torch.random.get_rng_state()
    data = read_batches((x, LABELS), batch_size=4)
    output_curvature(network, layers_of(network, x), data, CrossEntropyProbe())
    assert_unchanged(network, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_layer_without_gradient_is_named():
    network, x = make(PartlyDetached), rows(11, 3)
    data = read_batches((x, LABELS))
    found = output_curvature(network, layers_of(network, x), data, CrossEntropyProbe())
    assert found.no_gradient == ("frozen",)

    class Detached(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    network = make(Detached)
    found = output_curvature(network, layers_of(network, x), data, CrossEntropyProbe())
    assert found.unknown == set(found.weights)


# The empirical Fisher matrix.


@pytest.mark.parametrize("name", CASES)
def test_with_one_sample_a_batch_it_is_the_empirical_fisher_diagonal(name):
    network, x = CASES[name][0](), CASES[name][1]
    data = read_batches((x, LABELS), batch_size=1)
    found = empirical_fisher(network, layers_of(network, x), data, F.cross_entropy)
    for layer, h in found.weights.items():
        torch.testing.assert_close(
            h, slow.fisher_diagonal(network, layer, x, LABELS, F.cross_entropy)
        )
        calls = slow.input_gradients(network, layer, x, LABELS, F.cross_entropy)
        for entry, gradients in zip(found.inputs[layer], calls, strict=True):
            total = sum(float(g.square().sum()) for g in gradients)
            assert entry.total == pytest.approx(total, rel=1e-10)


def test_batches_give_their_size_times_their_squared_mean_gradient():
    network, x = make(Residual), rows(11, 3)
    data = read_batches((x, LABELS), batch_size=4)
    found = empirical_fisher(network, layers_of(network, x), data, F.cross_entropy)
    for layer, h in found.weights.items():
        gradients = slow.batch_gradients(network, layer, data, F.cross_entropy)
        sizes = [batch.n for batch in data]
        # Weighted by their samples, so that a short last batch counts less.
        total = sum(n * n * g.square() for n, g in zip(sizes, gradients, strict=True))
        torch.testing.assert_close(h, total / 11)


# Stopping.


def many(n: int = 640, batch_size: int = 8):
    network, x = make(ConvNet), rows(n, 2, 5, 5)
    return (
        network,
        layers_of(network, x),
        read_batches((x, torch.arange(n) % 3), batch_size=batch_size),
    )


def test_it_stops_at_the_tolerance_with_the_same_numbers_each_time():
    network, layers, data = many()
    told: list[tuple[int, int]] = []
    found = output_curvature(
        network,
        layers,
        data,
        CrossEntropyProbe(),
        tolerance=0.2,
        progress=lambda i, of: told.append((i, of)),
    )
    again = output_curvature(network, layers, data, CrossEntropyProbe(), tolerance=0.2)
    assert 4 * 8 <= found.n_samples < 640
    assert found.largest_error <= 0.2
    assert len(told) == found.n_samples // 8 and told[-1] == (80, 80)
    assert again.n_samples == found.n_samples and again.errors == found.errors
    assert all(torch.equal(found.weights[name], h) for name, h in again.weights.items())


def test_a_smaller_tolerance_reads_more_and_zero_reads_all():
    network, layers, data = many()
    seen = [
        output_curvature(network, layers, data, CrossEntropyProbe(), tolerance=t).n_samples
        for t in (0.5, 0.25, 0.15, 0.0)
    ]
    assert seen == sorted(seen) and seen[0] < seen[2] and seen[-1] == 640


def test_stopping_is_the_pass_over_the_first_batches_of_a_random_order():
    network, layers, data = many()
    early = output_curvature(network, layers, data, CrossEntropyProbe(), tolerance=0.2)
    mixed = data.in_random_order()
    places = [id(batch) for batch in data]
    assert [id(b) for b in mixed] != places and sorted(map(id, mixed)) == sorted(places)

    class InOrder(Batches):
        def in_random_order(self) -> Batches:
            return self

    first = InOrder(mixed[: early.n_samples // 8])
    whole = output_curvature(network, layers, first, CrossEntropyProbe(), tolerance=0)
    for name, h in whole.weights.items():
        assert torch.equal(early.weights[name], h)
        assert early.inputs[name][0].total == whole.inputs[name][0].total


def test_the_errors_it_stops_on_are_those_of_other_images():
    # 40 disjoint sets of images: how far their means lie apart is what the errors claim to tell.
    network, layers, data = many(n=40 * 64)
    sets = [Batches(data[i : i + 8]) for i in range(0, len(data), 8)]
    found = [
        output_curvature(network, layers, s, CrossEntropyProbe(), tolerance=0, seed=i)
        for i, s in enumerate(sets)
    ]
    means = torch.tensor([[float(h.mean()) for h in c.weights.values()] for c in found])
    relative = means / means.mean(0)
    apart = (relative - relative.quantile(0.5, 1, keepdim=True)).std(0)
    claimed = torch.tensor([[w for w, _ in c.errors.values()] for c in found]).mean(0)
    ratio = claimed / apart
    assert float(ratio.min()) > 0.6 and float(ratio.max()) < 1.6, ratio


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_has_the_fisher_information_of_the_same_in_single(dtype):
    # Gradients near 1e-4, whose squares are below the smallest number of float16.
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return 1e-3 * F.cross_entropy(outputs.float(), labels)

    half = make(Twice, dtype=torch.float32).to(dtype)
    x, y = rows(320, 3).to(dtype), torch.arange(320) % 3
    layers = layers_of(half, x)
    found = empirical_fisher(half, layers, read_batches((x, y), batch_size=8), loss)
    single = read_batches((x.float(), y), batch_size=8)
    expected = empirical_fisher(half.float(), layers, single, loss)
    for name, h in expected.weights.items():
        assert found.weights[name].dtype == torch.float32
        away = torch.linalg.norm(found.weights[name] - h)
        assert float(away) < 0.05 * float(torch.linalg.norm(h))  # gradients are rounded
