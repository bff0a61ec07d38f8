"""Kind B: a layer's call without gradient is neither the one that matters most, nor free."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.reported import product
from tests.small_networks import seeded

DATA = (
    torch.randn(96, 8, generator=seeded(0)),
    torch.randint(0, 3, (96,), generator=seeded(1)),
)


class Recompute(torch.autograd.Function):
    """Keeps nothing of a block but its input, and computes it again on the way back."""

    @staticmethod
    def forward(ctx, block, x, *weights):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_(True)
        with torch.enable_grad():
            y = ctx.block(x)
        weights = [w for w in ctx.block.parameters() if w.requires_grad]
        return None, *torch.autograd.grad(y, [x, *weights], gradient)


class Doubled(torch.autograd.Function):
    """A function whose gradient has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class Straight(torch.autograd.Function):
    """Rounds, and passes gradients on as they are."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Network(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(1)
        self.how = how
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2)
        )

    def block(self, block, x):
        if self.how == "reentrant":
            return checkpoint(block, x, use_reentrant=True)
        if self.how == "not reentrant":
            return checkpoint(block, x, use_reentrant=False)
        if self.how == "in segments":
            return checkpoint_sequential(block, 2, x, use_reentrant=True)
        if self.how == "function":
            needed = (w for w in block.parameters() if w.requires_grad)
            return Recompute.apply(block, x, *needed)
        if self.how == "twice":
            with torch.no_grad():
                block(x)
        if self.how == "nested":
            return checkpoint(
                lambda y: checkpoint(block, y, use_reentrant=False), x, use_reentrant=False
            )
        return block(x)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + 0.2 * self.block(block, x)
        return self.head(x)


@pytest.fixture
def table():
    def of(how, scorer):
        with torch.random.fork_rng(devices=[]):
            network = how if isinstance(how, nn.Module) else Network(how)
        return product.rise_table(network, DATA, scorer=scorer)

    return of


RECOMPUTED = ["reentrant", "not reentrant", "in segments", "function", "nested"]


@pytest.mark.parametrize("scorer", ["fisher", "diagonal"])
@pytest.mark.parametrize("how", RECOMPUTED)
def test_recomputing_changes_no_number(table, how, scorer):
    """Both kinds of checkpoints, in segments, nested, and a function of its own."""
    plain, _ = table("plain", scorer)
    got, warnings = table(how, scorer)
    for name, parts in plain.items():
        for part, row in parts.items():
            assert got[name][part] == pytest.approx(row, rel=1e-4), (name, part)
    assert not any("gradient" in each for each in warnings)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "function"])
def test_second_derivatives_of_what_is_recomputed_are_right_or_refused(table, how):
    """`hutchinson` differentiates twice, which PyTorch cannot through some of these."""
    try:
        got, _ = table(how, "hutchinson")
    except Exception as error:
        assert product.is_refusal(error) and "second derivatives" in str(error)
        return
    plain, _ = table("plain", "hutchinson")
    for name in plain:
        assert got[name]["weights"][4] == pytest.approx(plain[name]["weights"][4], rel=1e-3)


def test_a_function_with_one_derivative_is_refused_where_two_are_needed(table):
    """`once_differentiable`: fine with one gradient, and named where there are two."""

    class Once(Network):
        def forward(self, x):
            return super().forward(Doubled.apply(self.stem(x))[:, :8])

    network = Once("plain")
    got, _ = table(network, "fisher")
    assert got["stem"]["weights"][4] > 0
    with pytest.raises(ValueError, match=r"second derivatives.*'fisher'"):
        table(network, "hutchinson")


def test_a_call_without_gradients_whose_result_is_not_used_is_named_and_measured(table):
    """A block called once more under no_grad: measured, as all before it, and nearly as plain."""
    plain, _ = table("plain", "fisher")
    got, warnings = table("twice", "fisher")
    assert any("'blocks.0.0'" in each and "no gradient" in each for each in warnings)
    assert got["head"]["weights"][4] == pytest.approx(plain["head"]["weights"][4], rel=1e-4)
    for name in ("stem", "blocks.0.0", "blocks.1.2"):
        ratio = got[name]["weights"][4] / plain[name]["weights"][4]
        assert 1 / 3 < ratio < 3, name


class Frozen(nn.Module):
    """A backbone under no_grad, and a head that is trained."""

    def __init__(self, head_matters=True):
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head, self.side = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x) + 1e-3 * self.side(x).detach()


@pytest.mark.parametrize("scorer", ["fisher", "diagonal", "trace", "hutchinson"])
def test_layers_without_gradient_have_the_rises_that_are_measured(table, scorer):
    """Frozen and detached parts: the order of rises is that of the outputs' own changes."""
    network = Frozen()
    got, warnings = table(network, scorer)
    for name in ("backbone.0", "backbone.2", "side"):
        assert any(f"'{name}'" in each for each in warnings)
        rows = got[name]["weights"]
        assert rows[2] > rows[4] > rows[8] > 0
    assert got["side"]["weights"][4] < 1e-3 * got["head"]["weights"][4]
    with torch.no_grad():
        plain = network(DATA[0]).double()
        p = (plain / 3).softmax(1)
        for name in ("backbone.0", "side"):
            changed, _ = product.quantized(
                network, DATA, {**dict.fromkeys(got, (32, 32)), name: (3, 32)}, correction=False,
                rounding="nearest",
            )  # fmt: skip
            change = changed(DATA[0]).double() - plain
            centred = change - (p * change).sum(1, keepdim=True)
            by_hand = float(0.5 * (p * centred.square()).sum(1).mean())
            # Softened outputs, scaled by one factor for all layers, which is not 1 here.
            got_one = product.rise_table(
                network, DATA, scorer=scorer, rounding="nearest", correction=False
            )[0][name]["weights"][3]
            assert 0.2 < got_one / by_hand < 5


