"""Takes the pictures in docs/images: a search of the digits study, its dashboard and its report.

    python -m docs.screenshots [--run FOLDER] [--out docs/images]

Needs what ``.[dev]`` installs, and Debian's packages chromium and chromium-driver. ``--run`` takes
a finished run (``hq-optuna-runs/digits``) instead of making one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from hq_optuna.artifacts.store import open_artifacts
from hq_optuna.dashboard import write_pages
from hq_optuna.dashboard.server import DashboardServer
from hq_optuna.storages import load_study, sqlite_url
from tests.browser.chromium import Browser

WAIT_S = 120.0
COLOURS = 256
"""Of the palette: pictures of figures need no more, and are a quarter of the size."""


def run_digits(folder: Path) -> None:
    """Search the bits of the digits network."""
    subprocess.run(
        [sys.executable, "-m", "hq_optuna", "run", "digits", "--folder", str(folder)],
        check=True,
    )


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture as a small PNG, which keeps the colours of thin lines too."""
    few = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a finished run of digits")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.run or Path(temporary) / "digits"
        if options.run is None:
            run_digits(folder)
        study = load_study(sqlite_url(folder / "study.db"), "digits")
        artifacts = open_artifacts(folder / "artifacts")
        write_pages(study)  # a run of an earlier version may have others
        with DashboardServer(study._storage, artifacts, port=0) as server:
            page = f"{server.url}/dashboard/studies/{study._study_id}"
            with Browser(1400, 1210) as browser:
                browser.open(page)
                browser.wait(
                    lambda: len(browser.find("[id^='user-defined-plot:'] .main-svg")) >= 3,
                    WAIT_S,
                    "figures",
                )
                browser.wait(lambda: browser.find("#plot-history .point"), WAIT_S, "history")
                browser.pause(2)
                # The cards of this package stand below those of every study.
                browser.run("document.getElementById('user-defined-plot:steps').scrollIntoView()")
                browser.run("window.scrollBy(0, -90)")
                browser.pause(1)
                save(browser.picture(), options.out / "dashboard.png")
            with Browser(1280, 913) as browser:
                browser.open((folder / "report.html").absolute().as_uri())
                browser.wait(lambda: browser.find("figure .main-svg"), WAIT_S, "figures")
                browser.pause(2)
                save(browser.picture(), options.out / "report.png")


if __name__ == "__main__":
    main()
