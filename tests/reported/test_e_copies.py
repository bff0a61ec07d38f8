"""Kind E: code that holds the original network, or what it computed, is found out."""

import functools
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from tests.reported import product
from tests.small_networks import seeded

DATA = (
    torch.randn(64, 8, generator=seeded(0)),
    torch.randint(0, 3, (64,), generator=seeded(1)),
)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def hooked():
    """A hook over the original keeps a feature that forward reads."""

    class Hooked(Plain):
        def __init__(self):
            super().__init__()
            self.kept = {}
            self.b.register_forward_hook(lambda m, x, y: self.kept.update(b=y.detach()))

        def forward(self, x):
            self.b(self.a(x).relu())
            return self.c(self.kept["b"].relu())

    return Hooked()


def hooked_and_run():
    network = hooked()
    network(DATA[0])
    return network


def closed_over():
    """Its forward is a function that holds it."""
    net = Plain()
    net.forward = lambda x: net.c(net.b(net.a(x).relu()).relu())
    return net


def one_layer_held():
    """One layer alone is reached through a weak reference, which copies do not follow."""

    class Held(Plain):
        def __init__(self):
            super().__init__()
            self.__dict__["there"] = weakref.ref(self.b)

        def forward(self, x):
            return self.c(self.there()(self.a(x).relu()).relu())

    net = Held()
    net.keep = None
    return net


def half_held():
    """A layer is called twice, once as the original's."""
    net = Plain()
    other = net.b
    net.b.register_forward_hook(lambda m, x, y: y + 0.1 * linear(x[0], other.weight))
    return net


def frozen_and_held():
    """As a closure, where no parameter takes gradients."""
    net = closed_over()
    net.requires_grad_(False)
    return net


def without_gradients():
    """As a closure, under no_grad throughout."""
    net = Plain()

    @torch.no_grad()
    def forward(x):
        return net.c(net.b(net.a(x).relu()).relu())

    net.forward = forward
    return net


def copies_itself_badly():
    """A __deepcopy__ that returns a network of the same layers."""

    class Shared(Plain):
        def __deepcopy__(self, memo):
            other = Shared.__new__(Shared)
            nn.Module.__init__(other)
            other.a, other.b, other.c = self.a, self.b, self.c
            return other

    return Shared()


