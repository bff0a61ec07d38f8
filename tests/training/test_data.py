"""Training data: repeatable order, whole batches, and refusals."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from hq_optuna.errors import DataError
from hq_optuna.training import TrainingData
from hq_optuna.training.data import blended, epoch_seed, seeded
from tests.small_networks import seeded as generator

X, Y = torch.arange(10.0)[:, None], torch.arange(10)


def read(data: TrainingData, seed: int = 0) -> list[list[int]]:
    with seeded(seed):
        return [batch.labels.tolist() for batch, _ in data.epoch(generator(seed))]


@pytest.mark.parametrize("data", [(X, Y), TensorDataset(X, Y)])
def test_epochs_are_shuffled_by_their_seed_into_whole_batches(data):
    training = TrainingData(data, batch_size=4)
    assert training.steps == 2 and training.batch_size == 4
    first = read(training)
    assert [len(batch) for batch in first] == [4, 4]
    assert len({label for batch in first for label in batch}) == 8  # no sample twice
    assert read(training) == first != read(training, seed=1)


def test_inputs_stay_with_their_labels_in_trees_too():
    training = TrainingData((((X, {"a": 2 * X})), Y), batch_size=5)
    for batch, _ in training.epoch(generator(0)):
        assert torch.equal(batch.inputs[0][:, 0], batch.labels.float())
        assert torch.equal(batch.inputs[1]["a"][:, 0], 2 * batch.labels.float())


def test_fewer_samples_than_a_batch_make_one_batch():
    assert TrainingData((X, Y), batch_size=64).batch_size == 10
    assert [len(b) for b in read(TrainingData((X, Y), batch_size=64))] == [10]


def test_a_shuffling_loader_is_repeatable():
    training = TrainingData(DataLoader(TensorDataset(X, Y), 5, shuffle=True), batch_size=99)
    assert training.steps == 2 and training.batch_size == 5
    assert read(training) == read(training) != read(training, seed=1)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_loader_that_shuffles_by_a_generator_of_its_own_is_repeatable(sampled):
    own, pairs = generator(3), TensorDataset(X, Y)
    loader = DataLoader(pairs, 5, shuffle=True, generator=own)
    if sampled:
        loader = DataLoader(pairs, 5, sampler=RandomSampler(pairs, generator=own))
    training = TrainingData(loader, batch_size=99)
    state = own.get_state()
    assert read(training) == read(training) != read(training, seed=1)
    assert torch.equal(own.get_state(), state)


def test_a_list_of_batches_is_read_as_it_is():
    training = TrainingData([(X[:6], Y[:6]), (X[6:], Y[6:])], batch_size=99)
    assert read(training) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    assert training.batch_size == 6


def test_augmentation_changes_inputs_by_the_epochs_generator_and_nothing_else():
    def noisy(x, g):
        return x + torch.rand(x.shape, generator=g)

    training = TrainingData((X, Y), batch_size=5, augment=noisy)

    def inputs(seed: int) -> torch.Tensor:
        return torch.cat([batch.inputs for batch, _ in training.epoch(generator(seed))])

    assert torch.equal(inputs(0), inputs(0)) and not torch.equal(inputs(0), inputs(1))
    assert torch.equal(X, torch.arange(10.0)[:, None])


def test_each_view_of_a_batch_is_augmented_by_itself():
    def noisy(x, g):
        return x + 100 * torch.randint(1, 9, x.shape, generator=g)

    training = TrainingData((X, Y), batch_size=5, augment=noisy, views=3)
    for batch, views in training.epoch(generator(0)):
        assert len(views) == 2
        for view in (batch.inputs, *views):
            assert torch.equal(view[:, 0] % 100, batch.labels.float())
        assert not torch.equal(batch.inputs, views[0]) and not torch.equal(*views)


def test_blending_takes_the_same_part_of_the_same_sample_in_all_views():
    x = torch.randn(50, 2, generator=generator(1))
    one, two, both = blended([x, 10 * x, x + 1], 0.5, generator(3))
    torch.testing.assert_close(two, 10 * one)
    torch.testing.assert_close(both, one + 1)
    assert not torch.equal(one, x)


def test_random_states_are_left_as_found():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with seeded(3):
        first = torch.rand(1), np.random.rand(), random.random()
    with seeded(3):
        assert first == (torch.rand(1), np.random.rand(), random.random())
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()


def test_epochs_have_seeds_of_their_own():
    assert len({epoch_seed(seed, epoch) for seed in range(20) for epoch in range(20)}) == 400


def test_the_digest_tells_data_apart():
    one = TrainingData((X, Y), 4)
    assert one.digest() == TrainingData((X.clone(), Y), 4).digest()
    assert one.digest() != TrainingData((X + 1, Y), 4).digest()
    assert one.digest() != TrainingData((X, Y + 1), 4).digest()
    assert TrainingData(TensorDataset(X, Y), 4).digest() == "10 of 4"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (X, "have no labels"),
        ((X, Y[:9]), "10 inputs and 9 labels"),
        ((X[:0], Y[:0]), "empty"),
        ((X / 0, Y), "NaN or infinity"),
        ([], "empty"),
        (TensorDataset(X[:0], Y[:0]), "empty"),
        (iter([(X, Y)]), "read only once"),
        ([X], "is a pair"),
        ([(X, Y, Y)], "got tuple of 3"),
        (list(zip(X, Y.tolist(), strict=True)), "these look like samples"),
        (list(zip(X, Y, strict=True)), "a plain list of samples is not batched"),
        (7, "are a int; give"),
    ],
)
def test_unusable_data_are_refused(data, says):
    with pytest.raises(DataError, match=says):
        TrainingData(data, 4)


def test_blended_samples_are_between_two_of_the_batch():
    x = torch.randn(200, 3, 2, generator=generator(1))
    (found,) = blended([x], 0.25, generator(2))
    changed = (found != x).flatten(1).any(1)
    assert 30 < changed.sum() < 70
    other = x[torch.randperm(200, generator=generator(2))]
    part = ((found - other) * (x - other)).sum((1, 2)) / (x - other).square().sum((1, 2))
    moved = changed.nonzero().flatten()
    for i in moved:
        torch.testing.assert_close(found[i], part[i] * x[i] + (1 - part[i]) * other[i])
    assert 0 <= part[moved].min() < 0.15 and 0.85 < part[moved].max() < 1
    assert torch.equal(blended([x], 0.25, generator(2))[0], found)
    assert torch.equal(blended([x], 0.0, generator(2))[0], x)


@pytest.mark.parametrize(("inputs", "got"), [(torch.arange(3), "int64"), ((X, X), "tuple")])
def test_only_one_tensor_of_floats_can_be_blended(inputs, got):
    with pytest.raises(DataError, match=f"one tensor of floats; got .*{got}. Give blend=0"):
        blended([inputs], 0.5, generator(0))
