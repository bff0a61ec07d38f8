"""Leave the user's network as it is: work on a copy, or put back what changed."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.errors import NetworkError
from hq_optuna.network.batches import Inputs, cloned, forward
from hq_optuna.network.containers import clone, is_plain, map_tensors, same, tensors
from hq_optuna.network.devices import preserve_rng_state
from hq_optuna.network.modes import own_modes

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, deque, set)


@own_modes()
def copied(network: nn.Module, *, training: bool = False) -> nn.Module:
    """Return a copy in evaluation mode, or in training mode, if PyTorch can copy the network."""
    held = [v for m in network.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    odd = [t for t in (*network.parameters(), *network.buffers(), *held) if not is_plain(t)]
    memo: dict[int, Any] = {id(t): _odd_copy(t) for t in odd}
    try:
        found = copy.deepcopy(network, memo)
    except Exception as error:  # of what the user's modules hold
        raise NetworkError(
            f"The network cannot be copied: {error}. Weights that a hook computes can be made "
            "plain ones (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove), and "
            "tensors with a graph that a module keeps can be detached."
        ) from error
    found.train(training)  # what it returns is not looked at: overrides forget to return self
    return found


def _odd_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in a layout that PyTorch does not copy itself, such as sparse."""
    copy = clone(tensor.detach())
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy


def check_copy(
    network: nn.Module, copy: nn.Module, layers: Sequence[str], batches: Sequence[Inputs]
) -> list[str]:
    """Prove that a copy, which has run before, computes with its own weights and no others.

    Hooks, closures and replaced methods are not copied: they may hold the original network; a
    network may also keep what it computed from a weight. The graph of the outputs tells which
    weights they hang on. One that it does not show (a part without gradients, recomputation) is
    moved, in the copy and then in the original. Further batches run for layers that the first one
    does not call. Returns a sentence for each layer without effect.

    Raises:
        NetworkError: Bits of a layer of the copy would not act, or not on the copy alone.
    """
    names = {id(p): name for name, p in network.named_parameters()}
    own = {id(p) for p in copy.parameters()}
    used, ran = _used(network, copy, layers, batches)
    foreign = [name for place, name in names.items() if place in used or place in own]
    if foreign:
        raise NetworkError(f"A copy of the network computes with {foreign[0]!r} of the {_HELD}")
    unseen = [n for n in layers if id(copy.get_parameter(f"{n}.weight")) not in used]
    idle = (name for name in unseen if _is_idle(network, copy, name, ran.get(name, batches[0])))
    return [
        f"Layer {name!r} has no effect on the network's outputs in the calibration batches that "
        "were tried; whatever its bits are there is no loss, so check that this is meant."
        for name in idle
    ]


def _used(
    network: nn.Module, copy: nn.Module, layers: Sequence[str], batches: Sequence[Inputs]
) -> tuple[set[int], dict[str, Inputs]]:
    """Return the ids of the parameters in a copy's graphs, and a batch for each layer that ran."""
    used, ran = set[int](), dict[str, Inputs]()
    with _preserve_gradients(network), _preserve_gradients(copy):
        for parameter in (*network.parameters(), *copy.parameters()):
            if not parameter.is_inference():
                parameter.requires_grad_(parameter.is_floating_point())
        for inputs in batches:
            with watched_calls(copy, layers) as called:
                used |= _leaves(copy, inputs)
            ran |= {name: inputs for name in called if name not in ran}
            if set(layers) <= set(ran):
                break
    return used, ran


def _is_idle(network: nn.Module, copy: nn.Module, name: str, inputs: Inputs) -> bool:
    """Say whether a layer has no effect; refuse one whose weight has none alone, or in the copy."""
    if _moves(copy, name, inputs):
        return False
    if _moves(network, name, inputs):
        raise NetworkError(
            f"The weight of {name!r} has no effect in a copy of the network, as it has in the "
            + _HELD
        )
    if _moves(copy, name, inputs, by_output=True):
        raise NetworkError(
            f"The network's outputs hang on what {name!r} returns, but not on its weight: "
            "something that was computed from the weight is kept (a cache, a fused or merged "
            "weight), and bits would not act. Turn that off, or clear it."
        )
    return True


