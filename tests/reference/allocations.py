"""Slower twins of liveness: what PyTorch's allocator gives out, and a count moment by moment."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn


def peak_allocated(call: Callable[[], Any]) -> int:
    """Return the most bytes that PyTorch's CPU allocator has given out at once during a call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as run:
        kept = call()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


class Forgetful(fx.Interpreter):
    """Runs a traced network and drops each value after its last use."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(fx.symbolic_trace(network), garbage_collect_values=True)


def brute_force_peak(network: nn.Module, example: torch.Tensor) -> int:
    """Return the most bytes of values that are made and still needed, node by node of the trace.

    Every node of the traced network is run; at each, the memory of all earlier values that it or
    a later node takes is added up. Views count once, as what they look at.
    """
    graph = fx.symbolic_trace(network).graph
    nodes = list(graph.nodes)
    interpreter = fx.Interpreter(fx.GraphModule(network, graph), garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(example)
    values = interpreter.env
    most = 0
    for at, now in enumerate(nodes):
        if now.op == "output":
            continue
        needed = {}
        for node in nodes[: at + 1]:
            later = node is now or any(node in n.all_input_nodes for n in nodes[at:])
            if later and isinstance(values.get(node), torch.Tensor):
                storage = values[node].untyped_storage()
                needed[storage.data_ptr()] = storage.nbytes()
        most = max(most, sum(needed.values()))
    return most
