"""The figures of the house: how large the package is, and how easily a reader finds the way in it.

    python -m benchmarks.house [--out FILE] [--quick]

Most figures are read from the source text. Two are measured: the processor time of
`hq-optuna --help` beside that of `import optuna`, and the stations of one setting on its way from
`hq-optuna run` to the first score. `--quick` leaves the stations out and takes one run of `--help`.

Figures:
    lines: Lines of all files in `hq_optuna/`, templates, docstrings and blank lines included.
    largest_room: Files in the largest room.
    import_cycles: Groups of modules that import each other, imports for types included.
    functions_over_60: Functions of more than 60 lines, docstrings included.
    complexity_over_15: Functions and methods whose cyclomatic complexity is over 15, as Radon
        counts it: each `and`, `or`, comprehension and `assert` is a branch too.
    setting_places: Files that define the setting `correction`: as a parameter with a default, as a
        field, as a key in a string, or as an option. Files that pass it on or read it don't count.
    stations, station_files: Functions, and files, that receive the value of `--seed` before the
        first score: as an argument, or in an argument (other than `self`) that holds it, in a dict
        or in an attribute of an object, at most two levels deep.
    help_cpu_ratio: Median processor time of `hq-optuna --help` over that of `import optuna`.
    documented_share: Share of public classes, functions and methods with a docstring.
    annotated_share: Share of public functions and methods with all parameters and the result
        annotated.
    readme_lines: Lines of README.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from radon.complexity import cc_visit

from benchmarks.outcome import Outcome
from tests.test_architecture import FACE, cycles, graph

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hq_optuna"
SETTING = "correction"
SEED = 918_273_645
"""A value that nothing else has, so that it can be followed."""

MOST_LINES, MOST_COMPLEXITY = 60, 15
RUNS = 7

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> list[Path]:
    """Return the package's Python files."""
    return sorted(PACKAGE.rglob("*.py"))


def count_lines() -> int:
    """Return the number of lines of all text files in the package."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def rooms() -> dict[str, int]:
    """Return the number of files of each room; largest first."""
    found: dict[str, int] = {}
    for path in sources():
        room = str(path.parent.relative_to(ROOT))
        found[room] = found.get(room, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def import_cycles() -> list[list[str]]:
    """Return the groups of modules that import each other."""
    edges = graph()
    edges.pop(FACE, None)  # shows names of every room, and loads them when they are used
    return cycles(edges)


def long_functions() -> list[str]:
    """Return the functions with more than `MOST_LINES` lines."""
    return [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, Function)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > MOST_LINES
    ]


def complex_functions() -> list[str]:
    """Return the functions with a complexity over `MOST_COMPLEXITY`."""
    return [
        f"{path.relative_to(ROOT)}:{block.lineno} {block.name} ({block.complexity})"
        for path in sources()
        for block in cc_visit(path.read_text(encoding="utf-8"))
        if block.letter in "FM" and block.complexity > MOST_COMPLEXITY
    ]


def defines(source: str, setting: str) -> bool:
    """Return whether a module names a setting as a definition, rather than use it.

    Definitions are parameters with a default, fields of classes, keys written as strings and
    options of the command line. A key that a value is read by, ``settings["correction"]``, is a
    use.
    """
    options = (f"--{setting}", f"--no-{setting}")
    nodes = list(ast.walk(ast.parse(source)))
    read_by = {id(node.slice) for node in nodes if isinstance(node, ast.Subscript)}
    for node in nodes:
        if isinstance(node, Function):
            plain = [*node.args.posonlyargs, *node.args.args]
            with_default = plain[len(plain) - len(node.args.defaults) :]
            pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            with_default += [argument for argument, default in pairs if default is not None]
            if any(item.arg == setting and is_switch(item) for item in with_default):
                return True
        elif isinstance(node, ast.ClassDef):
            fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            if any(isinstance(target, ast.Name) and target.id == setting for target in fields):
                return True
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in read_by:
                continue
            words = node.value.replace("/", " ").split()
            if node.value == setting or (len(words) <= 2 and set(words) & set(options)):
                return True
    return False


def is_switch(argument: ast.arg) -> bool:
    """Return whether a parameter may be a bool; another object may have the setting's name."""
    return argument.annotation is None or "bool" in ast.unparse(argument.annotation)


def setting_places() -> list[str]:
    """Return the files that define the setting `SETTING`."""
    return [
        str(path.relative_to(ROOT))
        for path in sources()
        if defines(path.read_text(encoding="utf-8"), SETTING)
    ]


