"""Hutchinson's estimator: exact on diagonal Hessians, and within its error elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hq_optuna.curvature import hutchinson
from hq_optuna.network.batches import read_batches
from hq_optuna.network.unfused import unfused
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


@pytest.mark.parametrize("seed", [0, 1])
def test_one_probe_is_exact_on_a_diagonal_hessian(seed):
    network = make(nn.Sequential(nn.Linear(6, 4, bias=False)))
    x, h = torch.eye(6, dtype=torch.float64), rows(4, 6, seed=1).exp()
    labels = torch.stack([h.t(), network[0].weight.detach().t()], dim=1)  # (6, 2, 4)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        """½ Σ h (w − w₀)², as in test_sensitivity."""
        h, w0 = labels.unbind(1)
        return 0.5 * (6 * h * (outputs - w0).square()).sum(1).mean()

    layers, data = layers_of(network, x), read_batches((x, labels), batch_size=4)
    found = hutchinson(network, layers, data, loss, most_sweeps=1, tolerance=0, raw=True, seed=seed)
    torch.testing.assert_close(found.weights["0"], h, rtol=1e-12, atol=0)
    torch.testing.assert_close(slow.hessian_diagonal(network, "0", x, labels, loss), h)


CASES = {
    "Residual": (lambda: make(Residual), rows(11, 3)),  # tanh: the Hessian is not Gauss-Newton's
    "Twice": (lambda: make(Twice), rows(11, 3)),
    "ConvNet": (lambda: make(ConvNet), rows(11, 2, 5, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_means_are_those_of_the_hessians_diagonal_in_weights_and_inputs(name):
    network, x = CASES[name][0](), CASES[name][1]
    layers, data = layers_of(network, x), read_batches((x, LABELS), batch_size=4)
    options = {"tolerance": 0, "most_sweeps": 4, "raw": True}
    found = [
        hutchinson(network, layers, data, F.cross_entropy, seed=seed, **options)
        for seed in range(16)
    ]
    for layer in layers:
        exact = slow.hessian_diagonal(network, layer.name, x, LABELS, F.cross_entropy)
        within(
            torch.tensor([float(c.weights[layer.name].sum()) for c in found]), float(exact.sum())
        )
        traces = slow.input_hessian_traces(network, layer.name, x, LABELS, F.cross_entropy)
        for call, trace in enumerate(traces):
            values = [c.inputs[layer.name][call] for c in found]
            assert all(v.n_samples == 44 for v in values)
            within(torch.tensor([v.total / 44 for v in values]), trace)


def within(values: Tensor, exact: float) -> None:
    """Four standard errors of the mean over the seeds."""
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - exact) <= 4 * error + 1e-12, (values.mean(), exact, error)


def test_elements_are_the_hessians_diagonal():
    network, x = make(nn.Sequential(nn.Linear(3, 3))), rows(11, 3)
    data = read_batches((x, LABELS))
    found = hutchinson(
        network, layers_of(network, x), data, F.cross_entropy, tolerance=0, most_sweeps=2000
    )
    exact = slow.hessian_diagonal(network, "0", x, LABELS, F.cross_entropy)
    torch.testing.assert_close(found.weights["0"], exact, rtol=0.15, atol=0.015)


def test_it_stops_at_the_tolerance_with_the_same_numbers_each_time():
    network, x = make(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))), rows(32, 3)
    data = read_batches((x, torch.arange(32) % 3), batch_size=8)
    layers, told = layers_of(network, x), []
    options = {"tolerance": 0.25, "most_sweeps": 200}
    found = hutchinson(
        network, layers, data, F.cross_entropy, **options, progress=lambda *p: told.append(p)
    )
    again = hutchinson(network, layers, data, F.cross_entropy, **options)
    assert found.largest_error <= 0.25
    assert 4 <= len(told) < 800 and told[-1] == (800, 800)
    assert found.errors == again.errors
    assert all(torch.equal(found.weights[name], h) for name, h in again.weights.items())


def test_it_gives_up_at_the_limit_and_says_how_far_it_came():
    network, x = make(ConvNet), rows(11, 2, 5, 5)
    data = read_batches((x, LABELS), batch_size=4)
    found = hutchinson(
        network, layers_of(network, x), data, F.cross_entropy, tolerance=1e-9, most_sweeps=2
    )
    assert found.n_samples == 11
    assert found.largest_error > 1e-9
    with pytest.raises(ValueError, match="most_sweeps is at least 1; got 0"):
        hutchinson(network, (), data, F.cross_entropy, most_sweeps=0)


def test_a_layer_with_negative_curvature_gets_its_standard_error():
    network, x = make(nn.Sequential(nn.Linear(3, 3))), rows(8, 3)
    data = read_batches((x, rows(8, 3, seed=1)), batch_size=2)

    def concave(outputs: Tensor, labels: Tensor) -> Tensor:
        return -outputs.square().sum(1).mean()

    exact = slow.hessian_diagonal(network, "0", x, data[0].labels, concave)
    assert float(exact.mean()) < 0
    found = hutchinson(network, layers_of(network, x), data, concave, tolerance=0)
    h = found.weights["0"]
    assert bool((h > 0).all()) and bool((h == h[0, 0]).all())
    raw = hutchinson(network, layers_of(network, x), data, concave, tolerance=0, raw=True)
    assert float(raw.weights["0"].mean()) < 0
    assert found.inputs["0"][0].mean > 0 and found.inputs["0"][0].per_element is None


def test_a_loss_without_second_derivative_has_no_curvature():
    network, x = make(nn.Sequential(nn.Linear(3, 3))), rows(8, 3)
    data = read_batches((x, LABELS[:8]))
    found = hutchinson(network, layers_of(network, x), data, lambda z, y: z.mean())
    assert found.no_gradient == ()
    # In its weights, and in its inputs, a linear layer is linear; only together they curve.
    assert not found.weights["0"].any() and found.inputs["0"][0].total == 0.0


def test_layers_without_gradient_are_named():
    network, x = make(PartlyDetached), rows(11, 3)
    layers, data = layers_of(network, x), read_batches((x, LABELS))
    assert hutchinson(network, layers, data, F.cross_entropy).no_gradient == ("frozen",)
    found = hutchinson(network, layers, data, lambda z, y: (z.argmax(1) == y).double().mean())
    assert found.unknown == {layer.name for layer in layers}


def test_the_network_and_the_callers_random_state_are_left_as_they_were():
    network, x = make(ConvNet).train(), rows(11, 2, 5, 5)
    network.head.weight.requires_grad_(False)
    before, state = snapshot(network), torch.random.get_rng_state()
    hutchinson(
        network, layers_of(network, x), read_batches((x, LABELS)), F.cross_entropy, most_sweeps=1
    )
    assert_unchanged(network, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_network_in_half_precision_has_the_curvature_of_the_same_in_single():
    """Sums of many probes, each of which is less than a digit of the sum in bfloat16."""
    half = make(nn.Sequential(nn.Linear(3, 4)), dtype=torch.float32).to(torch.bfloat16)
    x, y = rows(320, 3).bfloat16(), rows(320, 4, seed=1).bfloat16()
    layers = layers_of(half, x)
    found = hutchinson(
        half, layers, read_batches((x, y), batch_size=1), F.mse_loss, most_sweeps=4, tolerance=0
    )
    single = read_batches((x.float(), y.float()), batch_size=1)
    expected = hutchinson(half.float(), layers, single, F.mse_loss, most_sweeps=4, tolerance=0)
    assert found.weights["0"].dtype == torch.float32
    torch.testing.assert_close(found.weights["0"], expected.weights["0"], rtol=0.03, atol=0)


def test_fused_attention_has_a_second_derivative_too():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0)
    network = unfused(nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 3)).eval())
    data = read_batches((rows(16, 3, 8).float(), torch.arange(16) % 3))
    layers = layers_of(network, data[0].inputs)
    assert len(layers) == 4 + 2 + 1
    found = hutchinson(network, layers, data, F.cross_entropy)
    assert all(bool(h.any()) for h in found.weights.values())


class Checkpointed(nn.Module):
    """Computes its layers anew on the way back, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.on = True

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x)


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(0)
    network = Checkpointed().eval()
    data = read_batches((rows(16, 3).float(), torch.arange(16) % 3))
    layers = layers_of(network, data[0].inputs)
    found = []
    for network.on in (True, False):
        found.append(hutchinson(network, layers, data, F.cross_entropy))
    for name in found[0].weights:
        assert torch.equal(found[0].weights[name], found[1].weights[name])


@pytest.mark.parametrize("recurrent", [True, False])
def test_recurrent_layers_of_cudnn_have_no_gradient_in_eval_mode_and_are_not_used(recurrent):
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
            self.middle = nn.GRU(4, 4, batch_first=True) if recurrent else nn.Identity()
            # A module with a hook is not taken apart into linear layers.
            self.middle.register_forward_hook(lambda module, args, output: output)

        def forward(self, x):
            seen.append(torch.backends.cudnn.enabled)
            z = self.middle(self.first(x))
            return self.head((z[0] if recurrent else z)[:, -1])

    network = Net().eval()
    data = read_batches((rows(8, 5, 3).float(), torch.arange(8) % 3))
    layers = layers_of(network, data[0].inputs)
    before = torch.backends.cudnn.enabled
    seen.clear()
    hutchinson(network, layers, data, F.cross_entropy)
    assert set(seen) == {before and not recurrent}
    assert torch.backends.cudnn.enabled == before
