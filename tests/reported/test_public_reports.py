"""Reports from public trackers that no other list here has; `README.md` says what is right."""

from __future__ import annotations

import copy
import json
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

import hq_optuna as hq
from hq_optuna.errors import HqOptunaError, ResumeError
from tests.reported import product

BITS = {"bits": (8, 4, 2)}
PLAIN = {"rounding": "nearest", "correction": False}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(build: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def images(n: int = 24, shape: tuple[int, ...] = (2, 6, 6), seed: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape, generator=seeded(seed)), torch.arange(n) % 3


def vectors(n: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 8, generator=seeded(2)), torch.arange(n) % 3


def dense() -> nn.Sequential:
    layers = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers)


class Conv(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace)
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))


def rises(network: nn.Module, data: Any, **options: Any) -> dict[Any, float]:
    table, _ = product.rise_table(network, data, **{**BITS, **options})
    parts = ((layer, part, row) for layer, of in table.items() for part, row in of.items())
    return {(layer, part, b): v for layer, part, row in parts for b, v in row.items()}


def assert_alike(found: dict[Any, float], wanted: dict[Any, float], rel: float = 1e-3) -> None:
    assert found == pytest.approx(wanted, rel=rel, abs=1e-7)


def refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(HqOptunaError, match=words) as caught:
        call()
    assert product.is_refusal(caught.value)


# Layers that tools overlook


def test_a_fused_transformer_layer_does_not_hide_its_layers():
    """pytorch#128413: in eval mode the encoder layer calls none of its layers; hooks see none."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    network = made(lambda: nn.Sequential(encoder, nn.Flatten(), nn.Linear(40, 3))).eval()
    data = torch.randn(12, 5, 8, generator=seeded()), torch.arange(12) % 3
    macs, said = product.macs(network, data)
    projections = {f"0.self_attn.{part}_proj": 5 * 8 * 8 for part in ("q", "k", "v", "out")}
    linear = {"0.linear1": 5 * 8 * 16, "0.linear2": 5 * 16 * 8, "2": 40 * 3}
    assert macs == projections | linear
    assert "products of activations (attention)" in said
    quantized, _ = product.quantized(network, data, 2)
    with torch.no_grad():  # where PyTorch would take the fused way
        fast = quantized(data[0])
    assert torch.allclose(fast, quantized(data[0]), atol=1e-5)
    assert not torch.allclose(fast, network(data[0]), atol=1e-3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x[:, None])[0][:, -1])


class Transposed(nn.Module):
    """The linear layer of GPT-2: inputs by outputs, and no nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters, self.head = nn.Parameter(torch.randn(8, 1, 3)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.conv1d(x[:, None], self.filters).mean(2))


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (Recurrent, "gru"),
        (lambda: nn.Sequential(Transposed(), nn.ReLU(), nn.Linear(8, 3)), "Transposed"),
        (Functional, "filters"),
    ],
    ids=["recurrent", "transposed", "functional"],
)
def test_weights_of_other_operations_are_named(build, word):
    """nni#5183, pytorch#71028; pytorch/tutorials#1401, transformers#2466; distiller#364."""
    _, said = product.macs(made(build), vectors())
    assert word in said


class AddLowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 8) / 4), nn.Parameter(torch.randn(8, 2) / 4)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", AddLowRank()),
    ],
    ids=["weight_norm, of old", "weight_norm", "spectral_norm", "low rank"],
)
def test_a_weight_that_is_computed_is_named(compute):
    """pytorch#28594, #102981, #8208; descript-audio-codec#81: no parameter, and not copied."""
    network = made(dense).eval()
    made(lambda: compute(network[2]))
    network(vectors()[0])  # so that the weight has a graph
    try:
        macs, said = product.macs(network, vectors())
    except HqOptunaError as error:
        assert product.is_refusal(error)
        assert "weight_norm" in str(error)
    else:
        assert macs == {"0": 64, "4": 24}
        assert re.search(r"'2'.*computed from other parameters", said)


