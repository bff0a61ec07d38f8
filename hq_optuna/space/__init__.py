"""What may be chosen and what it costs: layers, bits, assignments, costs, budgets. NumPy only."""

from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.budget import Bound, Budget
from hq_optuna.space.cost import METRICS, CostModel, Metric, format_cost, macs
from hq_optuna.space.latency import LatencyTable, read_latency
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec
from hq_optuna.space.memory import MemoryMap
from hq_optuna.space.search_space import SearchSpace

__all__ = [
    "FLOAT_BITS",
    "METRICS",
    "BitConfig",
    "Bound",
    "Budget",
    "CostModel",
    "LatencyTable",
    "LayerBits",
    "LayerSpec",
    "MemoryMap",
    "Metric",
    "SearchSpace",
    "format_cost",
    "macs",
    "read_latency",
]
