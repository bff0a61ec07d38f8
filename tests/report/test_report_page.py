"""The report as Markdown and as one HTML file."""

import json
import os
import re

import optuna
import pytest

from hq_optuna import attributes, visualization
from hq_optuna.dashboard.view import ShownStorage
from hq_optuna.protocol.status import read_status
from hq_optuna.report.data import report_data
from hq_optuna.report.page import render_html, write_report
from hq_optuna.report.text import render_markdown
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace
from tests.fake_search import fake_study
from tests.report.reported import Page, known, page_of

ACCURACY = {"accuracy_before": 0.981, "accuracy_after": 0.975}
INNER = 2_359_296
MACS = 442_368 + 2 * INNER + 1280


# Markdown


def test_markdown_tables_have_as_many_cells_in_every_row_as_in_the_header():
    names = ("a|b", "c*d_e", "<f>")
    layers = [LayerSpec(name, "Linear", (8, 8), 0, 64, 1, 8) for name in names]
    study = fake_study(SearchSpace.build(layers, bits=(8, 4), pin_first_last=None))
    text = render_markdown(report_data(study, command="hq-optuna run x"))
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    for shown in (r"a\|b", r"c\*d\_e", r"\<f\>"):
        assert f"| {shown} | Linear | 64 |" in text
    assert "\n    hq-optuna run x\n" in text


def test_markdown_has_a_row_for_every_layer_and_one_for_all():
    text = render_markdown(report_data(known()))
    assert (
        "| layer1.0.conv | Conv2d | 2,304 | 2,359,296 | 4 | 4 | 45.7 % | 36.3 % | 0.0117 |" in text
    )
    assert "| fc | Linear (pinned) | 1,280 | 1,280 | 8 | 8 |" in text
    assert f"| all |  | 40,880 | {MACS:,} |" in text
    assert text.startswith("# Bit search: fake\n\n4 layers at")


# HTML


def test_the_page_is_well_formed_and_the_answer_comes_first(tmp_path):
    page = page_of(known(facts=ACCURACY), tmp_path)
    assert page.open == []
    assert page.text.index("4 layers at 4 to 8 bits") < page.text.index("Cost and accuracy")
    order = [i for i in page.ids if not i.startswith("fig-")]
    assert order == [
        *("beside", "layers", "answer", "limits", "settings", "counts"),
        *("reproduce", "not-counted", "warnings"),
    ]
    figures = [i for i in page.ids if i.startswith("fig-")]
    assert len(figures) == 8
    assert page.ids.index("answer") < page.ids.index(figures[0])
    assert page.ids.index(figures[-1]) < page.ids.index("settings")


def test_the_page_loads_nothing_from_anywhere(tmp_path):
    page = page_of(known(warnings=("Take care.",)), tmp_path)
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
    page = page_of(known(), tmp_path)
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
    study.set_user_attr(attributes.FINGERPRINT, {evil: evil})
    page = page_of(study, tmp_path, command=f"hq-optuna run {evil}")
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

    page = Page(render_html(report_data(known()), [("x", "caption", Figure())]))
    assert page.tags.count("script") == 2
    assert "b" not in page.tags


def test_the_figures_of_the_page_are_those_of_the_study(tmp_path):
    page = page_of(known(), tmp_path)
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
    page = page_of(known(n_trials=0, sensitivity=False), tmp_path)
    assert [i for i in page.ids if i.startswith("fig-")] == ["fig-cost-share"]
    assert caplog.text == ""
    assert "No step is closed yet" in page.text


def test_a_page_without_warnings_says_none_and_links_to_none(tmp_path):
    page = page_of(known(), tmp_path)
    assert page.links == []
    assert "Warnings\nNone." in page.text


def test_the_command_stands_in_the_page(tmp_path):
    page = page_of(known(), tmp_path, command="hq-optuna run digits --seed 3")
    assert "hq-optuna run digits --seed 3" in page.text
    assert "does not say" not in page.text
    assert "The study does not say which command started it." in page_of(known(), tmp_path).text


def test_the_same_study_gives_the_same_bytes(tmp_path):
    study = known()
    write_report(study, tmp_path / "a.html")
    write_report(study, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_folder_is_made_and_nothing_else_is_left_in_it(tmp_path):
    write_report(known(), tmp_path / "new" / "folder" / "report.html")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["report.html"]


def test_a_failed_write_keeps_the_earlier_report_and_leaves_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("earlier")

    def full_disk(_):
        assert len(list(tmp_path.iterdir())) == 2  # written beside its place
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(known(), path)
    assert path.read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_who_reads_the_earlier_report_keeps_it_whole(tmp_path):
    path, reader = tmp_path / "report.html", tmp_path / "reader"
    path.write_text("earlier")
    reader.hardlink_to(path)
    write_report(known(), path)
    assert reader.read_text() == "earlier"  # replaced, not overwritten
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_report_changes_nothing_in_the_study(tmp_path):
    study = known()

    def everything():
        system = study._storage.get_study_system_attrs(study._study_id)
        return study.user_attrs, dict(system), [vars(trial) for trial in study.get_trials()]

    before = everything()
    write_report(study, tmp_path / "report.html")
    assert everything() == before


def test_reports_status_plots_and_the_dashboards_view_only_read(tmp_path, monkeypatch):
    study = known(train_every=1, facts=ACCURACY)
    storage = study._storage

    def refused(*_arguments, **_named):
        raise AssertionError("a reader writes")

    writers = [name for name in dir(storage) if name.startswith(("set_", "create_", "delete_"))]
    assert {"set_study_system_attr", "create_new_trial"} <= set(writers)
    for name in writers:
        monkeypatch.setattr(storage, name, refused)
    found = optuna.load_study(study_name=study.study_name, storage=storage)
    write_report(found, tmp_path / "report.html")
    assert render_markdown(report_data(found))
    assert read_status(found).steps > 0
    for name in visualization.__all__:
        getattr(visualization, name)(found)
    shown = ShownStorage(storage)
    assert shown.importances(study._study_id)
    assert shown.get_best_trial(study._study_id)
    assert shown.get_all_studies()


def test_the_page_can_be_made_from_the_json_alone():
    data = json.loads(json.dumps(report_data(known(facts=ACCURACY))))
    page = Page(render_html(data, []))
    assert "4 layers at 4 to 8 bits" in page.text
