"""A worker whose candidates take a sleep each and a score from a table, for `benchmarks.workers`.

python -m benchmarks.sleeping_worker SECONDS LAYERS
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.table_search import Search
from hq_optuna.workers.serving import Answer, Orders, serve
from tests.fake_search import fake_score, fake_table


def main() -> None:
    """Serve the orders on standard input."""
    seconds, layers = float(sys.argv[1]), int(sys.argv[2])
    space = Search(layers=layers).sampler().space
    table = fake_table(space)

    def score(order: dict[str, Any], needed: Callable[[], bool]) -> Answer:
        del needed
        time.sleep(seconds)
        weights, activations = fake_score(table, space.config(order["bits"]))
        facts = {"score_weights": weights, "score_activations": activations}
        return weights + activations, {**facts, "seconds": seconds, "worker": f"box:{os.getpid()}"}

    def tell(event: str, **said: Any) -> None:
        print(json.dumps({"event": event, **said}), flush=True)

    serve(Orders(sys.stdin.fileno(), lambda: os._exit(1)), score, tell)


if __name__ == "__main__":
    main()
