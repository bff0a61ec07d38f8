"""The dashboard as `hq-optuna dashboard` serves it."""

from __future__ import annotations

import importlib.util
import json
import socket
import urllib.error
import urllib.request

import optuna
import pytest

from hq_optuna.artifacts.store import attach, open_artifacts
from hq_optuna.dashboard import write_pages
from hq_optuna.dashboard.server import DashboardServer
from hq_optuna.dashboard.view import MOST_IMPORTANT, for_people, make_clearer
from hq_optuna.errors import DashboardError
from hq_optuna.protocol.history import read_history
from hq_optuna.storages import open_storage
from tests.dashboard.answers import dashboard, detail
from tests.fake_search import fake_space, fake_study, score
from tests.servers import KINDS, place

SPACE = fake_space(8)


def fetch(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read()


def shown(server, study):
    return json.loads(fetch(f"{server.url}/api/studies/{study._study_id}"))


@pytest.fixture(autouse=True)
def _needs_dashboard():
    dashboard()


@pytest.fixture
def storage():
    return open_storage(None)


@pytest.mark.parametrize(
    ("kind", "encoding"), [*((k, "layers") for k in KINDS), ("sqlite", "compact")]
)
def test_it_shows_the_answer_and_a_line_for_every_trial(kind, encoding, tmp_path):
    with place(kind, tmp_path) as url:
        study = fake_study(SPACE, storage=open_storage(url), encoding=encoding, n_trials=0)
        score(study, SPACE)
        history = read_history(study)
        with DashboardServer(open_storage(url), port=0) as server:
            body = shown(server, study)
            assert [trial["number"] for trial in body["best_trials"]] == [history.incumbent.number]
            assert len(body["trials"]) == len(study.trials)
            lines = {trial["number"]: trial["note"]["body"] for trial in body["trials"]}
            assert all("\n" not in line and line.endswith("budget.") for line in lines.values())
            for candidate in history.candidates:
                assert lines[candidate.number].startswith(
                    f"Step {candidate.step}, candidate {candidate.slot + 1}: "
                )
                if candidate.to_bits is not None:
                    assert (
                        f"`{candidate.variable}` from {candidate.from_bits} to "
                        f"{candidate.to_bits} bits" in lines[candidate.number]
                    )
                within = candidate.cost <= history.info.limit
                assert ("within budget" in lines[candidate.number]) == within
        study._storage.remove_session()


def test_the_line_of_a_trained_step_says_what_training_gave(storage):
    study = fake_study(SPACE, storage=storage, train_every=2, final=True)
    history = read_history(study)
    record, n = history.records[2], sum(r.training is not None for r in history.records)
    with DashboardServer(storage, port=0) as server:
        lines = {t["number"]: t["note"]["body"] for t in shown(server, study)["trials"]}
    assert "Trained for 2 epochs in 2.5 s: accuracy 88.00% → 91.00%" in lines[record.number]
    assert sum("Trained for" in line for line in lines.values()) == n


@pytest.mark.parametrize("encoding", ["layers", "compact"])
def test_the_importance_of_a_layer_is_its_share_of_the_predicted_loss_rise(storage, encoding):
    study = fake_study(fake_space(30), storage=storage, encoding=encoding, n_trials=40)
    with DashboardServer(storage, port=0) as server:
        url = f"{server.url}/api/studies/{study._study_id}/param_importances"
        (bars,) = json.loads(fetch(url))["param_importances"]
    # s of fake_table is 0.25·(1 + 7i mod 11); from 8 to 2 bits a layer rises by 1.5·s·(4⁻² − 4⁻⁸).
    names = [layer.name for layer in fake_space(30).layers]
    s = {name: 1 + (7 * i) % 11 for i, name in enumerate(names)}
    del s[names[0]], s[names[-1]]  # pinned
    assert len(bars) == MOST_IMPORTANT
    for bar in bars:
        assert bar["importance"] == pytest.approx(s[bar["name"]] / sum(s.values()))
    values = [bar["importance"] for bar in bars]
    assert values == sorted(values, reverse=True)
    assert min(values) * sum(s.values()) >= sorted(s.values())[-MOST_IMPORTANT] - 1e-9


def test_importances_of_other_studies_are_optunas(storage):
    other = optuna.create_study(study_name="other", storage=storage)
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1) ** 2, n_trials=20)
    unknown = fake_study(SPACE, storage=storage, sensitivity=False)
    with DashboardServer(storage, port=0) as server:
        for study, names in ((other, {"x"}), (unknown, {v.name for v in SPACE.variables})):
            url = f"{server.url}/api/studies/{study._study_id}/param_importances"
            (bars,) = json.loads(fetch(url))["param_importances"]
            assert {bar["name"] for bar in bars} == names


def test_feasible_and_infeasible_are_told_apart(storage):
    study = fake_study(SPACE, storage=storage, n_trials=0)
    score(study, SPACE)
    costs = {c.number: c.cost for c in read_history(study).candidates}
    limit = read_history(study).info.limit
    with DashboardServer(storage, port=0) as server:
        over = {t["number"]: t["constraints"][0] > 0 for t in shown(server, study)["trials"]}
    assert {n: over[n] for n in costs} == {n: cost > limit for n, cost in costs.items()}
    assert {True, False} <= set(over.values())


