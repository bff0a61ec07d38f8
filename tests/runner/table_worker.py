"""A worker process on an additive table: ``python -m tests.runner.table_worker STORAGE SECONDS``.

Each candidate takes about SECONDS, so that kills
land inside candidates. No PyTorch.
"""

from __future__ import annotations

import random
import sys
import time

import optuna
from optuna.storages import BaseStorage

from hq_optuna.runner.worker import work
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.storages import open_storage
from tests.samplers.tables import assigned, sampler

NAME = "table"


def by() -> ProgressiveBitSampler:
    return sampler(8, n_candidates=4, encoding="compact")


def opened(storage: str) -> BaseStorage:
    return open_storage(storage)


def main(storage: str, seconds: float) -> None:
    study = optuna.load_study(study_name=NAME, storage=opened(storage), sampler=by())

    def objective(trial: optuna.Trial) -> float:
        time.sleep(random.uniform(0.5, 1.5) * seconds)
        return assigned(trial)

    work(study, objective)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
