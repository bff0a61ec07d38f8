"""How a sampler ends loops of `optuna.Study.optimize`."""

from __future__ import annotations

from optuna.study import Study


def stop(study: Study) -> None:
    """End the loop of Optuna's that this thread is in, if it is in one.

    Args:
        study: As Optuna hands it to samplers.
    """
    # With `HyperbandPruner` that is a study made for one bracket, which holds the study whose loop
    # runs as `_study` and knows nothing of the loop.
    study = getattr(study, "_study", study)
    # study.stop() raises outside of optimize(), for example in a loop of ask and tell.
    if getattr(study._thread_local, "in_optimize_loop", False):
        study.stop()
