"""`BitSearch` from the network to the answer, on a real network in a fraction of a second."""

from __future__ import annotations

import copy
import sqlite3
from pathlib import Path

import optuna
import pytest
import sqlalchemy
import torch
from optuna.trial import TrialState
from torch import Tensor, nn
from torch.nn import functional

import hq_optuna as hq
from hq_optuna.errors import (
    BudgetError,
    DataError,
    HqOptunaError,
    NetworkError,
    ResumeError,
    SpaceError,
    StorageError,
)
from hq_optuna.protocol.history import read_history
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.space.cost import CostModel
from hq_optuna.storages import load_study, open_storage, sqlite_url
from tests.searches import BUDGET, LAYERS, Network, data, dump, facts, search
from tests.training_searches import plan


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


def run(path: Path | None = None, name: str = "s", by: hq.BitSearch | None = None, **options):
    by = search() if by is None else by
    storage = None if path is None else sqlite_url(path)
    return by.optimize(storage, name, **{"n_candidates": 2, **options})


# The answer


def test_the_answer_is_within_the_budget_and_the_network_has_its_bits():
    by = search(validation=data(30, seed=7))
    study = run(by=by)
    result = by.result(study)
    model = CostModel(by.space.layers)
    assert result.met
    assert result.cost == model.cost(result.config) <= 0.3 * model.int8
    assert (result.cost_int8, result.cost_float32) == (model.int8, 16 * model.int8)
    assert tuple(result.config) == LAYERS
    assert {bits for pair in result.config.values() for bits in pair} <= {8, 4, 2}
    history = read_history(study)
    assert result.steps == len(history.records)
    assert result.candidates == sum(c.counted for c in history.candidates)
    assert result.score == history.records[-1].winner.score
    assert not result.network.training
    outputs = result.network(data()[0])
    hq.set_bits(result.network, dict.fromkeys(LAYERS, (32, 32)))
    assert not torch.equal(outputs, result.network(data()[0]))
    hq.set_bits(result.network, result.config)
    assert torch.equal(outputs, result.network(data()[0]))


def test_the_answer_reads_in_one_line():
    by = search(validation=data(30, seed=7))
    result = by.result(run(by=by))
    before, after = (100 * result.facts[f"accuracy_{when}"] for when in ("before", "after"))
    assert str(result) == (
        f"3 layers: {result.cost / 1e3:.4g} kBOPs, {100 * result.cost / result.cost_int8:.1f} % of "
        f"all-8-bit; predicted loss rise {result.score:.3g} nats; "
        f"accuracy {before:.1f} % -> {after:.1f} %"
    )


def test_the_best_trial_is_the_answer_with_all_layers():
    by = search()
    study = run(by=by)
    bits = {name: pair.weight_bits for name, pair in by.result(study).config.items()}
    assert study.best_trial.params == bits
    assert study.best_trial.user_attrs["kind"] == "incumbent"


def test_the_callers_network_is_left_as_it_was():
    network = Network()
    before = copy.deepcopy(network)
    by = search(model=network, validation=data(30, seed=7))
    result = by.result(run(by=by))
    assert network.training
    assert str(network) == str(before)
    for name, tensor in before.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    for name, parameter in network.named_parameters():
        assert parameter.grad is None
        assert not any(parameter is other for other in result.network.parameters()), name
    assert all(not module._forward_pre_hooks for module in network.modules())


OF_ONE_BATCH = {"curvature_samples": 24, "rounding_samples": 24, "set_aside_samples": 24}
"""One batch cannot be split, and has no standard error."""


def without_peak(facts):
    """Return facts without that of memory, which is another each time."""
    assert facts["preparation_peak_mib"] >= 0
    return {name: fact for name, fact in facts.items() if name != "preparation_peak_mib"}


def test_the_network_is_measured_before_and_after_as_anyone_would():
    x, labels = data(30, seed=7)
    by = search(validation=(x, labels))
    study = run(by=by)
    result = by.result(study)
    float_network = Network().eval()
    with torch.no_grad():
        right = float_network(x).argmax(1) == labels
        still = result.network(x).argmax(1) == labels
    assert without_peak(result.facts) == {
        **OF_ONE_BATCH,
        "validation_samples": 30,
        "accuracy_before": int(right.sum()) / 30,
        "accuracy_after": int(still.sum()) / 30,
        "validation_lost": int((right & ~still).sum()),
        "validation_gained": int((still & ~right).sum()),
    }
    stored = dict(read_history(study).facts)
    assert [row["method"] for row in stored.pop("compared")] == ["answer", "uniform", "8 bits"]
    assert stored == dict(result.facts)


