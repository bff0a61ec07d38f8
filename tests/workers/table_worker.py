"""A worker process on an additive table.

    python -m tests.workers.table_worker STORAGE SECONDS [STEP]

Each candidate takes about SECONDS, so that kills land inside candidates. With STEP it says when it
has its first candidate of that step and waits there for standard input to end, so that whoever
starts several can have all at work before any goes on, and kill them before any is done. No
PyTorch.
"""

from __future__ import annotations

import random
import sys
import time

import optuna
from optuna.storages import BaseStorage

from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.storages import open_storage
from hq_optuna.workers.loop import work
from tests.samplers.tables import assigned, sampler

NAME = "table"


def by() -> ProgressiveBitSampler:
    return sampler(8, n_candidates=4, encoding="compact")


def opened(storage: str) -> BaseStorage:
    return open_storage(storage)


def main(storage: str, seconds: float, waits_at: int | None = None) -> None:
    chosen = by()
    study = optuna.load_study(study_name=NAME, storage=opened(storage), sampler=chosen)

    def objective(trial: optuna.Trial) -> float:
        nonlocal waits_at
        ticket = chosen.ticket(study, trial)
        if ticket is not None and ticket.step == waits_at:
            waits_at = None
            print("at work", flush=True)
            sys.stdin.read()
        time.sleep(random.uniform(0.5, 1.5) * seconds)
        return assigned(trial)

    work(study, objective)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:]))