def test_what_the_page_reads_is_the_same_and_shorter(storage):
    study = fake_study(SPACE, storage=storage)
    write_pages(study)
    plain = detail(study)
    with DashboardServer(storage, port=0) as server:
        ours = shown(server, study)
    for name in ("union_search_space", "intersection_search_space", "union_user_attrs", "note"):
        assert ours[name] == plain[name]
    assert [figure["id"] for figure in ours["plotly_graph_objects"]] == [
        *("steps", "bits", "sensitivity")
    ]
    for mine, theirs in zip(ours["trials"], plain["trials"], strict=True):
        for name in ("number", "state", "values", "user_attrs", "constraints", "artifacts"):
            assert mine[name] == theirs[name]
        for parameter, whole in zip(mine["params"], theirs["params"], strict=True):
            assert parameter["distribution"]["choices"] == []
            for name in ("name", "param_internal_value", "param_external_value"):
                assert parameter[name] == whole[name]
    assert len(json.dumps(ours["trials"])) < len(json.dumps(plain["trials"]))


def test_attributes_of_the_study_are_for_people(storage):
    study = fake_study(SPACE, storage=storage, facts={"accuracy_before": 0.9, "compared": [{}]})
    study.set_user_attr("owner", "Ada")
    with DashboardServer(storage, port=0) as server:
        found = {item["key"]: item["value"] for item in shown(server, study)["user_attrs"]}
    assert found["owner"] == "Ada"
    assert found["accuracy before"] == "0.9"
    assert found["budget"].startswith("40 % of the all-8-bit BOPs (")
    assert not any(key.startswith("hq:") or value[:1] in "[{" for key, value in found.items())
    assert study.user_attrs["hq:info"]  # what is stored is as it was
    assert for_people(study.user_attrs).keys() == found.keys()


def test_of_a_file_that_was_replaced_only_the_newest_is_shown_and_all_files_answer(
    storage, tmp_path
):
    study = fake_study(SPACE, storage=storage)
    artifacts = open_artifacts(tmp_path / "artifacts")
    for text in (b"<p>old", b"<p>new"):
        attach(study, "report", artifacts.put(text), filename="report.html", mimetype="text/html")
    reference = artifacts.put(b"1,2")
    attach(study, "sensitivity_csv", reference, filename="s.csv", mimetype="text/csv")
    (tmp_path / "other.txt").write_text("by Optuna itself")
    optuna.artifacts.upload_artifact(
        artifact_store=artifacts.store, file_path=str(tmp_path / "other.txt"), study_or_trial=study
    )
    with DashboardServer(storage, artifacts, port=0) as server:
        files = {file["filename"]: file for file in shown(server, study)["artifacts"]}
        assert set(files) == {"report.html", "s.csv", "other.txt"}
        assert len(shown(server, study)["artifacts"]) == 3
        page = fetch(
            f"{server.url}/artifacts/{study._study_id}/{files['report.html']['artifact_id']}"
        )
        assert page == b"<p>new"
        fetch(f"{server.url}/artifacts/{study._study_id}/{files['other.txt']['artifact_id']}")


def test_studies_of_other_kinds_are_shown_as_they_are(storage):
    study = optuna.create_study(storage=storage, study_name="other")
    study.set_user_attr("hq", {"a": 1})
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    fake_study(SPACE, storage=storage, name="ours")
    with DashboardServer(storage, port=0) as server:
        assert shown(server, study) == detail(study)
        names = json.loads(fetch(f"{server.url}/api/studies"))["study_summaries"]
        assert [item["study_name"] for item in names] == ["other", "ours"]


def test_a_search_that_has_not_begun_is_shown(storage):
    study = fake_study(SPACE, storage=storage, n_trials=0)
    with DashboardServer(storage, port=0) as server:
        assert shown(server, study)["trials"] == shown(server, study)["best_trials"] == []


def test_a_search_that_is_started_anew_after_it_was_deleted_is_shown(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    with DashboardServer(open_storage(url), port=0) as server:
        found = []
        for n_trials in (None, 8):
            study = fake_study(SPACE, storage=open_storage(url), n_trials=n_trials)
            (best,) = shown(server, study)["best_trials"]
            assert best["number"] == read_history(study).incumbent.number
            found.append(study._study_id)
            address = f"{server.url}/api/studies/{study._study_id}"
            delete = urllib.request.Request(address, method="DELETE", data=b"{}")
            assert urllib.request.urlopen(delete, timeout=30).status == 204
            study._storage.remove_session()
        assert found[0] == found[1]


def test_a_running_trial_says_so():
    trial = {
        "number": 4,
        "state": "Running",
        "params": [],
        "note": {"version": 0, "body": ""},
        "user_attrs": [{"key": "kind", "value": "candidate"}, {"key": "step", "value": "2"}],
    }
    body = {"trials": [trial], "best_trials": [], "plotly_graph_objects": []}
    make_clearer(body, read_history(fake_study(4)).info)
    assert body["trials"][0]["note"]["body"].endswith("Being scored now.")


def test_a_port_that_is_taken_is_explained(storage):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(DashboardError, match=rf"Port {port} of 127.0.0.1 is taken.*--port 0"):
            DashboardServer(storage, port=port)


def test_an_address_of_another_host_is_explained(storage):
    with pytest.raises(DashboardError, match=r"Cannot listen on 192.0.2.1, port 0: .*--host"):
        DashboardServer(storage, host="192.0.2.1", port=0)


def test_it_says_how_to_install_the_dashboard(storage, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DashboardError, match=r"pip install 'hq_optuna\[dashboard\]'"):
        DashboardServer(storage)


def test_it_is_gone_when_the_block_is_left(storage):
    with DashboardServer(storage, port=0) as server:
        fetch(f"{server.url}/api/meta")
    with pytest.raises(urllib.error.URLError):
        fetch(f"{server.url}/api/meta")
