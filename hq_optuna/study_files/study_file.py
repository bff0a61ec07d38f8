"""Study files: a plain Python file that says which network is searched, and on which data.

A study file defines `network` and `calibration`, perhaps `validation`, `test`, `train`, `augment`,
`loss`, `rise`, `evaluate` and `SETTINGS`. The parameters of the first five are its options
on the command line: ``def network(checkpoint: Path)`` becomes ``--checkpoint PATH``; a parameter
called ``folder`` receives the run's folder instead. Nothing here loads PyTorch before
`StudyFile.build`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from hq_optuna.errors import HqOptunaError, SettingError, StudyFileError
from hq_optuna.settings import SearchSettings, settings_of
from hq_optuna.study_files.options import FOLDER, Option, complete, parse, read_options

_REQUIRED = ("network", "calibration")
_WITH_OPTIONS = (*_REQUIRED, "validation", "test", "train")
_CALLED_LATER = ("loss", "rise", "evaluate", "augment")


@dataclass
class StudyParts:
    """What a study file's functions returned; ``None`` for what it does not define.

    Attributes:
        network: The trained float network, an ``nn.Module``.
        calibration: Labelled data that the score reads.
        validation: Data on which accuracy before and after is measured.
        loss: ``loss(outputs, labels)``, a mean over the batch; cross entropy without it.
        evaluate: ``evaluate(network, batches)``, named figures; accuracy without it.
        test: Returns the test data. A function, so that nothing reads them before the end.
        train: Returns the training data, which only a search that trains reads.
        augment: ``augment(inputs, generator)``, changes a batch of training inputs.
        rise: One of `hq_optuna.rises`, or ``rise(outputs, moved)``, summed over the batch.
    """

    network: Any
    calibration: Any
    validation: Any = None
    loss: Callable[[Any, Any], Any] | None = None
    evaluate: Callable[[Any, Any], Mapping[str, float]] | None = None
    test: Callable[[], Any] | None = None
    train: Callable[[], Any] | None = None
    augment: Callable[[Any, Any], Any] | None = None
    rise: Callable[[Any, Any], Any] | None = None


@dataclass(frozen=True)
class StudyFile:
    """A study file that was imported and looks right; none of its functions has been called.

    `doc` is the first line of its docstring, `options` are those of its functions by parameter
    name, in the order they appear, and `settings` its SETTINGS as written (``{}`` without).
    """

    path: Path
    doc: str
    options: dict[str, Option]
    settings: dict[str, Any]
    _module: ModuleType = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> StudyFile:
        """Import a study file, with its folder on ``sys.path`` meanwhile.

        Raises:
            StudyFileError: The file is missing, fails to import, lacks a function, or its options
                or SETTINGS are not understood. Names the file and, where known, the line.
        """
        path = Path(path).resolve()
        module = _import(path)
        for name in _REQUIRED:
            if not hasattr(module, name):
                raise StudyFileError(
                    f"{path} does not define {name}(). A study file defines at least "
                    f"{' and '.join(f'{n}()' for n in _REQUIRED)}; see docs/guides/study-files.md."
                )
        for name in (*_WITH_OPTIONS, *_CALLED_LATER):
            if not callable(getattr(module, name, len)):
                kind = type(getattr(module, name)).__name__
                raise StudyFileError(f"{path}: {name} must be a function; got a {kind}.")
        settings = getattr(module, "SETTINGS", {})
        check_settings(settings, path)
        functions = {name: getattr(module, name) for name in _WITH_OPTIONS if hasattr(module, name)}
        doc = (inspect.getdoc(module) or "").partition("\n")[0]
        return cls(path, doc, read_options(functions, path), dict(settings), module)

    def parse_options(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return every option's value as typed (``["--data", "x", "--n=3"]``), or its default.

        Raises:
            StudyFileError: Unknown option, bad or missing value, or a required option is missing.
        """
        return self.complete(parse(self.options, arguments, self.path.name))

    def stored_options(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return options as a study holds them; paths are text there.

        Raises:
            StudyFileError: The file no longer has one of them.
        """
        values = {}
        for name, value in stored.items():
            if name not in self.options:
                raise StudyFileError(
                    f"The study was started with --{name.replace('_', '-')} {value}, and "
                    f"{self.path.name} has no such option any more. Give its function the "
                    "parameter back, or begin another study (--name)."
                )
            values[name] = Path(value) if self.options[name].type is Path else value
        return values

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a value for every option, defaults filled in.

        Raises:
            StudyFileError: An option is unknown, or a required one is missing.
        """
        return complete(self.options, given, self.path.name)

    def build(self, folder: Path, options: Mapping[str, Any]) -> StudyParts:
        """Call the study's functions with these options; missing ones take their defaults.

        The run's folder is made if it is missing, and given to parameters called ``folder``.

        Raises:
            StudyFileError: An option is unknown or missing, a function fails (names the line) or
                returns something else. Other errors of this package pass through.
        """
        values = self.complete(options) | {FOLDER: folder}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyFileError(f"The run's folder {folder} cannot be made: {error}.") from error
        network = self._call("network", values)
        from torch import nn  # here, so that the command line starts without it

        if not isinstance(network, nn.Module):
            raise StudyFileError(
                f"network() of {self.path.name} must return a torch.nn.Module; got "
                f"{network!r:.80}. Return the trained network itself."
            )
        calibration = self._call("calibration", values)
        if calibration is None:
            raise StudyFileError(
                f"calibration() of {self.path.name} returned None. Return (inputs, labels) tensors,"
                " a Dataset or batches."
            )
        has = self._module.__dict__
        later = {
            name: functools.partial(self._call, name, values)
            for name in ("validation", "test", "train")
            if name in has
        }
        return StudyParts(
            network,
            calibration,
            validation=later["validation"]() if "validation" in later else None,
            test=later.get("test"),
            train=later.get("train"),
            **{name: has.get(name) for name in _CALLED_LATER},
        )

    def _call(self, name: str, values: Mapping[str, Any]) -> Any:
        function = getattr(self._module, name)
        parameters = inspect.signature(function).parameters
        try:
            with _on_path(self.path.parent):
                return function(**{parameter: values[parameter] for parameter in parameters})
        except HqOptunaError:
            raise
        except Exception as error:
            raise StudyFileError(
                f"{name}() of {self.path}{_line(error, self.path)} failed: "
                f"{type(error).__name__}: {error}"
            ) from error


def find_study(name: str) -> Path:
    """Return the study file of a path, or of a bare name.

    A name means ``studies/NAME.py`` in the current folder, then one of the package's own studies.

    Raises:
        StudyFileError: There is none; lists what was tried and which studies there are.
    """
    package = Path(__file__).resolve().parents[1]
    shipped = package / "studies"  # as the wheel installs them; a checkout has them beside it
    folders = [Path.cwd() / "studies", shipped if shipped.is_dir() else package.parent / "studies"]
    is_path = name.endswith(".py") or Path(name).name != name
    tried = [Path(name).expanduser()] if is_path else [folder / f"{name}.py" for folder in folders]
    for path in tried:
        if path.suffix == ".py" and path.is_file():
            return path.resolve()
    names = sorted({path.stem for folder in folders for path in folder.glob("[!_]*.py")})
    raise StudyFileError(
        f"There is no study {name!r} (tried {', '.join(map(str, dict.fromkeys(tried)))}). Give the "
        f"path of a .py file or the name of a study: {', '.join(names) or 'none found'}."
    )


def check_settings(settings: Any, path: Path) -> None:
    """Refuse SETTINGS with unknown keys, or values of another kind than the key has.

    Raises:
        StudyFileError: Names the file, the key and what it takes.
    """
    if not isinstance(settings, Mapping):
        raise StudyFileError(f"{path}: SETTINGS must be a dict; got {type(settings).__name__}.")
    known = settings_of(SearchSettings)
    for key, value in settings.items():
        if key not in known:
            raise StudyFileError(
                f"{path}: SETTINGS has the unknown key {key!r}. It may set: {', '.join(known)}."
            )
        try:
            SearchSettings(**{key: value})
        except SettingError as error:
            said = str(error).removeprefix(key).lstrip()
            colon = "" if said.startswith("is ") else ":"
            raise StudyFileError(f"{path}: SETTINGS[{key!r}]{colon} {said}") from None


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Let the study import its neighbours, at the top of the file or in what makes its parts.

    What is called later, such as a metric, finds what was imported until then.
    """
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))


def _import(path: Path) -> ModuleType:
    if path.suffix != ".py" or not path.is_file():
        raise StudyFileError(f"{path} is no study file. Give the path of a .py file that exists.")
    name = f"_hq_optuna_study_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Compiled here rather than by the loader, which would keep a .pyc in the user's folder and
        # take a file edited twice within a second for the older one.
        code = loader.source_to_code(loader.get_data(str(path)), str(path))
        with _on_path(path.parent):
            exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        missing = isinstance(error, ModuleNotFoundError)
        raise StudyFileError(
            f"{path}{_line(error, path)} cannot be imported: {type(error).__name__}: {error}. "
            + ("Install what is missing." if missing else "Correct the file and try again.")
        ) from error
    return module


def _line(error: BaseException, path: Path) -> str:
    """Return ``", line N"``: the innermost line of the study file that led to the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    frames = list(traceback.walk_tb(error.__traceback__))
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
    return f", line {lines[-1]}" if lines else ""
