"""Candidates run on what their incumbent left give the outputs of a whole pass, bit for bit."""

import os
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hq_optuna.batches import Batches, autocast, forward, merge_first, read_batches, tensors
from hq_optuna.bit_config import BitConfig, LayerBits
from hq_optuna.introspection import introspect
from hq_optuna.layers import FLOAT_BITS
from hq_optuna.quantization import get_bits, observe_inputs, prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.scoring import Scorer, Sensitivity
from hq_optuna.scoring.outputs import squared_error_rise
from hq_optuna.scoring.reuse import Reuse
from tests.small_networks import ConvNet, LaterInPlace, Residual, Tokens, Twice, make, seeded

IMAGES = torch.randn(14, 2, 6, 6, generator=seeded(0))
ROWS = torch.randn(14, 3, generator=seeded(1))
SEQUENCES = torch.randn(14, 4, 3, generator=seeded(2))
ALL = 2**40


def sum_of_all(outputs: object, labels: Tensor) -> Tensor:
    return sum((t.double().sum() for t in tensors(outputs)), torch.zeros(()).double())


def rise(outputs: object, moved: object) -> Tensor:
    pairs = zip(tensors(outputs), tensors(moved), strict=True)
    return sum((squared_error_rise(a, b) for a, b in pairs), torch.zeros(()).double())


class Search:
    """One prepared network, scored with reuse and without."""

    def __init__(self, network, inputs, *, correct=True, memory=ALL, precision="float32"):
        if isinstance(inputs, list):
            data = read_batches(inputs)
        else:
            n = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0])
            n = len(inputs) if isinstance(inputs, Tensor) else n
            data = read_batches((inputs, torch.arange(n) % 3), batch_size=4)
        self.data: Batches = merge_first(data, 8)
        layers = introspect(network, data[0].inputs).layers
        self.names = [layer.name for layer in layers]
        histograms = observe_inputs(network, self.names, data)
        self.prepared = prepare(network, layers, histograms, observer="min_max")
        row = dict.fromkeys(range(1, 17), 0.0) | {FLOAT_BITS: 0.0}
        table = Sensitivity(dict.fromkeys(self.names, row), dict.fromkeys(self.names, row))

        def scorer(memory: int) -> Scorer:
            correction = None
            if correct:
                correction = StatisticsCorrection(self.prepared, self.data, precision)
            return Scorer(
                *(self.prepared, table, self.data, sum_of_all),
                output_rise=rise,
                correction=correction,
                memory=memory,
                precision=precision,
            )

        self.whole, self.reusing = scorer(0), scorer(memory)

    @property
    def reuse(self) -> Reuse:
        assert self.reusing.reuse is not None, self.reusing.warnings
        return self.reusing.reuse

    def uniform(self, bits: int) -> BitConfig:
        return BitConfig.uniform(self.names, bits, bits)

    def changed(self, config: BitConfig, *names: str, by: int = 1) -> BitConfig:
        lowered = {n: LayerBits(config[n][0] - by, config[n][1] - by) for n in names}
        return BitConfig({**config, **lowered})

    def outputs(self, scorer: Scorer, config, incumbent=None) -> list[Tensor]:
        set_bits(self.prepared, config)
        with torch.no_grad(), autocast(self.prepared, scorer.precision):
            return [t.clone() for out in scorer._run(incumbent) for t in tensors(out)]

    def check(self, config, incumbent=None) -> None:
        """Outputs and scores of both ways are equal, and the network is left equal too."""
        found = self.outputs(self.reusing, config, incumbent)
        with torch.no_grad(), autocast(self.prepared, self.reusing.precision):
            left = list(tensors(forward(self.prepared, self.data[0].inputs)))
        score = self.reusing.score(config, incumbent)
        assert get_bits(self.prepared) == config
        expected = self.outputs(self.whole, config)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(left, expected, strict=False))
        assert score == self.whole.score(config)

    def walk(self, seed: int, n_steps: int = 3) -> None:
        """Search at random: candidates of an incumbent, one of which is the next one."""
        draw = random.Random(seed)
        incumbent = self.uniform(8)
        self.check(incumbent, incumbent)
        for _ in range(n_steps):
            candidates = []
            for _ in range(3):
                names = draw.sample(self.names, min(len(self.names), draw.choice((1, 1, 2))))
                candidates.append(self.changed(incumbent, *names, by=draw.choice((1, 2, -1))))
                self.check(candidates[-1], incumbent)
            incumbent = draw.choice(candidates)


