"""Optuna's private names: each is still there, and one module alone uses them."""

from __future__ import annotations

import ast
import importlib
import threading
import tomllib
from collections.abc import Iterator

import optuna
import pytest
from packaging.requirements import Requirement

from tests.test_architecture import ROOT, TORCH, sources

INTERNALS = ROOT / "hq_optuna" / "optuna_internals.py"

NEEDED = [
    ("optuna.study:Study", "_storage", "write system attributes, which have no public way in"),
    ("optuna.study:Study", "_study_id", "call the methods of a storage"),
    ("optuna.study:Study", "_thread_local", "stop a loop of optimize from within a sampler"),
    ("optuna.study:Study", "_pop_waiting_trial_id", "run trials that somebody enqueued"),
    ("optuna.pruners:HyperbandPruner", "_study", "find the study behind a bracket"),
    ("optuna.study._frozen:FrozenStudy", "_study_id", "list studies by age"),
    ("optuna.trial:Trial", "_trial_id", "call the methods of a storage"),
    ("optuna.trial:Trial", "_cached_frozen_trial", "tell a trial what was written past it"),
    ("optuna.trial:FrozenTrial", "_trial_id", "call the methods of a storage"),
    ("optuna.samplers:BaseSampler", "_raise_error_if_multi_objective", "refuse such studies"),
    ("optuna.storages:RDBStorage", "_create_new_trial", "create a trial in one transaction"),
    ("optuna.storages:_CachedStorage", "_backend", "find the database behind Optuna's cache"),
    ("optuna.storages._rdb:models", "TrialModel", "read all trials in one query"),
    ("optuna.storages._rdb:models", "TrialParamModel", "write a trial in one transaction"),
    ("optuna.storages._rdb:models", "TrialValueModel", "read all trials in one query"),
    ("optuna.storages._rdb:models", "TrialUserAttributeModel", "read and write attributes"),
    ("optuna.storages._rdb:models", "TrialSystemAttributeModel", "read and write tickets"),
    ("optuna.storages._rdb:models", "StudyModel", "hand out trial numbers one after the other"),
    ("optuna.storages._rdb:models", "StudySystemAttributeModel", "write many attributes at once"),
    ("optuna.artifacts:FileSystemArtifactStore", "_get_filepath", "write artifacts atomically"),
    ("optuna.artifacts._upload", "ARTIFACTS_ATTR_PREFIX", "list artifacts in the dashboard"),
]
"""Where a name is, the name, and what it is needed for."""


def instance(owner: type) -> object:
    """Return an object of a class whose private names are set when it is made."""
    study = optuna.create_study()
    if owner is optuna.storages._CachedStorage:
        return optuna.storages.get_storage("sqlite://")
    if owner is optuna.trial.Trial:
        return study.ask()
    if owner is optuna.trial.FrozenTrial:
        return optuna.create_trial(value=0.0)
    if owner is optuna.study.Study:
        return study
    if owner is optuna.pruners.HyperbandPruner:  # the study of one of its brackets
        return owner()._create_bracket_study(study, 0)
    if owner.__name__ == "FrozenStudy":
        (frozen,) = study._storage.get_all_studies()
        return frozen
    return owner


@pytest.mark.parametrize(("where", "name", "purpose"), NEEDED)
def test_optuna_still_has_the_private_name(where: str, name: str, purpose: str) -> None:
    module, _, attribute = where.partition(":")
    gone = (
        f"Optuna {optuna.__version__} no longer has {where.replace(':', '.')}.{name}; hq_optuna "
        f"needs it to {purpose}. Find another way in hq_optuna/optuna_internals.py."
    )
    try:
        owner = importlib.import_module(module)
        owner = getattr(owner, attribute) if attribute else owner
    except (ImportError, AttributeError):
        pytest.fail(gone)
    found = instance(owner) if isinstance(owner, type) else owner
    if not hasattr(found, name):
        pytest.fail(gone)


