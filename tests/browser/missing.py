"""What the browser tests need beside Python, and how to get it."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver"}
MODULES = {
    "selenium": "selenium",
    "PIL": "pillow",
    "optuna_dashboard": "'hq_optuna[dashboard]'",
}


def skip() -> None:
    """Skip the test where a browser is missing, and say what turns it on."""
    packages = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if packages:
        pytest.skip(f"needs a browser: apt-get install {' '.join(packages)}")
    wheels = [name for module, name in MODULES.items() if not importlib.util.find_spec(module)]
    if wheels:
        pytest.skip(f"needs a browser's driver: pip install {' '.join(wheels)}")
