"""One network scored on what incumbents left and as a whole, side by side."""

import random

import torch
import torch.nn.functional as F
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
from tests.small_networks import seeded

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

    def __init__(
        self, network, inputs, *, correct=True, memory=ALL, precision="float32", quantizers=None
    ):
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
        self.prepared = prepare(
            network, layers, histograms, observer="min_max", quantizers=quantizers
        )
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

    def candidates(self, n: int = 4) -> list[BitConfig]:
        """Return candidates of 8 bits everywhere that change one layer each, in turn."""
        incumbent, most = self.uniform(8), len(self.names)
        return [self.changed(incumbent, self.names[i % most], by=1 + i // most) for i in range(n)]

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

    def check_together(self, configs, incumbent) -> None:
        """Outputs of candidates in one pass are those of passes of their own."""
        if self.reusing.reuse is None:
            scores = self.reusing.score_together(configs, incumbent)
            assert scores == [self.whole.score(config) for config in configs]
            return
        with torch.no_grad(), autocast(self.prepared, self.reusing.precision):
            batches = list(self.reuse.run_together(configs, incumbent))
        assert get_bits(self.prepared) == incumbent
        sums = self.reusing._measure_together(configs, incumbent)
        for j, config in enumerate(configs):
            found = [t for outputs in batches for t in tensors(outputs[j])]
            expected = self.outputs(self.whole, config)
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert sums[j] == self.whole.measure(config)

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
            several = [draw.sample(candidates, draw.choice((2, 3))) for _ in range(2)]
            if draw.random() < 0.5:  # what is the incumbent's is run in one pass, or in another
                self.check_together(several.pop(), incumbent)
            for candidate in candidates:
                self.check(candidate, incumbent)
            for group in several:
                self.check_together(group, incumbent)
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
