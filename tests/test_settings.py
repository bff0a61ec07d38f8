"""Settings: each is named once, and is found wherever a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.hooks import settings_table
from hq_optuna import attributes
from hq_optuna.cli.app import load
from hq_optuna.cli.check import template
from hq_optuna.errors import HqOptunaError, SettingError, SpaceError
from hq_optuna.protocol.history import read_history
from hq_optuna.report.data import report_data
from hq_optuna.report.text import render_markdown
from hq_optuna.settings import (
    RunSettings,
    SearchSettings,
    read_bits,
    read_quantizers,
    settings_of,
)
from hq_optuna.space.budget import Budget
from tests.searches import search

ROOT = Path(__file__).parents[1]


def options_of(command: str) -> dict[str, str]:
    """Return the help of each option of a command, by the option."""
    found = {}
    for parameter in load(command).params:
        for option in parameter.opts:
            found[option] = str(getattr(parameter, "help", "")).replace("\\[", "[")
    return found


@pytest.mark.parametrize("command", ["run", "worker", "launch"])
def test_every_setting_with_an_option_is_in_the_help_of_the_commands_that_search(command):
    shown = options_of(command)
    for owner in (SearchSettings, RunSettings):
        for one in settings_of(owner).values():
            if one.name == "target" and command != "run":
                assert one.option not in shown  # these only search
            elif one.option:
                assert one.help in shown[one.option]
                assert f"[default: {one.shown_default}]" in shown[one.option]


def test_every_setting_is_in_the_study_and_in_its_report():
    made = search(scorer="trace", seed=3, activation_bits=(8, 4))
    study = made.optimize(n_candidates=2)
    stored = study.user_attrs[attributes.INFO]["settings"]
    assert set(stored) == set(settings_of(SearchSettings))
    assert (stored["scorer"], stored["seed"], stored["n_candidates"]) == ("trace", 3, 2)
    assert (stored["bits"], stored["budget"]) == ([8, 4, 2], "0.3 bops")
    assert read_history(study).info.settings == stored
    text = render_markdown(report_data(study)).replace("\\", "")  # which escapes for Markdown
    for name, one in settings_of(SearchSettings).items():
        begins, ends = f"| {name.replace('_', ' ')} |", f" | {one.help} |"
        assert any(row.startswith(begins) and row.endswith(ends) for row in text.splitlines())
    assert "| n candidates | 2 candidates | Candidates a step. |" in text


def test_what_differs_is_said_for_every_setting_that_tells_searches_apart():
    study = search().optimize()
    fingerprint = study.user_attrs[attributes.FINGERPRINT]
    apart = {name for name, one in settings_of(SearchSettings).items() if one.differs}
    assert apart - {"train_every"} <= set(fingerprint)  # a search that never trains has none
    # What these say is part of the space, of the quantizers by layer, or of the training.
    space = {"bits", "activation_bits", "pin_first_last", "pins", "allowed", "tied", "tie_inputs"}
    space |= {"hardware", "latency", "products"}
    training = {"train_epochs", "final_epochs", "training", "final_training"}
    assert set(settings_of(SearchSettings)) - apart == space | training | {"quantizers", "method"}


def test_every_setting_is_in_the_template_of_a_study_file_and_its_example_is_a_value():
    text = template()
    compile(text, "study.py", "exec")
    examples = {}
    for name, one in settings_of(SearchSettings).items():
        line = f'    # "{name}": {one.example},'
        assert line in text
        examples |= eval("{" + line.strip().removeprefix("# ") + "}")
    assert set(examples) == set(settings_of(SearchSettings))
    SearchSettings(**examples)


def test_every_setting_is_in_the_docs():
    page = (ROOT / "docs" / "reference" / "settings.md").read_text("utf-8")
    assert "<!-- settings table -->" in page  # which building the site replaces by this:
    table = settings_table()
    for owner in (SearchSettings, RunSettings):
        for name, one in settings_of(owner).items():
            (row,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
            assert one.help in row
            assert one.shown_default in row


def test_a_setting_that_is_added_to_a_copy_of_the_package_is_everywhere(tmp_path):
    """Nothing but its field in settings.py has to be written."""
    shutil.copytree(ROOT / "hq_optuna", tmp_path / "hq_optuna")
    file = tmp_path / "hq_optuna" / "settings.py"
    field = """    colour: str = _scoring("red", "Colour of the thing.", differs="the colour")
"""
    before = "    scorer: ScorerName"
    text = file.read_text("utf-8")
    assert text.count(before) == 1
    file.write_text(text.replace(before, field + before), encoding="utf-8")
    program = """
import json, sys
import hq_optuna as hq
from docs.hooks import settings_table
from hq_optuna import attributes
from hq_optuna.cli.app import load
from hq_optuna.cli.check import template
from hq_optuna.errors import ResumeError
from hq_optuna.report.data import report_data
from hq_optuna.report.text import render_markdown
from hq_optuna.study_files.study_file import check_settings
from tests.searches import search
made = search(colour="blue")
study = made.optimize("sqlite:///s.db", "s")
check_settings({"colour": "green"}, "x.py")
try:
    search(colour="green").optimize("sqlite:///s.db", "s")
    refused = ""
