"""Several candidates in one pass: what runs together, how many, and when."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from hq_optuna.layers import FLOAT_BITS
from hq_optuna.quantization import set_bits
from hq_optuna.scoring import scorer as scorer_module
from hq_optuna.scoring.together import Stacker
from tests.scoring.side_by_side import IMAGES, ROWS, SEQUENCES, Mixed, Search
from tests.small_networks import ConvNet, make, seeded


def trusted(search: Search, n: int | None = None) -> dict[str, bool]:
    """What runs together, by operation; of batches of n samples alone, if given."""
    judged: dict[str, bool] = {}
    for (node, shapes, _), found in search.reuse.stacker._trusted.items():
        if n is None or n == shapes[0][0][0]:
            judged[node.name] = found and judged.get(node.name, True)
    return judged


def test_operations_of_pytorch_run_together():
    search = Search(make(Mixed(["norm", "shortcut", "norm"]), 0, torch.float32), IMAGES)
    search.check_together(search.candidates(), search.uniform(8))
    found = trusted(search, n=8)
    # Sums of products may add up otherwise in a larger batch, as the processor likes.
    products = ("conv", "others", "head")
    simple = {name: one for name, one in found.items() if not any(p in name for p in products)}
    assert all(simple.values())
    assert any("norms" in name for name in simple)  # with statistics of each candidate
    assert any("convs" in name for name in found)


def vision_transformer() -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64
    )


@pytest.mark.parametrize(
    "kind", [models.mobilenet_v3_small, models.shufflenet_v2_x0_5, vision_transformer]
)
def test_networks_of_torchvision(kind):
    torch.manual_seed(0)
    network, images = kind(), torch.randn(8, 3, 32, 32, generator=seeded(0))
    with torch.no_grad():
        network.train()(images)
    search = Search(network.eval(), images)
    incumbent, draw = search.uniform(8), random.Random(0)
    for n in (4, 3):
        several = [
            search.changed(incumbent, draw.choice(search.names), by=draw.choice((1, 2, 3)))
            for _ in range(n)
        ]
        search.check_together(several, incumbent)
        incumbent = several[0]
    assert any(trusted(search).values())


class OfTheWholeBatch(nn.Module):
    """What a sample gives depends on the batch, though at first one does not see it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "largest":  # 6 in most batches, of one candidate or of several
            x = F.relu6(1.7 * x)
            x = x / x.max()
        elif self.kind == "mean":
            x = x - x.mean(0, keepdim=True)
        elif self.kind == "sorted":
            x = x.sort(0).values
        elif self.kind == "size":
            x = x.reshape(x.shape[0], -1, 1, 1).reshape(x.size(0), 2, 6, 6) / x.shape[0]
        elif self.kind == "permuted":
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        elif self.kind == "softmax":
            x = torch.softmax(x, dim=0)
        return self.head(self.b(x).mean((2, 3)))


@pytest.mark.parametrize("kind", ["largest", "mean", "sorted", "size", "permuted", "softmax"])
@pytest.mark.parametrize("correct", [False, True])
def test_operations_on_the_whole_batch_run_apart(kind, correct):
    search = Search(make(OfTheWholeBatch(kind), 1, torch.float32), 3 * IMAGES, correct=correct)
    assert search.reusing.warnings == []
    incumbent = search.uniform(8)
    for group in ([2, 1], [1, 0, 2], [0, 1, 2]):
        several = [search.changed(incumbent, search.names[place], by=2) for place in group]
        search.check_together(several, incumbent)
    assert not all(trusted(search).values())