class Adapted(nn.Module):
    """A frozen layer with an adapter beside it, as peft wraps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) / 2


def test_adapters_and_the_frozen_layers_beside_them_all_count():
    """peft#761; frozen weights round as any other, and stay frozen."""
    network = made(lambda: nn.Sequential(Adapted(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3)))
    macs, _ = product.macs(network, vectors())
    assert macs == {"0.base_layer": 64, "0.lora_A": 16, "0.lora_B": 16, "2": 24}
    free = copy.deepcopy(network).requires_grad_(True)
    assert_alike(rises(network, vectors()), rises(free, vectors()))
    assert not network[0].base_layer.weight.requires_grad


class MethodCompiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.block = torch.compile(self.hidden, backend="eager")

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


class ForwardCompiled(MethodCompiled):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


def forward_replaced() -> nn.Module:
    network = dense()
    network.forward = torch.compile(network.forward, backend="eager")
    return network


def test_what_is_compiled_is_refused_wherever_it_sits():
    """pytorch#117758, #93726; pytorch-lightning#20233: what is compiled first has no hooks."""
    for build in (MethodCompiled, forward_replaced):  # a copy would call the original
        refused(lambda build=build: product.macs(made(build), vectors()), "compile|the original")
    part = made(dense)
    part[2] = torch.compile(part[2], backend="eager")
    refused(lambda: product.macs(part, vectors()), "'2' is compiled")
    # An activation that is compiled holds no layer.
    network = made(dense)
    network[1].act = torch.compile(torch.relu, backend="eager")
    assert set(product.macs(network, vectors())[0]) == {"0", "2", "4"}


def test_a_class_whose_forward_is_compiled_is_refused_as_such():
    """pytorch#142358: its hooks see calls or none, as the compiler has it."""
    refused(lambda: product.macs(made(ForwardCompiled), vectors()), "compiled by torch.compile")


# Weights and inputs of all kinds


class Views(nn.Module):
    """Layers read parts, transposes and expansions of tensors, made contiguous or not."""

    def __init__(self, contiguous: bool) -> None:
        super().__init__()
        self.keep = Tensor.contiguous if contiguous else (lambda x: x)
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 3, padding=1)
        self.c, self.head = nn.Linear(36, 5), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, half = torch.relu(self.a(x)).chunk(2, 1)
        x = self.b(self.keep(half.transpose(2, 3))).flatten(2)
        x = self.c(self.keep(x.transpose(0, 1))).transpose(0, 1)
        return self.head(torch.relu(self.keep(x)).flatten(1))


def test_inputs_that_are_views_round_as_their_copies_do():
    """pytorch#75009: fake quantization once mixed up tensors that were not contiguous."""
    views, copies = made(lambda: Views(False)), made(lambda: Views(True))
    assert_alike(rises(views, images()), rises(copies, images()), rel=1e-5)
    of, _ = product.quantized(views, images(), 3)
    wanted, _ = product.quantized(copies, images(), 3)
    assert torch.allclose(of(images()[0]), wanted(images()[0]), atol=1e-6)


def test_channels_last_changes_no_number():
    """pytorch#82060, executorch#16429."""
    network, (x, y) = made(Conv), images()
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    turned = x.contiguous(memory_format=torch.channels_last), y
    assert_alike(rises(last, turned), rises(network, (x, y)))
    of, _ = product.quantized(last, turned, 3)
    assert torch.allclose(of(x), product.quantized(network, (x, y), 3)[0](x), atol=1e-5)


def test_pruned_channels_and_layers_stay_zero():
    """apple/coremltools#2853, #2851: a channel of zeros has no range, and 0 / 0 is NaN."""
    network = made(Conv)
    with torch.no_grad():
        network.a.weight[0] = network.b.weight[2:4] = 0
    quantized, _ = product.quantized(network, images(), 2)
    assert not quantized.a.weight[0].any()
    assert not quantized.b.weight[2:4].any()
    nn.init.zeros_(network.b.weight)
    found = rises(network, images())
    assert all(map(math.isfinite, found.values()))
    assert found["b", "weights", 2] == 0
    assert product.search(network, images(), **BITS).share <= 0.25


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias)


