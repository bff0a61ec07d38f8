"""What every benchmark prints last: one JSON object on one line."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import optuna
import torch

import hq_optuna


class Outcome:
    """Collects figures and prints them, with machine, versions and seconds, as the last line."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self.figures: dict[str, float] = {}
        self.details: dict[str, Any] = {}
        self._started = time.perf_counter()

    def finish(self, out: Path | None) -> None:
        """Print the line; write everything, details too, to ``out``."""
        line = {
            "benchmark": self.benchmark,
            "figures": self.figures,
            "machine": {
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
            },
            "versions": {
                "hq_optuna": hq_optuna.__version__,
                "optuna": optuna.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "seconds": round(time.perf_counter() - self._started, 1),
        }
        if out is not None:
            out.write_text(json.dumps({**line, "details": self.details}, indent=1) + "\n")
        print(json.dumps(line))