_HELD = (
    "original: a hook, a closure or a replaced forward holds the original, and is not copied with "
    "it. Let forward and hooks reach layers through self, or through the module that a hook is "
    "given, and keep nothing of the network in functions around it."
)


def outputs_of_copy(network: nn.Module, copy: nn.Module, inputs: Inputs) -> Any:
    """Return a copy's outputs; refuse one that fails where the network itself runs."""
    try:
        return forward(copy, inputs)
    except Exception as error:
        with preserve_network(network):
            network.eval()
            forward(network, inputs)  # where this fails too, it is the network's own error
        raise NetworkError(
            f"A copy of the network fails where the network itself runs, with "
            f"{type(error).__name__}: {error}. Perhaps a part of it holds the {_HELD}"
        ) from error


@contextmanager
def watched_calls(network: nn.Module, layers: Sequence[str]) -> Iterator[set[str]]:
    """Yield a set that gets the names of those layers that the body calls."""
    called: set[str] = set()
    with ExitStack() as stack:
        for name in layers:
            module = network.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda m, x, name=name: called.add(name))
            stack.callback(hook.remove)
        yield called


def _leaves(network: nn.Module, inputs: Inputs) -> set[int]:
    """Return the ids of the parameters in the graph of a network's outputs."""
    try:
        # Nobody goes back through this graph, so nothing needs to be kept for it.
        nothing = torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x)
        with torch.enable_grad(), nothing:
            outputs = forward(network, cloned(inputs))
    except RuntimeError:  # it writes into what takes gradients, which is right without
        return set()
    leaves = {id(tensor) for tensor in tensors(outputs)}
    return leaves | {id(node.variable) for node in graph_of(outputs) if hasattr(node, "variable")}


def graph_of(outputs: Any) -> set[Any]:
    """Return the nodes of the graph that PyTorch keeps to differentiate these outputs."""
    todo: list[Any] = [t.grad_fn for t in tensors(outputs) if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        new = {node for node, _ in todo.pop().next_functions if node is not None} - seen
        seen |= new
        todo.extend(new)
    return seen


@torch.no_grad()
def _moves(network: nn.Module, layer: str, inputs: Inputs, *, by_output: bool = False) -> bool:
    """Say whether outputs move when a layer's weight, or its output, does; all is put back."""
    module = network.get_submodule(layer)
    weight = network.get_parameter(f"{layer}.weight")

    def run() -> list[Tensor]:
        return [t.clone() for t in tensors(forward(network, cloned(inputs)))]

    with preserve_network(network):
        network.eval()
        before = run()
        if by_output:
            handle = module.register_forward_hook(lambda m, x, y: map_tensors(y, _moved))
            after = run()
            handle.remove()
        else:
            weight.copy_(_moved(weight))
            after = run()
    return len(before) != len(after) or not all(map(same, before, after))


def _moved(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    step = torch.linspace(-1, 1, x.numel(), dtype=torch.float32, device=x.device).reshape(x.shape)
    return (x + step * (1 + x.abs().max())).to(x.dtype) if x.numel() else x


@contextmanager
def preserve_network(network: nn.Module) -> Iterator[None]:
    """Put back what the body changes in a network.

    Training flags, parameters and buffers (values and identity), gradients by identity,
    `requires_grad`, plain attributes and the containers in them, and the random state of
    PyTorch, NumPy and Python are as they were, bit for bit, also when the body raises. Costs one
    copy of the parameters and buffers while it runs. Objects of other classes in attributes are not
    looked into.
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
    containers: list[tuple[Any, Any]] = []
    todo = [value for _, _, saved in attributes for value in saved.values()]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            containers.append((value, value.copy()))
            todo += value.values() if isinstance(value, dict) else value
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
    held = [(t, t.data, clone(t.detach())) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, data, copy in held:
                if is_plain(tensor) and tensor.data_ptr() != data.data_ptr():
                    tensor.data = data
                if not same(tensor, copy):
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
