"""The command ``hq-optuna``."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from hq_optuna.cli.app import app

    app(prog_name="hq-optuna")
