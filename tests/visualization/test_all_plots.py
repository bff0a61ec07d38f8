"""What holds for every picture."""

import json
import re
import subprocess
import sys
from pathlib import Path

import optuna
import plotly.graph_objects as go
import pytest

from hq_optuna import visualization
from hq_optuna.errors import ResumeError
from hq_optuna.space.budget import Budget
from hq_optuna.visualization.palette import PAGES
from tests.fake_search import fake_space, fake_study

PLOTS = [getattr(visualization, name) for name in visualization.__all__]


def study_for(plot, *args, **more):
    """Return a search that has what a plot draws: one that trains for `plot_training`."""
    if plot is visualization.plot_training:
        more = {"train_every": 1, "final": True, **more}
    return fake_study(*args, **more)


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_of_a_finished_search_has_data_and_a_title(plot):
    figure = plot(study_for(plot, 6))
    assert isinstance(figure, go.Figure)
    assert len(figure.data) >= 1
    assert figure.layout.title.text


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        (visualization.plot_bits, "No step is closed yet"),
        (visualization.plot_steps, "No step is closed yet"),
        (visualization.plot_candidates, "No candidate is scored yet"),
        (visualization.plot_sensitivity, "holds no sensitivities"),
        (visualization.plot_pareto, "holds no whole table of sensitivities"),
        (visualization.plot_prediction, "No candidate has both a predicted and a measured"),
        (visualization.plot_workers, "Nobody has begun a trial yet"),
        (visualization.plot_training, "This search trains nothing"),
    ],
)
def test_a_study_with_nothing_to_draw_gives_an_empty_figure_and_a_warning(plot, words, caplog):
    figure = plot(fake_study(6, n_trials=0, sensitivity=False))
    assert len(figure.data) == 0
    assert words in caplog.text
    assert words in figure.layout.annotations[0].text


@pytest.mark.parametrize("n_trials", range(1, 8))
@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_works_wherever_the_search_was_stopped(plot, n_trials):
    json.loads(plot(fake_study(5, n_trials=n_trials)).to_json())
    trained = fake_study(5, n_candidates=1, n_trials=n_trials, train_every=1, final=True)
    json.loads(plot(trained).to_json())


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_works_on_trials_without_user_attributes(plot):
    json.loads(plot(study_for(plot, 5, bare=True)).to_json())


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_refuses_a_study_of_another_kind(plot):
    with pytest.raises(ResumeError, match="is not a bit search of hq_optuna"):
        plot(optuna.create_study(study_name="other"))


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_needs_nothing_but_the_storage(plot, tmp_path):
    url = f"sqlite:///{tmp_path}/search.db"
    study = study_for(plot, 4, storage=url, budget=Budget.fraction(bops=0.5))
    loaded = optuna.load_study(study_name="fake", storage=url)  # no sampler of ours
    assert plot(loaded).to_dict() == plot(study).to_dict()


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_is_transparent_and_leaves_the_study_as_it_was(plot):
    study = study_for(plot, 4)
    before = [vars(trial) for trial in study.get_trials()], study.user_attrs
    figure = plot(study)
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert ([vars(trial) for trial in study.get_trials()], study.user_attrs) == before


@pytest.mark.parametrize("plot", PLOTS)
def test_every_plot_has_a_light_and_a_dark_page_and_draws_the_same_on_both(plot):
    study = study_for(plot, 4)
    plain, light, dark = plot(study), plot(study, dark=False), plot(study, dark=True)
    assert light.to_dict()["data"] == dark.to_dict()["data"] == plain.to_dict()["data"]
    assert (light.layout.paper_bgcolor, light.layout.font.color) == PAGES[False]
    assert (dark.layout.paper_bgcolor, dark.layout.font.color) == PAGES[True]
    assert dark.layout.plot_bgcolor == dark.layout.paper_bgcolor


@pytest.mark.parametrize("plot", PLOTS)
def test_every_hover_text_of_a_number_of_nats_or_cost_names_its_unit(plot):
    for trace in plot(study_for(plot, 6)).data:
        if trace.hoverinfo != "skip":
            assert any(
                word in trace.hovertemplate
                for word in ("nats", "bits", "BOPs", "KiB", "of the total", "UTC", "[2]:.4g} %")
            )


@pytest.mark.parametrize("plot", PLOTS)
def test_layers_and_steps_of_a_network_with_150_layers_are_readable(plot, large):
    figure = plot(large)
    assert figure.layout.height <= 2000 + 200
    names = [layer.name for layer in fake_space(150).layers]
    axis = figure.layout.yaxis
    if plot in (
        visualization.plot_bits,
        visualization.plot_sensitivity,
        visualization.plot_cost_share,
    ):
        assert list(axis.ticktext) == names
        assert axis.range[0] > axis.range[1]  # the first on top
        assert 1650 / len(names) >= axis.tickfont.size + 2


@pytest.fixture(scope="module")
def large():
    space = fake_space(150, bits=(8, 4))
    return fake_study(space, encoding="compact", n_trials=60)


@pytest.mark.parametrize("budget", [Budget.fraction(size_bytes=0.5), Budget.fraction(bops=0.5)])
def test_costs_are_labelled_in_the_unit_of_the_metric(budget):
    figure = visualization.plot_steps(fake_study(6, budget=budget))
    unit = {"bops": "cost (MBOPs)", "size_bytes": "cost (KiB)"}[budget.metric]
    assert figure.layout.yaxis2.title.text == unit
    share = visualization.plot_cost_share(fake_study(6, budget=budget))
    assert ("BOPs" if budget.metric == "bops" else "KiB") in share.data[0].name


def test_layer_names_are_shown_as_text_and_not_as_html():
    space = fake_space(4)
    layers = list(space.layers)
    object.__setattr__(layers[1], "name", "<b>a</b>")
    study = fake_study(type(space).build(layers, bits=(8, 4)))
    for plot in PLOTS:
        text = json.dumps(json.loads(plot(study).to_json()))  # without plotly's own escapes
        unnamed = (visualization.plot_pareto, visualization.plot_training)
        assert plot in unnamed or "&lt;b&gt;a&lt;/b&gt;" in text
        assert "<b>" not in text


def test_the_page_of_plots_names_them_all():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "plots.md").read_text("utf-8")
    assert set(re.findall(r"`(plot_\w+)", page)) == set(visualization.__all__)


def test_the_plots_load_no_torch():
    code = (
        "import sys, hq_optuna.visualization; from tests.fake_search import fake_study; "
        "hq_optuna.visualization.plot_bits(fake_study(4)); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