class Mixed(nn.Module):
    """Random pieces on a stem: shortcuts, branches, sharing, writing in place, views."""

    PIECES = (
        *("norm", "inplace", "shortcut", "branch", "again", "iadd", "late", "whole", "view"),
        *("dropout", "loop", "unused"),
    )

    def __init__(self, pieces: list[str]) -> None:
        super().__init__()
        self.pieces = pieces
        self.stem, self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in pieces)
        self.others = nn.ModuleList(nn.Conv2d(4, 4, 1, groups=2, bias=False) for _ in pieces)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in pieces)
        self.mixes = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in pieces)
        self.relu, self.copying = nn.ReLU(inplace=True), nn.ReLU()
        self.whole, self.dropout = Gate(), nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.copying(self.first(self.stem(x)))
        parts = zip(self.pieces, self.convs, self.others, self.norms, self.mixes, strict=True)
        for piece, conv, other, norm, mix in parts:
            if piece == "norm":
                x = F.relu(norm(conv(x)))
            elif piece == "inplace":
                x = self.relu(norm(other(self.relu(conv(x)))))
            elif piece == "shortcut":
                x = self.copying(norm(other(F.relu6(conv(x)))) + x)
            elif piece == "branch":
                x = mix(torch.cat([conv(x), F.silu(other(x))], 1))
            elif piece == "again":
                x = self.shared(torch.tanh(self.shared(x)) + x)
            elif piece == "iadd":
                y = norm(conv(x))
                y += x
                x = self.relu(y)
            elif piece == "late":
                y = conv(x)
                x = other(y) + F.relu_(y)
            elif piece == "whole":
                x = self.whole(x)
            elif piece == "view":
                y = x[:, :, ::2, ::2].repeat(1, 1, 2, 2)
                x = conv(x).mul_(0.5) + y[:, :, : x.shape[2], : x.shape[3]]
            elif piece == "dropout":
                x = conv(self.dropout(F.dropout(x, training=self.training)))
            elif piece == "loop":
                for _ in range(2):
                    x = torch.relu(conv(x)).add(x)
            elif piece == "unused":
                other(x)
                y = conv(x)
                y.clamp_(min=0.0)
                x = y
        return self.head(x.mean((2, 3)))


class Gate(nn.Module):
    """Control flow that depends on the data, inside a network that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if float(x.sum()) > 0 else self.conv(-x)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from(Mixed.PIECES), min_size=1, max_size=5),
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from([ALL, 20_000, 5_000]),
)
def test_random_networks_and_searches_give_equal_outputs(pieces, seed, correct, memory):
    network = make(Mixed(pieces), seed, torch.float32)
    Search(network, IMAGES, correct=correct, memory=memory).walk(seed)


@pytest.mark.parametrize("piece", Mixed.PIECES)
def test_each_piece_can_be_cut(piece):
    search = Search(make(Mixed([piece, piece]), 3, torch.float32), IMAGES)
    assert search.reusing.warnings == []
    search.walk(0, n_steps=5)
    assert search.reuse.n_bytes > 0


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (ConvNet, IMAGES),
        (Residual, ROWS),
        (Twice, ROWS),
        (LaterInPlace, ROWS),
        (Tokens(flat=True), SEQUENCES),
        (Tokens(flat=False), SEQUENCES),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_that_are_hard_to_quantize(kind, inputs, dtype):
    search = Search(make(kind, dtype=dtype), inputs.to(dtype))
    assert search.reusing.warnings == []
    search.walk(1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_precisions_are_equal_and_differ_from_each_other(precision):
    search = Search(
        make(Mixed(["shortcut", "iadd"]), 0, torch.float32), IMAGES, precision=precision
    )
    search.walk(2)
    plain = Search(make(Mixed(["shortcut", "iadd"]), 0, torch.float32), IMAGES)
    ours, theirs = (s.reusing.score(s.uniform(4)) for s in (search, plain))
    assert (ours == theirs) == (precision == "float32")
    assert ours.calibration_loss == pytest.approx(theirs.calibration_loss, rel=0.2, abs=2)


class Named(nn.Module):
    """Keyword inputs, a default that is not given, a dictionary of tuples as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, left: Tensor, right: Tensor, mask: Tensor | None = None) -> dict:
        x = torch.tanh(self.a(left)) + self.b(right)
        if mask is not None:
            x = x * mask
        return {"sum": (x, x.sum(1, keepdim=True)), "more": [self.c(F.relu(x))]}