def test_a_convolution_that_standardizes_its_weight_rounds_what_it_stores():
    """pytorch-image-models#522, WeightStandardization#2: a forward of its own, on its weight."""
    network = made(Conv)
    network.b = made(lambda: Standardized(6, 6, 3, padding=1))
    bits = {"a": (8, 8), "b": (2, 8), "head": (8, 8)}
    quantized, _ = product.quantized(network, images(), bits, **PLAIN)
    by_hand, _ = product.quantized(network, images(), 8, **PLAIN)
    rounded = quantized.b.weight.detach()
    assert all(len(filters.unique()) <= 4 for filters in rounded)
    x = network.relu(by_hand.a(images()[0]))
    plain = functional.layer_norm(rounded.flatten(1), (54,), eps=1e-5).reshape(rounded.shape)
    x = product.rounded_input(by_hand, "b", x)
    wanted = functional.conv2d(x, plain, network.b.bias, padding=1)
    assert torch.allclose(quantized.b(x), wanted, atol=1e-4)


def test_a_grouped_transposed_convolution_has_a_scale_for_each_output_channel():
    """pytorch#47535, #54816; onnxruntime#19694; ppq#339: (inputs, outputs of a group, …)."""

    def build() -> nn.Module:
        up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        return nn.Sequential(up, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 3))

    network, data = made(build), images(shape=(4, 4, 4))
    larger = copy.deepcopy(network)
    with torch.no_grad():
        larger[0].weight[2:, 1] *= 1000
    of, _ = product.quantized(network, data, 3, **PLAIN)
    changed, _ = product.quantized(larger, data, 3, **PLAIN)
    ours, theirs = (q[0].weight.detach().reshape(2, 2, 3, -1) for q in (of, changed))
    kept = torch.ones(2, 3, dtype=bool)
    kept[1, 1] = False
    by_channel = ours.transpose(1, 2), theirs.transpose(1, 2)
    assert torch.equal(by_channel[0][kept], by_channel[1][kept])  # other channels round as before
    assert all(len(channel.unique()) <= 8 for channel in by_channel[0].flatten(0, 1))


def test_one_weight_of_two_modules_is_rounded_once():
    """coreai-optimization#41, nncf#889: two settings for one tensor, and one that counts twice."""
    network = made(dense)
    network[2].weight = network[0].weight
    macs, said = product.macs(network, vectors())
    assert set(macs) == {"0", "4"}
    assert re.search("'2'.*shares its weight with '0'", said)
    assert network[2].weight is network[0].weight


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mix(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.mix(x * 100)))


def test_a_module_called_twice_rounds_at_both_calls_and_costs_both():
    """pytorch#29657, distiller#297, mct-model-optimization#1450; with a second input 100 times."""
    network, (x, y) = made(Twice), vectors()
    assert product.macs(network, (x, y))[0]["mix"] == 2 * 64
    bits = {"stem": (8, 8), "mix": (3, 8), "head": (8, 8)}
    of, _ = product.quantized(network, (x, y), bits, correction=False)
    by_hand = float((cross_entropy(of(x), y) - cross_entropy(network(x), y)).detach())
    measured = product.measured_rise(network, (x, y), bits, correction=False)
    assert measured == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
    assert (
        measured < 1e-2 * float(cross_entropy(network(x), y).detach()) + 1
    )  # one range holds both


def test_relus_that_work_in_place_leave_the_inputs_that_are_measured():
    """captum#156, pytorch#95617, distiller#351."""
    assert_alike(rises(made(lambda: Conv(True)), images()), rises(made(Conv), images()), rel=1e-5)


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8, dtype=torch.complex64)
        self.a, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(torch.view_as_real(self.mix(z)).flatten(1))))


def test_complex_numbers_are_looked_at_whole():
    """pytorch/ao#4910: the imaginary part was dropped without a word."""
    network, (x, y) = made(Spectrum), vectors(16)
    z = torch.complex(x, x.flip(0))
    macs, said = product.macs(network, (z, y))
    assert set(macs) == {"a", "head"}
    assert re.search("mix.*complex64", said)
    wanted = float(cross_entropy(network(z), y).detach())
    assert product.float_loss(network, (z, y)) == pytest.approx(wanted, rel=1e-5)
    z[3, 1] = complex(0.0, math.nan)
    refused(lambda: product.float_loss(network, (z, y)), "NaN")


