"""Leave the user's network as it is: work on a copy, or put back what changed."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hq_optuna.errors import NetworkError
from hq_optuna.network.devices import preserve_rng_state

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, deque, set)


def copied(network: nn.Module, *, training: bool = False) -> nn.Module:
    """Return a copy in evaluation mode, or in training mode, if PyTorch can copy the network."""
    try:
        found = copy.deepcopy(network)
    except Exception as error:  # of what the user's modules hold
        raise NetworkError(
            f"The network cannot be copied: {error}. Weights that a hook computes can be made "
            "plain ones (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove), and "
            "tensors with a graph that a module keeps can be detached."
        ) from error
    found.train(training)  # what it returns is not looked at: overrides forget to return self
    return found


@contextmanager
def preserve_network(network: nn.Module) -> Iterator[None]:
    """Put back what the body changes in a network.

    Training flags, parameters and buffers (values and identity), gradients by identity,
    `requires_grad`, plain attributes and the containers directly in them, and the random state of
    PyTorch, NumPy and Python are as they were, bit for bit, also when the body raises. Costs one
    copy of the parameters and buffers while it runs. What lies deeper in attributes that are not
    tensors of the network (a cache of lists in lists) is not followed.
    """
    tensors = [*network.parameters(), *network.buffers()]
    with (
        _preserve_gradients(network),
        _preserve_values(tensors),
        _preserve_attributes(network),
        preserve_rng_state(tensor.device for tensor in tensors),
    ):
        yield


@contextmanager
def _preserve_attributes(network: nn.Module) -> Iterator[None]:
    attributes = [(m, m.training, dict(vars(m))) for m in network.modules()]
    containers = [
        (value, value.copy())
        for _, _, saved in attributes
        for value in saved.values()
        if type(value) in _CONTAINERS
    ]
    try:
        yield
    finally:
        for container, saved in containers:
            container.clear()
            in_order = isinstance(container, (list, deque))
            container.extend(saved) if in_order else container.update(saved)
        for module, training, values in attributes:
            if module.training != training:
                module.training = training  # a scripted module keeps it outside its attributes
            vars(module).clear()
            vars(module).update(values)


@contextmanager
def _preserve_values(tensors: list[Tensor]) -> Iterator[None]:
    # `.data` keeps the storage, should the network assign another one (max-norm constraints do).
    held = [(t, t.data, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, data, copy in held:
                if tensor.data_ptr() != data.data_ptr():
                    tensor.data = data
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)


@contextmanager
def _preserve_gradients(network: nn.Module) -> Iterator[None]:
    gradients = [(p, p.requires_grad, p.grad) for p in network.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad, gradient in gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
