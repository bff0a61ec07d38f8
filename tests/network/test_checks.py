"""Checks at the door: what is refused before any work, in words that say what to do."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_optuna.errors import DataError, NetworkError
from hq_optuna.network.batches import read_batches
from hq_optuna.network.checks import (
    IGNORED_LABEL,
    check_forward,
    check_labels,
    check_probabilities,
    look_over,
)
from hq_optuna.network.loss_weights import as_mean
from tests.small_networks import ConvNet, Residual, assert_unchanged, make, seeded, snapshot

X = torch.randn(9, 3, generator=seeded(0), dtype=torch.float64)
Y = torch.arange(9) % 3


def data(x=X, y=Y, batch_size=4):
    return read_batches((x, y), batch_size=batch_size)


class Then(nn.Module):
    """A linear layer, and a function of its outputs."""

    def __init__(self, then, first=None):
        super().__init__()
        self.linear, self.then = nn.Linear(3, 3), then
        self.first = first or (lambda x: x)

    def forward(self, x):
        return self.then(self.linear(self.first(x)))


def test_a_network_with_sound_data_passes_without_a_word():
    assert check_forward(make(Residual), data(), F.cross_entropy) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(training):
    network = make(ConvNet).train(training)
    before = snapshot(network)
    images = torch.randn(9, 2, 5, 5, generator=seeded(1), dtype=torch.float64)
    assert check_forward(network, data(images), F.cross_entropy) == []
    assert_unchanged(network, before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_that_cannot_be_copied_is_refused_with_the_way_out():
    network = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)).double()
    with pytest.raises(NetworkError, match=r"cannot be copied: .*remove_weight_norm"):
        check_forward(network, data(), F.cross_entropy)
    nn.utils.remove_weight_norm(network[0])
    assert check_forward(network, data(), F.cross_entropy) == []


def test_a_network_with_extra_state_that_is_no_tensor_is_refused():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"amax": 1.0}

        def set_extra_state(self, state):
            pass

    network = nn.Sequential(Extra(3, 3)).double()
    with pytest.raises(NetworkError, match=r"'0._extra_state', a dict and no tensor"):
        check_forward(network, data(), F.cross_entropy)


def test_dropout_that_eval_mode_does_not_turn_off_is_refused():
    network = make(Then(F.dropout))  # training=True is its default
    with pytest.raises(NetworkError, match=r"Two forward passes .* differ.*dropout"):
        check_forward(network, data(), F.cross_entropy)
    check_forward(make(Then(nn.Dropout())), data(), F.cross_entropy)


def test_noise_in_one_of_several_outputs_is_refused():
    network = make(Then(lambda z: {"logits": z, "aux": [z, z + torch.rand(1)]}))
    with pytest.raises(NetworkError, match="network is random"):
        check_forward(network, data(), lambda z, y: F.cross_entropy(z["logits"], y))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_refused(bad):
    network = make(Then(lambda z: torch.cat([z, z[:, :1] * 0 + bad], 1)))
    with pytest.raises(NetworkError, match="outputs on the calibration data hold NaN or infinity"):
        check_forward(network, data(), F.cross_entropy)


@pytest.mark.parametrize("labels, words", [(Y + 1, "from 1 to 3"), (Y - 1, "from -1 to 1")])
def test_labels_out_of_range_are_refused_with_the_range_allowed(labels, words):
    with pytest.raises(DataError, match=rf"labels run {words}.*3 outputs \(labels 0 to 2\)"):
        check_forward(make(Residual), data(y=labels), F.cross_entropy)


def test_labels_of_later_batches_are_looked_at_too():
    labels = Y.clone()
    labels[-1] = 7
    with pytest.raises(DataError, match="labels run from 7 to 7"):
        look_over(make(Residual), data(y=labels), F.cross_entropy)


def test_the_label_that_cross_entropy_ignores_is_allowed():
    labels = Y.clone()
    labels[::2] = IGNORED_LABEL
    assert check_forward(make(Residual), data(y=labels), F.cross_entropy) == []


@pytest.mark.parametrize(
    "outputs, labels",
    [
        (torch.zeros(4, 3), torch.rand(4, 3)),  # regression
        (torch.zeros(4), torch.full((4,), 9)),  # one output: no classes
        (torch.zeros(4, 3), torch.full((4, 3), 9)),  # several labels a sample
        ({"logits": torch.zeros(4, 3)}, torch.full((4,), 9)),
        (torch.zeros(4, 3), torch.full((4,), IGNORED_LABEL)),
    ],
)
def test_labels_that_are_not_classes_are_left_to_the_loss_function(outputs, labels):
    check_labels(outputs, labels)


def one_logit(z, y):
    return F.binary_cross_entropy_with_logits(z[:, 0], y.to(z.dtype))


def test_labels_of_a_loss_of_its_own_are_left_to_it():
    network = make(Then(lambda z: z[:, :1]))
    assert check_forward(network, data(y=Y % 2), one_logit) == []
    with pytest.raises(DataError, match=r"outputs have shape \(4, 1\).*give loss, for example"):
        check_forward(network, data(y=Y % 2), F.cross_entropy)


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()])
def test_outputs_with_one_number_a_sample_are_no_class_scores(loss):
    for then in (lambda z: z[:, 0], lambda z: z[:, :1]):
        with pytest.raises(DataError, match=r"one number a sample.*cross-entropy, which is for cl"):
            check_forward(make(Then(then)), data(y=X[:, 0]), loss)
    assert check_forward(make(Then(lambda z: z[:, 0])), data(y=X[:, 0]), F.mse_loss) == []


@pytest.mark.parametrize(
    "labels",
    [
        X,  # numbers, some of them negative
        X.abs() + 1,
        X[:, 0],
        torch.cat([torch.full((8, 3), 1 / 3), torch.zeros(1, 3)]).double(),  # the last batch
    ],
)
def test_numbers_to_be_predicted_are_no_labels_of_cross_entropy(labels):
    with pytest.raises(DataError, match=r"labels are no classes.*give loss.*mse_loss"):
        look_over(make(Residual), data(y=labels), F.cross_entropy)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_probabilities_are_labels_of_cross_entropy(kind):
    check_probabilities(X, X.softmax(1).to(kind))
    check_probabilities(torch.zeros(2, 500, 3), torch.rand(2, 500, 3).softmax(1).to(kind))


def test_the_label_that_the_loss_itself_ignores_is_allowed():
    labels = Y.clone()
    labels[::2] = 255
    assert (
        check_forward(make(Residual), data(y=labels), nn.CrossEntropyLoss(ignore_index=255)) == []
    )


def test_labels_per_pixel_are_looked_at():
    with pytest.raises(DataError, match="labels run from 0 to 3"):
        check_labels(torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 1], [2, 3]]]))


def per_sample(z, y):
    return F.cross_entropy(z, y, reduction="none")


@pytest.mark.parametrize(
    "loss, words",
    [
        (per_sample, r"returns one number.*got \(4,\)"),
        (lambda z, y: 0.5, "returns one number.*got float"),
        (lambda z, y: F.cross_entropy(z, y) * float("nan"), "loss on the first.*is nan"),
        (lambda z, y: F.cross_entropy(z, y) / 0, "loss on the first.*is inf"),
        (lambda z, y: z @ y, r"failed on the first calibration batch: .*called with \(outputs"),
        (lambda z: z.sum(), "loss function failed"),
    ],
)
def test_a_loss_that_is_not_one_finite_number_is_refused(loss, words):
    with pytest.raises(DataError, match=words):
        check_forward(make(Residual), data(), loss)


def test_a_loss_function_that_sums_over_the_batch_is_warned_of():
    def summed(z, y):
        return F.cross_entropy(z, y, reduction="sum")

    network = make(Residual)
    loss, said = as_mean(network, data(), summed)
    assert len(said) == 1
    assert "sums over the batch" in said[0] and "reduction='mean'" in said[0]
    z = network(X).detach()
    assert float(loss(z, Y)) == pytest.approx(float(F.cross_entropy(z, Y)))


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda z, y: z.square().mean(), F.nll_loss])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_a_mean_loss_is_not_warned_of(loss, batch_size):
    batches = data(batch_size=batch_size)
    assert as_mean(make(Residual), batches, loss) == (loss, [])


def test_samples_with_several_labels_are_cut_between_samples():
    network = make(Then(lambda z: z.flatten(0, 1)))
    tokens = torch.randn(5, 4, 3, generator=seeded(2), dtype=torch.float64)
    batches = data(tokens, torch.arange(20).reshape(5, 4) % 3, batch_size=5)
    flat = [type(b)(b.inputs, b.labels.flatten(), b.n) for b in batches]
    batches = type(batches)(flat)
    mean = lambda z, y: F.cross_entropy(z, y) + 0  # noqa: E731
    assert as_mean(network, batches, mean) == (mean, [])
    loss, said = as_mean(network, batches, lambda z, y: F.cross_entropy(z, y, reduction="sum"))
    assert len(said) == 1
    z, labels = network(tokens).detach(), torch.arange(20) % 3
    assert float(loss(z, labels)) == pytest.approx(4 * float(F.cross_entropy(z, labels)))


def test_a_network_made_for_one_batch_size_is_not_refused_for_it():
    network = make(Then(lambda z: z.reshape(9, 3)))
    assert check_forward(network, data(batch_size=9), F.cross_entropy) == []


def test_a_network_that_writes_into_its_input_is_refused_and_the_data_kept():
    network, batches = make(Then(lambda z: z, first=lambda x: x.sub_(0.5))), data()
    digest = batches.digest()
    with pytest.raises(NetworkError, match="writes into its input"):
        check_forward(network, batches, F.cross_entropy)
    assert batches.digest() == digest


def test_inputs_with_names_are_passed_by_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, *, pixels: Tensor) -> Tensor:
            return self.inner(pixels)

    batches = read_batches(({"pixels": X}, Y), batch_size=4)
    assert check_forward(make(Named), batches, F.cross_entropy) == []


def test_a_network_that_would_write_into_other_inputs_is_refused_at_the_first():
    network = make(Then(lambda z: z, first=lambda x: x.clamp_(-100, 100)))  # X is in between
    with pytest.raises(NetworkError, match="writes into its input"):
        check_forward(network, data(), F.cross_entropy)


def test_a_network_that_remembers_other_batches_is_refused():
    class Largest(Then):
        largest = torch.zeros((), dtype=torch.float64)

        def forward(self, x):
            self.largest = torch.maximum(self.largest, x.abs().max())
            return super().forward(x) / self.largest

    x = X.clone()
    x[-1] = 100
    with pytest.raises(NetworkError, match="remembers what it saw"):
        check_forward(make(Largest(lambda z: z)), data(x), F.cross_entropy)


def test_a_network_with_another_number_of_outputs_each_time_is_refused():
    calls = []

    def more(z):
        calls.append(z)
        return [z] * len(calls)

    with pytest.raises(NetworkError, match="different numbers of tensors"):
        check_forward(make(Then(more)), data(), lambda z, y: F.cross_entropy(z[0], y))
