"""Kind J, what concerns data: it works as it is, or a sentence says why not and what to do."""

import itertools
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hq_optuna as hq
from hq_optuna.errors import DataError
from hq_optuna.network import batches
from hq_optuna.network.batches import Batch, check_sample_axis, read_batches
from hq_optuna.network.containers import clone, digest_of, is_finite, same, tensors
from hq_optuna.network.copies import preserve_network
from tests.reported import product

torch.manual_seed(0)
X, Y = torch.randn(48, 8), torch.randint(0, 3, (48,))
A = ((torch.rand(48, 48) < 0.1).float() + torch.eye(48)) / 4
LAYOUTS = {
    "coo": torch.Tensor.to_sparse,
    "not coalesced": lambda a: torch.sparse_coo_tensor(
        a.to_sparse().indices().repeat(1, 2), a.to_sparse().values().repeat(2) / 2, a.shape
    ),
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
}


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch, about layouts


class Network(nn.Module):
    def __init__(self, take=lambda x: x):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.take = take

    def forward(self, x):
        return self.c(self.b(self.a(self.take(x)).relu()).relu())


class Graph(Network):
    def __init__(self, adjacency=None, how="attribute"):
        super().__init__()
        if how == "buffer":
            self.register_buffer("adjacency", adjacency)
        elif how == "parameter":
            self.adjacency = nn.Parameter(adjacency)
        else:
            self.adjacency = adjacency

    def forward(self, x, adjacency=None):
        adjacency = self.adjacency if adjacency is None else adjacency
        return self.c(adjacency @ self.b(adjacency @ self.a(x).relu()).relu())


def score(network, data, **options):
    return product.score(network, data, 4, correction=False, rounding="nearest", **options)


# Sparse tensors and other layouts.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_matrices_may_be_anywhere(layout, tmp_path):
    """pytorch#71652, #16667: a buffer, a parameter, an attribute, an input: as if it were dense."""
    sparse = LAYOUTS[layout](A)
    dense = score(Graph(A), [(X, Y)])
    with torch.no_grad():
        by_hand = float(cross_entropy(Graph(A)(X), Y))
    assert product.float_loss(Graph(), [((X, sparse), Y)]) == pytest.approx(by_hand, abs=1e-5)
    assert score(Graph(), [((X, sparse), Y)]) == pytest.approx(dense, rel=1e-4)
    for how in ("buffer", "parameter", "attribute"):
        network = Graph(sparse, how)
        assert score(network, [(X, Y)]) == pytest.approx(dense, rel=1e-4)
        assert network.adjacency.layout == sparse.layout
    found = product.search(Graph(sparse, "buffer"), [(X, Y)], limit=4)
    other = Graph(LAYOUTS[layout](torch.ones(48, 48)), "buffer")
    loaded = product.saved_and_loaded(found, other, tmp_path)
    assert torch.equal(loaded(X), found.network(X))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_tensors_are_compared_named_and_put_back(layout):
    """Their numbers count, also NaN among them, and a network's buffer is as it was."""
    sparse, other = LAYOUTS[layout](A), LAYOUTS[layout](A * 2)
    assert same(sparse, clone(sparse))
    assert not same(sparse, other)
    assert not same(sparse, A)
    assert len({digest_of([("", x)]) for x in (sparse, clone(sparse), other, A)}) == 3
    assert not is_finite(LAYOUTS[layout](torch.where(A > 0.2, torch.nan, A)))
    network = Graph(sparse, "buffer")
    with preserve_network(network):
        network.adjacency.values().mul_(3) if layout != "not coalesced" else None
        network.adjacency.mul_(3)
    assert same(network.adjacency, LAYOUTS[layout](A))


def test_sparse_data_of_all_samples_are_refused_and_batches_of_them_are_not():
    """They cannot be cut; what can be wrong with them is found."""
    with pytest.raises(DataError, match=r"cannot be cut.*Give batches"):
        read_batches((X.to_sparse(), Y))
    network = Network(take=torch.Tensor.to_dense)
    assert score(network, [(X.to_sparse(), Y)]) == score(Network(), [(X, Y)])
    with pytest.raises(DataError, match=r"inputs hold NaN or infinity \(batch 1\)"):
        read_batches([(X.to_sparse(), Y), ((X / 0).to_sparse(), Y)])


