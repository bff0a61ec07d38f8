"""Opening journals and gRPC proxies."""

from __future__ import annotations

import optuna
import pytest

from hq_optuna.errors import StorageError
from hq_optuna.storages import load_study, open_storage, opening

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize("form", ["journal:///{}", "{}"])
@pytest.mark.parametrize("name", ["study.log", "sub/study.journal"])
def test_a_journal_is_named_by_its_url_or_its_ending(tmp_path, form, name):
    path = tmp_path / name
    storage = open_storage(form.format(path))
    study = optuna.create_study(study_name="s", storage=storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert len(load_study(form.format(path), "s").trials) == 2
    assert path.exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("journal://study.log", "is no journal URL. Expected 'journal:///search.log'"),
        ("journal://", "is no journal URL"),
        ("journal:///", "is no journal URL"),
        ("grpc://", "written 'grpc://host:port'"),
        ("grpc://host:port", "written 'grpc://host:port'"),
        ("grpc://me:secret@host:1", "it knows no users and no passwords"),
        ("grpc://host:1/database", "written 'grpc://host:port'"),
    ],
)
def test_broken_urls_of_journals_and_proxies_are_explained(url, words):
    with pytest.raises(StorageError, match=words) as error:
        open_storage(url)
    assert "secret" not in str(error.value)


def test_a_journal_that_is_a_folder_or_no_journal_is_refused(tmp_path):
    with pytest.raises(StorageError, match="is a folder"):
        open_storage(f"journal:///{tmp_path}")
    text = tmp_path / "notes.log"
    text.write_text("not JSON\nat all\n")
    with pytest.raises(StorageError, match="is no journal of Optuna"):
        open_storage(str(text))


@pytest.mark.parametrize("text", ["5\n6\n", '"a"\n"b"\n', '{"a": 1}\n', '{"op_code": 99}\n'])
def test_lines_that_are_json_and_no_journal_of_this_optuna_are_refused(tmp_path, text):
    path = tmp_path / "a.log"
    path.write_text(text)
    with pytest.raises(StorageError, match=r"a\.log is no journal of Optuna, or one of a later"):
        open_storage(str(path))


def test_a_proxy_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.setattr(opening, "GRPC_TIMEOUT_S", 0.2)
    with pytest.raises(StorageError, match=r"grpc://127\.0\.0\.1:9: nobody answers"):
        open_storage("grpc://127.0.0.1:9")


def test_grpc_that_is_not_installed_is_named(monkeypatch):
    def missing(**_: object) -> None:
        raise ImportError("No module named 'grpc'")

    monkeypatch.setattr(opening, "GrpcStorageProxy", missing)
    with pytest.raises(StorageError, match=r"pip install 'hq_optuna\[grpc\]'"):
        open_storage("grpc://localhost")
