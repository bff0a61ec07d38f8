"""The report: data, Markdown, HTML."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pytest

from hq_optuna import attrs
from hq_optuna._version import __version__
from hq_optuna.cost import Budget
from hq_optuna.errors import ResumeError
from hq_optuna.history import read_history
from hq_optuna.layers import LayerSpec
from hq_optuna.runner._report_html import render_html
from hq_optuna.runner._report_words import before_and_after, fact, number, percent, seconds
from hq_optuna.runner.report import layer_table, render_markdown, report_data, write_report
from hq_optuna.runner.resolving import resolve
from hq_optuna.space import SearchSpace
from tests.fake_search import fake_space, fake_study

ACCURACY = {"accuracy_before": 0.981, "accuracy_after": 0.975}
INNER = 2_359_296
MACS = 442_368 + 2 * INNER + 1280


def _study(**more):
    """Return a search whose answer is known: both inner layers at 4 bits, the others at 8."""
    return fake_study(fake_space(4, bits=(8, 4)), budget=Budget.fraction(bops=0.32), **more)


class _Page(HTMLParser):
    """Elements, text and links of a page as a browser would see them."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.open, self.cells, self.scripts = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.links += [found[key] for key in ("src", "href", "action") if key in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
            return
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def _page(study, tmp_path, **more):
    write_report(study, tmp_path / "report.html", **more)
    return _Page((tmp_path / "report.html").read_text(encoding="utf-8"))


# The answer


def test_the_headline_of_a_finished_search_is_the_answer_in_one_sentence():
    share = 1 - 96 * INNER / (64 * MACS)
    assert f"{100 * share:.1f}" == "31.4"
    assert report_data(_study(facts=ACCURACY))["headline"] == (
        "4 layers at 4 to 8 bits: 31.4 % of the all-8-bit BOPs, predicted loss rise 0.0176 nats, "
        "validation accuracy 98.1 % → 97.5 %."
    )


def test_the_headline_says_when_accuracy_was_not_measured():
    assert report_data(_study())["headline"].endswith("validation accuracy not measured.")


def test_the_headline_takes_another_figure_where_the_study_measures_no_accuracy():
    data = report_data(_study(facts={"f1_score_before": 0.9, "f1_score_after": 0.875}))
    assert data["headline"].endswith("validation f1 score 0.9 → 0.875.")


def test_the_headline_names_float_activations_and_the_size():
    space = fake_space(4, bits=(8, 4), activation_bits=None, pin_first_last=None)
    data = report_data(fake_study(space, budget=Budget.fraction(size_bytes=0.5)))
    assert data["headline"].startswith(
        "4 layers at 4 bits (activations in float): 50.0 % of the all-8-bit size, "
    )


def test_the_headline_of_an_unfinished_search_says_how_far_it_is():
    data = report_data(_study(n_trials=3))
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
    data = report_data(_study(n_trials=5))  # the start, its record, two candidates, their record
    excess = 64 * MACS * (1 - 0.32)
    assert data["state"]["step"] == 1
    assert data["state"]["progress"] == pytest.approx(48 * INNER / excess, rel=1e-12)


def test_the_headline_of_a_search_without_trials_names_the_budget():
    data = report_data(_study(n_trials=0))
    assert data["headline"] == (
        "No step is closed yet: 0 candidates scored; the budget is 32.0 % of the all-8-bit BOPs."
    )
    assert data["cost"]["answer"] is None


def test_a_search_at_the_bottom_above_its_budget_says_so():
    study = _study()
    info = {**study.user_attrs[attrs.INFO], "limit": 1.0}
    study.set_user_attr(attrs.INFO, info)
    data = report_data(study)
    assert data["state"]["status"] == "exhausted"
    assert "the budget is not met" in data["headline"]


# The data


def test_the_costs_are_absolute_and_fractions_of_all_8_bit_and_float():
    cost = report_data(_study())["cost"]
    answer = 64 * MACS - 96 * INNER
    assert cost == {
        "answer": answer,
        "int8": 64 * MACS,
        "float32": 1024 * MACS,
        "of_int8": answer / (64 * MACS),
        "of_float32": answer / (1024 * MACS),
    }


def test_the_data_survive_a_round_trip_through_strict_json():
    for study in (_study(facts={"x": math.nan}), _study(n_trials=0), fake_study(4, bare=True)):
        data = report_data(study, command="hq-optuna run x")
        assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_the_layer_table_holds_bits_shares_and_sensitivity_of_the_incumbent():
    rows = layer_table(read_history(_study()))
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
    rows = layer_table(read_history(_study(n_trials=0)))
    assert [row.weight_bits for row in rows] == [8, 8, 8, 8]
    assert [row.share_after for row in rows] == [row.share_before for row in rows]


