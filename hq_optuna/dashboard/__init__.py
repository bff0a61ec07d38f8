"""Everything optuna-dashboard shows of a search beside its trials: notes, figures, files.

`PageWriter` keeps them current while a search runs, off the path of the workers; `write_pages`
writes them once; `hq_optuna.dashboard.server` starts the dashboard on a study's storage. Writing
needs nothing but Optuna, so a search on machines without optuna-dashboard can be browsed from one
that has it.
"""

from hq_optuna.dashboard.pages import write_pages
from hq_optuna.dashboard.writer import PageWriter, PreparationNote

__all__ = ["PageWriter", "PreparationNote", "write_pages"]
