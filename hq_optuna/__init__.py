"""Find how many bits each layer of a trained network needs, under a compute-cost budget.

Names are loaded when they are first used, so ``import hq_optuna`` loads neither PyTorch nor Optuna.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hq_optuna._version import __version__

if TYPE_CHECKING:
    from hq_optuna import (
        artifacts,
        export,
        pruners,
        rises,
        samplers,
        space,
        storages,
        visualization,
    )
    from hq_optuna.answer.recipe import load
    from hq_optuna.answer.resolve import load_assignment, pareto, resolve, trades
    from hq_optuna.answer.result import SearchResult
    from hq_optuna.bit_search import BitSearch
    from hq_optuna.network.evaluation import Metric
    from hq_optuna.network.introspection import introspect
    from hq_optuna.objective.hessian import HessianObjective
    from hq_optuna.protocol.history import assignment, read_history
    from hq_optuna.quantization import prepare, set_bits
    from hq_optuna.report.page import write_report
    from hq_optuna.settings import SearchSettings
    from hq_optuna.space import FLOAT_BITS, BitConfig, Budget, CostModel, LayerBits, LayerSpec
    from hq_optuna.space.search_space import SearchSpace
    from hq_optuna.training import TrainingSettings
    from hq_optuna.training.plan import TrainingPlan

_HOME = {
    "BitConfig": "space",
    "BitSearch": "bit_search",
    "Budget": "space",
    "CostModel": "space",
    "FLOAT_BITS": "space",
    "HessianObjective": "objective.hessian",
    "Metric": "network.evaluation",
    "LayerBits": "space",
    "LayerSpec": "space",
    "SearchResult": "answer.result",
    "SearchSettings": "settings",
    "SearchSpace": "space",
    "TrainingPlan": "training.plan",
    "TrainingSettings": "training",
    "assignment": "protocol.history",
    "introspect": "network.introspection",
    "load": "answer.recipe",
    "load_assignment": "answer.resolve",
    "pareto": "answer.resolve",
    "prepare": "quantization",
    "read_history": "protocol.history",
    "resolve": "answer.resolve",
    "set_bits": "quantization",
    "trades": "answer.resolve",
    "write_report": "report.page",
}
_ROOMS = (
    "artifacts",
    "export",
    "pruners",
    "rises",
    "samplers",
    "space",
    "storages",
    "visualization",
)

__all__ = [
    "FLOAT_BITS",
    "BitConfig",
    "BitSearch",
    "Budget",
    "CostModel",
    "HessianObjective",
    "LayerBits",
    "LayerSpec",
    "Metric",
    "SearchResult",
    "SearchSettings",
    "SearchSpace",
    "TrainingPlan",
    "TrainingSettings",
    "__version__",
    "artifacts",
    "assignment",
    "export",
    "introspect",
    "load",
    "load_assignment",
    "pareto",
    "prepare",
    "pruners",
    "read_history",
    "resolve",
    "rises",
    "samplers",
    "set_bits",
    "space",
    "storages",
    "trades",
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