# Losses and batches


def test_a_smaller_last_batch_counts_by_its_samples():
    """transformers#41898, mlcommons/training#89, catalyst#799."""
    network, (x, y) = made(Conv), images(20)
    wanted = float(cross_entropy(network(x), y).detach())
    for cut in (16, 19):
        batches = [(x[:cut], y[:cut]), (x[cut:], y[cut:])]
        assert product.float_loss(network, batches) == pytest.approx(wanted, rel=1e-5)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(x))).transpose(1, 2)


def test_a_token_counts_the_same_in_every_batch():
    """torchtune#1875, transformers#24725: means of batches are no mean where lengths differ."""
    network, x = made(Tokens), torch.randn(16, 6, 8, generator=seeded())
    y = torch.randint(0, 3, (16, 6), generator=seeded(1))
    y[:8, 1:] = -100
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    wanted = float(cross_entropy(network(x), y).detach())
    assert product.float_loss(network, batches) == pytest.approx(wanted, rel=1e-5)
    of, _ = product.quantized(network, batches, 2)
    by_hand = float((cross_entropy(of(x), y) - cross_entropy(network(x), y)).detach())
    assert product.measured_rise(network, batches, 2) == pytest.approx(by_hand, rel=1e-3)


def test_class_weights_do_not_depend_on_the_batch():
    """pytorch#61309, #50528, #8062: the mean divides by the weights of the batch at hand."""
    network, (x, y) = made(Conv), images()
    y = y.sort().values  # one class a batch: weighted means of batches would be unweighted
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 0.2]))
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]
    wanted = float(loss(network(x), y).detach())
    assert product.float_loss(network, batches, loss) == pytest.approx(wanted, rel=1e-5)
    of, _ = product.quantized(network, batches, 3, loss)
    by_hand = float((loss(of(x), y) - loss(network(x), y)).detach())
    measured = product.measured_rise(network, batches, 3, loss)
    assert measured == pytest.approx(by_hand, rel=1e-3, abs=1e-6)


def test_labels_may_be_probabilities():
    """mmpretrain#805, deit#91: labels of mixup are no class numbers."""
    network, (x, y) = made(Conv), images()
    soft = functional.one_hot(y, 3) * 0.8 + 0.2 / 3
    wanted = float(cross_entropy(network(x), soft).detach())
    assert product.float_loss(network, (x, soft)) == pytest.approx(wanted, rel=1e-5)
    found = product.search(network, (x, soft), validation=(x, soft), **BITS)
    by_hand = float((network(x).argmax(1) == y).float().mean())
    assert found.facts.get("accuracy_before", by_hand) == pytest.approx(by_hand)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_broadcasts_over_samples_is_that_of_the_batches_as_given():
    """pytorch#16045, FARM#229: outputs (N, 1) and labels (N,) make a loss of N² pairs."""
    network = made(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)))
    x, y = vectors()[0], torch.randn(32, generator=seeded(3))
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    losses = [float(functional.mse_loss(network(a), b).detach()) for a, b in batches]
    try:
        found = product.float_loss(network, batches, functional.mse_loss)
    except HqOptunaError as error:
        assert product.is_refusal(error)
        assert re.search("shape|broadcast|size", str(error))
    else:
        assert found == pytest.approx(sum(losses) / 4, rel=1e-5)


# Networks that are more than their layers


def test_an_average_of_weights_is_a_network_and_data_parallel_is_none():
    """ema-pytorch#6, as timm's EMA; distiller#369, sparseml#1490: names begin with "module."."""
    network = made(Conv)
    averaged = torch.optim.swa_utils.AveragedModel(network)
    averaged.update_parameters(network)
    options = {"budget": "0.6 bops", **BITS}
    found = rises(averaged, images(), pins={"module.a": 8}, **options)
    wanted = rises(network, images(), pins={"a": 8}, **options)
    assert_alike(
        {(layer.removeprefix("module."), *of): v for (layer, *of), v in found.items()}, wanted
    )
    refused(lambda: rises(nn.DataParallel(copy.deepcopy(network)), images()), "DataParallel")


