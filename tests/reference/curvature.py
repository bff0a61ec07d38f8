"""Curvature the slow way: one sample at a time, and the Hessian itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.batches import Batches

Loss = Callable[[Any, Any], Tensor]


def batch_gradients(network: nn.Module, name: str, data: Batches, loss_fn: Loss) -> list[Tensor]:
    """Return the gradient of each batch's loss in a layer's weight."""
    weight = network.get_submodule(name).weight
    return [
        torch.autograd.grad(loss_fn(network(batch.inputs), batch.labels), weight)[0]
        for batch in data
    ]


def adam_second_moment(gradients: Sequence[Tensor], beta2: float) -> Tensor:
    """Return v̂ after the last gradient: Kingma & Ba 2015, Algorithm 1, element by element."""
    v = [0.0] * gradients[0].numel()
    for g in gradients:
        v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g.flatten().tolist(), strict=True)]
    corrected = [a / (1 - beta2 ** len(gradients)) for a in v]
    return torch.tensor(corrected, dtype=torch.float64).reshape(gradients[0].shape)


def fisher_diagonal(network: nn.Module, name: str, x: Tensor, y: Tensor, loss_fn: Loss) -> Tensor:
    """Return the mean over samples of the squared gradient of a sample's own loss."""
    weight = network.get_submodule(name).weight
    total = torch.zeros_like(weight)
    for i in range(len(x)):
        loss = loss_fn(network(x[i : i + 1]), y[i : i + 1])
        total += torch.autograd.grad(loss, weight)[0].square()
    return total / len(x)


def hessian_diagonal(network: nn.Module, name: str, x: Tensor, y: Tensor, loss_fn: Loss) -> Tensor:
    """Return the exact diagonal of the Hessian of the mean loss in a layer's weight."""
    parameters = {k: v.detach() for k, v in network.named_parameters()}
    shape = parameters[f"{name}.weight"].shape

    def loss(flat: Tensor) -> Tensor:
        changed = {**parameters, f"{name}.weight": flat.reshape(shape)}
        return loss_fn(torch.func.functional_call(network, changed, (x,)), y)

    return (
        torch.func.hessian(loss)(parameters[f"{name}.weight"].flatten()).diagonal().reshape(shape)
    )


def input_gradients(
    network: nn.Module, name: str, x: Tensor, y: Tensor, loss_fn: Loss
) -> list[list[Tensor]]:
    """Return, for each call of a layer, each sample's gradient in what the layer is given.

    A zero is added to the input of this layer alone and the loss is differentiated in that zero.
    """
    calls: list[list[Tensor]] = []
    for i in range(len(x)):
        zeros: list[Tensor] = []

        def add_zero(_module: nn.Module, args: Any, zeros: list[Tensor] = zeros) -> Any:
            zeros.append(torch.zeros_like(args[0], requires_grad=True))
            return (args[0] + zeros[-1],)

        handle = network.get_submodule(name).register_forward_pre_hook(add_zero)
        loss = loss_fn(network(x[i : i + 1]), y[i : i + 1])
        handle.remove()
        gradients = torch.autograd.grad(loss, zeros)
        calls = calls or [[] for _ in gradients]
        for call, gradient in zip(calls, gradients, strict=True):
            call.append(gradient)
    return calls
