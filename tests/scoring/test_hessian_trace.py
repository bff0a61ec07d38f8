"""The table of Hessian traces, against measured rises of the corrected network, layer by layer."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import get_bits, observe_inputs, prepare
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.rises import Given, rise_of_loss
from hq_optuna.scoring import hessian_trace as table_module
from hq_optuna.scoring.hessian_trace import hessian_trace
from hq_optuna.scoring.scorer import Scorer
from hq_optuna.scoring.sensitivity import Sensitivity
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.search_space import SearchSpace
from tests.small_networks import seeded

FLOAT = LayerBits(32, 32)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def classes(n, of=3):
    return torch.randint(0, of, (n,), generator=seeded(1))


class Parts:
    """A network prepared at float, with everything that a table needs."""

    def __init__(self, build, x, y, loss=cross_entropy, corrected=False, batch_size=16):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.network = build().eval()
        self.data, self.loss = read_batches((x, y), batch_size=batch_size), loss
        self.rise = rise_of_loss(loss)
        layers = introspect(self.network, self.data).layers
        self.space = SearchSpace.build(layers, bits=(8, 6, 4, 3), pin_first_last=None)
        names = [layer.name for layer in layers]
        histograms = observe_inputs(self.network, names, self.data)
        self.prepared = prepare(self.network, layers, histograms)
        self.correction = StatisticsCorrection(self.prepared, self.data) if corrected else None

    def table(self, probes=2, **options):
        return hessian_trace(
            *(self.prepared, self.space, self.data, self.rise, self.correction),
            probes=probes,
            **options,
        )

    def measured(self, name, bits):
        """The rise of the outputs with one layer rounded, and the rest as the correction has it."""
        with torch.no_grad():
            outputs = [self.network(batch.inputs) for batch in self.data]
        fitted = self.rise.fitted(outputs, self.data)
        empty = Sensitivity({}, {})
        scorer = Scorer(self.prepared, empty, self.data, self.loss, correction=self.correction)

        def rise(expected, moved):
            change = (moved - expected).double().movedim(1, -1)
            change = change.reshape(len(change), -1, change.shape[-1])
            if not hasattr(fitted, "factor"):
                return change.flatten(1).square().mean(1).sum()
            return 0.5 * (change @ fitted.factor).square().sum(-1).mean(1).sum()

        scorer.output_rise = Given(rise)
        _, found = scorer.measure({**dict.fromkeys(get_bits(self.prepared), FLOAT), name: bits})
        if self.correction is not None:
            self.correction.reset()
        return found


def dense():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
            self.a, self.o = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.i(x)
            h = h + self.a(self.norm(h)).tanh()
            return self.o(h).transpose(1, 2)

    return Tokens()


def images():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Tanh(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.Tanh(),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def with_mean(build, shape=(3, 8, 8)):
    """Norms whose stored statistics are those of the data, as after a training."""

    def made():
        network = build()
        with torch.no_grad():
            network.train()
            for _ in range(60):
                network(drawn(64, *shape, seed=5))
        return network

    return made


@pytest.mark.parametrize("bits", [3, 8])
def test_where_one_number_is_predicted_the_last_layers_rises_are_exact(bits):
    parts = Parts(lambda: nn.Sequential(nn.Linear(4, 1)), drawn(40, 4), drawn(40, 1), mse_loss)
    table, _ = parts.table()
    for row, pair in (
        (table.weights["0"], LayerBits(bits, 32)),
        (table.activations["0"], LayerBits(32, bits)),
    ):
        # What is measured is a difference of outputs in single precision.
        assert row[bits] == pytest.approx(parts.measured("0", pair), rel=1e-4)


CASES = {
    "dense": lambda: Parts(dense, drawn(96, 6), classes(96)),
    "squared error": lambda: Parts(dense, drawn(96, 6), drawn(96, 3, seed=2), mse_loss),
    "tokens": lambda: Parts(tokens, drawn(64, 5, 6), classes(320).reshape(64, 5)),
    "images": lambda: Parts(images, drawn(64, 3, 8, 8), classes(64)),
    "corrected": lambda: Parts(
        with_mean(images), drawn(96, 3, 8, 8, seed=5), classes(96), corrected=True
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rises_at_many_bits_are_those_measured_one_layer_at_a_time(case):
    """At 6 and 8 bits errors are small, so that first order is nearly all there is."""
    parts = CASES[case]()
    table, curvature = parts.table(probes=30 if case in ("images", "corrected") else 100)
    assert not curvature.unknown
    for name in table.weights:
        for bits in (6, 8):
            w = parts.measured(name, LayerBits(bits, 32))
            a = parts.measured(name, LayerBits(32, bits))
            assert table.weights[name][bits] == pytest.approx(w, rel=0.25)
            if case != "corrected":  # of which inputs' rises are taken away by half
                assert table.activations[name][bits] == pytest.approx(a, rel=0.25)
            else:
                assert 0.7 < table.activations[name][bits] / a < 4


def everywhere():
    """Layers of every kind that are known, from 40 places down to 1."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, (3, 2), stride=(1, 2), padding="valid", dilation=2, groups=2), nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=8), nn.BatchNorm2d(8),
        nn.Flatten(2), nn.Conv1d(8, 6, 2, padding="same"), nn.BatchNorm1d(6), nn.Tanh(),
        nn.Linear(84, 5), nn.Tanh(), nn.Conv1d(6, 2, 5), nn.Flatten(), nn.Linear(2, 3),
    )  # fmt: skip


