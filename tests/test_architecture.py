"""Rooms and the direction of imports, read from the source text; nothing here runs the package.

    studies        cli
         runner  export          know both halves
    torch half      Optuna half  never each other
        cost    search           NumPy and SciPy only
    base: errors layers assignment space _version

A new module must be placed in a room below; one that stands nowhere fails the test.
"""

import ast
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hq_optuna"

BASE = {"errors", "layers", "bit_config", "space", "whole_files", "_version"}
PLAIN = {"cost", "search"}
TORCH = {
    *("batches", "introspection", "quantization", "curvature", "scoring", "training"),
    *("as_found", "checks", "copies", "devices"),
}
OPTUNA = {
    *("attrs", "workers", "history", "samplers", "pruners", "storages"),
    *("artifacts", "visualization", "standing", "runs", "dashboard"),
}
BOTH = {"runner", "launching", "export"}
FACE = "hq_optuna"
"""The package's own `__init__`, which shows names of every room (lazily)."""

ROOMS = BASE | PLAIN | TORCH | OPTUNA | BOTH | {"cli", FACE}

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FOR_STUDIES = {"torchvision", "sklearn"}


def reachable(room: str) -> set[str]:
    """Rooms that ``room`` may import."""
    if room in BASE:
        return BASE
    if room in PLAIN:
        return BASE | {room}
    if room in TORCH:
        return BASE | PLAIN | TORCH
    if room in OPTUNA:
        return BASE | PLAIN | OPTUNA
    if room in BOTH:
        return ROOMS - {"cli"}
    return ROOMS


def forbidden(room: str, package: str) -> bool:
    """Return whether ``room`` must not import the third-party ``package``."""
    if package in PICKLES | FOR_STUDIES:
        return True
    if room in BASE:
        return True
    if room in PLAIN:
        return package not in {"numpy", "scipy"}
    if room in TORCH:
        return package in {"optuna", "sqlalchemy", "plotly", "optuna_dashboard"}
    if room in OPTUNA:
        return package in {"torch", "safetensors"}
    return False


