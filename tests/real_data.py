"""Real data that the project cannot ship: tests that need them skip where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


def shared_data(name: str) -> Path:
    """Return a file of the real data, or skip the test that asks for it."""
    folder = Path(os.environ.get("HQ_OPTUNA_DATA", CHECKOUT.parent / "shared" / "data"))
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not in {folder}; HQ_OPTUNA_DATA names the folder with the data")
    return folder / name
