"""Which room may import which, read from the source text; nothing here runs the package.

    cli
    bit_search                               the whole search from one call
    report   study_files   workers   export
    answer                                   the answer of a search
    objective                                where a network meets a trial: both halves
    training scoring curvature rises         dashboard visualization samplers pruners
    quantization network   hardware          artifacts protocol storages
    settings  search  space                  NumPy and SciPy only
    attributes  errors  atomic_files         standard library only
    optuna_internals                         Optuna only: its private names

The left column of the middle knows PyTorch, the right one Optuna; neither knows the other. `ROOMS`
is the whole table. A module that stands in no room fails the test.
"""

import ast
import functools
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hq_optuna"

BASE = ("errors", "atomic_files", "_version", "attributes")
INTERNALS = "optuna_internals"
PLAIN = ("space", "search", "settings")
TORCH = ("network", "quantization", "rises", "curvature", "scoring", "training")
OPTUNA = (
    *("storages", "protocol", "pruners", "samplers", "artifacts", "visualization", "dashboard"),
)
BOTH = (
    "hardware",
    "objective",
    "answer",
    "export",
    "workers",
    "study_files",
    "report",
    "bit_search",
)
FACE = "hq_optuna"
"""The package's own `__init__`, which shows names of every room (lazily)."""

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "atomic_files": set(),
    "_version": set(),
    "attributes": set(),
    "settings": {"errors", "space"},
    INTERNALS: set(),
    "space": {"errors"},
    "search": {"errors", "settings", "space"},
    "hardware": {"errors", "settings", "space"},
    "network": {"errors", "settings", "space"},
    "quantization": {"errors", "settings", "space", "network"},
    "rises": {"errors", "network"},
    "curvature": {"errors", "space", "network", "quantization", "rises"},
    "scoring": {"errors", "settings", "space", "network", "quantization", "rises", "curvature"},
    "training": {
        *("errors", "atomic_files", "settings", "space"),
        *("network", "quantization", "curvature"),
    },
    "storages": {"errors", "attributes", INTERNALS},
    "protocol": {
        *("errors", "attributes", INTERNALS, "settings", "space", "search", "storages"),
    },
    "pruners": {"attributes", "space", "search"},
    "samplers": {
        *("attributes", INTERNALS, "settings", "space", "search", "protocol", "pruners"),
    },
    "artifacts": {"errors", "atomic_files", "attributes", INTERNALS},
    "visualization": {"attributes", "space", "search", "protocol"},
    "dashboard": {
        *("errors", "attributes", INTERNALS, "space", "search"),
        *("storages", "protocol", "artifacts", "visualization"),
    },
    "objective": {
        *("errors", "attributes", INTERNALS, "settings", "_version", "space", "search", *TORCH),
        *("protocol", "pruners", "samplers", "artifacts", "hardware"),
    },
    "answer": {
        *("errors", "atomic_files", "attributes", "space", "search"),
        *("network", "quantization", "rises", "scoring", "protocol", "artifacts", "objective"),
    },
    "export": {
        *("errors", "atomic_files", "_version", "space", "network", "quantization", "answer"),
    },
    "workers": {"errors", "attributes", INTERNALS, "search", "storages", "protocol", "samplers"},
    "study_files": {"errors", "settings"},
    "report": {
        *("atomic_files", "_version", "attributes", "settings", INTERNALS, "space", "search"),
        *("protocol", "visualization", "answer"),
    },
    "bit_search": {
        *("errors", "attributes", INTERNALS, "settings", "space", "search"),
        *("network", "rises", "training", "storages", "protocol"),
        *("pruners", "samplers", "artifacts", "dashboard"),
        *("objective", "answer", "workers", "hardware"),
    },
    "cli": {*BASE, INTERNALS, *PLAIN, *TORCH, *OPTUNA, *BOTH},
    FACE: {*BASE, INTERNALS, *PLAIN, *TORCH, *OPTUNA, *BOTH},
    "__main__": {"cli"},
}
MOST_FILES = 15
"""In a room: what a newcomer can take in at a glance."""

MOST_LINES = 700
"""In a file: what holds more probably holds two ideas."""

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FOR_STUDIES = {"torchvision", "sklearn"}