except ResumeError as error:
    refused = str(error)
print(json.dumps({
    "options": [o for p in load("run").params for o in p.opts],
    "stored": study.user_attrs[attributes.INFO]["settings"]["colour"],
    "fingerprint": study.user_attrs[attributes.FINGERPRINT]["colour"],
    "report": "| colour | blue | Colour of the thing. |" in render_markdown(report_data(study)),
    "template": "Colour of the thing." in template(),
    "refused": refused,
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        **{"cwd": tmp_path, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "--colour" in found["options"]
    assert (found["stored"], found["fingerprint"]) == ("blue", "blue")
    assert found["report"] and found["template"]
    assert "Changed: the colour (study: blue, now: green)" in found["refused"]


@pytest.mark.parametrize(
    ("text", "bits"),
    [("2-8", (2, 3, 4, 5, 6, 7, 8)), ("8,4,2", (8, 4, 2)), ("4", (4,)), ("2-3, 8", (2, 3, 8))],
)
def test_bits_are_read_as_typed(text, bits):
    assert read_bits(text) == bits


@pytest.mark.parametrize("text", ["", "a", "2-", "-2", "8-2", "2--4", "8,6-4"])
def test_bits_that_cannot_be_read_are_refused(text):
    with pytest.raises(SpaceError, match="are no bits"):
        read_bits(text)


def test_settings_that_were_typed_become_values():
    typed = SearchSettings(
        budget="0.5 bops", bits="4,8", activation_bits="float", pin_first_last="none"
    )
    assert typed.changed == {
        "budget": Budget.fraction(bops=0.5),
        "bits": (4, 8),
        "activation_bits": None,
        "pin_first_last": None,
    }
    assert SearchSettings(activation_bits="8").activation_bits == 8
    assert SearchSettings(activation_bits="4,8").activation_bits == (4, 8)
    assert SearchSettings(activation_bits="same").activation_bits == "same"
    assert SearchSettings(pin_first_last="8").pin_first_last == 8
    with pytest.raises(SpaceError, match="one number of bits, or none; got '2-4'"):
        SearchSettings(pin_first_last="2-4")
    with pytest.raises(SettingError, match="'a lot' is no budget"):
        search(budget="a lot")


def test_quantizers_are_read_as_typed():
    assert SearchSettings(quantizers=["a=b = dorefa"]).quantizers == {"a=b": "dorefa"}
    assert SearchSettings(quantizers={"a": "dorefa"}).quantizers == {"a": "dorefa"}
    for text in ("midrise", "=midrise", "layer=", ""):
        with pytest.raises(SpaceError, match="names no quantizer of a layer"):
            read_quantizers([text])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seed": "1"}, "seed is a whole number; got '1'"),
        ({"seed": True}, "seed is a whole number; got True"),
        ({"rule": "best"}, "rule is one of min, ratio; got 'best'"),
        ({"scorer": "fit"}, "scorer is one of gauss_newton, loss, .*; got 'fit'"),
        ({"refine": 1}, "refine is True or False; got 1"),
        ({"bits": None}, "bits is a sequence of whole numbers"),
        ({"budget": None}, "budget is text, .* or several of them; got None"),
        ({"tied": "ab"}, "tied is a sequence of groups"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(given, words):
    with pytest.raises(SettingError, match=words) as caught:
        SearchSettings(**given)
    assert isinstance(caught.value, HqOptunaError)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_setting_is_refused_with_the_nearest_one():
    with pytest.raises(TypeError, match=r"no setting 'candidates'\. Did you mean 'n_candidates'\?"):
        search(candidates=3)
    with pytest.raises(TypeError, match="no setting 'nonsense'"):
        search().optimize(nonsense=1)
    with pytest.raises(TypeError, match="bits is fixed when BitSearch is made"):
        search().optimize(bits=(8, 4))


def test_settings_may_be_given_as_one_object_and_by_name():
    settings = SearchSettings(bits=(8, 2), pin_first_last=None, budget=Budget.fraction(bops=0.5))
    made = search(settings=settings, bits=(8, 4))
    assert made.settings.bits == (8, 4)
    assert made.budget == Budget.fraction(bops=0.3)  # by name goes before
    assert made.settings.changed["bits"] == (8, 4)


def test_settings_come_back_from_json():
    settings = SearchSettings(budget="64 KiB", activation_bits="4,8", pins={"a": (8, 4)})
    assert SearchSettings(**json.loads(json.dumps(settings.to_json()))).budget == settings.budget
    assert RunSettings(folder="a").folder == Path("a")
    assert RunSettings().to_json()["retry_for"] == 300.0


def test_settings_do_not_change_after_they_are_made():
    with pytest.raises(AttributeError):
        SearchSettings().seed = 1


def test_training_that_nobody_gave_data_for_is_refused():
    for asked in ({"train_every": 4}, {"final_epochs": 3}):
        with pytest.raises(SettingError, match=r"need training data: give BitSearch a plan"):
            search(**asked)


def test_no_two_settings_have_the_same_option():
    owners = (SearchSettings, RunSettings)
    options = [one.option for owner in owners for one in settings_of(owner).values() if one.option]
    assert len(options) == len(set(options))
