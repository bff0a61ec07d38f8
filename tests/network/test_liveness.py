"""Liveness against a count over every node of a trace, and against PyTorch's allocator."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna.network.introspection import introspect
from hq_optuna.network.operators.liveness import Recorder, memory_map
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.memory import MemoryMap
from tests.reference.allocations import Forgetful, brute_force_peak, peak_allocated


def recorded(network: nn.Module, example: Tensor, n_samples: int = 1) -> Recorder:
    record = Recorder(network.eval(), example, n_samples)
    with torch.no_grad():
        record.run(network, example)
    return record


def allocated(network: nn.Module, example: Tensor) -> MemoryMap:
    """What PyTorch allocates, without merging."""
    return memory_map(recorded(network, example), {}, merge=False)


class Block(nn.Module):
    def __init__(self, width: int, *, shrinks: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, stride=1 + shrinks)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.short = nn.Conv2d(width, width, 1, stride=2) if shrinks else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(functional.relu(self.bn(self.conv1(x))))
        return functional.relu(y + self.short(x))


class Branches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width // 2, 3, padding=1), nn.Conv2d(width, width // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x).sigmoid()], 1) * x


def drawn(seed: int) -> nn.Module:
    """Return a network of random blocks."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    width = 4 * chance.randint(1, 3)
    kinds: list[Callable[[], nn.Module]] = [
        lambda: Block(width, shrinks=chance.random() < 0.5),
        lambda: Branches(width),
        lambda: nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Hardswish()),
        lambda: nn.AvgPool2d(2),
        lambda: nn.ConvTranspose2d(width, width, 2, stride=2),
    ]
    blocks = [chance.choice(kinds)() for _ in range(chance.randint(1, 5))]
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(width, 10),
    ).eval()


@pytest.mark.parametrize("seed", range(12))
def test_what_is_allocated_equals_a_count_over_every_node_of_a_trace(seed: int) -> None:
    network, example = drawn(seed), torch.randn(1, 3, 32, 32)
    assert allocated(network, example).peak({}) == brute_force_peak(network, example)


@pytest.mark.parametrize("seed", [0, 3, 7])
def test_what_is_allocated_is_what_the_allocator_gives_out(seed: int) -> None:
    # Without the input, which the caller holds; channels last, where oneDNN copies nothing.
    network = drawn(seed).to(memory_format=torch.channels_last)
    example = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    found = allocated(network, example)
    inner = MemoryMap(found.moments, tuple(t for t in found.tensors if t.name != "input"))
    run = Forgetful(network)
    with torch.no_grad():
        run.run(example)  # constants are made once
    assert inner.peak({}) == pytest.approx(peak_allocated(lambda: run.run(example)), rel=0.05)


def test_a_residual_stays_until_it_is_added_and_pointwise_operations_make_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Block(4, shrinks=False)).eval()
    memory = introspect(network, torch.randn(2, 3, 8, 8)).memory
    assert memory.moments == ("0", "1.conv1", "1.conv2")
    assert [(t.name, t.n_elements, t.first, t.last, t.readers) for t in memory.tensors] == [
        ("input", 192, 0, 0, ("0",)),
        ("0", 256, 0, 2, ("1.conv1",)),  # the residual too
        ("1.conv1", 256, 1, 2, ("1.conv2",)),  # batch norm and ReLU write over it
        ("1.conv2", 256, 2, 2, ()),  # the sum and its ReLU too; what the network returns
    ]
    assert [t.alone for t in memory.tensors] == [True, False, True, False]
    bits = BitConfig({"0": (8, 8), "1.conv1": (8, 4), "1.conv2": (8, 2)})
    assert memory.profile(bits).tolist() == [192 + 128, 128 + 64, 128 + 64 + 1024]


def test_merged_is_what_a_network_allocates_that_works_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv2(functional.relu_(self.conv1(x)))
            y += x
            return functional.relu_(y)

    example = torch.randn(1, 4, 16, 16)
    plain, merged = (memory_map(recorded(InPlace(), example), {}, merge=m) for m in (False, True))
    assert plain.peak({}) == merged.peak({}) == 3 * 4 * 16 * 16 * 4


def test_what_is_only_moved_is_as_narrow_as_what_reads_it() -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 10)),
    )
    memory = introspect(network, torch.randn(1, 3, 16, 16)).memory
    assert [(t.name, t.readers) for t in memory.tensors] == [
        *(("input", ("0",)), ("0", ("3",)), ("2", ("3",)), ("3", ()), ("4", ("6",)), ("6", ())),
    ]


def test_elements_are_those_of_one_sample_and_integers_keep_their_width() -> None:
    network = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3))
    memory = introspect(network, torch.zeros(4, 5, dtype=torch.long)).memory
    assert [(t.name, t.n_elements, t.bits) for t in memory.tensors] == [
        ("input", 5, 64),
        ("0", 30, 32),
        ("1", 15, 32),
    ]


def test_introspection_leaves_no_hook_and_the_same_outputs() -> None:
    network, example = drawn(1), torch.randn(2, 3, 32, 32)
    before = network(example)
    introspect(network, example)
    assert torch.equal(network(example), before)