def test_what_is_measured_may_be_anything():
    def evaluate(network, batches):
        with torch.no_grad():
            outputs = network(batches[0].inputs)
        return {"loss": functional.cross_entropy(outputs, batches[0].labels).item()}

    by = search(validation=data(10, seed=7), evaluate=evaluate)
    result = by.result(run(by=by))
    measured = {"validation_samples", "loss_before", "loss_after"}
    assert set(without_peak(result.facts)) == {*OF_ONE_BATCH, *measured}
    with torch.no_grad():
        after = functional.cross_entropy(result.network(data(10, seed=7)[0]), data(10)[1])
    assert result.facts["loss_after"] == after.item()


def test_without_validation_data_nothing_is_measured():
    by = search()
    assert without_peak(by.result(run(by=by)).facts) == OF_ONE_BATCH


def test_a_search_without_a_closed_step_has_no_answer():
    by = search()
    study = run(by=by)
    empty = optuna.create_study(study_name="empty", sampler=study.sampler, pruner=study.pruner)
    with pytest.raises(ResumeError, match="'empty' has no closed step yet"):
        search().result(empty)


def stop_after(n: int):
    """Return a callback that presses Ctrl-C when n candidates are done."""

    def callback(log: StepLog) -> None:
        if len(log.results) >= n:
            raise KeyboardInterrupt

    return callback


def test_the_incumbent_of_an_interrupted_search_can_be_had(path):
    with pytest.raises(KeyboardInterrupt):
        run(path, on_progress=stop_after(2))
    result = search().result(load_study(sqlite_url(path), "s"))
    assert not result.met
    assert str(result).endswith("(budget not met)")
    assert result.config == hq.BitConfig.uniform(LAYERS, 8, 8)


def test_progress_is_told_while_the_table_is_made_and_after_each_trial():
    told: list[tuple[str, int, int]] = []
    steps: list[int] = []
    run(
        progress=lambda *entry: told.append(entry),
        on_progress=lambda log: steps.append(len(log.closed)),
    )
    shares = [done / of for _, done, of in told]
    assert shares == sorted(shares)
    assert (shares[0] < 0.5, shares[-1]) == (True, 1.0)
    assert {"layers", "statistics", "table"} <= {what for what, _, _ in told}
    assert all(0 < done <= of for _, done, of in told)
    assert steps == sorted(steps)


# The same search again


@pytest.mark.parametrize(
    ("scorer", "options"),
    [(None, {}), ("diagonal", {"rule": "min", "seed": 3, "n_candidates": 1}), ("trace", {})],
)
def test_an_interrupted_search_goes_on_to_the_history_of_an_undisturbed_one(path, scorer, options):
    undisturbed = run(by=search(scorer=scorer), **options)
    for n in (1, 3, 4):  # each time a new process would read network and data anew
        with pytest.raises(KeyboardInterrupt):
            run(path, by=search(scorer=scorer), on_progress=stop_after(n), **options)
    study = run(path, by=search(scorer=scorer), **options)
    assert facts(study) == facts(undisturbed)
    assert TrialState.RUNNING not in {trial.state for trial in study.trials}
    one, other = search(scorer=scorer).result(study), search(scorer=scorer).result(undisturbed)
    assert one.config == other.config
    assert torch.equal(one.network(data()[0]), other.network(data()[0]))


def test_the_same_search_twice_is_the_same():
    assert facts(run()) == facts(run())


