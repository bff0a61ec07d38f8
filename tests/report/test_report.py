"""What the report says: the answer in a sentence, its data, its words."""

import json
import math
import shlex

import optuna
import pytest

from hq_optuna import attributes
from hq_optuna._version import __version__
from hq_optuna.answer.resolve import resolve
from hq_optuna.errors import ResumeError
from hq_optuna.protocol.history import read_history
from hq_optuna.report.data import layer_table, report_data
from hq_optuna.report.page import write_report
from hq_optuna.report.text import before_and_after, fact, number, percent, render_markdown, seconds
from hq_optuna.space.budget import Budget
from tests.fake_search import fake_space, fake_study
from tests.report.reported import known, page_of

ACCURACY = {"accuracy_before": 0.981, "accuracy_after": 0.975}
INNER = 2_359_296
MACS = 442_368 + 2 * INNER + 1280

MOST = "; most of the predicted rise is in layer1.0.conv (66 %), layer3.1.conv (33 %)."


# The answer


def test_the_headline_of_a_finished_search_is_the_answer_in_one_sentence():
    share = 1 - 96 * INNER / (64 * MACS)
    assert f"{100 * share:.1f}" == "31.4"
    assert report_data(known(facts=ACCURACY))["headline"] == (
        "4 layers at 4 to 8 bits: 31.4 % of the all-8-bit BOPs, predicted loss rise 0.0176 nats, "
        "validation accuracy 98.1 % → 97.5 %" + MOST
    )


def test_the_headline_says_when_accuracy_was_not_measured():
    assert report_data(known())["headline"].endswith("validation accuracy not measured" + MOST)


def test_the_headline_takes_another_figure_where_the_study_measures_no_accuracy():
    data = report_data(known(facts={"f1_score_before": 0.9, "f1_score_after": 0.875}))
    assert data["headline"].endswith("validation f1 score 0.9 → 0.875" + MOST)


def test_the_headline_names_float_activations_and_the_size():
    space = fake_space(4, bits=(8, 4), activation_bits=None, pin_first_last=None)
    data = report_data(fake_study(space, budget=Budget.fraction(size_bytes=0.5)))
    assert data["headline"].startswith(
        "4 layers at 4 bits (activations in float): 50.0 % of the all-8-bit size, "
    )


def test_the_headline_of_an_unfinished_search_says_how_far_it_is():
    data = report_data(known(n_trials=3))
    assert data["state"] == {
        "status": "unfinished",
        "over": False,
        "reason": "",
        "step": 0,
        "progress": 0.0,
        "scored_in_open_step": 1,
    }
    assert data["headline"] == (
        "Unfinished, 0.0 % of the way to the budget: after step 0 it is at 100.0 % of the "
        "all-8-bit BOPs (the budget is 32.0 %), predicted loss rise 0.000137 nats; 1 candidate of "
        "the next step scored."
    )


def test_progress_is_the_part_of_the_excess_cost_that_is_gone():
    data = report_data(known(n_trials=5))  # the start, its record, two candidates, their record
    excess = 64 * MACS * (1 - 0.32)
    assert data["state"]["step"] == 1
    assert data["state"]["progress"] == pytest.approx(48 * INNER / excess, rel=1e-12)


def test_the_headline_of_a_search_without_trials_names_the_budget():
    data = report_data(known(n_trials=0))
    assert data["headline"] == (
        "No step is closed yet: 0 candidates scored; the budget is 32.0 % of the all-8-bit BOPs."
    )
    assert data["cost"]["answer"] is None


def test_a_search_at_the_bottom_above_its_budget_says_so():
    study = known()
    info = {**study.user_attrs[attributes.INFO], "limit": 1.0}
    study.set_user_attr(attributes.INFO, info)
    data = report_data(study)
    assert data["state"]["status"] == "exhausted"
    assert "the budget is not met" in data["headline"]


# The data


def test_the_costs_are_absolute_and_fractions_of_all_8_bit_and_float():
    cost = report_data(known())["cost"]
    answer = 64 * MACS - 96 * INNER
    assert cost == {
        "answer": answer,
        "int8": 64 * MACS,
        "float32": 1024 * MACS,
        "of_int8": answer / (64 * MACS),
        "of_float32": answer / (1024 * MACS),
    }