@pytest.mark.parametrize("build", [everywhere, tokens, dense])
def test_products_say_what_running_a_layer_again_at_every_number_of_bits_says(build, monkeypatch):
    shape = {everywhere: (3, 16, 16), tokens: (9, 6), dense: (6,)}[build]
    y = classes(48 * 9).reshape(48, 9) if build is tokens else classes(48)
    x = drawn(48, *shape, seed=5)
    made = {everywhere: with_mean(build, (3, 16, 16))}.get(build, build)
    parts = Parts(made, x, y, corrected=True)
    assert 2 in parts.correction.takes.values() or build is not everywhere
    monkeypatch.setattr(table_module, "LINE_PLACES", 2**40)
    fast, _ = parts.table()
    monkeypatch.setattr(table_module, "is_plain", lambda module: False)
    slow, _ = parts.table()
    for found, expected in ((fast.weights, slow.weights), (fast.activations, slow.activations)):
        for name, row in expected.items():
            assert found[name] == pytest.approx(row, rel=1e-3)  # of small errors, run again


def test_one_forward_pass_serves_all_probes_unless_layers_run_again_on_the_way_back():
    class Counted(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.i, self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.checkpointed, self.calls = checkpointed, 0

        def forward(self, x):
            self.calls += 1
            h = self.i(x).tanh()
            run = lambda h: self.a(h).tanh()  # noqa: E731
            h = checkpoint(run, h, use_reentrant=True) if self.checkpointed else run(h)
            return self.o(h)

    tables = []
    for checkpointed in (False, True):
        parts = Parts(lambda on=checkpointed: Counted(on), drawn(32, 6), classes(32))
        parts.prepared.calls = 0
        tables.append(parts.table(probes=3)[0])
        # Two batches, each also once for the outputs' Hessian.
        assert parts.prepared.calls == 2 + 2 * (3 if checkpointed else 1)
    for part in ("weights", "activations"):
        for name, row in getattr(tables[0], part).items():
            assert getattr(tables[1], part)[name] == pytest.approx(row, rel=1e-4)


def test_what_a_correction_takes_away_is_taken_away():
    """A weight error that batch-norm undoes, a factor on a channel, costs nothing."""
    parts = CASES["corrected"]()
    with torch.no_grad():
        rounded = parts.prepared[0].parametrizations.weight[0]
        weight = parts.prepared[0].parametrizations.weight.original.detach()
        for bits in (8, 6, 4, 3):
            rounded.keep(weight, bits, 0.9 * weight, torch.ones(8))
    corrected, _ = parts.table()
    parts.correction = None
    plain, _ = parts.table()
    assert corrected.weights["0"][4] < 1e-3 * plain.weights["0"][4]


def test_the_same_data_give_the_same_numbers_and_bits_are_put_back():
    parts = CASES["dense"]()
    before = get_bits(parts.prepared)
    told = []
    first, _ = parts.table(progress=lambda done, of: told.append((done, of)))
    assert first == parts.table()[0]
    assert first != parts.table(seed=1)[0]
    assert get_bits(parts.prepared) == before and told[-1] == (6, 6)


def test_rises_of_a_layer_that_is_called_twice_are_those_of_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.o(self.a(self.a(x).tanh()).tanh())

    parts = Parts(Twice, drawn(96, 6), classes(96))
    assert "a" not in StatisticsCorrection(parts.prepared, parts.data).takes
    table, _ = parts.table(probes=100)
    for bits in (6, 8):
        assert table.weights["a"][bits] == pytest.approx(
            parts.measured("a", LayerBits(bits, 32)), rel=0.25
        )


def test_an_activation_that_writes_into_what_a_layer_returned_changes_nothing():
    tables = []
    for in_place in (False, True):
        parts = Parts(
            lambda in_place=in_place: nn.Sequential(
                nn.Linear(6, 16), nn.ReLU(in_place), nn.Linear(16, 8), nn.ReLU(in_place),
                nn.Linear(8, 3),
            ),
            drawn(64, 6), classes(64),
        )  # fmt: skip
        tables.append(parts.table()[0])
    assert tables[0] == tables[1]


def test_parameters_keep_their_gradients():
    parts = CASES["dense"]()
    parts.table()
    assert all(p.requires_grad and p.grad is None for p in parts.prepared.parameters())


def test_functions_are_refused_as_they_tell_no_hessian():
    parts = CASES["dense"]()
    parts.rise = Given(lambda z, moved: 0.0)
    with pytest.raises(ValueError, match=r"needs a rise of hq_optuna\.rises"):
        parts.table()