class Merged(nn.Linear):
    """Computes another weight at its first pass and uses it ever after, as merged adapters do."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.merged = None

    def forward(self, x):
        if self.merged is None:
            self.merged = self.weight * 1.0
        return linear(x, self.merged, self.bias)


def merges():
    net = Plain()
    net.b = Merged(16, 16)
    return net


def merged_before():
    net = merges()
    with torch.no_grad():
        net(DATA[0])
    return net


HOLDING = [
    *(hooked, hooked_and_run, closed_over, one_layer_held, half_held, frozen_and_held),
    *(without_gradients, copies_itself_badly),
]
CAUSE = r"hook|closure|replaced|cop(y|ies|ied)|original"


@pytest.mark.parametrize("make", HOLDING)
def test_a_network_whose_copy_uses_the_original_is_refused(make):
    """Hooks, closures, weak references: bits would not act, so it is refused with the cause."""
    with pytest.raises(ValueError, match=CAUSE) as caught:
        product.opened(make(), DATA)
    assert product.is_refusal(caught.value)


@pytest.mark.parametrize("make", [merges, merged_before])
def test_a_weight_that_is_kept_from_the_first_pass_is_refused(make):
    """What was merged once stays in float whatever the bits are: refused as such."""
    with pytest.raises(ValueError, match=r"'b'.*is kept") as caught:
        product.opened(make(), DATA)
    assert product.is_refusal(caught.value)


def makes_its_copies_anew():
    """A __deepcopy__ that builds a network and loads the weights: it knows of no rounding."""

    class Anew(Plain):
        def __deepcopy__(self, memo):
            other = type(self)()
            other.load_state_dict(self.state_dict(), strict=False)
            return other

    return Anew()


def test_a_network_that_makes_its_copies_anew_is_refused():
    """Its copies would be in float whatever the bits: refused with the method that does it."""
    with pytest.raises(ValueError, match="__deepcopy__") as caught:
        product.opened(makes_its_copies_anew(), DATA)
    assert product.is_refusal(caught.value)


def bound_method():
    net = Plain()
    net.forward = types.MethodType(Plain.forward, net)
    return net


def partial_of_a_method():
    net = Plain()
    net.forward = functools.partial(Plain.forward, net)
    return net


def hooks_that_take_the_module():
    net = Plain()
    net.b.register_forward_hook(lambda m, x, y: y + 0 * m.weight.sum())
    net.a.register_forward_pre_hook(lambda m, x: (x[0] * 1.0,))
    return net


def list_of_layers():
    class Listed(Plain):
        def __init__(self):
            super().__init__()
            self.__dict__["order"] = [self.a, self.b]

        def forward(self, x):
            for layer in self.order:
                x = layer(x).relu()
            return self.c(x)

    return Listed()


@pytest.mark.parametrize(
    "make", [bound_method, partial_of_a_method, hooks_that_take_the_module, list_of_layers]
)
def test_what_copies_follow_is_searched_as_the_plain_network(make):
    """Bound methods, partials, hooks that use their argument, plain lists: right, bit for bit."""
    network = make()
    before = [p.clone() for p in network.parameters()]
    changed, _ = product.quantized(network, DATA, 3)
    by_hand, _ = product.quantized(Plain(), DATA, 3)
    with torch.no_grad():
        assert torch.equal(changed(DATA[0]), by_hand(DATA[0]))
        assert torch.equal(network(DATA[0]), Plain()(DATA[0]))
    assert all(map(torch.equal, before, network.parameters()))


def test_an_answer_leaves_the_original_alone():
    """Weights of the answer are its own: training them moves nothing of the network."""
    network = Plain()
    found = product.search(network, DATA)
    before = network(DATA[0]).detach()
    for parameter in found.network.parameters():
        parameter.data.add_(1.0)
    cross_entropy(found.network(DATA[0]), DATA[1]).backward()
    assert torch.equal(network(DATA[0]), before)
    assert all(p.grad is None for p in network.parameters())


class Scaled(Plain):
    """A number in an attribute, which no state dict holds; and one that forward counts."""

    def __init__(self, by):
        super().__init__()
        self.by, self.calls = by, 0

    def forward(self, x):
        self.calls += 1
        return self.by * super().forward(x)


def test_a_number_in_an_attribute_belongs_to_the_network(tmp_path):
    """Loaded into, or resumed with, a network of another number: refused by its name."""
    url = f"sqlite:///{tmp_path}/s.db"
    network = Scaled(2.0)
    found = product.search(network, DATA, storage=url, name="s")
    network(DATA[0])  # counts, which says nothing of what it computes
    again = product.saved_and_loaded(found, network, tmp_path / "answer")
    assert torch.equal(again(DATA[0]), found.network(DATA[0]))
    product.search(network, DATA, storage=url, name="s")
    with pytest.raises(ValueError, match=r"'by' is 2\.0, and here it is 3\.0"):
        product.saved_and_loaded(found, Scaled(3.0), tmp_path / "answer")
    with pytest.raises(ValueError, match="the network's weights"):
        product.search(Scaled(3.0), DATA, storage=url, name="s")


def test_a_layer_without_effect_is_named():
    """Called, and its result thrown away: searched, with a sentence that names it."""

    class Idle(Plain):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(8, 4)

        def forward(self, x):
            self.idle(x)
            return super().forward(x)

    search = product.opened(Idle(), DATA)
    assert any("'idle'" in each and "no effect" in each for each in search.objective.warnings)