def test_the_data_survive_a_round_trip_through_strict_json():
    for study in (known(facts={"x": math.nan}), known(n_trials=0), fake_study(4, bare=True)):
        data = report_data(study, command="hq-optuna run x")
        assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_the_layer_table_holds_bits_shares_and_sensitivity_of_the_incumbent():
    rows = layer_table(read_history(known()))
    after = 64 * MACS - 96 * INNER
    assert [row.name for row in rows] == ["conv1", "layer1.0.conv", "layer3.1.conv", "fc"]
    assert [row.searched for row in rows] == [False, True, True, False]
    assert [row.weight_bits for row in rows] == [8, 4, 4, 8]
    assert [row.share_before for row in rows] == [m / MACS for m in (442_368, INNER, INNER, 1280)]
    assert [row.share_after for row in rows] == [
        c / after for c in (64 * 442_368, 16 * INNER, 16 * INNER, 64 * 1280)
    ]
    assert [row.sensitivity for row in rows] == [
        1.5 * s * 4.0**-b for s, b in ((0.25, 8), (2, 4), (1, 4), (2.75, 8))
    ]


def test_the_sensitivities_of_the_layers_add_up_to_the_score():
    history = read_history(fake_study(fake_space(9, bits=range(2, 9), activation_bits=(8, 4))))
    total = math.fsum(row.sensitivity for row in layer_table(history))
    assert total == pytest.approx(history.incumbent.winner.score, rel=1e-14)  # sums of 18 terms


def test_before_the_first_step_the_layer_table_shows_the_start():
    rows = layer_table(read_history(known(n_trials=0)))
    assert [row.weight_bits for row in rows] == [8, 8, 8, 8]
    assert [row.share_after for row in rows] == [row.share_before for row in rows]


def test_float_activations_add_nothing_to_the_sensitivity():
    space = fake_space(4, bits=(8, 4), activation_bits=None)
    rows = layer_table(read_history(fake_study(space, budget=Budget.fraction(size_bytes=0.6))))
    assert rows[0].sensitivity == 0.25 * 4.0**-8


def test_without_a_stored_table_the_sensitivity_is_unknown():
    rows = layer_table(read_history(known(sensitivity=False)))
    assert {row.sensitivity for row in rows} == {None}
    assert "not measured" in render_markdown(report_data(known(sensitivity=False)))


def test_the_counts_tell_candidates_records_pruned_and_failed_apart():
    study = known()
    assert report_data(study)["counts"] == {
        "candidates": 4,  # the start, two in step 1, one in step 2
        "duplicates": 0,
        "records": 3,
        "trained": 0,
        "running": 0,
        "pruned": 0,
        "failed": 0,
        "workers": 1,
        "seconds": 1.0,
        "training_seconds": 0.0,
    }
    study.tell(study.ask(), state=optuna.trial.TrialState.PRUNED)
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    study.ask()
    counts = report_data(study)["counts"]
    assert [counts[k] for k in ("running", "pruned", "failed")] == [1, 1, 1]


def test_settings_fingerprint_versions_and_what_is_not_counted_are_there():
    study = known(skipped=(("bn", "BatchNorm2d", "normalisation"),), warnings=("Take care.",))
    study.set_user_attr(attributes.FINGERPRINT, {"network": "6f1c", "data": "09ab"})
    data = report_data(study)
    settings = {"scorer": "table", "rule": "ratio", "n_candidates": 4, "seed": 0}
    assert settings.items() <= data["settings"].items()
    assert data["fingerprint"] == {"network": "6f1c", "data": "09ab"}
    assert data["versions"]["hq_optuna"] == __version__
    assert data["versions"]["optuna"] == optuna.__version__
    assert data["skipped"] == [{"name": "bn", "kind": "BatchNorm2d", "reason": "normalisation"}]
    assert data["warnings"] == ["Take care."]
    assert any("Biases" in line for line in data["not_counted"])
    text = render_markdown(data)
    for words in ("6f1c", "09ab", "| bn | BatchNorm2d | normalisation |", "- Take care."):
        assert words in text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mysql+pymysql://me:p@ss/w@db:3306/hq", "mysql+pymysql://me:***@db:3306/hq"),
        ("postgresql://:pw@db/hq", "postgresql://:***@db/hq"),
        ("postgresql+psycopg://me:my pass@db/hq", "postgresql+psycopg://me:***@db/hq"),
        ("mysql://db/hq?user=a&password=b", "mysql://db/hq?user=a&password=***"),
        ("mysql+pymysql://db/hq?user=me&passwd=b", "mysql+pymysql://db/hq?user=me&passwd=***"),
        ("postgresql://db/hq?sslpassword=b&x=1", "postgresql://db/hq?sslpassword=***&x=1"),
        ("sqlite:///a@b.db", "sqlite:///a@b.db"),
    ],
)
@pytest.mark.parametrize("form", ["--storage={}", "{}"])
def test_passwords_in_the_command_are_masked(form, url, shown):
    words = ["run", "x", form.format(url), "--budget", "0.25"]
    found = report_data(known(n_trials=0), command=shlex.join(words))["command"]
    assert shlex.split(found) == ["run", "x", form.format(shown), "--budget", "0.25"]


