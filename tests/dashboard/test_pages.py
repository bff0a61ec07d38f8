"""Notes and figures of a study, as optuna-dashboard itself reads them back."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import replace

import optuna
import pytest

from hq_optuna import attributes, visualization
from hq_optuna.dashboard import pages, write_pages
from hq_optuna.dashboard.notes import YOURS, trial_note
from hq_optuna.dashboard.pages import FIGURES, NOTED_STEPS, figures, note_in, parts, thinned
from hq_optuna.errors import ResumeError
from hq_optuna.protocol.history import read_history
from hq_optuna.space.budget import Budget
from hq_optuna.storages import RetryingStorage, open_storage, sqlite_url
from hq_optuna.storages.writing import set_study_system_attrs
from tests.dashboard.answers import dashboard, detail
from tests.fake_search import fake_space, fake_study, score
from tests.servers import KINDS, place

SPACE = fake_space(6)


@pytest.fixture
def study():
    """A finished search, in memory."""
    return fake_study(SPACE)


def system(study):
    return study._storage.get_study_system_attrs(study._study_id)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dashboard_reads_note_and_figures_from_every_storage(kind, tmp_path):
    with place(kind, tmp_path) as url:
        study = fake_study(SPACE, storage=open_storage(url), n_trials=0)
        score(study, SPACE)
        assert write_pages(study)
        shown, history = detail(study), read_history(study)
        assert shown["note"]["body"] == note_in(system(study))
        assert "## fake: the answer" in shown["note"]["body"]
        drawn = {
            item["id"]: json.loads(item["graph_object"]) for item in shown["plotly_graph_objects"]
        }
        assert drawn == {
            name: json.loads(figure.to_json()) for name, figure in figures(history).items()
        }
        assert set(drawn) == {"steps", "bits", "sensitivity"}
        record = next(t for t in shown["trials"] if t["number"] == history.records[2].number)
        assert record["note"]["body"].startswith("Closes step 2; takes trial ")
        study._storage.remove_session()


def test_the_note_says_goal_state_incumbent_budget_and_files():
    study = fake_study(6, facts={"accuracy_before": 0.95, "accuracy_after": 0.94})
    write_pages(study)
    history, text = read_history(study), note_in(system(study))
    answer = history.incumbent
    assert "at a cost of at most **" in text
    assert "40 % of all-8-bit" in text
    assert "Finished: the budget is met" in text
    assert f"{answer.winner.score:.3g} nats" in text
    assert f"/dashboard/studies/{study._study_id}/trials?numbers={answer.number}" in text
    assert "95.00%" in text
    assert "94.00%" in text
    assert "`hq-optuna report` writes it any time" in text  # none is attached
    for layer in history.space.layers:
        assert f"`{layer.name}`" in text


def test_a_search_that_trains_has_its_figure_and_says_what_training_gave(study):
    assert "training" not in figures(read_history(study))
    write_pages(study)
    assert "trained" not in note_in(system(study))
    trained = fake_study(SPACE, train_every=2, final=True)
    write_pages(trained)
    history, shown = read_history(trained), detail(trained)
    drawn = {item["id"]: item["graph_object"] for item in shown["plotly_graph_objects"]}
    assert set(drawn) == set(FIGURES)
    assert "validation accuracy" in drawn["training"]
    record = history.records[2]
    note = next(t for t in shown["trials"] if t["number"] == record.number)["note"]["body"]
    said = "2 epochs in 2.5 s: accuracy 88.00% → 91.00%, loss 0.52 → 0.4"
    assert note.endswith(f"Trained for {said}.")
    assert "Score 0 nats" in note  # the trained network's own, and not its winner's
    assert f"| {said}" in note_in(system(trained))


def test_a_long_search_shows_its_trainings_among_thinned_steps():
    space = fake_space(24, bits=range(8, 1, -1), pin_first_last=None)
    budget = Budget.fraction(bops=0.07)
    study = fake_study(space, n_candidates=1, budget=budget, encoding="compact", train_every=7)
    history = read_history(study)
    trained = [record.step for record in history.records if record.training is not None]
    marks = figures(history)["training"].data[1]
    assert list(marks.x) == trained


def test_the_note_says_which_layers_are_rounded_otherwise():
    study = fake_study(4)
    info = dict(study.user_attrs[attributes.INFO])
    study.set_user_attr(attributes.INFO, {**info, "quantizers": {"layer1.0.conv": "midrise"}})
    write_pages(study)
    assert "weights midrise: layer1.0.conv; all others uniform." in note_in(system(study))


def test_the_note_follows_a_search_that_goes_on():
    study = fake_study(SPACE, n_trials=0)
    write_pages(study)
    assert "No step is closed yet" in note_in(system(study))
    score(study, SPACE, 12)
    assert write_pages(study)
    text = note_in(system(study))
    assert "Not finished, and nobody works on it now" in text
    assert "**Incumbent.** After step" in text


def test_what_is_written_already_is_not_written_again(study):
    assert write_pages(study)
    before = system(study)
    assert not write_pages(study)
    assert system(study) == before


def test_what_readers_write_in_the_note_stays(study):
    write_pages(study)
    theirs = note_in(system(study)) + "\nAsk Ada about layer2.\n"
    dashboard().save_note(study, theirs)
    study.set_user_attr("hq:report:accuracy_before", 0.5)
    study.set_user_attr("hq:report:accuracy_after", 0.5)
    assert write_pages(study)
    text = dashboard().get_note(study)
    assert text.count("Ask Ada about layer2.") == 1
    assert text.count(YOURS) == 1
    assert text.index("50.00%") < text.index(YOURS) < text.index("Ask Ada")
    assert not write_pages(study)


def test_a_note_that_was_there_before_is_kept_whole(study):
    dashboard().save_note(study, "# My study\nDo not delete.")
    write_pages(study)
    assert dashboard().get_note(study).endswith("# My study\nDo not delete.\n")


def test_a_note_that_a_trial_has_is_left_alone(study):
    record = read_history(study).records[1]
    trial_id = study._storage.get_trial_id_from_study_id_trial_number(
        study._study_id, record.number
    )
    set_study_system_attrs(
        study._storage,
        study._study_id,
        {f"dashboard:{trial_id}:note_ver": 3, f"dashboard:{trial_id}:note_str:0": "mine"},
    )
    write_pages(study)
    shown = {trial["trial_id"]: trial["note"]["body"] for trial in detail(study)["trials"]}
    assert shown[trial_id] == "mine"


def test_a_long_search_has_few_notes_and_few_small_attributes():
    space = fake_space(24, bits=range(8, 1, -1), pin_first_last=None)
    budget = Budget.fraction(bops=0.07)
    study = fake_study(space, n_candidates=1, budget=budget, encoding="compact")
    before = system(study)
    write_pages(study)
    history, written = read_history(study), system(study)
    assert len(history.records) > 2 * NOTED_STEPS  # or this test shows nothing
    notes = [key for key in written if key.endswith(":note_ver")]
    assert len(notes) == NOTED_STEPS + 1  # and the study's own
    assert len(written) - len(before) <= 2 * NOTED_STEPS + 10
    assert all(len(json.dumps(value)) <= 65_535 for value in written.values())
    few = thinned(history).records
    assert len(few) <= pages.FIGURE_STEPS
    assert few[-1] == history.records[-1]
    assert {b.step - a.step for a, b in itertools.pairwise(few)} == {2}


def test_figures_fit_the_cards_of_the_dashboard():
    history = read_history(fake_study(60, n_trials=30))
    for name, figure in figures(history).items():
        assert figure.layout.height == pages.CARD_PX
        labels = figure.layout.yaxis.ticktext
        if name in ("bits", "sensitivity"):
            assert 10 < len(labels) <= 30, name
    assert len(visualization.plot_bits(fake_study(60, n_trials=30)).layout.yaxis.ticktext) == 60


@pytest.mark.parametrize("text", ["", "short", '"' * 70_000, "⇒" * 70_000, "x" * 200_000])
def test_a_text_of_any_length_is_cut_so_that_every_database_takes_it(text):
    stored = parts("dashboard:note_str:", "y" * 400_000, {})
    cut = parts("dashboard:note_str:", text, stored)
    assert all(len(json.dumps(part)) <= pages.LONGEST_PART for part in cut.values())
    assert note_in({**stored, **cut}) == text  # nothing of the longer text is left


def test_two_writers_at_once_leave_whole_pages(tmp_path):
    url = sqlite_url(tmp_path / "study.db")
    study = fake_study(SPACE, storage=open_storage(url), n_trials=0)
    score(study, SPACE, 30)
    others = [optuna.load_study(study_name="fake", storage=open_storage(url)) for _ in range(2)]
    failed = []

    def write(other, n):
        try:
            for i in range(6):
                other.set_user_attr(f"hq:report:x{n}_before", i)
                other.set_user_attr(f"hq:report:x{n}_after", i)
                write_pages(other)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(other, n)) for n, other in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    write_pages(study)
    shown = detail(study)
    assert shown["note"]["body"].count("## fake") == 1
    assert shown["note"]["body"].count(YOURS) == 1
    for item in shown["plotly_graph_objects"]:
        json.loads(item["graph_object"])


def test_pages_do_not_wait_for_a_database_that_is_away(study, monkeypatch):
    kept = RetryingStorage(study._storage, retry_for_s=1000.0)
    loaded = optuna.load_study(study_name="fake", storage=kept)

    def away(*_arguments):
        raise ConnectionError("no answer")

    monkeypatch.setattr(study._storage, "get_study_system_attrs", away)
    with pytest.raises(ConnectionError):
        write_pages(loaded)


def test_a_study_of_another_kind_is_refused():
    with pytest.raises(ResumeError, match="is not a bit search"):
        write_pages(optuna.create_study())


@pytest.mark.parametrize(
    ("state", "value", "words"),
    [
        ("COMPLETE", 0.25, "Score 0.25 nats, 1.5 kBOPs, over budget."),
        ("RUNNING", None, "Being scored now."),
        ("PRUNED", None, "It was not needed any more"),
        ("FAIL", None, "failed, or was given back"),
    ],
)
def test_one_line_says_what_a_trial_was(state, value, words):
    info = read_history(fake_study(4)).info
    what = {"kind": "candidate", "step": 7, "slot": 0, "layer": "conv1 8→4, fc 4→8", "cost": 1500.0}
    text = trial_note(what, replace(info, limit=1000.0), state=state, score=value)
    assert text.startswith("Step 7, candidate 1: a swap, `conv1 8→4, fc 4→8`.")
    assert words in text
    assert "\n" not in text


def test_a_trial_of_another_kind_has_no_line():
    assert trial_note({"kind": "free"}, read_history(fake_study(4)).info) == ""
