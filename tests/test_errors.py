"""Errors are caught by the builtin's name too, and carry what a caller needs to go on."""

import copy
import inspect

import pytest

from hq_optuna import errors
from hq_optuna.errors import BudgetError, HqOptunaError, ResumeError

ALL = [
    item
    for item in vars(errors).values()
    if inspect.isclass(item) and issubclass(item, HqOptunaError) and item is not HqOptunaError
]


def make(kind: type[HqOptunaError]) -> HqOptunaError:
    if kind is BudgetError:
        return BudgetError("too low", limit=3.0, minimum=4.0)
    return kind("too low")


def test_the_module_defines_the_errors_the_package_promises() -> None:
    assert {kind.__name__ for kind in ALL} >= {
        "SettingError",
        "SpaceError",
        "BudgetError",
        "NetworkError",
        "DataError",
        "StudyFileError",
        "RecipeError",
        "ResumeError",
        "StorageError",
        "ScoreError",
    }


@pytest.mark.parametrize("kind", ALL)
def test_code_that_knows_nothing_of_this_package_catches_the_builtin(
    kind: type[HqOptunaError],
) -> None:
    builtin = (
        RuntimeError
        if kind.__name__
        in (
            *("StorageError", "ArtifactError", "WorkerError", "DashboardError", "ScoreError"),
            "TrainingError",
        )
        else ValueError
    )
    with pytest.raises(builtin, match="too low"):
        raise make(kind)
    assert issubclass(kind, HqOptunaError)


def test_a_budget_error_carries_limit_and_minimum() -> None:
    error = BudgetError("too low", limit=3.0, minimum=4.0)
    assert (error.limit, error.minimum, str(error)) == (3.0, 4.0, "too low")


def test_a_budget_error_cannot_be_made_without_its_numbers() -> None:
    with pytest.raises(TypeError, match="limit"):
        BudgetError("too low")  # type: ignore[call-arg]


def test_a_resume_error_names_what_changed() -> None:
    assert ResumeError("other", changed=("network", "budget")).changed == ("network", "budget")
    assert ResumeError("other").changed == ()


@pytest.mark.parametrize("kind", ALL)
def test_an_error_survives_the_way_out_of_a_worker_process(kind: type[HqOptunaError]) -> None:
    # `copy` rebuilds an exception as a process pool does: a class that cannot be rebuilt from
    # its arguments breaks the whole pool instead of raising in the parent.
    error = make(kind)
    again = copy.copy(error)
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)