class Remembers(nn.Module):
    """Adds what it saw in earlier calls, kept in a buffer, a list, or a list in a dict."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.where, self.keys, self.cache = where, [], {"keys": []}
        self.register_buffer("past", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        now = x.mean(0).detach()
        if self.where == "buffer":
            self.past = 0.9 * self.past + now
            return self.head(x + self.past)
        kept = self.keys if self.where == "list" else self.cache["keys"]
        kept.append(now)
        return self.head(x + sum(kept))


@pytest.mark.parametrize("where", ["buffer", "list", "dict"])
def test_a_network_that_remembers_earlier_calls_is_refused_and_left_alone(where):
    """Model-Optimizer#2248: replayed batches attended to keys of their own earlier replay."""
    network = made(lambda: Remembers(where))
    refused(lambda: product.rise_table(network, vectors(), **BITS), "differ|twice|repeat|same")
    assert not network.past.any()
    assert network.keys == network.cache["keys"] == []


def test_an_embedding_that_renorms_itself_is_as_before():
    """pytorch#26596, #28959: with max_norm each call writes into the weight, in eval mode too."""

    def build() -> nn.Module:
        table = nn.Embedding(10, 8, max_norm=0.5)
        return nn.Sequential(table, nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))

    network, y = made(build), torch.arange(32) % 3
    x, before = torch.randint(0, 10, (32, 4), generator=seeded()), network[0].weight.clone()
    wanted = float(cross_entropy(copy.deepcopy(network)(x), y).detach())
    assert product.float_loss(network, (x, y)) == pytest.approx(wanted, rel=1e-5)
    assert product.search(network, (x, y), **BITS).share <= 0.25
    assert torch.equal(network[0].weight, before)


def plan(data: Any, **settings: Any) -> hq.TrainingPlan:
    given = hq.TrainingSettings(**{"epochs": 1, "batch_size": 8, **settings})
    return hq.TrainingPlan(data=data, every=1, settings=given, final=None)


class Frozen(nn.Module):
    """Keeps its batch-norm in eval mode whatever mode is set, as segmentation networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.norm.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.a(x))).mean((2, 3)))


@pytest.mark.parametrize("label_weight", [0.0, 1.0])
def test_training_leaves_a_frozen_batch_norm_alone(tmp_path, label_weight):
    """gt-pyg#112, pytorch-deeplab-resnet#39: train() of every epoch thaws what was frozen."""
    network = made(Frozen)
    before = copy.deepcopy(network.state_dict())
    training = plan(images(32, seed=3), label_weight=label_weight)
    options = {"budget": "0.1 bops", "artifacts": tmp_path / "a", "correction": False, **BITS}
    found = product.search(network, images(), training=training, **options)
    after = found.network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith("norm."))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


class Scaled(nn.Module):
    """Multiplies by a buffer that the state dict does not hold, as rotary embeddings have."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.net = dense()
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


def test_a_buffer_that_the_state_dict_leaves_out_is_part_of_the_network(tmp_path):
    """transformers#24576, pytorch#105233: loaded into another network, outputs were others."""
    x, url = vectors()[0], f"sqlite:///{tmp_path}/s.db"
    found = product.search(made(lambda: Scaled(2.0)), vectors(), storage=url, name="s", **BITS)
    try:
        back = product.saved_and_loaded(found, made(lambda: Scaled(5.0)), tmp_path / "answer")
    except HqOptunaError as error:
        assert "scale" in str(error)
    else:
        assert torch.equal(back(x), found.network(x))
    with pytest.raises(ResumeError, match="network"):
        product.search(made(lambda: Scaled(5.0)), vectors(), storage=url, name="s", **BITS)


# Studies and storages


