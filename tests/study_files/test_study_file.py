"""Study files: what they define, their options, what is refused."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hq_optuna.errors import DataError, HqOptunaError, StudyFileError
from hq_optuna.network.batches import read_batches
from hq_optuna.rises import SquaredError, rise_of_loss
from hq_optuna.settings import SearchSettings, settings_of
from hq_optuna.space.budget import Budget
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.study_files.options import Option, parse
from hq_optuna.study_files.study_file import StudyFile, find_study

MINIMAL = """
import torch
def network():
    return torch.nn.Linear(3, 2)
def calibration():
    return torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
"""

OPTIONS = '''
from __future__ import annotations
from pathlib import Path
import torch

seen = {}

def network(checkpoint: Path, width: int = 4, *, folder: Path):
    """Return it.

    Args:
        checkpoint: Where the weights
            are kept.
        width (int): Hidden units.
    """
    seen["network"] = (checkpoint, width, folder)
    return torch.nn.Linear(3, 2)

def calibration(n: int | None = None, rate: float = 0.5, kind: str = "a", flip: bool = False,
                width: int = 4):
    seen["calibration"] = (n, rate, kind, flip, width)
    return [(torch.zeros(1, 3), torch.zeros(1))]
'''


@pytest.fixture
def study(tmp_path):
    """Return a function that writes a study file and loads it."""

    def load(source, name="mine"):
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        return StudyFile.load(path)

    return load


def test_the_smallest_study_has_two_functions_and_gives_network_and_data(study, tmp_path):
    mine = study('"""One line.\n\nMore."""\n' + MINIMAL)
    assert (mine.path.stem, mine.doc, mine.options, mine.settings) == ("mine", "One line.", {}, {})
    parts = mine.build(tmp_path / "run", {})
    assert isinstance(parts.network, torch.nn.Linear)
    assert read_batches(parts.calibration).n_samples == 4
    assert (parts.validation, parts.loss, parts.evaluate, parts.test) == (None,) * 4
    assert parts.rise is None


@pytest.mark.parametrize("loss", ["nn.functional.mse_loss", "nn.MSELoss()"])
def test_a_loss_of_pytorch_is_handed_on_as_it_is(study, tmp_path, loss):
    given = study(MINIMAL + f"from torch import nn\nloss = {loss}\n").build(tmp_path, {}).loss
    assert isinstance(rise_of_loss(given), SquaredError)


def test_optional_functions_are_handed_on_and_test_is_read_only_when_asked(study, tmp_path):
    mine = study(
        MINIMAL
        + "read = []\n"
        + "def validation(n: int = 2): return [n]\n"
        + "def test(n: int = 2): read.append(n); return [n * 10]\n"
        + "def loss(outputs, labels): return 7\n"
        + "def rise(outputs, moved): return 8\n"
        + "def evaluate(network, batches): return {'dice': 0.5}\n"
    )
    parts = mine.build(tmp_path, {"n": 3})
    assert parts.validation == [3]
    assert parts.loss(None, None) == 7
    assert parts.rise(None, None) == 8
    assert parts.evaluate(None, None) == {"dice": 0.5}
    assert mine._module.read == []
    assert parts.test() == [30]
    assert mine._module.read == [3]


def test_parameters_become_options_with_types_defaults_and_help(study):
    assert study(OPTIONS).options == {
        "checkpoint": Option("checkpoint", Path, None, True),
        "width": Option("width", int, 4, False),
        "n": Option("n", int, None, False),
        "rate": Option("rate", float, 0.5, False),
        "kind": Option("kind", str, "a", False),
        "flip": Option("flip", bool, False, False),
    }
    helps = {name: option.help for name, option in study(OPTIONS).options.items()}
    assert helps["checkpoint"] == "Where the weights are kept."
    assert (helps["width"], helps["n"]) == ("Hidden units.", None)


def test_options_are_read_from_a_command_line_with_defaults_filled_in(study):
    mine = study(OPTIONS)
    arguments = ["--checkpoint", "a/b.pt", "--n=3", "--rate", "-1e-3", "--flip", "--kind=x=y"]
    assert mine.parse_options(arguments) == {
        "checkpoint": Path("a/b.pt"),
        "width": 4,
        "n": 3,
        "rate": -1e-3,
        "kind": "x=y",
        "flip": True,
    }
    values = mine.parse_options(["--checkpoint=~/c.pt", "--flip", "--no-flip", "--n=1", "--n=2"])
    assert (values["flip"], values["n"]) == (False, 2)
    assert values["checkpoint"] == Path.home() / "c.pt"


def test_functions_receive_their_options_and_the_folder_which_is_made(study, tmp_path):
    mine = study(OPTIONS)
    folder = tmp_path / "new" / "run"
    mine.build(folder, {"checkpoint": Path("c"), "width": 9, "flip": True})
    assert folder.is_dir()
    assert mine._module.seen == {
        "network": (Path("c"), 9, folder),
        "calibration": (None, 0.5, "a", True, 9),
    }


@given(st.integers(), st.floats(allow_nan=False), st.text())
def test_whatever_can_be_written_down_comes_back_from_the_command_line(n, rate, kind):
    kinds = {"n": int, "rate": float, "kind": str}
    options = {name: Option(name, kind, None, True) for name, kind in kinds.items()}
    values = parse(options, [f"--n={n}", f"--rate={rate!r}", f"--kind={kind}"], "study")
    assert values == {"n": n, "rate": rate, "kind": kind}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--chekpoint=x"],
            r"(?s)mine\.py has no option '--chekpoint'\. Did you mean --checkpoint\? Its options:\n"
            r".*  --checkpoint PATH \(required\)  Where the weights are kept\.\n",
        ),
        (["stray"], r"(?s)no option 'stray'\. Its options:.*--flip/--no-flip"),
        (["--checkpoint"], "mine.py: --checkpoint: expected one argument"),
        (["--checkpoint", "--flip"], "mine.py: --checkpoint: expected one argument"),
        (["--checkpoint="], "--checkpoint: takes a value of type Path; got ''"),
        (["--n", "many"], "--n: takes a value of type int; got 'many'"),
        (["--n", "1.5"], "--n: takes a value of type int; got '1.5'"),
        (["--rate=fast"], "--rate: takes a value of type float; got 'fast'"),
        (["--flip=yes"], "--flip/--no-flip: ignored explicit argument 'yes'"),
        (["--no-n=1"], "no option '--no-n'"),
        (["--n=1"], r"(?s)mine\.py needs --checkpoint\. Its options:.*--width INT"),
    ],
)
def test_a_wrong_option_is_refused_with_the_options_there_are(study, arguments, words):
    with pytest.raises(StudyFileError, match=words):
        study(OPTIONS).parse_options(arguments)


def test_build_checks_options_that_come_from_python(study, tmp_path):
    with pytest.raises(StudyFileError, match=r"no option 'bogus'\. Its options:\n  --checkpoint"):
        study(OPTIONS).build(tmp_path, {"checkpoint": Path("c"), "bogus": 1})
    with pytest.raises(StudyFileError, match="needs --checkpoint"):
        study(OPTIONS).build(tmp_path, {})
    with pytest.raises(StudyFileError, match=r"no option 'bogus'\. It has none\. .*--help"):
        study(MINIMAL).build(tmp_path, {"bogus": 1})
    with pytest.raises(StudyFileError, match="no option 'folder'"):
        study(OPTIONS).build(tmp_path, {"checkpoint": Path("c"), "folder": tmp_path})


@pytest.mark.parametrize(
    ("signature", "words"),
    [
        ("validation(x)", "annotate 'x' as one of str, int, float, bool, Path"),
        ("validation(x: list)", "annotate 'x' as one of"),
        ("validation(x: int | str)", "annotate 'x' as one of"),
        ("validation(x: 'Missing')", r"validation\(\): an annotation cannot be read: NameError"),
        ("validation(*x: int)", r"takes \*x: int; an option is an ordinary named parameter"),
        ("validation(**x: int)", "an option is an ordinary named parameter"),
        ("validation(x: int, /)", "an option is an ordinary named parameter"),
    ],
)
def test_a_parameter_that_cannot_be_an_option_is_refused(study, signature, words):
    with pytest.raises(StudyFileError, match=words):
        study(MINIMAL + f"def {signature}: return None\n")


@pytest.mark.parametrize("other", ["n: float = 1", "n: int = 2", "n: int", "n: int | None = None"])
def test_one_option_with_two_meanings_is_refused(study, other):
    source = MINIMAL + "def validation(n: int = 1): pass\ndef test({}): pass\n"
    with pytest.raises(
        StudyFileError, match=r"validation\(\) and test\(\) take 'n' with different"
    ):
        study(source.format(other))
    study(source.format("n: int = 1"))


def test_missing_functions_and_things_that_are_no_functions_are_refused(study):
    with pytest.raises(StudyFileError, match=r"mine\.py does not define network\(\)"):
        study("def calibration(): pass")
    with pytest.raises(StudyFileError, match=r"does not define calibration\(\).*study-files\.md"):
        study("def network(): pass")
    with pytest.raises(StudyFileError, match="loss must be a function; got a int"):
        study(MINIMAL + "loss = 3")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import os\nx = = 1\n", r"mine\.py, line 2 cannot be imported: SyntaxError"),
        ("\n\nimport no_such_module_xyz\n", r"mine\.py, line 3 .*no_such_module_xyz.*Install"),
        ("def f():\n    return 1 / 0\n\nf()\n", r"mine\.py, line 2 .*ZeroDivisionError: .*Correct"),
        ("import json\njson.loads('{')\n", r"mine\.py, line 2 cannot be imported: JSONDecodeError"),
        ("raise SystemExit(3)\n", r"mine\.py, line 1 cannot be imported: SystemExit: 3"),
    ],
)
def test_a_study_that_fails_to_import_names_the_file_and_the_line(study, source, words):
    path_before, modules_before = list(sys.path), set(sys.modules)
    with pytest.raises(StudyFileError, match=words):
        study(source)
    assert sys.path == path_before
    assert not [name for name in set(sys.modules) - modules_before if "mine" in name]


def test_a_file_that_is_not_there_or_no_python_is_refused(tmp_path):
    (tmp_path / "study.txt").write_text(MINIMAL)
    for name in ("none.py", "study.txt", ""):
        with pytest.raises(StudyFileError, match=r"is no study file\. Give the path of a \.py"):
            StudyFile.load(tmp_path / name)


def test_a_study_may_import_its_neighbours_at_the_top_and_in_its_functions(study, tmp_path):
    (tmp_path / "neighbour_top_xyz.py").write_text("width = 3\n")
    (tmp_path / "neighbour_late_xyz.py").write_text("import torch\nnet = torch.nn.Linear(3, 2)\n")
    path_before = list(sys.path)
    mine = study(
        "import neighbour_top_xyz\n"
        + MINIMAL.replace(
            "return torch.nn.Linear(3, 2)", "import neighbour_late_xyz as n; return n.net"
        )
    )
    assert mine.build(tmp_path, {}).network.in_features == 3
    assert sys.path == path_before


def test_a_study_edited_at_once_is_read_anew_and_leaves_no_cache(study, tmp_path):
    first = study(MINIMAL + "SETTINGS = {'seed': 1}")
    second = study(MINIMAL + "SETTINGS = {'seed': 2}")
    assert (first.settings, second.settings) == ({"seed": 1}, {"seed": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_two_studies_of_one_name_are_two_modules(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.py").write_text(MINIMAL + f"SETTINGS = {{'seed': {ord(folder)}}}")
    a, b = (StudyFile.load(tmp_path / folder / "s.py") for folder in ("a", "b"))
    assert a._module.__name__ != b._module.__name__
    assert (a.settings["seed"], b.settings["seed"]) == (97, 98)


def test_a_study_may_define_dataclasses(study, tmp_path):
    # dataclasses look their module up in sys.modules while they are made.
    head = "from __future__ import annotations\nimport dataclasses\n"
    study(head + MINIMAL + "@dataclasses.dataclass\nclass Shape:\n    width: int = 3\n")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "return torch.nn.Linear",
            r"network\(\) of mine\.py must return a torch\.nn\.Module; got <cl",
        ),
        ("return None", r"must return a torch\.nn\.Module; got None"),
        ("return {'weight': torch.zeros(999, 999)}", r"must return a torch\.nn\.Module; got \{'w"),
        ("raise KeyError('conv9')", r"network\(\) of .*mine\.py, line 4 failed: KeyError: 'conv9'"),
        ("open('no/such.pt')", r"mine\.py, line 4 failed: FileNotFoundError"),
    ],
)
def test_a_network_that_is_none_is_refused(study, tmp_path, body, words):
    mine = study(MINIMAL.replace("return torch.nn.Linear(3, 2)", body))
    with pytest.raises(StudyFileError, match=words):
        mine.build(tmp_path, {})


def test_a_calibration_that_returns_nothing_is_refused(study, tmp_path):
    mine = study(MINIMAL.replace("return torch.zeros(4, 3)", "torch.zeros(4, 3)"))
    with pytest.raises(StudyFileError, match=r"calibration\(\) of mine\.py returned None"):
        mine.build(tmp_path, {})


def test_errors_of_this_package_pass_through_a_study_as_they_are(study, tmp_path):
    source = (
        MINIMAL + "def test():\n    from hq_optuna.errors import DataError as E\n    raise E('me')"
    )
    parts = study(source).build(tmp_path, {})
    with pytest.raises(DataError, match=r"^me$"):
        parts.test()


def test_a_folder_that_cannot_be_made_is_reported(study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyFileError, match=r"folder .*file/run cannot be made"):
        study(MINIMAL).build(tmp_path / "file" / "run", {})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("[1]", "SETTINGS must be a dict; got list"),
        (
            "{'bit': 4}",
            r"unknown key 'bit'\. It may set: budget, hardware, bits, activation_bits.*seed",
        ),
        ("{'budget': 'lots'}", r"SETTINGS\['budget'\]: 'lots' is no budget"),
        ("{'budget': None}", r"SETTINGS\['budget'\] is text, '0\.25 bops', .*; got None"),
        ("{'n_candidates': '4'}", r"SETTINGS\['n_candidates'\] is a whole number; got '4'"),
        ("{'seed': 'abc'}", r"SETTINGS\['seed'\] is a whole number; got 'abc'"),
        ("{'seed': True}", r"SETTINGS\['seed'\] is a whole number; got True"),
        ("{'pins': ['0']}", r"SETTINGS\['pins'\] is a dict from layer names .* got \['0'\]"),
        ("{'tied': 'ab'}", r"SETTINGS\['tied'\] is a sequence of groups"),
        ("{'refine': 'no'}", r"SETTINGS\['refine'\] is True or False; got 'no'"),
        ("{'training': 3}", r"SETTINGS\['training'\] is a dict of settings"),
    ],
)
def test_settings_that_are_not_understood_are_refused(study, settings, words):
    with pytest.raises(StudyFileError, match=words):
        study(MINIMAL + f"SETTINGS = {settings}")


def test_settings_are_kept_as_written_and_a_budget_may_be_an_object(study):
    mine = study(
        "from hq_optuna.space import Budget\n"
        + MINIMAL
        + "SETTINGS = {'bits': (8, 4), 'budget': Budget.fraction(bops=0.5)}"
    )
    assert mine.settings == {"bits": (8, 4), "budget": Budget.fraction(bops=0.5)}


def test_settings_name_the_space_by_its_own_words():
    import inspect

    arguments = set(inspect.signature(SearchSpace.build).parameters) - {"layers", "memory"}
    assert arguments <= set(settings_of(SearchSettings))


def test_a_study_file_error_can_be_caught_as_either_kind():
    with pytest.raises(HqOptunaError):
        find_study("none")
    with pytest.raises(ValueError):
        find_study("none")
