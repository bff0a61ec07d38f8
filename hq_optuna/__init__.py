"""Find how many bits each layer of a trained network needs, under a compute-cost budget.

Names are loaded when they are first used, so ``import hq_optuna`` loads neither PyTorch nor Optuna.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hq_optuna._version import __version__

if TYPE_CHECKING:
    from hq_optuna import artifacts, cost, pruners, samplers, storages, visualization
    from hq_optuna.bit_config import BitConfig, LayerBits
    from hq_optuna.cost import Budget, CostModel
    from hq_optuna.history import assignment, read_history
    from hq_optuna.introspection import introspect
    from hq_optuna.layers import FLOAT_BITS, LayerSpec
    from hq_optuna.quantization import prepare, set_bits
    from hq_optuna.runner.bit_search import BitSearch
    from hq_optuna.runner.objective import HessianObjective
    from hq_optuna.runner.recipe import load
    from hq_optuna.runner.report import write_report
    from hq_optuna.runner.resolving import load_assignment, pareto, resolve
    from hq_optuna.runner.result import SearchResult
    from hq_optuna.runner.training_plan import TrainingPlan
    from hq_optuna.space import SearchSpace
    from hq_optuna.training import TrainingSettings

_HOME = {
    "BitConfig": "bit_config",
    "BitSearch": "runner.bit_search",
    "Budget": "cost",
    "CostModel": "cost",
    "FLOAT_BITS": "layers",
    "HessianObjective": "runner.objective",
    "LayerBits": "bit_config",
    "LayerSpec": "layers",
    "SearchResult": "runner.result",
    "SearchSpace": "space",
    "TrainingPlan": "runner.training_plan",
    "TrainingSettings": "training",
    "assignment": "history",
    "introspect": "introspection",
    "load": "runner.recipe",
    "load_assignment": "runner.resolving",
    "pareto": "runner.resolving",
    "prepare": "quantization",
    "read_history": "history",
    "resolve": "runner.resolving",
    "set_bits": "quantization",
    "write_report": "runner.report",
}
_ROOMS = ("artifacts", "cost", "pruners", "samplers", "storages", "visualization")

__all__ = [
    "FLOAT_BITS",
    "BitConfig",
    "BitSearch",
    "Budget",
    "CostModel",
    "HessianObjective",
    "LayerBits",
    "LayerSpec",
    "SearchResult",
    "SearchSpace",
    "TrainingPlan",
    "TrainingSettings",
    "__version__",
    "artifacts",
    "assignment",
    "cost",
    "introspect",
    "load",
    "load_assignment",
    "pareto",
    "prepare",
    "pruners",
    "read_history",
    "resolve",
    "samplers",
    "set_bits",
    "storages",
    "visualization",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