def test_training_refuses_a_sparse_buffer_before_it_works():
    """No checkpoint could hold it; the way out is an attribute."""
    plan = product.training([(X, Y)], every=1)
    with pytest.raises(DataError, match=r"'adjacency'.*plain attribute"):
        product.opened(Graph(A.to_sparse(), "buffer"), [(X, Y)], **plan)


def test_nested_and_conjugate_tensors_are_data_as_others_are():
    """Jagged tensors have samples; strided nested ones have no sizes, and are refused."""
    jagged = torch.nested.nested_tensor([X[:20], X[20:]], layout=torch.jagged)
    assert read_batches([(jagged, Y[:2])])[0].n == 2
    complex_ = torch.complex(X, X).conj()
    assert score(Network(take=lambda x: x.real), [(complex_, Y)]) == score(Network(), [(X, Y)])
    nested = torch.nested.nested_tensor([X[:20], X[20:]])
    with pytest.raises(DataError, match=r"without sizes or strides.*layout=torch.jagged"):
        read_batches([(nested, Y[:2])])


TYPES = "bool uint8 int32 int64 float16 bfloat16 float64 complex64 complex32 float8_e4m3fn uint16"


@pytest.mark.parametrize("name", TYPES.split())
def test_inputs_may_be_numbers_of_any_type(name):
    """The network turns them into floats; the loss is that by hand, a change is another digest."""
    dtype = getattr(torch, name)
    given = (X > 0) if name == "bool" else (3 * X).abs().to(dtype)
    network = Network(take=lambda x: (x.real if x.is_complex() else x).float())
    with torch.no_grad():
        by_hand = float(cross_entropy(network(given), Y))
    assert product.float_loss(network, (given, Y)) == pytest.approx(by_hand, rel=1e-5)
    changed = torch.cat([given[1:2], given[1:]])
    assert read_batches((given, Y)).digest() != read_batches((changed, Y)).digest()


def test_nan_in_complex_numbers_is_found_and_a_mask_is_let_pass():
    """−inf beside nothing but 0 is added to attention scores; −inf among others is a mistake."""
    with pytest.raises(DataError, match=r"NaN or infinity \(batch 1\)"):
        read_batches([(torch.complex(X, X), Y), (torch.complex(X, X / 0), Y)])
    mask = torch.zeros(48, 8).masked_fill(torch.arange(8) > 5, -torch.inf)
    assert read_batches(((X, mask), Y)).n_samples == 48
    with pytest.raises(DataError, match="NaN or infinity"):
        read_batches(((X, mask + 1), Y))


def test_numpy_arrays_and_uncut_lists_are_refused():
    """They would be left out of checks and digest, or go whole with each batch."""
    for data in ([(X.numpy(), Y.numpy())], [(((X, Y.numpy()),), Y)], [(X, Y.numpy())]):
        with pytest.raises(DataError, match=r"NumPy arrays. Give tensors: torch.from_numpy"):
            read_batches(data)
    with pytest.raises(DataError, match="a list of 48 values that are no tensors"):
        read_batches(({"x": X, "lengths": [8] * 48}, Y))
    with pytest.raises(DataError, match="48 or single numbers inputs and 48 labels"):
        read_batches(({"x": X, "scale": torch.tensor(1.0)}, Y))


# Inference mode.


@pytest.mark.parametrize("scorer", ["gauss_newton", "hutchinson", "diagonal"])
def test_tensors_of_inference_mode_are_as_good_as_others(scorer):
    """Data or weights that were made in inference mode, and everything inside of it."""
    with torch.inference_mode():
        data, network = (X.clone(), Y.clone()), Network()
    plain = score(Network(), (X, Y), scorer=scorer)
    assert score(Network(), data, scorer=scorer) == plain
    assert score(Network(), [data], scorer=scorer) == score(Network(), [(X, Y)], scorer=scorer)
    assert score(network, data, scorer=scorer) == plain
    with torch.inference_mode():
        assert score(network, data, scorer=scorer) == plain
    assert network.a.weight.is_inference()


# Streams.


class Once:
    """Can be read once, and is no iterator."""

    def __init__(self):
        self.parts = zip(X.split(16), Y.split(16), strict=True)

    def __iter__(self):
        return self.parts


@pytest.mark.parametrize(
    "make", [Once, lambda: map(tuple, Once()), lambda: (part for part in Once())]
)
def test_what_can_be_read_once_is_read_once(make):
    """An iterator, or an object around one: the same score as of a list."""
    assert score(Network(), make()) == score(
        Network(), [*zip(X.split(16), Y.split(16), strict=True)]
    )


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield X[:16], Y[:16]