def imports(module: str, source: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, full dotted name) of all imports, also in functions and under TYPE_CHECKING."""
    here = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = here.split(".")[: len(here.split(".")) - node.level + 1]
                origin = ".".join([*parents, origin]).rstrip(".")
            for alias in node.names:
                # `from hq_optuna import attrs` means a room, `from hq_optuna import BitSearch` not.
                room = origin == FACE and alias.name in ROOMS
                yield node.lineno, f"{origin}.{alias.name}" if room else origin
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Return a sentence for every import of ``module`` that points the wrong way."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else FACE
    if room not in ROOMS:
        return [f"{module} stands in no room; place it in tests/test_architecture.py."]
    found = []
    for line, name in imports(module, source, is_package=is_package):
        top, _, rest = name.partition(".")
        if top == FACE:
            target = rest.split(".")[0] or FACE
            if target not in reachable(room):
                found.append(f"{module}:{line} ({room}) must not import hq_optuna.{target}")
        elif top in PICKLES or (top not in sys.stdlib_module_names and forbidden(room, top)):
            found.append(f"{module}:{line} ({room}) must not import {top}")
    return found


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_point_downwards_and_the_halves_never_meet() -> None:
    found = [
        violation
        for path in sources("hq_optuna")
        for violation in violations(
            module_name(path), path.read_text("utf-8"), is_package=path.name == "__init__.py"
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "blamed"),
    [
        ("hq_optuna.space", "import numpy", "numpy"),
        ("hq_optuna.errors", "from hq_optuna.cost import Budget", "hq_optuna.cost"),
        ("hq_optuna.cost.model", "import torch.nn as nn", "torch"),
        ("hq_optuna.search.moves", "import optuna", "optuna"),
        ("hq_optuna.search.moves", "from ..cost import model", "hq_optuna.cost"),
        ("hq_optuna.search.moves", "from hq_optuna import samplers", "hq_optuna.samplers"),
        ("hq_optuna.scoring.trace", "from optuna.trial import Trial", "optuna"),
        ("hq_optuna.scoring.trace", "import hq_optuna.attrs as attrs", "hq_optuna.attrs"),
        ("hq_optuna.introspection", "from hq_optuna.runner import api", "hq_optuna.runner"),
        ("hq_optuna.batches", "import plotly.graph_objects", "plotly"),
        ("hq_optuna.curvature.adam", "import sqlalchemy", "sqlalchemy"),
        ("hq_optuna.samplers.log", "from torch import Tensor", "torch"),
        ("hq_optuna.samplers.log", "from hq_optuna.batches import Batches", "hq_optuna.batches"),
        ("hq_optuna.workers", "import hq_optuna.cli", "hq_optuna.cli"),
        ("hq_optuna.attrs", "import hq_optuna", "hq_optuna"),
        ("hq_optuna.runner.api", "from hq_optuna.cli import main", "hq_optuna.cli"),
        ("hq_optuna.runner.api", "import pickle", "pickle"),
        ("hq_optuna.cli.run", "from torchvision import models", "torchvision"),
        ("hq_optuna.export", "import sklearn.datasets", "sklearn"),
        ("hq_optuna.cost.model", "if TYPE_CHECKING:\n    import torch", "torch"),
        ("hq_optuna.cost.model", "def late():\n    import torch", "torch"),
        ("hq_optuna.cost.model", "import importlib\nimportlib.import_module('torch')", "torch"),
        ("hq_optuna.attic", "", "no room"),
    ],
)
def test_the_checker_catches_a_violation(module: str, source: str, blamed: str) -> None:
    (found,) = violations(module, source)
    assert blamed in found
    assert module in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hq_optuna.space", "import json\nfrom hq_optuna.errors import SpaceError"),
        ("hq_optuna.cost.budget", "import numpy\nfrom .model import CostModel"),
        (
            "hq_optuna.search.refine",
            "from scipy.optimize import milp\nfrom ..space import Variable",
        ),
        ("hq_optuna.scoring.trace", "import torch\nfrom hq_optuna.search import Move"),
        ("hq_optuna.samplers.log", "import optuna\nfrom hq_optuna import attrs"),
        ("hq_optuna.runner.api", "import torch, optuna\nfrom hq_optuna import scoring, samplers"),
        ("hq_optuna.cli.run", "import rich\nimport hq_optuna as hq\nfrom hq_optuna import runner"),
        ("hq_optuna", "from hq_optuna.runner import BitSearch"),
    ],
)
def test_the_checker_lets_the_right_direction_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_relative_imports_are_read_from_packages_too() -> None:
    (found,) = violations("hq_optuna.search", "from ..scoring import x", is_package=True)
    assert "hq_optuna.scoring" in found
    assert violations("hq_optuna.search", "from .moves import propose", is_package=True) == []


def test_only_declared_dependencies_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [
        *project["dependencies"],
        *(line for name in extras if name not in {"dev", "studies"} for line in extras[name]),
    ]
    known = {re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in declared}
    used = {
        name.partition(".")[0]
        for path in sources("hq_optuna")
        for _, name in imports(
            module_name(path), path.read_text("utf-8"), is_package=path.name == "__init__.py"
        )
    }
    assert used - set(sys.stdlib_module_names) - known <= {FACE}


def test_nothing_unpickles() -> None:
    # A pickle from a stranger's storage or artifact runs the stranger's code.
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources("hq_optuna", "studies", "benchmarks")
        for line, name in imports(module_name(path), path.read_text("utf-8"))
        if name.partition(".")[0] in PICKLES
    ]
    assert not found, "\n".join(found)


def test_no_module_holds_more_than_400_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in sources("hq_optuna", "studies", "benchmarks", "tests")
    }
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_no_module_is_called_utils() -> None:
    everywhere = sources("hq_optuna", "studies", "benchmarks", "tests")
    assert [path for path in everywhere if {"utils", "util"} & {path.stem, path.parent.name}] == []


def loaded_after(*modules: str) -> set[str]:
    """Return the top-level packages a fresh interpreter holds after the imports."""
    code = "".join(f"import {module}\n" for module in modules)
    code += "import sys\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(run.stdout.split())


def existing(rooms: set[str]) -> list[str]:
    names = {item.name for item in pkgutil.iter_modules([str(PACKAGE)])}
    return [f"hq_optuna.{name}" for name in sorted(rooms & names)]


def test_import_of_the_package_loads_no_torch() -> None:
    loaded = loaded_after("hq_optuna")
    assert "hq_optuna" in loaded
    assert "torch" not in loaded


def test_the_lower_rooms_load_neither_torch_nor_optuna() -> None:
    loaded = loaded_after(*existing(BASE | PLAIN))
    assert "numpy" in loaded
    assert not loaded & {"torch", "optuna", "sqlalchemy", "plotly"}


def test_the_optuna_half_loads_no_torch() -> None:
    loaded = loaded_after(*existing(OPTUNA))
    assert "optuna" in loaded
    assert "torch" not in loaded


def test_the_torch_half_loads_no_optuna() -> None:
    loaded = loaded_after(*existing(TORCH))
    assert "torch" in loaded
    assert not loaded & {"optuna", "sqlalchemy", "plotly", "torchvision", "sklearn"}
