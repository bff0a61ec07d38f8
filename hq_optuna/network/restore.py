"""Hand a network back as it came, whatever ran on it in between."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hq_optuna.network.devices import random_state_kept

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, deque, set)


@contextmanager
def restored(network: nn.Module) -> Iterator[None]:
    """Put back what the body changes in a network, and keep it off fused shortcuts.

    Training flags, parameters and buffers (values and identity), gradients by identity,
    `requires_grad`, plain attributes and the containers directly in them, and the random state of
    PyTorch, NumPy and Python are as they were, bit for bit, also when the body raises. Costs one
    copy of the parameters and buffers while it runs. What lies deeper in attributes that are not
    tensors of the network (a cache of lists in lists) is not followed.

    Args:
        network: The network, which the body may run and change.
    """
    modules = list(network.modules())
    attributes = [(m, m.training, dict(vars(m))) for m in modules]
    containers = [
        (value, value.copy())
        for _, _, saved in attributes
        for value in saved.values()
        if type(value) in _CONTAINERS
    ]
    # `.data` keeps the storage, should the network assign another one (max-norm constraints do).
    held = [(t, t.data, t.detach().clone()) for t in (*network.parameters(), *network.buffers())]
    gradients = [(p, p.requires_grad, p.grad) for p in network.parameters()]
    random_states = random.getstate(), np.random.get_state()
    # The fused transformer layer computes with the weights of layers that it never calls.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with random_state_kept(t.device for t, _, _ in held):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])
        for container, saved in containers:
            container.clear()
            in_order = isinstance(container, (list, deque))
            container.extend(saved) if in_order else container.update(saved)
        for module, training, values in attributes:
            if module.training != training:
                module.training = training  # a scripted module keeps it outside its attributes
            vars(module).clear()
            vars(module).update(values)
        with torch.no_grad():
            for tensor, data, copy in held:
                if tensor.data_ptr() != data.data_ptr():
                    tensor.data = data
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)
        for parameter, requires_grad, gradient in gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def fresh(tree: Any, device: torch.device) -> Any:
    """Copy nested inputs with their tensors to a device: networks may write into their input.

    Args:
        tree: Tensors in nested tuples (named ones too), lists and mappings; the rest is shared.
        device: Where the copies go.
    """
    if isinstance(tree, Tensor):
        return tree.detach().to(device, copy=True)
    if isinstance(tree, Mapping):
        return {key: fresh(value, device) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        copies = [fresh(value, device) for value in tree]
        if isinstance(tree, list):
            return copies
        return type(tree)(*copies) if hasattr(tree, "_fields") else tuple(copies)
    return tree
