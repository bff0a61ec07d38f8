"""What the writers of formats share: the networks, the data, and what was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from hq_optuna.network.batches import Batches, FloatOutputs
from hq_optuna.network.evaluation import Evaluate, measured_figures

Format = Literal["onnx", "encodings", "qonnx", "pt2"]
Weights = Literal["int2", "int4", "int8"]
"""The smallest type that weights may have in a file."""
Bias = Literal["float", "int32"]


@dataclass
class Job:
    """One file to write."""

    network: nn.Module
    deployed: nn.Module
    data: Batches
    weights: Weights
    bias: Bias
    samples: int
    evaluate: Evaluate | None
    about: dict[str, str]
    notes: list[str] = field(default_factory=list)
    beside: dict[str, bytes] = field(default_factory=dict)
    """Further files, by what comes into their name: `writing.beside`."""

    @property
    def reference(self) -> nn.Module:
        """The network whose numbers a file must have: with integer biases, the deployed one."""
        return self.network if self.bias == "float" else self.deployed


def compared_figures(job: Job, file: nn.Module) -> dict[str, tuple[float, float]]:
    """Return what the study measures, of a file and of the network, by name."""
    if job.evaluate is None or any(isinstance(b.labels, FloatOutputs) for b in job.data):
        return {}
    of_file = measured_figures(job.evaluate, file, job.data)
    of_network = measured_figures(job.evaluate, job.network, job.data)
    return {name: (of_file[name], value) for name, value in of_network.items() if name in of_file}