ENDLESS = {
    "cycle": lambda: itertools.cycle([(X, Y)]),
    "repeat": lambda: itertools.repeat((X, Y)),
    "dataset": Endless,
    "loader": lambda: DataLoader(Endless(), batch_size=None),
    "generator": lambda: (part for part in Endless()),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_never_ends_is_refused(kind, monkeypatch):
    """Told by its class, by many batches without a length, for training too."""
    monkeypatch.setattr(batches, "MOST_BATCHES", 100)
    monkeypatch.setattr("hq_optuna.training.data.MOST_STEPS", 100)
    with pytest.raises(DataError, match=r"calibration data have no end.*itertools\.islice"):
        product.opened(Network(), ENDLESS[kind]())
    if kind in ("dataset", "loader"):
        with pytest.raises(DataError, match=r"training data have no end.*itertools\.islice"):
            product.training(ENDLESS[kind](), every=1)
    assert read_batches(itertools.islice(ENDLESS[kind](), 3)).n_samples in (48, 144)


def test_what_does_not_fit_into_memory_is_refused_before_memory_is_full(monkeypatch):
    """Half of what is free, in bytes, sparse tensors by what they hold."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**16))
    assert read_batches(itertools.islice(Endless(), 20)).n_samples == 320
    with pytest.raises(DataError, match="do not fit into memory"):
        read_batches(itertools.islice(Endless(), 200))
    with pytest.raises(DataError, match="do not fit into memory"):
        read_batches((A.to_sparse(), Y) for _ in range(200))
    assert read_batches([(X[:16], Y[:16])] * 200).n_samples == 3200  # which is there already


def test_reading_leaves_all_random_states_as_found():
    """A loader with a generator of its own draws from it."""
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, generator=generator)
    before = generator.get_state(), torch.get_rng_state()
    read_batches(loader)
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("scorer", ["gauss_newton", "fisher", "hutchinson", "diagonal"])
def test_one_sample_is_enough(scorer):
    """A mean over one sample is that sample's loss."""
    with torch.no_grad():
        by_hand = float(cross_entropy(Network()(X[:1]), Y[:1]))
    for data in ((X[:1], Y[:1]), [(X[:1], Y[:1])]):
        assert product.float_loss(Network(), data) == pytest.approx(by_hand, rel=1e-6)
        assert score(Network(), data, scorer=scorer) == score(Network(), data, scorer=scorer)


# Where samples lie.


def many(*shape):
    return torch.randint(0, 3, shape)


R, IMAGE = torch.randn, torch.randn(3, 9, 9)
BOXES = [{"boxes": R(n, 4), "labels": many(n)} for n in (3, 5)]
COUNTED = {
    "samples": ([(R(8, 4), many(8))], [8]),
    "tokens": ([(many(8, 16), many(8, 16))], [8]),
    "flat labels": ([(many(8, 16), many(128)), (many(1, 16), many(16))], [8, 1]),
    "sequence first": (
        [(R(16, 8, 5), many(8)), (R(8, 8, 5), many(8)), (R(9, 3, 5), many(3))],
        [8, 8, 3],
    ),
    "tokens first": ([(many(16, 8), many(8))], [8]),
    "sequence first, masks": (
        [({"x": many(16, 8), "mask": R(16, 16), "pad": many(8, 16) > 0}, many(8))],
        [8],
    ),
    "edges first": ([({"edges": many(2, 30), "x": R(8, 4)}, many(8))], [8]),
    "number first": ([({"scale": torch.tensor(1.0), "x": R(8, 4)}, many(8))], [8]),
    "graph": ([((R(32, 6), R(32, 32)), many(32))], [32]),
    "detector": ([(([IMAGE, IMAGE],), BOXES)], [2]),
    "images of sizes": ([(([IMAGE, IMAGE[:, 2:]],), many(2))], [2]),
    "feature maps": ([(([R(8, 4), R(8, 9)],), [many(8), many(8)])], [8]),
    "several labels": ([(R(16, 8, 4), {"a": many(8), "b": many(8, 2)})], [8]),
    "segmentation": ([(R(4, 3, 8, 8), many(4, 8, 8))], [4]),
    "packed": ([(pack_sequence([R(2, 3), R(5, 3)], enforce_sorted=False), many(2))], [2]),
    "whole, sequence first": ((R(16, 70, 5), many(70)), [32, 32, 6]),
    "said": ([Batch((R(37, 6), many(2, 80), many(37)), many(8), 8)], [8]),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_samples_are_counted_by_labels_and_not_by_the_first_tensor(kind):
    """As many as there are labels, along one axis in all batches."""
    data, expected = COUNTED[kind]
    assert [batch.n for batch in read_batches(data)] == expected


UNCLEAR = {
    "two labels each, or sequence first": ([(R(4, 8, 5), many(8))], {0: 4, 1: 8}),
    "one sample, or one step": ([(many(1, 16), many(16))], {0: 1, 1: 16}),
    "boxes of all images": ([(R(4, 3, 32, 32), R(17, 6))], {0: 4}),
    "nodes of graphs": ([((R(37, 6), many(2, 80), many(37)), many(8))], {}),
    "features": ([(R(5, 4), many(4))], {0: 5, 1: 4}),
    "another axis in another batch": ([(R(8, 8, 4), many(8)), (R(5, 6, 8), many(8))], {}),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_what_is_unclear_is_refused_or_said(kind):
    """The sentence names shapes and option; with ``sample_axis`` it is counted along that."""
    data, told = UNCLEAR[kind]
    first = next(tensors(data[0])).shape[0]
    with pytest.raises(DataError, match=rf"inputs have the shapes \({first}, .*sample_axis=0"):
        read_batches(data)
    for axis, n in told.items():
        assert read_batches(data, sample_axis=axis)[0].n == n


class Sequences(nn.Module):
    """Token classes of a recurrent network or attention, which mix time steps."""

    def __init__(self, kind, batch_first, flat):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head, self.flat = nn.Embedding(3, 8), nn.Linear(8, 3), flat
        self.mix = {
            "gru": lambda: nn.GRU(8, 8, batch_first=batch_first),
            "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first),
        }[kind]()

    def forward(self, tokens):
        mixed = self.mix(self.embed(tokens))
        z = self.head(mixed[0] if isinstance(mixed, tuple) else mixed)
        return z.flatten(0, 1) if self.flat else z.transpose(1, 2)


@pytest.mark.parametrize("kind", ["gru", "attention"])
@pytest.mark.parametrize("flat", [False, True])
def test_time_steps_are_not_taken_for_samples(kind, flat):
    """A language model as in PyTorch's tutorial: labels (T, N) or (T·N,) of inputs (T, N).

    Shapes fit both; the network tells, and what it tells is refused or said.
    """
    x, y = many(7, 4), many(28) if flat else many(7, 4)
    first = Sequences(kind, batch_first=True, flat=flat).eval()
    check_sample_axis(first, read_batches([(x, y)])[0])
    other = Sequences(kind, batch_first=False, flat=flat).eval()
    with pytest.raises(DataError, match=r"4 samples seem to lie there.*sample_axis=1"):
        product.opened(other, [(x, y)])
    search = product.opened(other, [(x, y)], sample_axis=1)
    assert search.objective.data[0].n == 4


def test_sequences_first_have_the_cost_and_score_of_batches_first():
    """The same numbers in another order: the same MACs a sample, and the same rise."""

    class Recurrent(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            torch.manual_seed(1)
            self.first, self.a, self.b = batch_first, nn.Linear(8, 8), nn.Linear(8, 3)
            self.gru = nn.GRU(8, 8, batch_first=batch_first)

        def forward(self, x):
            return self.b(self.gru(self.a(x))[0].mean(1 if self.first else 0))

    x, y = R(24, 12, 8), many(24)
    turned = x.transpose(0, 1).contiguous()
    assert product.macs(Recurrent(False), (turned, y))[0] == {
        **{"a": 12 * 64, "b": 24, "gru.ih_l0": 12 * 3 * 64, "gru.hh_l0": 12 * 3 * 64}
    }
    plain = score(Recurrent(True), (x, y))
    assert score(Recurrent(False), (turned, y)) == pytest.approx(plain, rel=1e-4)
    plan = product.training((turned, y), every=1)["training"]
    data = hq.TrainingSettings(epochs=1, batch_size=6).data(plan.data, None)
    batch, _ = next(data.epoch(torch.Generator().manual_seed(0)))
    assert batch.inputs.shape == (12, 6, 8)
    assert batch.n == 6
