"""Another budget from a finished search; assignments as files."""

import itertools
import json

import optuna
import pytest
import torch

import hq_optuna as hq
from hq_optuna import attributes
from hq_optuna.answer.resolve import load_assignment, pareto, resolve
from hq_optuna.errors import BudgetError, RecipeError, ResumeError, SettingError
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from tests.fake_search import fake_score, fake_space, fake_study, fake_table
from tests.searches import Network, data, search


@pytest.mark.parametrize(
    "budget",
    [Budget.fraction(bops=0.2), Budget.fraction(size_bytes=0.6), Budget.absolute(bops=3e8)],
)
def test_the_assignment_is_the_best_of_all_within_the_budget(budget):
    space = fake_space(6, bits=(8, 4, 3, 2))
    study = fake_study(space)
    found = resolve(study, budget)
    model, table = CostModel(space.layers, budget.metric), fake_table(space)
    limit = budget.limit(space)
    every = itertools.product(*(v.bits for v in space.variables))
    configs = [c for c in map(space.config, every) if model.cost(c) <= limit]
    assert found.cost == model.cost(found.config) <= limit == found.limit
    assert found.score == pytest.approx(min(sum(fake_score(table, c)) for c in configs), rel=1e-12)
    assert found.int8 == model.int8


def test_a_budget_may_be_text_as_on_the_command_line():
    study = fake_study(5)
    assert resolve(study, "30 % bops") == resolve(study, Budget.fraction(bops=0.3))
    assert search(budget="0.3 bops").budget == Budget.fraction(bops=0.3)
    with pytest.raises(SettingError, match=r"'much' is no budget\. Write a fraction"):
        resolve(study, "much")
    with pytest.raises(SettingError, match=r"'much' is no budget\. Write a fraction"):
        search(budget="much")


def test_nothing_is_scored_and_nothing_is_written(tmp_path):
    url = f"sqlite:///{tmp_path / 's.db'}"
    fake_study(5, storage=url)
    loaded = optuna.load_study(study_name="fake", storage=url)  # no network, no sampler of ours

    def system(study):
        return study._storage.get_study_system_attrs(study._study_id)

    before = len(loaded.trials), loaded.user_attrs, system(loaded)
    resolve(loaded, Budget.fraction(bops=0.3))
    pareto(loaded)
    assert (len(loaded.trials), loaded.user_attrs, system(loaded)) == before


def test_an_assignment_is_saved_and_loaded(tmp_path):
    study = fake_study(5)
    study.set_user_attr(attributes.FINGERPRINT, {"network": "6f1c"})
    found = resolve(study, Budget.fraction(bops=0.3))
    path = tmp_path / "deep" / "assignment.json"
    found.save(path)
    assert hq.load_assignment(path) == found.config
    data = json.loads(path.read_text())
    assert data == json.loads(json.dumps(found.to_json()))
    assert data["fingerprint"] == {"network": "6f1c"}
    assert data["budget"]["text"] == "30 % of the all-8-bit BOPs"


def test_the_assignment_of_a_saved_result_is_loaded_too(tmp_path):
    searched = search()
    study = searched.optimize()
    result = searched.result(study)
    result.save(tmp_path)
    recipe = tmp_path / "recipe.json"
    assert load_assignment(recipe) == result.config
    for bits in (2, "two"):
        data = json.loads(recipe.read_text())
        next(iter(data["layers"].values()))["weight_bits"] = bits
        recipe.write_text(json.dumps(data))
        with pytest.raises(RecipeError, match="altered after it was saved"):
            load_assignment(recipe)


def _damaged(change):
    def write(path):
        resolve(fake_study(4), Budget.fraction(bops=0.5)).save(path)
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.write_text("{"), "is damaged"),
        (lambda path: path.write_text("[1]"), "holds no assignment"),
        (_damaged(lambda d: d.update(format_version=9)), "has format 9.*Update hq_optuna"),
        (_damaged(lambda d: d["assignment"].update(fc=[2, 2])), "was altered after it was saved"),
        (_damaged(lambda d: d.pop("assignment")), "is damaged: KeyError"),
        (_damaged(lambda d: d["assignment"].update(fc=8)), "is damaged: TypeError"),
    ],
)
def test_a_file_that_is_no_assignment_is_refused(tmp_path, write, words):
    path = tmp_path / "a.json"
    write(path)
    with pytest.raises(RecipeError, match=words):
        load_assignment(path)


def test_a_budget_below_the_cheapest_names_the_minimum():
    with pytest.raises(BudgetError, match="is below the cheapest assignment"):
        resolve(fake_study(4), Budget.fraction(bops=0.001))


def test_a_study_without_a_table_says_what_to_do():
    study = fake_study(4, sensitivity=False)
    with pytest.raises(ResumeError, match=r"Start the search once; it measures them first"):
        resolve(study, Budget.fraction(bops=0.5))
    with pytest.raises(ResumeError, match="holds no sensitivity"):
        pareto(study)


def test_the_pareto_curve_holds_the_searchs_own_budget():
    study = fake_study(fake_space(6, bits=range(2, 9)))
    curve = pareto(study, n=5)
    own = resolve(study, Budget.fraction(bops=0.4))
    assert (own.cost, own.score, own.config) in curve
    sizes = pareto(study, metric="size_bytes", n=5)
    assert sizes[-1].cost == CostModel(fake_space(6).layers, "size_bytes").int8


def test_a_search_by_the_layer_sum_is_no_better_than_its_resolved_budget():
    searched = search(scorer="trace")
    study = searched.optimize()
    found = hq.resolve(study, searched.budget)
    answer = searched.result(study)
    assert found.score <= answer.score * (1 + 1e-12)
    assert found.cost <= searched.budget.limit(searched.space)


def test_the_exact_assignment_comes_as_a_network_that_is_saved_and_loaded(tmp_path):
    searched = search(validation=data(12, seed=7))
    study = searched.optimize()
    before = len(study.trials), study.user_attrs
    budget = Budget.fraction(size_bytes=0.5)
    exact = searched.exact(study, budget)
    assert (len(study.trials), study.user_attrs) == before
    assert exact.config == resolve(study, budget).config
    assert exact.cost <= budget.limit(searched.space)
    assert exact.facts["validation_samples"] == 12
    assert exact.score == searched.objective.prepare().score(exact.config).total
    exact.save(tmp_path)
    inputs, _ = data(12, seed=7)
    with torch.no_grad():
        assert torch.equal(hq.load(tmp_path, Network())(inputs), exact.network(inputs))
    assert searched.exact(study).cost <= searched.budget.limit(searched.space)