@pytest.mark.parametrize("inputs", [{"left": ROWS, "right": ROWS * 2}, (ROWS, ROWS * 2)])
def test_several_inputs_defaults_and_nested_outputs(inputs):
    search = Search(make(Named, dtype=torch.float32), inputs)
    assert search.reusing.warnings == []
    search.walk(3)


def test_a_candidate_runs_only_what_depends_on_its_change():
    search = Search(make(Mixed(["norm", "norm", "norm"]), 0, torch.float32), IMAGES)
    ran: list[str] = []
    for name in search.names:
        search.prepared.get_submodule(name).register_forward_hook(
            lambda *_, name=name: ran.append(name)
        )
    incumbent = search.uniform(8)
    search.reusing.score(incumbent, incumbent)
    ran.clear()
    search.reusing.score(search.changed(incumbent, "convs.1"), incumbent)
    assert ran == ["convs.1", "convs.2", "head"] * len(search.data)
    ran.clear()  # the next incumbent: what changed with it runs once, with who needs it first
    incumbent = search.changed(incumbent, "convs.1")
    search.reusing.score(search.changed(incumbent, "convs.1"), incumbent)
    assert ran == ["convs.1", "convs.2", "head"] * len(search.data)
    ran.clear()
    search.reusing.score(search.changed(incumbent, "head"), incumbent)
    assert ran == ["convs.1", "convs.2", "head"] * len(search.data)
    ran.clear()
    search.reusing.score(search.changed(incumbent, "convs.2"), incumbent)
    assert ran == ["convs.2", "head"] * len(search.data)


@pytest.mark.parametrize("correct", [False, True])
def test_an_end_between_batches_leaves_what_was_run(correct):
    search = Search(
        make(Mixed(["norm", "late", "norm"]), 0, torch.float32), IMAGES, correct=correct
    )
    incumbent = search.uniform(8)
    candidates = [search.changed(incumbent, name) for name in ("head", "convs.1", "convs.0")]
    expected = [search.whole.score(candidate) for candidate in candidates]

    def end():
        raise KeyboardInterrupt

    search.reusing.between_batches = end
    for candidate in candidates:
        with pytest.raises(KeyboardInterrupt):
            search.reusing.score(candidate, incumbent)
    search.reusing.between_batches = lambda: None
    assert [search.reusing.score(candidate, incumbent) for candidate in candidates] == expected


def test_bits_set_elsewhere_do_not_matter():
    search = Search(make(Mixed(["shortcut", "iadd"]), 0, torch.float32), IMAGES)
    incumbent = search.uniform(6)
    search.check(incumbent, incumbent)
    set_bits(search.prepared, search.uniform(2))
    search.check(search.changed(incumbent, "head"), incumbent)


@pytest.mark.parametrize("name", ["stem.parametrizations.weight.original", "first.weight"])
def test_weights_that_changed_are_noticed(name):
    search = Search(make(Mixed(["norm"]), 0, torch.float32), IMAGES, correct=False)
    incumbent = search.uniform(6)
    search.check(incumbent, incumbent)
    with torch.no_grad():
        dict(search.prepared.named_parameters())[name].mul_(1.5)
    search.check(search.changed(incumbent, "head"), incumbent)
    search.check(incumbent, None)


def test_buffers_that_changed_are_noticed():
    search = Search(make(Mixed(["norm"]), 0, torch.float32), IMAGES, correct=False)
    incumbent = search.uniform(6)
    search.check(incumbent, incumbent)
    search.prepared.first.running_mean.add_(0.5)
    search.check(search.changed(incumbent, "head"), incumbent)


def test_without_an_incumbent_what_is_kept_serves_and_nothing_else_is_kept():
    search = Search(make(Mixed(["norm"]), 0, torch.float32), IMAGES)
    search.check(search.uniform(5))
    assert search.reuse.n_bytes == 0
    search.check(search.uniform(5), search.uniform(5))
    kept = search.reuse.n_bytes
    search.check(search.uniform(3))
    assert search.reuse.n_bytes == kept > 0
    search.reuse.forget()
    assert search.reuse.n_bytes == 0
    search.check(search.changed(search.uniform(5), "head"), search.uniform(5))


