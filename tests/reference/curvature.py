"""Curvature the slow way: one sample at a time, and the Hessian itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.network.batches import Batches

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


def input_hessian_traces(
    network: nn.Module, name: str, x: Tensor, y: Tensor, loss_fn: Loss
) -> list[float]:
    """Return, for each call of a layer, the mean over samples of tr ∂²ℓᵢ/∂x², by the full Hessian.

    Of all calls together, in zeros added to what the layer is given; each call has its own block.
    """
    shapes: list[torch.Size] = []
    module = network.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    network(x[:1])
    handle.remove()
    sizes = [shape.numel() for shape in shapes]
    traces = [0.0] * len(shapes)
    for i in range(len(x)):

        def loss(flat: Tensor, i: int = i) -> Tensor:
            parts = iter(flat.split(sizes))
            inputs = iter(shapes)
            handle = module.register_forward_pre_hook(
                lambda _, args: (args[0] + next(parts).reshape(next(inputs)),)
            )
            try:
                return loss_fn(network(x[i : i + 1]), y[i : i + 1])
            finally:
                handle.remove()

        zeros = torch.zeros(sum(sizes), dtype=x.dtype)
        diagonal = torch.autograd.functional.hessian(loss, zeros).diagonal()
        for call, part in enumerate(diagonal.split(sizes)):
            traces[call] += float(part.detach().sum()) / len(x)
    return traces


def gauss_newton_diagonal(
    network: nn.Module, name: str, x: Tensor, output_hessian: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the mean over samples of diag(Jᵀ H_z J) in a layer's weight, by the full Jacobian."""
    parameters = {k: v.detach() for k, v in network.named_parameters()}
    weight = parameters[f"{name}.weight"]
    total = torch.zeros_like(weight)
    for i in range(len(x)):

        def outputs(flat: Tensor, i: int = i) -> Tensor:
            changed = {**parameters, f"{name}.weight": flat.reshape(weight.shape)}
            return torch.func.functional_call(network, changed, (x[i : i + 1],))[0]

        jacobian = torch.func.jacrev(outputs)(weight.flatten())  # (C, P)
        h = output_hessian(network(x[i : i + 1])[0].detach())
        total += torch.einsum("cp,cd,dp->p", jacobian, h, jacobian).reshape(weight.shape)
    return total / len(x)


def softmax_hessian(z: Tensor, temperature: float = 1.0) -> Tensor:
    """Return diag(p) − p pᵀ with p = softmax(z / T)."""
    p = (z / temperature).softmax(0)
    return p.diag() - torch.outer(p, p)