def test_what_no_shell_takes_is_masked_too():
    found = report_data(known(n_trials=0), command="run 'x mysql://me:secret@db/hq")["command"]
    assert "secret" not in found and "***" in found


def test_a_study_of_another_kind_is_refused(tmp_path):
    study = optuna.create_study(study_name="other")
    with pytest.raises(ResumeError, match="'other' is not a bit search"):
        report_data(study)
    with pytest.raises(ResumeError, match="'other' is not a bit search"):
        write_report(study, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


# Words


def test_numbers_have_three_digits_and_none_is_not_measured():
    assert number(0.031415, "nats") == "0.0314 nats"
    assert percent(0.24789) == "24.8 %"
    assert seconds(12.345) == "12.3 s"
    assert seconds(1234.5) == "1,234 s"
    assert number(None, "nats") == percent(None) == fact("x", None) == "not measured"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy_after", 0.975, "97.5 %"),
        ("test_accuracy", 1, "100.0 %"),
        ("accuracy_points", 97.5, "97.5"),
        ("n_validation", 12000, "12,000"),
        ("perplexity", 12.3456789, "12.3457"),
        ("corrected", True, "true"),
        ("note", "as found", "as found"),
        ("list", [1, 2], "[1, 2]"),
        ("versions", {"optuna": "5.0.0", "n": 1000}, "optuna 5.0.0, n 1,000"),
        ("pins", {}, "none"),
        ("tied", [], "none"),
    ],
)
def test_facts_read_well(name, value, text):
    assert fact(name, value) == text


def test_only_what_was_measured_twice_is_compared():
    assert before_and_after({"a_before": 1.0, "b_after": 2.0}) == {}
    assert before_and_after({"a_b_before": 1.5, "a_b_after": 2.5}) == {"a b": "1.5 → 2.5"}


def test_facts_that_were_not_measured_twice_stand_alone():
    text = render_markdown(report_data(known(facts={**ACCURACY, "n_validation": 360})))
    assert "| accuracy, before → after | 98.1 % → 97.5 % |" in text
    assert "| n validation | 360 |" in text
    assert "accuracy before" not in text


# The exact optimum


def test_the_gap_is_the_answers_sum_over_the_least_sum_in_the_budget():
    space = fake_space(9, bits=(8, 6, 3), activation_bits=(8, 4))
    study = fake_study(space, budget=Budget.fraction(bops=0.4), n_candidates=1, rule="min")
    exact = report_data(study)["exact"]
    best = resolve(study, Budget.fraction(bops=0.4))
    assert exact["optimum"] == best.score
    assert exact["assignment"] == best.config.to_json()
    assert exact["cost"] == best.cost
    assert exact["answer"] == pytest.approx(read_history(study).incumbent.winner.score, rel=1e-12)
    assert exact["gap"] == exact["answer"] / best.score > 1
    assert exact["of_the_score"]
    text = render_markdown(report_data(study))
    assert f"| gap to the exact optimum | {exact['gap']:.3f} (sum over layers " in text
    assert "ranks by another score" not in text


def test_where_the_search_ranks_by_no_sum_the_report_says_so(tmp_path):
    from tests.searches import search

    study = search(scorer="gauss_newton").optimize()
    data = report_data(study)
    assert not data["exact"]["of_the_score"]
    assert (
        "the search ranks by another score, which is no sum over layers"
        in page_of(study, tmp_path).text
    )


def test_without_table_or_answer_there_is_no_gap():
    for study in (known(sensitivity=False), known(n_trials=3)):
        data = report_data(study)
        assert data["exact"] is None
        assert "gap to the exact optimum" not in render_markdown(data)
