"""Networks whose parts know of each other, or whose operations return aliases now and then."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_optuna.batches import Batches
from tests.introspected import Net
from tests.scoring.side_by_side import IMAGES, ROWS, Search
from tests.small_networks import make, seeded


def linears(*names, first=3):
    sizes = {name: (first if i == 0 else 4, 4) for i, name in enumerate(names)}
    return {name: nn.Linear(*size) for name, size in sizes.items()}


class NormAct(nn.BatchNorm2d):
    """Normalization and activation in one class of another library, which could be traced."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return F.relu(x)


def norms_of_another_library():
    def forward(net, x):
        return net.h(net.m(net.b(net.n(net.a(x)))).mean((2, 3)))

    convs = {"a": nn.Conv2d(2, 4, 3), "b": nn.Conv2d(4, 4, 3)}
    return Net(forward, **convs, n=NormAct(4), m=NormAct(4), h=nn.Linear(4, 3)), IMAGES


def a_layer_that_a_hook_calls():
    net = Net(
        lambda net, x: net.h(torch.tanh(net.a(x))), **linears("a", "h"), adapter=nn.Linear(3, 4)
    )
    net.a.register_forward_hook(lambda _, inputs, output: output + net.adapter(inputs[0]))
    return net, ROWS


class Holder(nn.Module):
    """Holds a layer that is registered elsewhere, and cannot be traced."""

    def __init__(self, layer):
        super().__init__()
        self.held = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x) if float(x.sum()) > -1e9 else x


def a_layer_in_a_plain_list():
    layers = linears("a", "b", "h")
    net = Net(lambda net, x: net.h(torch.tanh(net.holder(torch.tanh(net.a(x))))), **layers)
    net.holder = Holder(net.b)
    return net, ROWS


class Gate(nn.Module):
    """Returns its input itself where nothing is to be clamped."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.abs().max()) < 1 else x.clamp(-1, 1)


def a_module_that_returns_its_input_at_times():
    def forward(net, x):
        x = net.a(x)
        gated = net.gate(x)
        return net.h(torch.tanh(net.b(x)) + gated)

    x = torch.cat([10 * ROWS[:8], 0.01 * ROWS[:6]])
    return Net(forward, **linears("a", "b", "h"), gate=Gate()), x


def a_view_in_a_batch_of_one():
    def forward(net, x):
        x = net.e(x)
        turned, gate = x.transpose(0, 1).contiguous(), torch.sigmoid(net.g(x))
        return net.h(net.r(turned).transpose(0, 1) * gate).mean(1)

    x = torch.randn(9, 5, 3, generator=seeded(0))
    return Net(forward, **linears("e", "g", "r", "h")), x


CUT = (
    *(norms_of_another_library, a_layer_that_a_hook_calls, a_layer_in_a_plain_list),
    *(a_module_that_returns_its_input_at_times, a_view_in_a_batch_of_one),
)


class Styled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.style


def a_style_that_is_an_attribute():
    def forward(net, x):
        net.styled.style = torch.sigmoid(net.s(x))
        return net.h(torch.tanh(net.styled(net.a(x))))

    return Net(forward, **linears("a", "h"), s=nn.Linear(3, 4), styled=Styled(4, 4)), ROWS[:8]


def a_shortcut_of_two_hooks():
    net = Net(
        lambda net, x: net.h(net.c(torch.tanh(net.b(torch.tanh(net.a(x)))))), **linears(*"abch")
    )
    net.a.register_forward_hook(lambda *call: setattr(net, "saved", call[-1]))
    net.c.register_forward_hook(lambda *call: call[-1] + net.saved)
    return net, ROWS[:8]


def statistics_that_are_read_elsewhere():
    def forward(net, x):
        normed = torch.relu(net.n(net.a(x)))
        return net.h((normed * net.n.running_var.sqrt()[:, None, None]).mean((2, 3)))

    layers = {"a": nn.Conv2d(2, 4, 3), "n": nn.BatchNorm2d(4), "h": nn.Linear(4, 3)}
    return Net(forward, **layers), IMAGES


@dataclasses.dataclass
class Features:
    x: Tensor


class Encoder(nn.Module):
    def forward(self, x: Tensor) -> Features:
        return Features(x if float(x.sum()) > -1e9 else -x)


def tensors_in_an_object():
    def forward(net, x):
        features = net.encoder(torch.tanh(net.a(x)))
        features.x += net.b(features.x)
        return net.h(features.x)

    return Net(forward, **linears("a", "b", "h"), encoder=Encoder()), ROWS


def an_optional_input():
    def forward(net, x, mask=None):
        x = torch.tanh(net.a(x))
        return net.h(x if mask is None else x * mask)

    labels, mask = torch.zeros(4).long(), torch.zeros(4, 4)
    batches = [((ROWS[:4],), labels), ((ROWS[4:8], mask), labels)]
    return Net(forward, **linears("a", "h")), batches


WHOLE = (
    *(a_style_that_is_an_attribute, a_shortcut_of_two_hooks, statistics_that_are_read_elsewhere),
    *(tensors_in_an_object, an_optional_input),
)


@pytest.mark.parametrize("kind", [*CUT, *WHOLE])
def test_scores_are_those_of_whole_passes(kind):
    network, inputs = kind()
    search = Search(make(network, dtype=torch.float32), inputs)
    assert (search.reusing.reuse is not None) is (kind in CUT), search.reusing.warnings
    for seed in range(3):
        search.walk(seed)
    everywhere = [search.changed(search.uniform(8), name) for name in search.names]
    search.check_together(everywhere, search.uniform(8))


def test_a_loss_may_write_into_outputs():
    def forward(net, x):
        features = torch.tanh(net.b(torch.tanh(net.a(x))))
        return {"features": features, "logits": net.h(features)}

    def normalizing(outputs, labels):
        outputs["features"] /= outputs["features"].norm(dim=-1, keepdim=True)
        return outputs["features"].double().sum() + outputs["logits"].double().sum()

    network = make(Net(forward, **linears("a", "b", "h")), dtype=torch.float32)
    search = Search(network, ROWS)
    search.whole.loss_fn = search.reusing.loss_fn = normalizing
    for seed in range(3):
        search.walk(seed)


def test_memory_is_kept_for_images_that_are_larger_than_the_first():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    labels = torch.zeros(2).long()
    batches = [(torch.randn(2, 2, size, size), labels) for size in (8, 32, 40)]
    search = Search(network.eval(), batches, memory=40_000, correct=False)
    assert isinstance(search.data, Batches) and len(search.data) == 3
    incumbent = search.uniform(8)
    for name in search.names:
        search.check(search.changed(incumbent, name), incumbent)
        assert search.reuse.n_bytes <= 40_000
