"""The answer in files that other runtimes read; see `hq_optuna.export.write`."""

from hq_optuna.export.deployed import deployed, for_torchao
from hq_optuna.export.writing import Written, write

__all__ = ["Written", "deployed", "for_torchao", "write"]
