"""How long the dashboard's page of a large study takes to open, and what its pages cost workers.

A study of 5,000 trials and 60 layers (compact encoding, scored from a table, written in bulk) gets
its pages; then Chromium opens it. ``open_seconds`` is from the click to the history drawn with all
its trials, by a server that has read ahead, as `hq-optuna dashboard` does from its start;
``plain_…`` is the same with optuna-dashboard as it is. ``…_cpu_seconds`` are the processor times
in it, which a busy machine changes less. ``…_megabytes`` is what the page reads.
``attributes_ms`` is how long a worker that joins takes to read the study's attributes, without
pages, with them, and with a note for every trial (which is why there is none);
``refresh_cpu_seconds`` is what one writing takes of a core, in its thread.

    python -m benchmarks.dashboard [--trials 5000] [--quick] [--out FILE]

Needs optuna-dashboard, selenium, and Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna

from benchmarks.bulk import write_trials
from benchmarks.outcome import Outcome
from hq_optuna.dashboard import write_pages
from hq_optuna.dashboard.server import DashboardServer
from hq_optuna.space.budget import Budget
from hq_optuna.storages import open_storage, sqlite_url
from hq_optuna.storages.writing import set_study_system_attrs
from tests.browser.chromium import Browser
from tests.fake_search import fake_space, fake_study, score

LAYERS = 60
DRAWN = """
const history = document.querySelector("#plot-history");
return history === null ? 0 : history.querySelectorAll(".point").length;
"""


def large_study(url: str, n_trials: int) -> optuna.Study:
    """Return a study with so many trials, scored in memory and written in bulk."""
    space = fake_space(LAYERS, bits=range(8, 1, -1), pin_first_last=None)
    budget = Budget.fraction(bops=0.07)
    twin = fake_study(space, n_candidates=16, encoding="compact", budget=budget, n_trials=0)
    score(twin, space, n_trials)
    study = optuna.create_study(storage=open_storage(url), study_name="large")
    system = twin._storage.get_study_system_attrs(twin._study_id)
    set_study_system_attrs(study._storage, study._study_id, system)
    for key, value in twin.user_attrs.items():
        study.set_user_attr(key, value)
    write_trials(study, twin.get_trials(deepcopy=False))
    return study


def median_ms(function: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median time of a call."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return round(1000 * statistics.median(taken), 1)


@contextlib.contextmanager
def plain(url: str) -> Iterator[str]:
    """Serve optuna-dashboard as it is, by the same server."""
    import optuna_dashboard

    with DashboardServer(open_storage(url), port=0) as server:
        server._server.set_app(optuna_dashboard.wsgi(open_storage(url)))
        yield server.url


@contextlib.contextmanager
def ours(url: str, study_id: int) -> Iterator[str]:
    """Serve it as `hq-optuna dashboard` does."""
    with DashboardServer(open_storage(url), port=0) as server:
        server.read_ahead(study_id).join()
        yield server.url


def measure(address: str, study_id: int, n_trials: int, limit_s: float) -> dict[str, float]:
    """Return how long the page takes to show its trials, and how much it reads."""
    with Browser() as browser:
        started, served, used = time.perf_counter(), time.process_time(), browser.cpu_seconds()
        browser.open(f"{address}/dashboard/studies/{study_id}")
        browser.wait(lambda: browser.run(DRAWN) >= 0.9 * n_trials, limit_s, "the history")
        found = {
            "open_seconds": round(time.perf_counter() - started, 1),
            "server_cpu_seconds": round(time.process_time() - served, 1),
            "browser_cpu_seconds": round(browser.cpu_seconds() - used, 1),
        }
        errors = browser.console_errors()
    if errors:
        raise RuntimeError(f"The browser's console: {errors}")
    with urllib.request.urlopen(f"{address}/api/studies/{study_id}") as answer:
        n_bytes = len(answer.read())
    return {**found, "megabytes": round(n_bytes / 1e6, 1)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds a page may take")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    n_trials = 200 if options.quick else options.trials
    outcome = Outcome("dashboard")
    figures = outcome.figures
    with tempfile.TemporaryDirectory() as folder:
        url = sqlite_url(Path(folder) / "large.db")
        study = large_study(url, n_trials)
        storage, study_id = study._storage, study._study_id

        def read() -> Any:
            return storage.get_study_system_attrs(study_id)

        figures["attributes_ms_without_pages"] = median_ms(read)
        started = time.process_time()
        write_pages(study)
        figures["refresh_cpu_seconds"] = round(time.process_time() - started, 2)
        figures["attributes_ms"] = median_ms(read)
        with ours(url, study_id) as address:
            figures |= measure(address, study_id, n_trials, options.limit)
        with plain(url) as address:
            found = measure(address, study_id, n_trials, options.limit)
            figures |= {f"plain_{name}": value for name, value in found.items()}
        notes = {
            key: value
            for trial in study.get_trials(deepcopy=False)
            for key, value in (
                (f"dashboard:{trial._trial_id}:note_ver", 1),
                (f"dashboard:{trial._trial_id}:note_str:0", "Step 3, candidate 5: `layer` " * 3),
            )
        }
        set_study_system_attrs(storage, study_id, notes)
        figures["attributes_ms_note_per_trial"] = median_ms(read)
    outcome.finish(options.out)


if __name__ == "__main__":
    main()