class Late(nn.Module):
    """What the first candidates do not show, and later ones do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(3, 32), nn.Linear(32, 3)
        if kind == "vectors":
            self.a = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "vectors":  # the last elements are done without, and differ now and then
            return F.silu(x)
        if self.kind == "flipped":
            x = x.flip(0)
        elif self.kind == "shapes":
            return x[:, x.mean(0) > 0].abs().sum(1, keepdim=True)
        return self.b(x)


@pytest.mark.parametrize("kind", ["vectors", "flipped", "shapes"])
def test_what_shows_only_in_later_candidates_is_not_trusted_before(kind):
    for seed in range(10):
        search = Search(make(Late(kind), seed, torch.float32), ROWS, correct=False)
        incumbent = search.uniform(8)
        lower = search.changed(incumbent, "a", by=2)
        search.check_together([lower, lower], incumbent)  # which cannot be told from each other
        for by in range(7):
            several = [
                search.changed(incumbent, "a", by=other) for other in (by, 1 if by < 3 else 7)
            ]
            search.check_together(several, incumbent)


def test_what_ran_together_in_vain_leaves_nothing(monkeypatch):
    linear = F.linear

    def otherwise(x: Tensor, *rest: Any) -> Tensor:
        return linear(x, *rest) * (1.0 if len(x) <= 16 else 1.01)

    monkeypatch.setattr(F, "linear", otherwise)
    network = make(nn.Sequential(nn.Linear(3, 32), nn.Linear(32, 32)), dtype=torch.float32)
    search = Search(network, ROWS)  # batches of 8, 4 and 2
    several = [search.changed(search.uniform(8), "0", by=by) for by in (1, 2, 3)]
    search.check_together(several, search.uniform(8))
    assert [list(trusted(search, n).values()) for n in (8, 4)] == [[False], [True]]


class Gated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * F.silu(x) * torch.tanh(x)


def test_a_shift_of_zero_changes_no_type():
    """A swap may leave a layer as it is in float, and single precision is of what was shifted."""
    pieces = nn.Linear(3, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), Gated()
    network = make(nn.Sequential(*pieces, nn.Linear(32, 32), nn.Linear(32, 3)), 0, torch.float32)
    search = Search(network, ROWS, precision="bfloat16")
    in_float = search.uniform(FLOAT_BITS)
    incumbent = search.changed(in_float, "0", by=24)
    swapped, *others = [search.changed(in_float, "5", by=24)] + [
        search.changed(incumbent, "0", by=by) for by in (3, 4)
    ]
    for group in (others, [swapped, others[0]], [others[1], swapped]):
        search.check_together(group, incumbent)


class Peeking(nn.Module):
    """A module of the user's that looks at the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return peek(x)


class WithModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.peeking, self.b = nn.Conv2d(2, 2, 1), Peeking(), nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.peeking(self.a(x))).mean((2, 3))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_module_or_a_hook_of_the_users_runs_apart(hooked):
    network = make(WithModule if not hooked else ConvNet, dtype=torch.float32)
    sizes: list[int] = []
    if hooked:
        norm = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
        norm.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    search = Search(network, IMAGES)
    incumbent = search.uniform(8)
    assert search.reusing.warnings == []
    search.check_together(search.candidates(3), incumbent)
    search.check_together(search.candidates(2), incumbent)
    apart = {node.name for node in search.reuse.graph.nodes} - trusted(search).keys()
    if hooked:
        assert max(sizes) == 8  # never more than a batch
        return
    assert any("peeking" in name for name in apart)


def peek(x: Tensor) -> Tensor:
    return x if float(x.abs().mean()) < 0.9 else 0.5 * x