def test_numbers_of_numpy_are_numbers(tmp_path):
    """optuna-dashboard#706, optuna#4430, #4062: storages hold JSON, and NumPy's are none."""
    wanted = product.search(made(dense), vectors(), **BITS)
    options = {"bits": np.array([8, 4, 2]), "budget": hq.Budget.fraction(bops=np.float32(0.25))}
    by_layer = {"pins": {"0": np.int64(4)}, "allowed": {"2": np.arange(2, 9, 2)}}
    given = {"storage": f"sqlite:///{tmp_path}/s.db", "candidates": np.int64(3), **options}
    assert product.search(made(dense), vectors(), name="s", **given).bits == wanted.bits
    found = product.search(made(dense), vectors(), name="t", **given, **by_layer)
    assert found.bits["0"] == (4, 4)
    assert found.share <= 0.25


def test_other_bits_are_another_study(tmp_path):
    """optuna#2199, #2328, #2854: choices that change in a study are an error of each trial."""
    url = f"sqlite:///{tmp_path}/s.db"
    product.search(made(dense), vectors(), storage=url, name="s", bits=(8, 4))
    before = len(optuna.load_study(study_name="s", storage=url).trials)
    with pytest.raises(ResumeError, match="space"):
        product.search(made(dense), vectors(), storage=url, name="s", bits=(8, 4, 3))
    assert len(optuna.load_study(study_name="s", storage=url).trials) == before


def test_a_study_made_for_something_else_is_refused(tmp_path):
    """optuna#2989 (another direction), optuna#5605 (trials of one study added to a new one)."""
    url = f"sqlite:///{tmp_path}/s.db"
    done = product.search(made(dense), vectors(), storage=url, name="s", **BITS)
    optuna.create_study(storage=url, study_name="up", direction="maximize")
    optuna.create_study(storage=url, study_name="new").add_trials(done.study.trials[1:])
    for name in ("up", "new"):
        with pytest.raises(ResumeError, match="another kind of study"):
            product.search(made(dense), vectors(), storage=url, name=name, **BITS)


def test_a_search_goes_on_after_interruptions_and_in_a_copy_of_its_study(tmp_path):
    """optuna#3255, #3336, #485, #6249, ResDAG#287: seeds begin anew, trials are left running."""
    wanted = product.search(made(dense), vectors(), budget="0.2 bops", **BITS)

    def interrupt(study: optuna.Study) -> None:
        raise KeyboardInterrupt

    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in "ab"]
    options = {"name": "s", "budget": "0.2 bops", **BITS}
    with pytest.raises(KeyboardInterrupt):
        product.search(made(dense), vectors(), storage=urls[0], during=interrupt, **options)
    optuna.copy_study(from_study_name="s", from_storage=urls[0], to_storage=urls[1])
    for url in urls:
        found = product.search(made(dense), vectors(), storage=url, **options)
        assert found.bits == wanted.bits
        assert product.history(found.study) == product.history(wanted.study)


def test_a_new_storage_may_be_opened_by_all_at_once(tmp_path):
    """optuna#4621, #820, #5385: tables are made once, or the others fail."""
    url, errors, start = f"sqlite:///{tmp_path}/new.db", [], threading.Barrier(6)

    def open_it() -> None:
        start.wait()
        try:
            product.storage(url)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_reports_are_json_and_html_whatever_values_and_names_a_study_has(tmp_path):
    """optuna-dashboard#108, aim#2629, ray#9103: Infinity and NaN are no JSON; names are no HTML."""
    url, name = f"sqlite:///{tmp_path}/s.db", "a|b/<img src=x>%"
    network = made(dense)
    network.add_module("</script><b>|", nn.Linear(3, 3))
    product.search(network, vectors(), storage=url, name=name, **BITS)
    study = optuna.load_study(study_name=name, storage=url)
    strange = {"user_attrs": {"x": math.nan}, "intermediate_values": {1: math.nan}}
    study.add_trial(optuna.trial.create_trial(value=math.inf, **strange))
    study.set_user_attr("mine", math.inf)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    data, page = product.reports(study, tmp_path / "report.html")
    json.loads(json.dumps(data), parse_constant=refuse)
    assert "<img src=x>" not in page
    assert "</script><b>" not in page
