"""What the checks of a network cost before a search: `check_forward` in forward passes of a batch.

    python -m benchmarks.door [--out FILE] [--quick]

Both are timed in turn, and the median of each is taken. Networks are torchvision's with random
weights, on one thread; calibration data are four batches of 32 images.

Figures:
    checks_NETWORK: Time of `check_forward` over that of a forward pass of one batch.
    largest: The largest of these.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch.nn.functional import cross_entropy

from benchmarks.outcome import Outcome
from hq_optuna.network.batches import forward, read_batches
from hq_optuna.network.checks import check_forward
from hq_optuna.network.introspection import introspect

NETWORKS = {"resnet18": 64, "mobilenet_v2": 96, "squeezenet1_1": 128, "vit_b_16": 224}
"""Name → pixels along a side."""
RUNS = 9


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(name: str, runs: int) -> tuple[float, float]:
    """Return median seconds of the checks of a network, and of a forward pass of one batch."""
    network = torchvision.models.get_model(name, weights=None).eval()
    n, size = 8 if name.startswith("vit") else 32, NETWORKS[name]
    images, labels = torch.randn(4 * n, 3, size, size), torch.randint(0, 1000, (4 * n,))
    data = read_batches((images, labels), batch_size=n)
    layers = [layer.name for layer in introspect(network, data[0].inputs).layers]

    def check() -> None:
        check_forward(network, data, cross_entropy, layers)

    @torch.no_grad()
    def once() -> None:
        forward(network, data[0].inputs)

    check()
    once()
    pairs = [(timed(check), timed(once)) for _ in range(runs)]
    checks, passes = (statistics.median(column) for column in zip(*pairs, strict=True))
    return checks, passes


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="two networks, few runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    outcome = Outcome("door")
    for name in list(NETWORKS)[:2] if arguments.quick else NETWORKS:
        checks, once = measure(name, 3 if arguments.quick or name.startswith("vit") else RUNS)
        outcome.figures[f"checks_{name}"] = round(checks / once, 2)
        outcome.details[name] = {"seconds_checks": checks, "seconds_pass": once}
        print(f"{name}: {checks:.2f} s of checks, {once:.2f} s a pass", flush=True)
    outcome.figures["largest"] = max(outcome.figures.values())
    outcome.finish(arguments.out)


if __name__ == "__main__":
    main()