class Within(nn.Module):
    """Code of the user's within what is PyTorch's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(3, 3), nn.Linear(3, 2)
        self.inner: Any = nn.Identity()
        if kind in ("module", "function"):
            self.inner = nn.TransformerEncoderLayer(3, 1, 4)
        if kind == "module":
            self.inner.norm1 = Peeking()
        elif kind == "function":
            self.inner.activation = peek

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.a(x))
        return self.b(torch.ops.hq_optuna_tests.peek(x) if self.kind == "operator" else x)


@pytest.fixture
def operator() -> Iterator[None]:
    with torch.library._scoped_library("hq_optuna_tests", "DEF") as library:
        library.define("peek(Tensor x) -> Tensor")
        library.impl("peek", peek, "CompositeExplicitAutograd")
        yield


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("kind", ["module", "function", "operator"])
def test_code_of_the_users_within_pytorchs_runs_apart(kind):
    search = Search(make(Within(kind), dtype=torch.float32), SEQUENCES, correct=False)
    assert search.reusing.warnings == []
    tried = {node.name for node in search.reuse.stacker._tried}
    apart = {node.name for node in search.reuse.graph.nodes} - tried
    assert apart == {"peek" if kind == "operator" else "network_inner"}
    search.check_together(search.candidates(3), search.uniform(8))


def test_as_many_run_together_as_memory_allows(monkeypatch):
    monkeypatch.setattr("hq_optuna.scoring.reuse.LONG_S", 10.0)
    network = make(Mixed(["norm", "branch", "norm"]), 0, torch.float32)
    everything = Search(network, IMAGES).reuse
    assert everything.most_together == 16
    everything_kept = sum(everything.graph.measured[n].n_bytes for n in everything.cuts) * 14 / 8
    # 8 images of 4 channels, 6 by 6: two branches, and what they become
    peak = everything.graph.peak_bytes
    assert 2 * 8 * 4 * 36 * 4 <= peak <= 4 * 8 * 4 * 36 * 4
    for n in (1, 2, 5):
        memory = int(everything_kept + (n - 1) * peak) + 1
        assert Search(network, IMAGES, memory=memory).reuse.most_together == n
    assert Search(network, IMAGES, memory=5_000).reuse.most_together == 1


def test_how_many_run_together_is_not_found_out_for_each_candidate_anew(monkeypatch):
    monkeypatch.setattr("hq_optuna.scoring.reuse.LONG_S", 10.0)
    reuse = Search(make(ConvNet, dtype=torch.float32), IMAGES).reuse
    most = reuse.most_together
    monkeypatch.setattr(reuse.graph, "nodes", None)
    assert reuse.most_together == most


def test_long_operations_on_a_processor_run_one_by_one(monkeypatch):
    search = Search(make(ConvNet, dtype=torch.float32), IMAGES)
    for measured in search.reuse.graph.measured.values():
        measured.seconds = 0.01
    assert search.reuse.most_together == 1
    measured_together(search, monkeypatch).clear()
    search.reusing.score_together(search.candidates(), search.uniform(8))
    assert search.reusing._one_pass is None


def measured_together(search: Search, monkeypatch) -> list[int]:
    """Return how many each pass from now on has."""
    sizes: list[int] = []
    measure = search.reusing._measure_together

    def measured(configs, incumbent):
        sizes.append(len(configs))
        return measure(configs, incumbent)

    monkeypatch.setattr(search.reusing, "_measure_together", measured)
    return sizes


@pytest.fixture
def small(monkeypatch) -> Search:
    monkeypatch.setattr("hq_optuna.scoring.reuse.LONG_S", 10.0)
    return Search(make(Mixed(["norm", "shortcut"]), 0, torch.float32), IMAGES)


@pytest.mark.parametrize("quicker", [True, False])
def test_one_pass_is_taken_if_it_was_quicker(small, quicker, monkeypatch):
    ticks = iter([0.0, 1.0, 3.0] if quicker else [0.0, 2.0, 3.0])
    monkeypatch.setattr(scorer_module.time, "perf_counter", lambda: next(ticks))
    sizes = measured_together(small, monkeypatch)
    incumbent, several = small.uniform(8), small.candidates(7)
    expected = [small.whole.score(config) for config in several]
    assert small.reusing.score_together(several[:2], incumbent) == expected[:2]
    assert sizes == []  # too few to try
    for _ in range(2):
        assert small.reusing.score_together(several, incumbent) == expected
    assert sizes == ([7, 7, 7] if quicker else [7, 7])
    assert small.reusing.most_together == (16 if quicker else 1)


def test_what_one_pass_gets_wrong_is_never_taken(monkeypatch):
    """Should an operation deceive all that looks at it, the scores of the trial tell."""
    monkeypatch.setattr("hq_optuna.scoring.reuse.LONG_S", 10.0)
    monkeypatch.setattr(Stacker, "trusts", lambda self, node, shapes, k: True)
    network = make(OfTheWholeBatch("sorted"), 1, torch.float32)
    search = Search(network, IMAGES, correct=False)
    several = search.candidates(5)
    scores = search.reusing.score_together(several, search.uniform(8))
    assert scores == [search.whole.score(config) for config in several]
    assert search.reusing.most_together == 1


def test_more_than_fit_are_scored_in_several_passes(small, monkeypatch):
    small.reusing._one_pass = True
    monkeypatch.setattr("hq_optuna.scoring.reuse.MOST_TOGETHER", 4)
    sizes = measured_together(small, monkeypatch)
    several = small.candidates(10)
    scores = small.reusing.score_together(several, small.uniform(8))
    assert scores == [small.whole.score(config) for config in several]
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize("one_pass", [None, True, False])
def test_layers_that_are_not_named_keep_their_bits(small, one_pass, monkeypatch):
    monkeypatch.setattr("hq_optuna.scoring.reuse.MOST_TOGETHER", 4)
    now, incumbent = small.uniform(6), small.uniform(8)
    wholes = [small.changed(now, name, by=by) for name in small.names for by in (1, 2)][:9]
    several = [{n: bits for n, bits in whole.items() if bits != now[n]} for whole in wholes]
    small.reusing._one_pass = one_pass
    set_bits(small.prepared, now)
    scores = small.reusing.score_together(several, incumbent)
    assert scores == [small.whole.score(whole) for whole in wholes]


def test_an_end_between_batches_leaves_what_was_run(small):
    incumbent, several = small.uniform(8), small.candidates(5)
    small.reusing._one_pass = True
    looks = itertools.count()

    def end() -> None:
        if next(looks) == 1:
            raise KeyboardInterrupt

    small.reusing.between_batches = end
    with pytest.raises(KeyboardInterrupt):
        small.reusing.score_together(several, incumbent)
    assert small.reusing.score_together(several, incumbent) == [
        small.whole.score(config) for config in several
    ]


def test_without_memory_or_with_hooks_each_runs_alone(small):
    incumbent, several = small.uniform(8), small.candidates(5)
    expected = [small.whole.score(config) for config in several]
    assert small.whole.most_together == 1
    assert small.whole.score_together(several, incumbent) == expected
    small.prepared.register_forward_hook(lambda *_: None)
    assert small.reusing.most_together == 1
    assert small.reusing.score_together(several, incumbent) == expected