def forbidden(room: str, package: str) -> bool:
    """Return whether ``room`` must not import the third-party ``package``."""
    if package in PICKLES | FOR_STUDIES:
        return True
    if room in BASE:
        return True
    if room == INTERNALS:
        return package != "optuna"
    if room in PLAIN:
        return package not in {"numpy", "scipy"}
    if room in TORCH:
        return package in {"optuna", "sqlalchemy", "plotly", "optuna_dashboard"}
    if room in OPTUNA:
        return package in {"torch", "safetensors"}
    return False


@functools.cache
def modules() -> dict[str, Path]:
    """Return the package's modules by name."""
    return {module_name(path): path for path in sources("hq_optuna")}


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
                # `from hq_optuna import space` means a module, `… import BitSearch` a name in one.
                whole = f"{origin}.{alias.name}"
                room = origin == FACE and alias.name in ROOMS
                yield node.lineno, whole if room or whole in modules() else origin
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
            if target != room and target not in ROOMS[room]:
                found.append(f"{module}:{line} ({room}) must not import hq_optuna.{target}")
        elif top in PICKLES or (top not in sys.stdlib_module_names and forbidden(room, top)):
            found.append(f"{module}:{line} ({room}) must not import {top}")
    return found


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph() -> dict[str, set[str]]:
    """Return module → modules of the package that it imports, also in functions."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        text, is_package = path.read_text("utf-8"), path.name == "__init__.py"
        names = {name for _, name in imports(module, text, is_package=is_package)}
        found[module] = {name for name in names if name in modules() and name != module}
    return found


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, Tarjan's strong components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def test_imports_follow_the_table_of_rooms() -> None:
    found = [
        violation
        for path in sources("hq_optuna")
        for violation in violations(
            module_name(path), path.read_text("utf-8"), is_package=path.name == "__init__.py"
        )
    ]
    assert not found, "\n".join(found)


def test_the_table_itself_has_no_circle_and_names_only_rooms() -> None:
    assert cycles({room: set(targets) for room, targets in ROOMS.items()}) == []
    assert set().union(*ROOMS.values()) <= set(ROOMS)
    for room in (*TORCH, *OPTUNA):
        other = OPTUNA if room in TORCH else TORCH
        assert not ROOMS[room] & set(other)


def test_every_permission_in_the_table_is_used() -> None:
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, targets in graph().items():
        parts = module.split(".")
        room = parts[1] if len(parts) > 1 else FACE
        used[room] |= {target.split(".")[1] for target in targets if "." in target} - {room}
    unused = {room: ROOMS[room] - used[room] for room in ROOMS if room not in ("cli", FACE)}
    assert {room: names for room, names in unused.items() if names} == {}


def test_no_module_imports_itself_through_others_not_even_for_types() -> None:
    edges = graph()
    del edges[FACE]  # shows names of every room, and loads them when they are used
    assert cycles(edges) == []


def test_a_circle_is_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set[str]()}
    assert cycles(edges) == [["a", "b", "c"]]


def test_no_room_holds_more_files_than_one_takes_in_at_a_glance() -> None:
    files: dict[Path, int] = {}
    for path in sources("hq_optuna"):
        files[path.parent] = files.get(path.parent, 0) + 1
    assert {str(room): n for room, n in files.items() if n > MOST_FILES} == {}


@pytest.mark.parametrize(
    ("module", "source", "blamed"),
    [
        ("hq_optuna.attributes", "import numpy", "numpy"),
        ("hq_optuna.errors", "from hq_optuna.space import Budget", "hq_optuna.space"),
        ("hq_optuna.space.cost", "import torch.nn as nn", "torch"),
        ("hq_optuna.search.moves", "import optuna", "optuna"),
        ("hq_optuna.space.cost", "from ..search import moves", "hq_optuna.search"),
        ("hq_optuna.search.moves", "from hq_optuna import samplers", "hq_optuna.samplers"),
        ("hq_optuna.scoring.trace", "from optuna.trial import Trial", "optuna"),
        ("hq_optuna.scoring.trace", "import hq_optuna.attributes as a", "hq_optuna.attributes"),
        ("hq_optuna.network.batches", "from hq_optuna.quantization import a", "quantization"),
        ("hq_optuna.network.batches", "import plotly.graph_objects", "plotly"),
        ("hq_optuna.curvature.adam", "import sqlalchemy", "sqlalchemy"),
        ("hq_optuna.protocol.step_log", "from torch import Tensor", "torch"),
        ("hq_optuna.protocol.step_log", "from hq_optuna.network import a", "hq_optuna.network"),
        ("hq_optuna.protocol.step_log", "from hq_optuna.samplers import a", "hq_optuna.samplers"),
        ("hq_optuna.workers.loop", "import hq_optuna.cli", "hq_optuna.cli"),
        ("hq_optuna.attributes", "import hq_optuna", "hq_optuna"),
        ("hq_optuna.answer.recipe", "from hq_optuna.report import text", "hq_optuna.report"),
        ("hq_optuna.answer.recipe", "import pickle", "pickle"),
        ("hq_optuna.cli.run", "from torchvision import models", "torchvision"),
        ("hq_optuna.answer.recipe", "import sklearn.datasets", "sklearn"),
        ("hq_optuna.space.cost", "if TYPE_CHECKING:\n    import torch", "torch"),
        ("hq_optuna.space.cost", "def late():\n    import torch", "torch"),
        ("hq_optuna.space.cost", "import importlib\nimportlib.import_module('torch')", "torch"),
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
        ("hq_optuna.attributes", "import json\nfrom dataclasses import dataclass"),
        ("hq_optuna.space.budget", "import numpy\nfrom .cost import CostModel"),
        ("hq_optuna.search.swaps", "from scipy.optimize import milp\nfrom ..space import layers"),
        ("hq_optuna.scoring.trace", "import torch\nfrom hq_optuna.space import layers"),
        ("hq_optuna.protocol.step_log", "import optuna\nfrom hq_optuna import attributes"),
        ("hq_optuna.objective.a", "import torch, optuna\nfrom hq_optuna import scoring, samplers"),
        ("hq_optuna.cli.run", "import rich\nfrom hq_optuna import workers"),
        ("hq_optuna", "from hq_optuna.bit_search import BitSearch"),
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
    known |= {"yaml"} if "pyyaml" in known else set()  # the one with another name
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


def test_no_module_holds_two_ideas() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in sources("hq_optuna", "studies", "benchmarks", "tests")
    }
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


THEIRS = {
    *("module", "parameter", "tensor", "ctx", "torch.backends.cudnn", "layers[name]"),  # PyTorch's
    *("axis", "console", "environment", "study", "trial"),  # of libraries; copies, or just made
    *("options", "graph", "model", "node", "program", "value"),  # of ONNX, its runtime, PyTorch
    *("called", "call"),  # functions that are being made
}
"""Objects of libraries whose attributes are set because there is no other way."""

RECORDS = {"entry", "tally", "past"}
"""Sums that are collected, each within the room that made it."""


def set_from_outside(source: str) -> list[str]:
    """Return the attributes that are set on another object than ``self``, as written."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else targets
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(each, ast.Attribute) and ast.unparse(each.value) not in (
                    *("self", "cls", "weight_quantizer(layers[name])"),
                    "input_quantizer(layers[name])",  # bits: what `set_bits` is for
                ):
                    found.append(ast.unparse(each))
    return found


def test_nobody_changes_an_object_of_ours_from_outside() -> None:
    found = {
        str(path.relative_to(ROOT)): other
        for path in sources("hq_optuna")
        if (
            other := [
                name
                for name in set_from_outside(path.read_text("utf-8"))
                if name.rpartition(".")[0] not in THEIRS | RECORDS
            ]
        )
    }
    assert found == {}


def test_an_attribute_that_is_set_from_outside_is_found() -> None:
    source = "def f(self, other):\n    self.a = 1\n    other.b, self.c = 1, 2\n    other.n += 1\n"
    assert set_from_outside(source) == ["other.b", "other.n"]


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


def existing(rooms: Iterable[str]) -> list[str]:
    names = {item.name for item in pkgutil.iter_modules([str(PACKAGE)])}
    return [f"hq_optuna.{name}" for name in sorted(set(rooms) & names)]


def test_import_of_the_package_loads_no_torch() -> None:
    loaded = loaded_after("hq_optuna")
    assert "hq_optuna" in loaded
    assert "torch" not in loaded


def test_the_lower_rooms_load_neither_torch_nor_optuna() -> None:
    loaded = loaded_after(*existing((*BASE, *PLAIN)))
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