def test_what_private_names_hold_is_what_is_expected_of_them() -> None:
    from hq_optuna import optuna_internals as internals

    study = optuna.create_study(storage="sqlite://")
    storage, study_id = internals.place_of(study)
    assert (storage, study_id) == (internals.storage_of(study), internals.id_of(study))
    assert storage.get_study_name_from_id(study_id) == study.study_name
    trial = study.ask()
    assert storage.get_trial(internals.trial_id_of(trial)).number == trial.number
    study.enqueue_trial({"a": 1})
    assert internals.FIXED_PARAMS in study.trials[1].system_attrs
    waiting = internals.pop_waiting(study)
    assert storage.get_trial(waiting).number == 1
    assert internals.pop_waiting(study) is None
    assert isinstance(internals.database_of(storage), optuna.storages.RDBStorage)
    assert internals.database_of(optuna.storages.InMemoryStorage()) is None


@pytest.mark.parametrize("pruner", [None, optuna.pruners.HyperbandPruner()])
def test_the_loop_of_this_thread_is_found_and_no_other(pruner: object) -> None:
    from hq_optuna.optuna_internals import loop_of

    seen: list[object] = []

    class Sampler(optuna.samplers.RandomSampler):
        def before_trial(self, study: optuna.Study, trial: object) -> None:
            seen.append(loop_of(study))
            thread = threading.Thread(target=lambda: seen.append(loop_of(study)))
            thread.start()
            thread.join()

    study = optuna.create_study(sampler=Sampler(), pruner=pruner)
    study.optimize(lambda trial: 0.0, n_trials=1)
    assert seen == [study, None]
    study.ask()
    assert seen[2] is None


def test_optuna_is_asked_for_as_the_version_whose_private_names_are_known() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (asked,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "optuna"]
    assert optuna.__version__ in asked.specifier
    assert "6.0.0" not in asked.specifier


OPTUNAS = {name for _, name, _ in NEEDED}
PYTHONS = {"_exit", "_replace", "_asdict"}  # of os and of named tuples


def private_uses(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of private attributes, and private modules of Optuna that are imported.

    What an object asks of itself, or of another one by a name that the file defines, is its own;
    but names of `NEEDED` are Optuna's wherever another object is asked.
    """
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            other = ast.unparse(node.value) not in ("self", "cls")
            if private and (node.attr not in own or (other and node.attr in OPTUNAS)):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optuna"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names if "._" in name)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("optuna")]
            yield from ((node.lineno, name) for name in names if "._" in name)


def test_no_other_module_uses_private_names_of_optuna() -> None:
    met = [path for path in sources("hq_optuna") if path != INTERNALS]
    met = [path for path in met if path.relative_to(ROOT).parts[1] not in (*TORCH, "export")]
    found = [
        f"{path.relative_to(ROOT)}:{line} uses {name}; hq_optuna/optuna_internals.py is for that"
        for path in met
        for line, name in private_uses(path.read_text("utf-8"))
        if name not in PYTHONS
    ]
    assert not found, "\n".join(found)


def test_every_private_name_that_is_used_is_looked_for() -> None:
    used = {name.rpartition(".")[2] for _, name in private_uses(INTERNALS.read_text("utf-8"))}
    used -= {"models", "FrozenStudy"}  # a module and a class, whose own names are looked for
    assert used <= OPTUNAS


@pytest.mark.parametrize(
    "source",
    [
        "study._storage",
        "class Mine:\n    def __init__(self, study):\n        self._storage = study._storage",
        "from optuna.storages._rdb import models",
        "import optuna.study._frozen",
        "class Mine:\n    def write(self):\n        self._get_filepath('x')",
    ],
)
def test_a_private_use_is_found(source: str) -> None:
    assert len(list(private_uses(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "class Mine:\n    def __init__(self):\n        self._a = 1\n    def b(self, other):\n"
        "        return other._a, self.__dict__",
        "from optuna.study import Study",
    ],
)
def test_names_of_ones_own_are_no_private_use(source: str) -> None:
    assert list(private_uses(source)) == []
