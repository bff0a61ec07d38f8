"""Kind C: what holds tensors reaches network, loss and checks as it was."""

import dataclasses
import tempfile
import types
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import register_pytree_node

import hq_optuna as hq
from hq_optuna.errors import DataError, NetworkError
from hq_optuna.network.containers import clone, map_tensors, tensors
from tests.reported import product

torch.manual_seed(0)
X, Y = torch.randn(48, 8), torch.randint(0, 3, (48,))


class Network(nn.Module):
    def __init__(self, wrap=lambda z: z, take=lambda x: x):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.wrap, self.take = wrap, take

    def forward(self, x):
        return self.wrap(self.c(self.b(self.a(self.take(x)).relu()).relu()))


def plain_loss(outputs, labels):
    return cross_entropy(outputs, labels)


def score(network, data, loss=plain_loss):
    return product.score(network, data, 4, loss, correction=False, rounding="nearest")


PLAIN = score(Network(), (X, Y))


class Ordered(OrderedDict):
    """Holds the same tensor as item and attribute, as Hugging Face's outputs do."""

    def __init__(self, logits):
        super().__init__(logits=logits)
        self.logits = logits


class Attributes(dict):
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class Frozen(dict):
    def __setitem__(self, key, value):
        raise TypeError("frozen")

    logits = property(lambda self: self["logits"])


class User(UserDict):
    logits = property(lambda self: self["logits"])


class Around(Mapping):
    def __init__(self, logits):
        self.held = {"logits": logits}

    def __getitem__(self, key):
        return self.held[key]

    def __iter__(self):
        return iter(self.held)

    def __len__(self):
        return len(self.held)

    logits = property(lambda self: self["logits"])


class Items(list):
    logits = property(lambda self: self[0])


@dataclasses.dataclass
class Data:
    logits: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenData:
    logits: Tensor


class Object:
    def __init__(self, logits):
        self.logits, self.me = logits, [self]  # a circle


class Slots:
    __slots__ = ("logits", "never_set")

    def __init__(self, logits):
        self.logits = logits


class Alone(Object):
    """Copies itself by returning itself."""

    def __copy__(self):
        return self


class Shared(Object):
    """All of its kind share one ``__dict__``."""

    state: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, logits):
        self.__dict__ = self.state
        super().__init__(logits)


class Named(NamedTuple):
    logits: Tensor
    note: str = "kept"


class Registered(Object):
    pass


register_pytree_node(Registered, lambda r: ([r.logits], None), lambda new, _: Registered(*new))