def test_layers_before_a_detached_branch_are_measured(table):
    """What goes through the branch is in their rises, as in the same network that detaches not."""

    class Branch(Network):
        def forward(self, x):
            h = self.stem(x)
            through = self.blocks[0](h)
            return self.head(h + 3 * (through.detach() if self.how == "detached" else through))

    plain, _ = table(Branch("plain"), "fisher")
    got, warnings = table(Branch("detached"), "fisher")
    assert any("'stem'" in each for each in warnings)
    for part in ("weights", "activations"):
        assert 1 / 2 < got["stem"][part][4] / plain["stem"][part][4] < 2


def test_activations_that_write_over_each_other_are_measured(table):
    """ReLU and SiLU in place: no backward pass is possible, and the search goes on without."""

    class InPlace(Network):
        def block(self, block, x):
            return block[2](nn.functional.silu(block[0](x).relu_(), inplace=True))

    got, warnings = table(InPlace("plain"), "fisher")
    assert len([each for each in warnings if "in place" in each]) == len(got)
    assert all(row["weights"][2] > row["weights"][8] > 0 for row in got.values())


def test_a_loss_without_gradient_is_measured_throughout(table):
    """The share of wrong classes: no gradient anywhere, and still a search within its budget."""
    network = Network("plain")

    def wrong(z, y):
        return (z.argmax(1) != y).float().mean()

    got, warnings = product.rise_table(network, DATA, wrong)
    assert len([each for each in warnings if "no gradient" in each]) == len(got)
    assert any(got[name]["weights"][2] > 0 for name in got)
    assert product.search(network, DATA, wrong).share <= 0.25


def test_a_layer_whose_gradient_is_zero_is_measured(table):
    """A branch times zero is without effect, by measurement, and is told as such."""

    class Dead(Network):
        def __init__(self):
            super().__init__("plain")
            self.dead = nn.Linear(8, 3)

        def forward(self, x):
            return super().forward(x) + 0 * self.dead(x)

    got, warnings = table(Dead(), "fisher")
    assert set(got["dead"]["weights"].values()) == {0.0}
    assert any("'dead'" in each for each in warnings)


def test_gradients_that_are_passed_straight_on_count_as_gradients(table):
    """A rounding inside the network with a gradient of its own is not 'no gradient'."""

    class Rounded(Network):
        def block(self, block, x):
            return Straight.apply(block(x))

    got, warnings = table(Rounded("plain"), "fisher")
    assert not any("gradient" in each for each in warnings)
    plain, _ = table("plain", "fisher")
    for name in plain:
        assert got[name]["weights"][4] == pytest.approx(plain[name]["weights"][4], rel=0.3)


def test_one_layer_called_many_times_has_a_gradient_for_each_call(table):
    """The same block five times, recomputed each time: the right call gets the right gradient."""

    class Again(Network):
        def forward(self, x):
            x = self.stem(x)
            for _ in range(5):
                x = x + 0.2 * self.block(self.blocks[0], x)
            return self.head(x) + 0 * self.blocks[1](x)[:, :3]

    plain, _ = table(Again("plain"), "diagonal")
    got, _ = table(Again("reentrant"), "diagonal")
    for part in ("weights", "activations"):
        row = plain["blocks.0.0"][part]
        assert got["blocks.0.0"][part] == pytest.approx(row, rel=1e-4)


def test_the_network_learns_nothing_from_what_is_measured():
    """Neither its `.grad` nor its `requires_grad` change, whatever ran without gradients."""
    network = Frozen()
    network.head.weight.requires_grad_(False)
    cross_entropy(network(DATA[0]), DATA[1]).backward()
    before = {n: None if p.grad is None else p.grad.clone() for n, p in network.named_parameters()}
    product.rise_table(network, DATA)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (name != "head.weight")
        same = before[name] is None and parameter.grad is None
        assert same or torch.equal(before[name], parameter.grad)
