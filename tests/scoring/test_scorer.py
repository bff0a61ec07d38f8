"""The scorer: predicted parts that add up, and a calibration loss from one forward pass."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hq_optuna.curvature import calibration_adam
from hq_optuna.errors import HqOptunaError, ScoreError, SpaceError
from hq_optuna.network.batches import read_batches
from hq_optuna.quantization import get_bits, observe_inputs, prepare
from hq_optuna.rises import SquaredError
from hq_optuna.scoring import Scorer, Sensitivity, measure_sensitivity
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.space.search_space import SearchSpace
from tests.small_networks import ConvNet, layers_of, make, rounded_by_hand, seeded

X = torch.randn(10, 2, 5, 5, generator=seeded(0), dtype=torch.float64)
Y = torch.arange(10) % 3


@pytest.fixture
def parts():
    network = make(ConvNet)
    data = read_batches((X, Y), batch_size=4)
    layers = layers_of(network, X)
    prepared = prepare(
        network, layers, observe_inputs(network, [layer.name for layer in layers], data)
    )
    space = SearchSpace.build(layers, pin_first_last=None)
    curvature = calibration_adam(network, layers, data, F.cross_entropy)
    sensitivity = measure_sensitivity(prepared, space, curvature, data)
    return network, Scorer(prepared, sensitivity, data, F.cross_entropy, measures=True)


def config(scorer: Scorer, bits: int, activation_bits: int) -> BitConfig:
    return BitConfig.uniform(list(get_bits(scorer.prepared)), bits, activation_bits)


def test_the_total_is_the_weights_and_the_activations_part_of_all_layers(parts):
    _, scorer = parts
    mixed = BitConfig({name: (2 + i, 8 - i) for i, name in enumerate(get_bits(scorer.prepared))})
    found = scorer.score(mixed)
    table = scorer.sensitivity
    weights = sum(table.weights[name][bits.weight_bits] for name, bits in mixed.items())
    inputs = sum(table.activations[name][bits.activation_bits] for name, bits in mixed.items())
    assert found.weights == pytest.approx(weights, rel=1e-14)
    assert found.activations == pytest.approx(inputs, rel=1e-14)
    assert found.total == found.weights + found.activations
    assert found.weights > 0 and found.activations > 0


@pytest.mark.parametrize("bits", [2, 4, FLOAT_BITS])
def test_the_calibration_loss_is_the_mean_over_samples_of_the_quantized_network(parts, bits):
    network, scorer = parts
    by_hand = copy.deepcopy(network)
    if bits != FLOAT_BITS:
        for layer in layers_of(network, X):
            module = by_hand.get_submodule(layer.name)
            module.weight.data = rounded_by_hand(module, layer, bits)
    losses = [
        float(F.cross_entropy(by_hand(X[i : i + 1]), Y[i : i + 1]).detach()) for i in range(10)
    ]
    found = scorer.score(config(scorer, bits, FLOAT_BITS))
    # The last batch of 2 counts as two samples, not as a third of all.
    assert found.calibration_loss == pytest.approx(sum(losses) / 10, rel=1e-12)
    assert found.activations == 0.0


def test_a_candidate_costs_one_forward_pass_per_batch_and_no_gradient(parts):
    _, scorer = parts
    passes: list[bool] = []
    scorer.prepared.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    for bits in (8, 4, 8):
        scorer.score(config(scorer, bits, bits))
    assert passes == [False] * 9


def test_scoring_trains_nothing_and_gives_the_same_number_each_time(parts):
    _, scorer = parts
    state = copy.deepcopy(scorer.prepared.state_dict())
    first = scorer.score(config(scorer, 3, 4))
    other = scorer.score(config(scorer, 8, 8))
    assert scorer.score(config(scorer, 3, 4)) == first
    assert scorer.score(config(scorer, 8, 8)) == other
    assert first.total > other.total
    assert first.calibration_loss != other.calibration_loss
    assert all(torch.equal(v, state[k]) for k, v in scorer.prepared.state_dict().items())
    assert all(p.grad is None for p in scorer.prepared.parameters())
    assert not any(m.training for m in scorer.prepared.modules())


def test_the_network_is_left_at_the_candidates_bits(parts):
    _, scorer = parts
    scorer.score(config(scorer, 5, 6))
    assert get_bits(scorer.prepared) == config(scorer, 5, 6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(parts, value):
    _, scorer = parts
    name = next(iter(scorer.sensitivity.weights))
    weights = {**scorer.sensitivity.weights, name: {4: value}}
    scorer.sensitivity = Sensitivity(weights, scorer.sensitivity.activations)
    with pytest.raises(ScoreError, match=r"score of an assignment is (nan|inf).*cannot be ranked"):
        scorer.score(config(scorer, 4, 4))


def test_a_layer_that_was_not_prepared_is_refused(parts):
    _, scorer = parts
    with pytest.raises(SpaceError, match="'elsewhere' is not prepared") as caught:
        scorer.measure({"elsewhere": LayerBits(4, 4)})
    assert isinstance(caught.value, HqOptunaError)


def test_the_loss_function_gets_outputs_and_labels_of_each_batch(parts):
    _, scorer = parts
    seen: list[tuple[int, Tensor]] = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        seen.append((len(outputs), labels))
        return outputs.sum() * 0 + float(labels.double().mean())

    scorer.loss_fn = loss
    expected = float(Y.double().mean())
    assert scorer.measure(config(scorer, 8, 8))[0] == pytest.approx(expected, rel=1e-14)
    assert [n for n, _ in seen] == [4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels in seen]), Y)


def test_by_loss_the_total_is_the_measured_rise_over_the_float_network(parts):
    network, plain = parts
    scorer = Scorer(plain.prepared, plain.sensitivity, plain.data, F.cross_entropy, by_loss=True)
    with torch.no_grad():
        float_loss = float(F.cross_entropy(network(X), Y))
    assert scorer.float_loss() == pytest.approx(float_loss, rel=1e-12)
    for bits in (2, 8):
        found = scorer.score(config(scorer, bits, bits))
        assert found.calibration_loss == plain.score(config(scorer, bits, bits)).calibration_loss
        assert found.total == pytest.approx(found.calibration_loss - float_loss, abs=1e-9)
        assert found.weights > 0 and found.activations > 0
    assert scorer.score(config(scorer, FLOAT_BITS, FLOAT_BITS)).total == 0.0


def test_a_loss_may_write_into_outputs(parts):
    _, scorer = parts
    expected = scorer.score(config(scorer, 4, 4))

    def writing(outputs: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, labels)
        outputs.zero_()
        return loss

    scorer.loss_fn = writing
    scorer.output_rise = SquaredError()
    found = scorer.score(config(scorer, 4, 4))
    assert found.calibration_loss == expected.calibration_loss
    assert scorer.score(config(scorer, FLOAT_BITS, FLOAT_BITS)).total == 0.0 < found.total


def test_what_is_called_between_batches_may_end_the_scoring(parts):
    _, scorer = parts
    calls = []
    scorer.score(config(scorer, 4, 4), lambda: calls.append(1))
    assert len(calls) == len(scorer.data) - 1

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scorer.score(config(scorer, 4, 4), stop)


def test_tiny_scores_keep_their_digits_and_do_not_tie(parts):
    _, plain = parts
    tiny = Scorer(
        plain.prepared,
        plain.sensitivity,
        plain.data,
        lambda z, y: 1e-12 * F.cross_entropy(z, y),
        by_loss=True,
    )
    scores = [tiny.score(config(tiny, bits, bits)).total for bits in (2, 3, 4)]
    assert len(set(scores)) == 3
    assert all(0 < abs(score) < 1e-9 for score in scores)