CLASSES = {
    **{kind.__name__: kind for kind in (Ordered, Around, Data, FrozenData, Object, Slots, Alone)},
    **{kind.__name__: kind for kind in (Named, Registered)},
    **{k.__name__: lambda z, k=k: k(logits=z) for k in (Attributes, Frozen, User)},
    "Items": lambda z: Items([z]),
    "SimpleNamespace": lambda z: types.SimpleNamespace(logits=z),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_outputs_keep_their_class_and_attributes(kind):
    """llm-compressor#2056: the loss reads ``.logits``; the score is that of a plain tensor."""

    def loss(outputs, labels):
        assert type(outputs) is type(CLASSES[kind](X))
        if kind == "Ordered":
            assert outputs["logits"] is outputs.logits
        return cross_entropy(outputs.logits, labels)

    assert score(Network(CLASSES[kind]), (X, Y), loss) == PLAIN


CONTAINERS = {
    "Categorical": (
        lambda z: torch.distributions.Categorical(logits=z),
        lambda out: out.logits,
    ),
    "return_types": (lambda z: torch.return_types.max((z, z.argmax(1))), lambda out: out.values),
    "defaultdict": (lambda z: defaultdict(list, z=z), lambda out: out["z"] + len(out["new"])),
    "deque": (lambda z: deque([z], 3), lambda out: out[0] * (out.maxlen == 3)),
    "read only": (lambda z: types.MappingProxyType({"z": z}), lambda out: out["z"]),
    "lengths": (
        lambda z: [z[:5], z[5:6], {"rest": [z[6:]]}],
        lambda out: torch.cat([*tensors(out)]),
    ),
    "tensor": (lambda z: setattr(z, "factor", torch.ones(1)) or z, lambda out: out * out.factor),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_of_python_and_pytorch_stay_what_they_are(kind):
    """Named results, default factories, lengths, tensors with attributes: as a plain tensor."""
    wrap, unwrap = CONTAINERS[kind]

    def loss(outputs, labels):
        return cross_entropy(unwrap(outputs), labels)

    assert score(Network(wrap), (X, Y), loss) == pytest.approx(PLAIN, rel=1e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_inputs_keep_their_class_and_attributes(kind):
    """A batch in a class of the user's is the network's one argument, alone or in a tuple."""
    made = CLASSES[kind]
    network = Network(take=lambda given: given.logits)
    for one in (made, lambda x: (made(x),)):
        if kind == "Items" and one is made:  # one tensor, as good as a list of arguments
            continue
        batches = [(one(X[:32]), Y[:32]), (one(X[32:]), Y[32:])]
        assert score(network, batches) == PLAIN


def test_a_named_tuple_is_as_many_arguments_as_the_network_takes():
    """``forward(batch)`` gets the named tuple, ``forward(x, scale)`` its two values."""

    class Two(NamedTuple):
        x: Tensor
        scale: Tensor

    class Both(Network):
        def forward(self, x, scale):
            return super().forward(x * scale)

    data = Two(X, torch.full((48, 1), 2.0)), Y
    plain = score(Network(), (2 * X, Y))
    assert score(Both(), data) == plain
    one = Network(take=lambda given: given.x * given.scale)
    assert score(one, data) == plain


@pytest.mark.parametrize("make", [Data, lambda y: {"a": y, "b": [y, y]}, lambda y: (y, y)])
def test_labels_may_be_in_anything_and_are_cut_with_the_inputs(make):
    """Several labels a sample, as ``(inputs, labels)`` of all samples and in batches."""

    def loss(outputs, labels):
        return cross_entropy(outputs, next(tensors(labels)))

    assert score(Network(), (X, make(Y)), loss) == PLAIN
    batches = [(X[:32], make(Y[:32])), (X[32:], make(Y[32:]))]
    assert score(Network(), batches, loss) == PLAIN


def test_packed_sequences_go_in_and_out():
    """Their batch sizes stay on the CPU, and their samples are the sequences."""
    texts = [torch.randn(n, 8) for n in (5, 3, 3, 1)]
    packed = pack_sequence(texts)
    moved = map_tensors(packed, lambda x: x.to("meta"))
    assert moved.data.is_meta
    assert moved.batch_sizes is packed.batch_sizes
    network = Network(take=lambda p: p.data, wrap=lambda z: packed._replace(data=z))

    def loss(outputs, labels):
        assert type(outputs) is type(packed)
        return cross_entropy(outputs.data, torch.arange(12) % 3) + 0 * labels.sum()

    search = product.opened(network, [(packed, Y[:4])], loss)
    assert search.objective.data[0].n == 4
    with torch.no_grad():
        by_hand = cross_entropy(Network()(packed.data), torch.arange(12) % 3)
    assert product.float_loss(network, [(packed, Y[:4])], loss) == pytest.approx(float(by_hand))


@pytest.mark.parametrize("kind", CLASSES)
def test_checks_look_into_all_of_them(kind):
    """mlx-lm#1759: random and NaN outputs are refused, whatever they are packed in."""

    def loss(outputs, labels):
        return cross_entropy(outputs.logits, labels)

    drawn = Network(lambda z: CLASSES[kind](nn.functional.dropout(z, 0.5, True)))
    with pytest.raises(NetworkError, match="random"):
        product.opened(drawn, (X, Y), loss)
    lost = Network(lambda z: CLASSES[kind](z * torch.nan))
    with pytest.raises(NetworkError, match="NaN"):
        product.opened(lost, (X, Y), loss)


def test_the_data_digest_sees_what_is_in_them():
    """Two searches whose data differ in a dataclass, or in a number beside tensors, are two."""
    found = {
        product.opened(
            Network(take=lambda d: d[0].logits), [(((Data(x), n),), Y)]
        ).objective.data.digest()
        for x, n in ((X, 1), (X + 1, 1), (X, 2))
    }
    assert len(found) == 3


def test_training_takes_them_too():
    """Inputs and outputs in classes are shuffled, cut, moved and trained on."""
    plan = hq.TrainingPlan(
        data=(Data(X), Y),
        every=1,
        final=None,
        settings=hq.TrainingSettings(epochs=1, label_weight=1),
    )
    network = Network(Ordered, take=lambda given: given.logits)
    found = product.search(
        network,
        (Data(X), Y),
        lambda outputs, labels: cross_entropy(outputs.logits, labels),
        training=plan,
        limit=4,
        artifacts=tempfile.mkdtemp(),
    )
    assert any("epochs" in str(trial.user_attrs) for trial in found.study.trials)


class Opaque(Mapping):
    """Hides what it holds in a function."""

    __slots__ = ()
    found: dict[str, Any] = {}  # noqa: RUF012

    def __getitem__(self, key):
        return Opaque.found[key]

    def __iter__(self):
        return iter(Opaque.found)

    def __len__(self):
        return len(Opaque.found)


REFUSED = {
    "set": (lambda z: {z, z + 1}, "A set .* in no order"),
    "generator": (lambda z: (part for part in z), "A generator .* read only once"),
    "Opaque": (
        lambda z: Opaque.found.update(z=z) or Opaque(),
        "Opaque in .*register_pytree_node",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_rebuilt_is_refused_by_the_name_of_its_class(kind):
    """At the door, and with the remedy."""
    make, words = REFUSED[kind]
    with pytest.raises(DataError, match=words):
        product.opened(Network(make), (X, Y), lambda out, y: next(iter(out)).sum())


def test_what_the_user_holds_is_not_written_into():
    """A mapping around a dict, a shared ``__dict__``: the copy changes, the original does not."""
    for kind, made in {**CLASSES, "Shared": Shared}.items():
        original = made(X)
        held = original.logits
        new = map_tensors(original, lambda x: x + 1)
        assert torch.equal(new.logits, X + 1), kind
        assert original.logits is held, kind
        assert held is X, kind


def test_nothing_changes_where_no_tensor_does():
    """The same object comes back, shared tensors stay shared, circles end, modules are leaves."""
    tree = {"a": [X, X], "b": Object(X), "c": nn.Linear(2, 2), "size": X.shape}
    assert map_tensors(tree, lambda x: x) is tree
    new = map_tensors(tree, clone)
    assert new["a"][0] is new["a"][1] is new["b"].logits
    assert new["b"].me[0] is new["b"]
    assert new["c"] is tree["c"]
    assert new["size"] is tree["size"]
    untouched = Data(torch.zeros(1)), [1, 2]
    assert map_tensors([untouched, Y], lambda x: x + 1 if x is Y else x)[0] is untouched