def test_float_activations_add_nothing_to_the_sensitivity():
    space = fake_space(4, bits=(8, 4), activation_bits=None)
    rows = layer_table(read_history(fake_study(space, budget=Budget.fraction(size_bytes=0.6))))
    assert rows[0].sensitivity == 0.25 * 4.0**-8


def test_without_a_stored_table_the_sensitivity_is_unknown():
    rows = layer_table(read_history(_study(sensitivity=False)))
    assert {row.sensitivity for row in rows} == {None}
    assert "not measured" in render_markdown(report_data(_study(sensitivity=False)))


def test_the_counts_tell_candidates_records_pruned_and_failed_apart():
    study = _study()
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
    study = _study(skipped=(("bn", "BatchNorm2d", "normalisation"),), warnings=("Take care.",))
    study.set_user_attr(attrs.FINGERPRINT, {"network": "6f1c", "data": "09ab"})
    data = report_data(study)
    assert data["settings"] == {
        "scorer": "table",
        "rounding": "nearest",
        "statistics_correction": False,
        "rule": "ratio",
        "n_candidates": 4,
        "seed": 0,
    }
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
    ("command", "shown"),
    [
        (
            "run x --storage mysql+pymysql://me:p@ss/w@db:3306/hq",
            "run x --storage mysql+pymysql://me:***@db:3306/hq",
        ),
        ("run x --storage=postgresql://:pw@db/hq", "run x --storage=postgresql://:***@db/hq"),
        ("run x --storage mysql://db/hq?user=a&password=b", None),
        ("run x --storage sqlite:///a.db --budget 0.25", None),
    ],
)
def test_passwords_in_the_command_are_masked(command, shown):
    if shown is None:
        shown = command.replace("password=b", "password=***")
    assert report_data(_study(n_trials=0), command=command)["command"] == shown


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
    ],
)
def test_facts_read_well(name, value, text):
    assert fact(name, value) == text


def test_only_what_was_measured_twice_is_compared():
    assert before_and_after({"a_before": 1.0, "b_after": 2.0}) == {}
    assert before_and_after({"a_b_before": 1.5, "a_b_after": 2.5}) == {"a b": "1.5 → 2.5"}


def test_facts_that_were_not_measured_twice_stand_alone():
    text = render_markdown(report_data(_study(facts={**ACCURACY, "n_validation": 360})))
    assert "| accuracy, before → after | 98.1 % → 97.5 % |" in text
    assert "| n validation | 360 |" in text
    assert "accuracy before" not in text


# Markdown


def test_markdown_tables_have_as_many_cells_in_every_row_as_in_the_header():
    names = ("a|b", "c*d_e", "<f>")
    layers = [LayerSpec(name, "Linear", (8, 8), 0, 64, 1, 8) for name in names]
    study = fake_study(SearchSpace.build(layers, bits=(8, 4), pin_first_last=None))
    text = render_markdown(report_data(study, command="hq-optuna run x"))
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    for shown in (r"a\|b", r"c\*d\_e", r"\<f\>"):
        assert f"| {shown} | Linear | 64 |" in text
    assert "\n    hq-optuna run x\n" in text


def test_markdown_has_a_row_for_every_layer_and_one_for_all():
    text = render_markdown(report_data(_study()))
    assert (
        "| layer1.0.conv | Conv2d | 2,304 | 2,359,296 | 4 | 4 | 45.7 % | 36.3 % | 0.0117 |" in text
    )
    assert "| fc | Linear (pinned) | 1,280 | 1,280 | 8 | 8 |" in text
    assert f"| all |  | 40,880 | {MACS:,} |" in text
    assert text.startswith("# Bit search: fake\n\n4 layers at")


# HTML


def test_the_page_is_well_formed_and_the_answer_comes_first(tmp_path):
    page = _page(_study(facts=ACCURACY), tmp_path)
    assert page.open == []
    assert page.text.index("4 layers at 4 to 8 bits") < page.text.index("Cost and accuracy")
    order = [i for i in page.ids if not i.startswith("fig-")]
    assert order == [
        *("beside", "layers", "answer", "settings", "reproduce", "not-counted", "warnings")
    ]
    figures = [i for i in page.ids if i.startswith("fig-")]
    assert len(figures) == 8
    assert page.ids.index("answer") < page.ids.index(figures[0])
    assert page.ids.index(figures[-1]) < page.ids.index("settings")


def test_the_page_loads_nothing_from_anywhere(tmp_path):
    page = _page(_study(warnings=("Take care.",)), tmp_path)
    assert page.links == ["#warnings"]
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1)
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "showSendToCloud: false" in text


def test_plotly_is_in_the_page_once(tmp_path):
    page = _page(_study(), tmp_path)
    assert page.tags.count("script") == 2
    assert len([script for script in page.scripts if script.lstrip().startswith("/**")]) == 1