def test_a_finished_search_changes_nothing(path):
    by = search(validation=data(30, seed=7))
    by.result(run(path, by=by))
    before = dump(path)
    again = search(validation=data(30, seed=7))
    study = run(path, by=again)
    again.result(study)
    assert dump(path) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A file with the finished search ``s`` by the diagonal scorer."""
    path = tmp_path_factory.mktemp("finished") / "study.db"
    run(path, by=search(scorer="diagonal"))
    return path


@pytest.mark.parametrize(
    ("name", "words", "made", "started"),
    [
        ("network", "the network's weights", {"model": Network(seed=1)}, {}),
        ("data", "the calibration data", {"calibration": data(seed=9)}, {}),
        ("space", "the search space", {"bits": (8, 6, 4, 2)}, {}),
        ("space", "the search space", {"pins": {"last": 8}}, {}),
        ("budget", "the budget", {"budget": hq.Budget.fraction(bops=0.4)}, {}),
        ("scorer", "the scorer", {"scorer": "trace"}, {}),
        ("observer", "the observer of activation ranges", {"observer": "min_max"}, {}),
        ("loss", "the loss function", {"loss_fn": functional.multi_margin_loss}, {}),
        ("seed", "the seed", {}, {"seed": 1}),
        ("rule", "the winner rule", {}, {"rule": "min"}),
        ("n_candidates", "the number of candidates a step", {}, {"n_candidates": 3}),
        ("encoding", "the encoding of candidates", {}, {"encoding": "compact"}),
    ],
)
def test_another_search_under_the_same_name_is_refused_naming_what_changed(
    finished, path, name, words, made, started
):
    with sqlite3.connect(finished) as source, sqlite3.connect(path) as copied:
        source.backup(copied)
    before = dump(path)
    with pytest.raises(ResumeError, match=f"'s' is another search. Changed: .*{words}") as error:
        run(path, by=search(**{"scorer": "diagonal", **made}), **started)
    assert name in error.value.changed
    assert len(error.value.changed) == 1
    assert "give a new study name" in str(error.value)
    assert dump(path) == before


@pytest.mark.parametrize("directions", [["minimize"], ["maximize"], ["minimize", "minimize"]])
def test_a_study_of_another_kind_is_refused_and_left_alone(path, directions):
    theirs = optuna.create_study(study_name="s", storage=sqlite_url(path), directions=directions)
    theirs.optimize(lambda trial: [trial.suggest_float("x", 0, 1)] * len(directions), n_trials=2)
    open_storage(sqlite_url(path))  # WAL
    before = dump(path)
    with pytest.raises(ResumeError, match="belongs to another kind of study"):
        run(path)
    assert dump(path) == before


def test_the_library_prints_nothing(path, capfd):
    run(path)
    assert capfd.readouterr() == ("", "")


def test_other_searches_of_a_storage_do_not_matter(path):
    first = run(path, "first", seed=1)
    second = run(path, "second", seed=2)
    assert facts(first) == facts(run(seed=1))
    assert facts(second) == facts(run(seed=2))


@pytest.mark.parametrize("kind", ["url", "storage"])
def test_a_disk_that_is_full_is_told_and_the_search_goes_on_afterwards(path, kind, monkeypatch):
    run(path, "other")  # the tables exist
    storage = open_storage(sqlite_url(path))

    def shrink(connection: sqlite3.Connection, _: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages + 3}")

    engine = storage._backend.engine
    sqlalchemy.event.listen(engine, "connect", shrink)
    engine.dispose()
    with monkeypatch.context() as patch:
        if kind == "url":
            patch.setattr("hq_optuna.storages.retrying.open_storage", lambda url: storage)
        with pytest.raises(StorageError, match=r"database or disk is full. Free some space"):
            place = sqlite_url(path) if kind == "url" else storage
            search().optimize(place, "s", n_candidates=2, retry_for_s=1)
    assert facts(run(path)) == facts(run())


# What is refused before any work


class Random(Network):
    def forward(self, x):
        return super().forward(x) + torch.rand(1)


def broken() -> Network:
    network = Network()
    with torch.no_grad():
        network.middle.weight[0] = torch.nan
    return network


UNLABELLED = {"calibration": torch.ones(2, 1, 7, 7)}


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (SpaceError, "pins: 'nosuch' matches no layer. .*first, middle", {"pins": {"nosuch": 8}}),
        (SpaceError, "allowed: 'x.*' matches no layer", {"allowed": {"x*": (8,)}}),
        (SpaceError, "whole numbers from 1 to 16", {"bits": (17,)}),
        (BudgetError, "below the cheapest", {"budget": hq.Budget.fraction(bops=0.01)}),
        (DataError, "are empty", {"calibration": (torch.empty(0, 1, 7, 7), torch.empty(0))}),
        (DataError, "no labels", {**UNLABELLED, "loss_fn": functional.mse_loss}),
        (DataError, "NaN", {"calibration": (data()[0] * torch.nan, data()[1])}),
        (DataError, "labels run from 1 to 3", {"calibration": (data()[0], data()[1] + 1)}),
        (NetworkError, "differ", {"model": Random()}),
        (NetworkError, "NaN", {"model": broken()}),
        (NetworkError, "quantize", {"model": torch.nn.Flatten()}),
        (DataError, "validation", {"validation": torch.ones(3)}),
        (ValueError, "scorer", {"scorer": "best"}),
        (ValueError, "observer is one of squared_error, .*; got 'best'", {"observer": "best"}),
    ],
)
def test_what_cannot_be_searched_is_refused_at_once(error, words, options):
    with pytest.raises(error, match=words) as raised:
        search(**options)
    assert isinstance(raised.value, HqOptunaError) or error is ValueError


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (lambda network, batches: batches.images, "evaluate fails .* 'images'"),
        (lambda network: {"dice": 1.0}, "evaluate fails .* is called with .network, batches"),
        (lambda network, batches: 0.9, "numbers by name.* got 0.9"),
        (lambda network, batches: {"dice": "good"}, "numbers by name.* got .'dice': 'good'"),
        (lambda network, batches: {"accuracy": 93.2}, "accuracy of 93.2; .* from 0 to 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_search(evaluate, words):
    with pytest.raises(DataError, match=words):
        search(validation=data(10, seed=7), evaluate=evaluate)
    search(evaluate=evaluate)  # without validation data nothing is measured


def test_a_measure_that_needs_all_validation_data_gets_them():
    def evaluate(network, batches):
        return {"batches": 1.0 / (len(batches) - 1)}

    batches = [data(10, seed=7), data(10, seed=8)]
    assert search(validation=batches, evaluate=evaluate).evaluate is evaluate


def test_what_is_measured_keeps_nothing_for_gradients(tmp_path):
    kept = []

    def evaluate(network, batches):
        outputs = network(batches[0].inputs)
        kept.append(outputs.requires_grad)
        return {"mean": outputs.mean()}

    found = search(validation=data(10, seed=7), evaluate=evaluate, training=plan())
    study = found.optimize(sqlite_url(tmp_path / "s.db"), "s", artifacts=tmp_path / "artifacts")
    found.result(study)
    assert len(kept) > 8
    assert not any(kept)


def test_a_storage_that_cannot_be_opened_is_refused():
    with pytest.raises(StorageError, match="is no storage URL"):
        search().optimize("study.db", "s")


def test_the_default_budget_is_a_quarter_of_the_bops():
    assert hq.BitSearch(Network(), data(), pin_first_last=None).budget == hq.Budget.fraction(
        bops=0.25
    )
    assert search().budget == BUDGET


class Mixed(nn.Module):
    """A transformer layer and an LSTM, as PyTorch ships them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attend = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.rnn, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.attend(self.embed(x)))[0][:, -1])


def test_attention_and_recurrent_layers_are_searched_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Mixed().eval()
    x, y = torch.randn(48, 5, 4), torch.arange(48) % 3
    found_by = hq.BitSearch(network, (x, y), bits=(8, 4), activation_bits=(8, 4), budget="0.5 bops")
    result = found_by.result(found_by.optimize())
    attention = {f"attend.self_attn.{part}_proj" for part in ("q", "k", "v", "out")}
    assert attention | {"rnn.ih_l0", "rnn.hh_l0"} <= set(result.config)
    assert len({result.config[f"attend.self_attn.{p}_proj"].activation_bits for p in "qkv"}) == 1
    with torch.no_grad():
        floats = found_by.objective.model(x)
        assert torch.allclose(floats, network(x), atol=1e-5)
        found = result.network(x)
        assert 0 < (found - floats).square().mean() < floats.var()
        result.save(tmp_path)
        assert torch.equal(hq.load(tmp_path, network)(x), found)
