"""``python -m hq_optuna``: the command without an installed script."""

from hq_optuna.cli import main

if __name__ == "__main__":
    main()