def test_names_and_warnings_are_escaped(tmp_path):
    evil = "</script><script>alert('1')</script>&amp;\"<b>"
    layers = [LayerSpec(n, evil, (8, 8), 0, 64, 1, 8) for n in (f"{evil}1", f"{evil}2", "c")]
    study = fake_study(
        SearchSpace.build(layers, bits=(8, 4), pin_first_last=None),
        name=evil,
        skipped=((evil, evil, evil),),
        warnings=(evil,),
        facts={evil: evil},
    )
    study.set_user_attr(attrs.FINGERPRINT, {evil: evil})
    page = _page(study, tmp_path, command=f"hq-optuna run {evil}")
    assert page.tags.count("script") == 2
    assert "b" not in page.tags
    assert page.open == []
    assert f"{evil}1" in page.cells
    assert f"fingerprint: {evil}" in page.cells
    assert "<b>" not in "".join(page.scripts[1:])


def test_no_text_in_a_figure_can_end_the_script():
    class Figure:
        layout = type("Layout", (), {"height": 100})

        def to_json(self):  # plotly's own escapes "<", today
            return json.dumps({"name": "</script><b>"})

    page = _Page(render_html(report_data(_study()), [("x", "caption", Figure())]))
    assert page.tags.count("script") == 2
    assert "b" not in page.tags


def test_the_figures_of_the_page_are_those_of_the_study(tmp_path):
    page = _page(_study(), tmp_path)
    script = page.scripts[-1]
    figures = json.JSONDecoder().raw_decode(script[script.index("{") :])[0]
    assert list(figures) == [
        "fig-steps",
        "fig-bits",
        "fig-cost-share",
        "fig-sensitivity",
        "fig-pareto",
        "fig-candidates",
        "fig-prediction",
        "fig-workers",
    ]
    assert figures["fig-steps"]["data"][0]["name"] == "score"
    assert set(figures) <= set(page.ids)


def test_an_unfinished_search_has_the_figures_it_can_have_and_logs_no_warning(tmp_path, caplog):
    page = _page(_study(n_trials=0, sensitivity=False), tmp_path)
    assert [i for i in page.ids if i.startswith("fig-")] == ["fig-cost-share"]
    assert caplog.text == ""
    assert "No step is closed yet" in page.text


def test_a_page_without_warnings_says_none_and_links_to_none(tmp_path):
    page = _page(_study(), tmp_path)
    assert page.links == []
    assert "Warnings\nNone." in page.text


def test_the_command_stands_in_the_page(tmp_path):
    page = _page(_study(), tmp_path, command="hq-optuna run digits --seed 3")
    assert "hq-optuna run digits --seed 3" in page.text
    assert "does not say" not in page.text
    assert "The study does not say which command started it." in _page(_study(), tmp_path).text


def test_the_same_study_gives_the_same_bytes(tmp_path):
    study = _study()
    write_report(study, tmp_path / "a.html")
    write_report(study, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_folder_is_made_and_nothing_else_is_left_in_it(tmp_path):
    write_report(_study(), tmp_path / "new" / "folder" / "report.html")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["report.html"]


def test_a_failed_write_keeps_the_earlier_report_and_leaves_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("earlier")
    written = []

    def full_disk(self, text, **_):
        written.append(self)
        self.write_bytes(text.encode()[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(_study(), path)
    assert written[0].parent == tmp_path
    assert written[0] != path
    assert path.read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_who_reads_the_earlier_report_keeps_it_whole(tmp_path):
    path, reader = tmp_path / "report.html", tmp_path / "reader"
    path.write_text("earlier")
    reader.hardlink_to(path)
    write_report(_study(), path)
    assert reader.read_text() == "earlier"  # replaced, not overwritten
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_report_changes_nothing_in_the_study(tmp_path):
    study = _study()

    def everything():
        system = study._storage.get_study_system_attrs(study._study_id)
        return study.user_attrs, dict(system), [vars(trial) for trial in study.get_trials()]

    before = everything()
    write_report(study, tmp_path / "report.html")
    assert everything() == before


def test_the_page_can_be_made_from_the_json_alone():
    data = json.loads(json.dumps(report_data(_study(facts=ACCURACY))))
    page = _Page(render_html(data, []))
    assert "4 layers at 4 to 8 bits" in page.text


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
    from tests.runner.searches import search

    study = search(scorer="gauss_newton").optimize()
    data = report_data(study)
    assert not data["exact"]["of_the_score"]
    assert (
        "the search ranks by another score, which is no sum over layers"
        in _page(study, tmp_path).text
    )


def test_without_table_or_answer_there_is_no_gap():
    for study in (_study(sensitivity=False), _study(n_trials=3)):
        data = report_data(study)
        assert data["exact"] is None
        assert "gap to the exact optimum" not in render_markdown(data)
