"""`introspect` changes nothing."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from hq_optuna.errors import NetworkError
from hq_optuna.network.introspection import introspect
from tests.introspected import one


class Careless(nn.Module):
    """Changes everything a forward pass can lay its hands on."""

    def __init__(self, *, fail=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2, 4))
        self.fail = fail
        self.calls = 0
        self.seen = []

    def forward(self, x):
        x.add_(1)
        self.calls += 1
        self.seen.append(x.mean())
        self.count += 1
        self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 0.1)
        self.fc.weight.mul_(0.5)
        self.fc.weight.requires_grad_(False)
        self.zero_grad()
        self.norm.train()
        x = self.norm(self.conv(x)).mean((2, 3))
        self.last = x + torch.rand_like(x) + random.random() + np.random.rand()
        self.cache = x
        self.train()
        if self.fail:
            raise RuntimeError("half way through")
        return self.fc(x)


def snapshot(network):
    """Return everything about a network that a user could notice, comparable by ==."""
    numbers = {
        name: (id(t), t.data_ptr(), t.detach().numpy().tobytes())
        for name, t in (*network.named_parameters(), *network.named_buffers())
    }
    flags = {name: module.training for name, module in network.named_modules()}
    grads = {
        name: (p.requires_grad, id(p.grad), None if p.grad is None else p.grad.numpy().tobytes())
        for name, p in network.named_parameters()
    }
    plain = {
        (name, key): (id(value), list(value) if isinstance(value, (dict, list)) else None)
        for name, module in network.named_modules()
        for key, value in vars(module).items()
    }
    return numbers, flags, grads, plain


def random_states():
    state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]


@pytest.mark.parametrize("fail", [False, True])
def test_the_network_the_input_and_the_random_state_are_left_as_found(fail):
    network, example = Careless(fail=fail), torch.randn(2, 3, 8, 8)
    network.norm.eval()  # a mixture of modes, as in fine-tuning
    network.conv.bias.requires_grad_(False)
    network.fc.weight.grad = torch.ones(2, 4)
    network.fc.register_forward_hook(lambda module, args, output: output * 2)
    before, states, kept = snapshot(network), random_states(), example.clone()
    hooks = len(nn.modules.module._global_forward_hooks)
    if fail:
        with pytest.raises(NetworkError, match="half way through"):
            introspect(network, example)
    else:
        assert len(introspect(network, example).layers) == 2
    assert snapshot(network) == before
    assert random_states() == states
    assert torch.equal(example, kept)
    assert len(nn.modules.module._global_forward_hooks) == hooks
    assert not hasattr(network, "cache")


def test_the_careless_network_changes_without_introspect():
    # The test above could not fail if this network were harmless.
    network, example = Careless(), torch.randn(2, 3, 8, 8)
    network.norm.eval()
    network.fc.weight.grad = torch.ones(2, 4)
    before, states = snapshot(network), random_states()
    with torch.no_grad():
        network.eval()(example)
    assert all(old != new for old, new in zip(before, snapshot(network), strict=True))
    assert all(old != new for old, new in zip(states[:3], random_states()[:3], strict=True))


def test_outputs_are_the_same_before_and_after():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    twin, example = copy.deepcopy(network), torch.randn(4, 3, 8, 8)
    introspect(network, example)
    assert torch.equal(network(example), twin(example))
    assert torch.equal(network[1].running_mean, twin[1].running_mean)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_scripted_part_keeps_its_mode():
    network = nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.Sequential(nn.ReLU())))
    found = introspect(network, torch.zeros(2, 3))
    assert all(module.training for module in network.modules())
    assert [layer.name for layer in found.layers] == ["0"]


def test_hooks_of_the_user_do_not_change_the_counts():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network[0].register_forward_hook(lambda module, args, output: output[:, :, :1])
    assert one(network, torch.zeros(1, 3, 8, 8)).macs == 4 * 36 * 27


def test_the_example_is_not_held_to_gradients():
    example = torch.zeros(2, 3, requires_grad=True) * 2
    assert one(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), example).macs == 6
