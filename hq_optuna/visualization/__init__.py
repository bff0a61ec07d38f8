"""Pictures of a search, as plotly figures, from what its storage holds and nothing else.

Every picture is made in two halves: `…_info` reads a `History` into plain numbers, `…_figure` draws
them, and ``plot_…(study)`` does both. Studies may be unfinished; one without anything to draw gives
a figure without data and a warning in the log.

Backgrounds are transparent and texts mid-grey, so that figures stand on light and on dark pages;
``dark=True`` or ``dark=False`` gives a figure of its own a page. Colours are those of Okabe & Ito
(2008) and Viridis, which all kinds of colour vision tell apart; symbols and dashes say the same
again. Layers stand in the order of the network, the first on top.

Plots are loaded when they are first used: the colours, and a worker that draws nothing, need no
plotly.

Example:
    >>> from hq_optuna import visualization
    >>> visualization.plot_bits(study).show()  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from hq_optuna.protocol.history import History
    from hq_optuna.visualization.bits import plot_bits
    from hq_optuna.visualization.candidates import plot_candidates
    from hq_optuna.visualization.cost_share import plot_cost_share
    from hq_optuna.visualization.pareto import plot_pareto
    from hq_optuna.visualization.prediction import plot_prediction
    from hq_optuna.visualization.sensitivity import plot_sensitivity
    from hq_optuna.visualization.steps import plot_steps
    from hq_optuna.visualization.training import plot_training
    from hq_optuna.visualization.workers import plot_workers

__all__ = [
    "plot_bits",
    "plot_candidates",
    "plot_cost_share",
    "plot_pareto",
    "plot_prediction",
    "plot_sensitivity",
    "plot_steps",
    "plot_training",
    "plot_workers",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_module(name.removeprefix("plot_")), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def figure_of(name: str, history: History) -> go.Figure:
    """Return what ``plot_NAME`` draws, of a history that is read already."""
    module = _module(name)
    return getattr(module, f"{name}_figure")(getattr(module, f"{name}_info")(history))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