def test_memory_is_bounded_and_more_of_it_leaves_less_to_run():
    ran: dict[int, int] = {}
    for memory in (1, 4_000, 20_000, 100_000, ALL):
        search = Search(
            make(Mixed(["shortcut", "branch", "norm", "iadd"]), 0, torch.float32),
            IMAGES,
            memory=memory,
        )
        incumbent = search.uniform(8)
        search.check(incumbent, incumbent)
        assert search.reuse.n_bytes <= memory
        counts: list[int] = []
        for name in search.names:
            search.prepared.get_submodule(name).register_forward_hook(
                lambda *_, counts=counts: counts.append(1)
            )
        for name in search.names:
            search.reusing.score(search.changed(incumbent, name), incumbent)
        ran[memory] = len(counts)
    assert sorted(ran.values(), reverse=True) == list(ran.values())
    assert ran[ALL] < 0.7 * ran[1]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if bool((x > 0).any()) else x


class Borrowed(nn.Module):
    """Reads a layer's weight outside the layer: tracing would take it for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(self.a(x)), self.a.weight)


class Overwritten(nn.Module):
    """Writes into a part of what is read later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x[:, 0].relu_()
        return self.b(x)


@pytest.mark.parametrize("kind", [Branching, Borrowed, Overwritten])
def test_what_cannot_be_cut_runs_whole_and_says_so_once(kind):
    search = Search(make(kind, dtype=torch.float32), ROWS)
    assert search.reusing.reuse is None
    (warning,) = search.reusing.warnings
    assert warning.startswith("Each candidate runs the whole network, because ")
    assert warning.endswith("Scores are the same; they only take longer.")
    search.walk(4)
    assert len(search.reusing.warnings) == 1


class OfLists(nn.Module):
    """Takes a list of images of any sizes, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 1), nn.Linear(3, 2)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        pooled = [self.conv(image[None]).mean((2, 3)) for image in images]
        return [{"scores": self.head(torch.relu(x))} for x in pooled]


def test_lists_of_images_run_whole():
    images = [([IMAGES[0], IMAGES[1, :, :4]],), ([IMAGES[2], IMAGES[3, :, :5]],)]
    batches = [(inputs, torch.zeros(2).long()) for inputs in images]
    search = Search(make(OfLists, dtype=torch.float32), batches, correct=False)
    assert len(search.reusing.warnings) == 1
    search.walk(5)


def test_hooks_on_the_network_itself_see_whole_passes():
    search = Search(make(Mixed(["norm"]), 0, torch.float32), IMAGES)
    seen: list[int] = []
    search.prepared.register_forward_hook(lambda *_: seen.append(1))
    search.reusing.score(search.uniform(4), search.uniform(4))
    assert len(seen) == 2 * len(search.data)  # in float, and with these bits


def test_the_float_network_is_left_as_it_was_by_looking_for_cuts():
    network = make(Mixed(["late", "iadd", "whole"]), 0, torch.float32)
    search = Search(network, IMAGES)
    with torch.no_grad():
        expected = network(IMAGES)
        set_bits(search.prepared, dict.fromkeys(search.names, (FLOAT_BITS, FLOAT_BITS)))
        assert torch.equal(search.prepared(IMAGES), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device_too():
    network = make(Mixed(["norm", "shortcut", "iadd"]), 0, torch.float32).cuda()
    torch.backends.cudnn.deterministic = True
    for precision in ("float32", "bfloat16"):
        Search(network, IMAGES.cuda(), precision=precision).walk(6)


@pytest.mark.skipif(
    "HQ_OPTUNA_DATA" not in os.environ, reason="HQ_OPTUNA_DATA names no folder with the checkpoint"
)
def test_the_published_resnet20():
    from studies.cifar10_resnet20 import ResNet20

    state = torch.load(
        Path(os.environ["HQ_OPTUNA_DATA"]) / "resnet20_cifar10.pt", weights_only=True
    )
    network = ResNet20()
    network.load_state_dict(state)
    search = Search(network.eval(), torch.randn(14, 3, 32, 32, generator=seeded(5)))
    assert search.reusing.warnings == []
    search.walk(7, n_steps=6)
