"""Calibration data: what is read, in which order, and what is refused."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hq_optuna.errors import DataError, HqOptunaError
from hq_optuna.network.batches import Batches, check_sample_axis, forward, move, read_batches
from hq_optuna.network.containers import tensors

X = torch.arange(40.0, dtype=torch.float64).reshape(10, 4)
Y = torch.arange(10) % 3


def with_value(value: float) -> Tensor:
    x = X.clone()
    x[7, 2] = value
    return x


class Pairs(Dataset[Any]):
    """A map-style dataset of whatever ``items`` holds."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Noisy(Dataset[Any]):
    """Random augmentation: another input at each reading."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return X[index] + torch.rand(4, dtype=torch.float64), Y[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(X[:6], Y[:6]), (X[6:], Y[6:])])


def joined(batches: Batches) -> tuple[Tensor, Tensor]:
    inputs = [tensor for batch in batches for tensor in tensors(batch.inputs)]
    return torch.cat(inputs), torch.cat([batch.labels for batch in batches])


# What is read.


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        ((X, Y), [4, 4, 2]),
        (TensorDataset(X, Y), [4, 4, 2]),
        (Pairs([(x, int(y)) for x, y in zip(X, Y, strict=True)]), [4, 4, 2]),
        (DataLoader(TensorDataset(X, Y), batch_size=3), [3, 3, 3, 1]),
        ([(X[:6], Y[:6]), (X[6:], Y[6:])], [6, 4]),
        (Stream(), [6, 4]),
        (iter([(X[:6], Y[:6]), (X[6:], Y[6:])]), [6, 4]),
    ],
    ids=["tensors", "dataset", "pairs", "loader", "list", "stream", "iterator"],
)
def test_every_form_of_the_same_data_is_read_in_order(data: Any, sizes: list[int]) -> None:
    batches = read_batches(data, batch_size=4)
    assert [batch.n for batch in batches] == sizes
    assert len(batches) == len(sizes)
    assert batches.n_samples == 10
    inputs, labels = joined(batches)
    assert torch.equal(inputs, X)
    assert torch.equal(labels, Y)


def test_tuples_of_inputs_are_cut_together() -> None:
    batches = read_batches(((X, X * 2), Y), batch_size=6)
    first, second = batches[1].inputs
    assert torch.equal(first, X[6:])
    assert torch.equal(second, X[6:] * 2)


def test_mappings_of_inputs_are_cut_together() -> None:
    batches = read_batches(({"ids": X, "mask": X > 3}, Y), batch_size=6)
    assert [batch.n for batch in batches] == [6, 4]
    assert torch.equal(batches[1].inputs["ids"], X[6:])
    assert torch.equal(batches[1].inputs["mask"], X[6:] > 3)


def test_a_loader_of_mappings_keeps_its_batches() -> None:
    data = [({"ids": X[:6]}, Y[:6]), ({"ids": X[6:]}, Y[6:])]
    assert [batch.n for batch in read_batches(data)] == [6, 4]


def test_lists_of_inputs_from_a_loader_become_tuples() -> None:
    data = DataLoader(Pairs([((x, x), y) for x, y in zip(X, Y, strict=True)]), batch_size=5)
    (a, b), _ = read_batches(data)[0].inputs, None
    assert torch.equal(a, X[:5])
    assert torch.equal(b, X[:5])


def test_batches_that_were_read_already_are_taken_as_they_are() -> None:
    batches = read_batches((X, Y))
    assert read_batches(batches) is batches


def test_an_iterator_is_read_once() -> None:
    read = []

    def once() -> Iterator[Any]:
        for part in (slice(0, 6), slice(6, 10)):
            read.append(part)
            yield X[part], Y[part]

    assert read_batches(once()).n_samples == 10
    assert len(read) == 2


def test_reading_leaves_the_random_state_as_found() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    read_batches(DataLoader(TensorDataset(X, Y), batch_size=5))
    assert torch.equal(torch.get_rng_state(), before)


# How the data are named.


def test_the_digest_is_that_of_the_content() -> None:
    digest = read_batches((X, Y), batch_size=4).digest()
    assert digest == read_batches((X.clone(), Y.clone()), batch_size=4).digest()
    assert digest == read_batches(TensorDataset(X, Y), batch_size=4).digest()
    assert len(digest) == 12


def test_the_digest_does_not_depend_on_how_a_tensor_lies_in_memory() -> None:
    transposed = X.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert read_batches((transposed, Y)).digest() == read_batches((X, Y)).digest()


def test_the_digest_changes_with_everything_a_score_depends_on() -> None:
    other_label = Y.clone()
    other_label[9] += 1
    digests = {
        read_batches(data, batch_size=size).digest()
        for data, size in [
            ((X, Y), 4),
            ((X, other_label), 4),
            ((with_value(-1.0), Y), 4),
            ((X.float(), Y), 4),
            ((X, Y.int()), 4),
            ((X.flip(0), Y.flip(0)), 4),
            ((X[:9], Y[:9]), 4),
            ((X.reshape(10, 2, 2), Y), 4),
            ((X, Y), 5),
        ]
    }
    assert len(digests) == 9


def test_the_same_bytes_in_another_type_have_another_digest() -> None:
    zeros = torch.zeros(10, 4)
    assert read_batches((zeros, Y)).digest() != read_batches((zeros.int(), Y)).digest()


def test_labels_of_booleans_and_halves_have_digests() -> None:
    digests = {read_batches((X, Y.gt(k))).digest() for k in (0, 1)}
    digests |= {read_batches((X.bfloat16() + k, Y)).digest() for k in (0, 1)}
    assert len(digests) == 4


# What is refused.


@pytest.mark.parametrize(
    "data",
    [
        (X[:0], Y[:0]),
        [],
        [(X[:0], Y[:0])],
        DataLoader(TensorDataset(X[:0], Y[:0])),
        Pairs([]),
        iter(()),
    ],
    ids=["tensors", "list", "empty batch", "loader", "dataset", "iterator"],
)
def test_empty_data_are_refused(data: Any) -> None:
    with pytest.raises(DataError, match=r"calibration data are empty\. Give at least one labelled"):
        read_batches(data)


def test_a_tensor_alone_has_no_labels() -> None:
    with pytest.raises(DataError, match=r"have no labels; give \(inputs, labels\)"):
        read_batches(X)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TensorDataset(X), "got list of 1. Unlabelled"),
        ([X[:5], X[5:]], "got Tensor. Unlabelled"),
        ([(X, Y, Y)], r"is a pair \(inputs, labels\); got tuple of 3"),
        ([{"image": X, "label": Y}], "got dict. Unlabelled"),
    ],
    ids=["dataset", "tensors", "triple", "mapping"],
)
def test_batches_that_are_no_pairs_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_batches(data)


@pytest.mark.parametrize("labels", [None, 3, [1, 2, 0], "cat"])
def test_labels_that_are_no_tensor_are_refused(labels: Any) -> None:
    # They would reach the loss unchecked and would be missing from the digest.
    with pytest.raises(DataError, match="label"):
        read_batches([(X[:3], labels)])


def test_a_batch_with_fewer_labels_than_inputs_is_refused() -> None:
    with pytest.raises(DataError, match="label"):
        read_batches([(X[:5], Y[:5]), (X[5:], Y[5:9])])


def test_fewer_labels_than_inputs_are_refused() -> None:
    with pytest.raises(DataError, match="10 inputs and 9 labels; give one label per input"):
        read_batches((X, Y[:9]))


def test_a_second_input_of_another_length_is_refused() -> None:
    with pytest.raises(DataError, match="one label per input"):
        read_batches(((X, X[:9]), Y))


def test_inputs_without_a_tensor_are_refused() -> None:
    with pytest.raises(DataError, match="holds no tensor as input"):
        read_batches([(["a", "b"], Y[:2])])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_with_their_batch(value: float) -> None:
    with pytest.raises(DataError, match=r"calibration inputs hold NaN or infinity \(batch 1\)"):
        read_batches((with_value(value), Y), batch_size=4)
    with pytest.raises(DataError, match=r"calibration labels hold NaN or infinity \(batch 1\)"):
        read_batches((X, with_value(value)), batch_size=4)


def test_nan_is_found_in_nested_inputs() -> None:
    with pytest.raises(DataError, match="NaN"):
        read_batches(({"a": X, "b": (X, with_value(float("nan")))}, Y))


def test_a_shuffling_loader_is_refused() -> None:
    x = torch.arange(200.0)[:, None]
    loader = DataLoader(TensorDataset(x, x[:, 0].long()), batch_size=50, shuffle=True)
    with pytest.raises(DataError, match=r"differently on a second reading.*shuffle=False"):
        read_batches(loader)


def test_random_augmentation_is_refused() -> None:
    with pytest.raises(DataError, match="random augmentation: scores must be repeatable"):
        read_batches(Noisy())


@pytest.mark.parametrize("data", [None, 5, nn.Linear(1, 1)])
def test_what_is_no_data_is_refused_by_its_name(data: Any) -> None:
    with pytest.raises(DataError, match=f"are a {type(data).__name__}; give .inputs, labels."):
        read_batches(data)


def test_messages_name_the_data_they_speak_of() -> None:
    with pytest.raises(DataError, match="The validation data are empty"):
        read_batches([], what="validation")
    assert issubclass(DataError, HqOptunaError)


# Trees of tensors.


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


@pytest.mark.parametrize(
    "inputs", [(X, Y[:, None]), [X, Y[:, None]], {"b": Y[:, None], "a": X}], ids=str
)
def test_a_network_is_called_by_position_or_by_keyword(inputs: Any) -> None:
    assert torch.equal(forward(Add(), inputs), X - Y[:, None])


def test_a_single_tensor_is_the_only_argument() -> None:
    assert torch.equal(forward(nn.Identity(), X), X)


def test_tensors_come_out_in_order_and_other_things_do_not() -> None:
    tree = {"b": [X, "text", (Y, 3)], "a": X * 2, "none": None}
    found = list(tensors(tree))
    assert len(found) == 3
    assert found[0] is X
    assert found[1] is Y


def test_moving_keeps_the_shape_of_the_tree_and_the_original() -> None:
    tree = {"a": (X, 3), "b": [Y, "text"]}
    moved = move(tree, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1] == 3
    assert moved["b"][0].is_meta
    assert moved["b"][1] == "text"
    assert not X.is_meta
    batches = read_batches((X, Y), batch_size=4).to(torch.device("meta"))
    assert [batch.n for batch in batches] == [4, 4, 2]
    assert batches[0].inputs.is_meta
    assert batches[0].labels.is_meta


def test_an_empty_batch_among_others_is_named() -> None:
    with pytest.raises(DataError, match=r"calibration data is empty \(batch 1\)"):
        read_batches([(X, Y), (X[:0], Y[:0])])


def test_named_tuples_stay_named() -> None:
    class Pair(NamedTuple):
        x: Tensor
        y: Tensor

    found = read_batches((Pair(X[:10], X[:10]), Y[:10]), batch_size=5)
    assert all(isinstance(batch.inputs, Pair) for batch in found)


def test_a_loader_may_fill_the_same_memory_anew() -> None:
    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            held = torch.empty(5, *X.shape[1:], dtype=X.dtype)
            for start in (0, 5):
                held.copy_(X[start : start + 5])
                yield held, Y[start : start + 5]

    found = read_batches(Loader())
    assert torch.equal(torch.cat([batch.inputs for batch in found]), X[:10])


def test_samples_are_those_of_the_first_input_that_has_some() -> None:
    inputs = {"scale": torch.tensor(2.0), "x": X[:5]}
    assert read_batches([(inputs, Y[:5])])[0].n == 5


class Swapped(nn.Module):
    """Gives the last axis to a norm as its channels."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def test_batch_norm_by_the_batch_leaves_open_where_samples_lie():
    """It mixes samples as a recurrent layer mixes time steps, and is no reason to refuse them."""
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    network = nn.Sequential(nn.Embedding(5, 4), Swapped(norm), nn.Linear(4, 3)).eval()
    labels = torch.arange(42).reshape(6, 7) % 3
    check_sample_axis(network, read_batches([(labels, labels)])[0])
