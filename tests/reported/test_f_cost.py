"""Kind F: cost is what all the data really compute."""

import re

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from tests.reported import product
from tests.small_networks import seeded

X, Y = torch.randn(256, 8, generator=seeded(0)), torch.randint(0, 3, (256,), generator=seeded(1))


def made(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build().eval()


class Experts(nn.Module):
    """Each sample runs one of three experts, or of four, the last of which nobody takes."""

    def __init__(self, n=3):
        super().__init__()
        self.i, self.router, self.o = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(n))

    def chosen(self, x):
        return self.router(self.i(x).relu()).argmax(1)

    def forward(self, x):
        h = self.i(x).relu()
        to, out = self.router(h).argmax(1), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            out[to == number] = expert(h[to == number])
        return self.o(out.relu())


def by_expert(network):
    order = network.chosen(X).argsort(stable=True)
    return X[order], Y[order]


def test_an_expert_costs_what_all_data_use_it():
    """Sorted so that the first batches need one expert alone: MACs by hand over all samples."""
    network = made(Experts)
    data = by_expert(network)
    macs, said = product.macs(network, data)
    for number in range(3):
        by_hand = 256 * int((network.chosen(X) == number).sum()) / 256
        assert macs[f"experts.{number}"] == pytest.approx(by_hand, abs=1)
    assert re.search(r"experts\.\d.*depends on the data", said)
    found = product.search(network, data)
    share = {n: macs[n] * w * a for n, (w, a) in found.bits.items()}
    assert sum(share.values()) / sum(64 * m for m in macs.values()) <= 0.25


def test_an_expert_without_samples_is_not_searched():
    """Nothing tells its bits, so it stays in float, and is listed with the cause."""
    network = made(lambda: Experts(4))
    macs, said = product.macs(network, by_expert(network))
    assert "experts.3" not in macs and re.search(r"experts\.3.*no calibration sample", said)
    assert "experts.3" not in product.search(network, by_expert(network)).bits


@pytest.mark.parametrize("scorer", ["hessian_trace", "diagonal"])
def test_an_expert_that_few_samples_need_is_not_free(scorer):
    """Sorted, so that the samples which a table reads may need one expert alone."""
    network = made(Experts)
    table, _ = product.rise_table(network, by_expert(network), scorer=scorer)
    for number in range(3):
        rows = table[f"experts.{number}"]
        assert rows["weights"][2] > rows["weights"][8] > 0
        assert rows["activations"][2] > 0


class Twice(nn.Module):
    """A layer is called once for each of so many steps as the batch has."""

    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = self.step(x[:, t] + h).tanh()
        return self.head(h)


def test_a_layer_called_a_different_number_of_times_costs_the_mean():
    """Sequences of 2 and of 5 steps: 3.5 calls of 64 multiplications a sample."""
    x = [torch.randn(16, n, 8, generator=seeded(n)) for n in (2, 5)]
    macs, _ = product.macs(made(Twice), [(each, Y[:16]) for each in x])
    assert macs == {"step": 224, "head": 24}


class Early(nn.Module):
    """Leaves early where it is sure of the whole batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return self.c(self.b(h) if float(x.mean()) > 0 else h)


def test_a_branch_that_some_batches_take_costs_its_share():
    """Half of the batches leave early: the layer costs half, and it is said."""
    x = X[:64].abs()
    data = [(x[:32], Y[:32]), (-x[32:], Y[32:64])]
    macs, said = product.macs(made(Early), data)
    assert macs == {"a": 64, "b": 32, "c": 24}
    assert "'b'" in said and "depends on the data" in said


class Functional(nn.Module):
    """Weights that functions use, beside the layer's own call or instead of it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.i, self.m, self.o = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        h, w = self.i(x).relu(), self.m.weight
        if self.how == "beside":
            return self.o(self.m(h) + linear(h, w))
        if self.how == "matrix product":
            return self.o(self.m(h) + h @ w.T)
        if self.how == "einsum":
            return self.o(self.m(h) + torch.einsum("ni,oi->no", h, w))
        if self.how == "part":
            return self.o(self.m(h) + nn.functional.pad(linear(h, w[:8]), (0, 8)))
        return self.o(linear(h, w, self.m.bias))


@pytest.mark.parametrize(
    "how, macs", [("beside", 512), ("matrix product", 512), ("einsum", 512), ("part", 384)]
)
def test_what_functions_do_with_a_layers_weight_is_counted_and_said(how, macs):
    """`F.linear`, `@`, einsum, a slice of the weight: counted, with the layer named."""
    found, said = product.macs(made(lambda: Functional(how)), (X, Y))
    assert found == {"i": 128, "m": macs, "o": 48}
    assert "'m'" in said and f"{macs - 256} MACs" in said


def test_a_weight_that_only_functions_use_is_listed_with_its_cost():
    """Not searched, as what enters cannot be rounded; its MACs are said."""
    found, said = product.macs(made(lambda: Functional("instead")), (X, Y))
    assert "m" not in found and re.search(r"\bm\b.*256 MACs", said)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.o = nn.Linear(8, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        h = self.i(x)[:, None]
        return self.o(self.attention(h, h, h)[0][:, 0])


def test_attention_inside_one_function_has_its_projections_counted():
    """PyTorch's attention uses its weights without calling layers."""
    found, said = product.macs(made(Attention), (X, Y))
    projections = {f"attention.{part}_proj": 8 * 8 for part in ("q", "k", "v", "out")}
    assert found == {"i": 8 * 8, "o": 8 * 3, **projections}
    assert "products of activations (attention)" in said


class Padded(nn.Conv2d):
    """A convolution that pads in its own way, as those ported from TensorFlow do."""

    def forward(self, x):
        x = nn.functional.pad(x, (0, 1, 0, 1))
        return conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def test_a_subclass_costs_what_its_own_forward_computes():
    """An output of 4 × 4 of 6 channels with 3 · 9 weights each."""
    net = made(
        lambda: nn.Sequential(
            Padded(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 3),
        )
    )  # fmt: skip
    macs, _ = product.macs(net, (torch.randn(8, 3, 8, 8, generator=seeded(0)), Y[:8]))
    assert macs == {"0": 16 * 6 * 27, "4": 18}


def test_images_of_different_sizes_cost_the_mean_without_a_warning():
    """What hangs on the shapes is no branch: nothing is said."""
    net = made(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(4, 3),
        )
    )  # fmt: skip
    data = [(torch.randn(4, 3, n, n, generator=seeded(n)), Y[:4]) for n in (6, 10)]
    macs, said = product.macs(net, data)
    assert macs["0"] == (16 + 64) / 2 * 4 * 27
    assert "depends on the data" not in said


def test_two_layers_that_share_a_weight_cost_by_their_own_calls():
    """Tied layers: the first is searched, the other listed, and neither gets the other's MACs."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.o(self.b(self.a(x).relu()).relu())

    found, said = product.macs(made(Tied), (X, Y))
    assert found == {"a": 64, "o": 24}
    assert "shares its weight with 'a'" in said
