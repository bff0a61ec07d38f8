"""The format ``pt2``: a program of PyTorch, with integer weights and nothing of this package in it.

`torch.export.load` reads it. Batch-norm stays as it is, so its outputs equal the network's bit for
bit on the processor it was written on.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from hq_optuna.export.check import Check, Tally, furthest, have_classes, last_steps
from hq_optuna.export.deployed import deployed, deployed_layers, round_biases_
from hq_optuna.export.job import Job
from hq_optuna.export.operators import PLAIN
from hq_optuna.export.tracing import bound, rows, traced
from hq_optuna.network.batches import arguments, forward
from hq_optuna.network.containers import tensors


def content(job: Job) -> tuple[bytes, int, Check | None]:
    """Return the file, the bytes its numbers take, and what its check found."""
    network = deployed(job.network)
    if job.bias == "int32":
        round_biases_(network)
    program = traced(network, job.data).run_decompositions(PLAIN)
    held = [*program.state_dict.values(), *program.constants.values()]
    stored = sum(x.nbytes for x in held if isinstance(x, torch.Tensor))
    program.example_inputs = None  # samples of the user's
    for node in program.graph.nodes:  # paths of source files on this machine
        node.meta.pop("stack_trace", None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=dict(job.about))
    data = file.getvalue()
    return data, stored, _checked(loaded(data), network, job) if job.samples else None


def loaded(data: bytes) -> ExportedProgram:
    """Return the program of a file's bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(io.BytesIO(data))


@torch.no_grad()
def _checked(program: ExportedProgram, network: torch.nn.Module, job: Job) -> Check:
    """Run the program beside the network, from the inputs to the outputs."""
    run: Any = program.module()
    reference = job.network if job.bias == "float" else network
    tally, largest, done = Tally(have_classes(job.data)), 0.0, 0
    for inputs, n in rows(job.data, job.samples):
        outputs = [y.numpy() for y in tensors(forward(reference, inputs))]
        called = bound(reference, *arguments(reference, inputs))
        found = [y.numpy() for y in tensors(run(*called.args, **called.kwargs))]
        largest = max(largest, *(float(np.abs(y).max(initial=0)) for y in outputs))
        tally.given_error = max(tally.given_error, furthest(found, outputs))
        tally.add_free(found, outputs)
        done += n
    layers = deployed_layers(network)
    names = [f"{name}.input_quantizer" for name in layers]
    seen = tally.run(done)
    return Check.same(done, largest, last_steps(names, layers), seen, layers)