def public_definitions(body: list[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    """Yield the public classes, functions and methods of a module or class, overloads left out."""
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node.body)


def annotated(function: Function) -> bool:
    """Return whether all parameters but ``self`` and the result are annotated."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
    told = all(item.annotation or item.arg in ("self", "cls") for item in named)
    return told and function.returns is not None


def public_shares() -> tuple[float, float, list[str]]:
    """Return the documented and the annotated share of public names, and what lacks either."""
    documented, typed, lacking = [], [], []
    for path in sources():
        for node in public_definitions(ast.parse(path.read_text(encoding="utf-8")).body):
            documented.append(ast.get_docstring(node) is not None)
            if isinstance(node, Function):
                typed.append(annotated(node))
            if not documented[-1] or (isinstance(node, Function) and not typed[-1]):
                lacking.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    return statistics.mean(documented), statistics.mean(typed), lacking


def cpu_seconds(command: list[str]) -> float:
    """Return the processor time that a command takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def help_cpu(n_runs: int) -> dict[str, float]:
    """Return the median processor time, in seconds, of ``--help`` and of ``import optuna``."""
    shown = [sys.executable, "-m", "hq_optuna", "--help"]
    imported = [sys.executable, "-c", "import optuna"]
    for command in (shown, imported):  # the first run fills the caches
        cpu_seconds(command)
    times = [(cpu_seconds(shown), cpu_seconds(imported)) for _ in range(n_runs)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return {"help_s": medians[0], "import_optuna_s": medians[1], "ratio": medians[0] / medians[1]}


class _FirstScore(BaseException):
    """Ends the run that is followed."""


def holds(value: Any, sentinel: int, depth: int = 2) -> bool:
    """Return whether a value is the sentinel, or a dict or object of the package that holds it."""
    if isinstance(value, int):
        return value == sentinel
    if depth == 0:
        return False
    if isinstance(value, dict):
        return any(holds(item, sentinel, depth - 1) for item in value.values())
    if type(value).__module__.startswith(f"{PACKAGE.name}."):
        names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
        return any(holds(getattr(value, name, None), sentinel, depth - 1) for name in names)
    return False


def follow_seed() -> list[str]:
    """Return the functions that receive the seed of a run before its first score, in order."""
    from hq_optuna.cli.app import app
    from hq_optuna.scoring.scorer import Scorer

    package, found = str(PACKAGE) + os.sep, dict[str, None]()

    def look(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package):
            return
        if code.co_name == "score" and isinstance(frame.f_locals.get("self"), Scorer):
            raise _FirstScore
        n = code.co_argcount + code.co_kwonlyargcount
        n += bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)  # *args, **kwargs
        if any(
            holds(frame.f_locals.get(name), SEED)
            for name in code.co_varnames[:n]
            if name not in ("self", "cls")
        ):
            file = Path(code.co_filename).relative_to(ROOT)
            found[f"{file}:{code.co_firstlineno} {code.co_qualname}"] = None

    with tempfile.TemporaryDirectory() as folder:
        words = ["run", str(ROOT / "studies" / "template.py"), "--seed", str(SEED)]
        sys.setprofile(look)
        try:
            app([*words, "--folder", folder, "--json"], standalone_mode=False)
        except _FirstScore:
            return list(found)
        finally:
            sys.setprofile(None)
    raise RuntimeError("The run ended without a call of Scorer.score.")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path, help="write everything here, details too")
    parser.add_argument("--only-stations", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_stations:
        print(json.dumps(follow_seed()))
        return
    outcome = Outcome("house")
    details: dict[str, Any] = {
        "rooms": rooms(),
        "import_cycles": import_cycles(),
        "functions_over_60": long_functions(),
        "complexity_over_15": complex_functions(),
        "setting_places": setting_places(),
        "help_cpu": help_cpu(1 if options.quick else RUNS),
    }
    documented, typed, details["undocumented_or_not_annotated"] = public_shares()
    figures = {
        "lines": count_lines(),
        "largest_room": max(details["rooms"].values()),
        **{name: len(found) for name, found in details.items() if isinstance(found, list)},
        "help_cpu_ratio": round(details["help_cpu"]["ratio"], 2),
        "documented_share": round(documented, 4),
        "annotated_share": round(typed, 4),
        "readme_lines": len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()),
    }
    figures.pop("undocumented_or_not_annotated")
    if not options.quick:
        # In a process of its own: a run that is ended in its middle leaves threads behind.
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.house", "--only-stations"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        stations = json.loads(done.stdout.splitlines()[-1])
        details["stations"] = stations
        figures["stations"] = len(stations)
        figures["station_files"] = len({station.partition(":")[0] for station in stations})
    for name, found in details.items():
        if isinstance(found, list) and found:
            print(f"{name}:", *found, sep="\n  ")
    outcome.figures, outcome.details = figures, details
    outcome.finish(options.out)


if __name__ == "__main__":
    main()
