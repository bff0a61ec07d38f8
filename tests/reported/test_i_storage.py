"""Kind I: a study is read without the right to write, and one that vanishes is told in a sentence.

The oracle is the same study in a file that may be written. Paths are taken wherever text is.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

import hq_optuna as hq
from hq_optuna.errors import ArtifactError, StorageError
from hq_optuna.workers import loop
from tests.reported import product
from tests.reported.test_g_trials_of_others import data, network

DROP = "-dac_override,-dac_read_search"  # without these root is refused like others
ALONE = ("setpriv", f"--inh-caps={DROP}", f"--bounding-set={DROP}") if os.geteuid() == 0 else ()
READS = """
import json, os, sys
import hq_optuna as hq
from hq_optuna.errors import HqOptunaError
from hq_optuna.protocol.status import read_status
from hq_optuna.report.data import report_data
told = {}
for name, url in json.loads(sys.argv[1]).items():
    study = hq.storages.load_study(url, "x")
    found = [hq.read_history(study).incumbent.config.to_json(), read_status(study).state]
    found += [len(report_data(study)["layers"]), hq.resolve(study, "0.3 bops").cost]
    found += [len(hq.pareto(study, n=5)), hq.storages.study_exists(url, "x")]
    try:
        hq.storages.open_storage(url)
        refused = ""
    except HqOptunaError as error:
        refused = str(error)
    told[name] = [found, refused]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished search: a SQLite file that nobody has open, and a journal."""
    folder = tmp_path_factory.mktemp("finished")
    found = product.search(network(), data(), storage=folder / "open.db", name="x")
    with sqlite3.connect(folder / "open.db") as opened, sqlite3.connect(folder / "study.db") as to:
        opened.backup(to)
    to.execute("PRAGMA journal_mode=WAL")
    to.close()
    journal = product.storage(f"journal:///{folder}/study.log")
    optuna.copy_study(from_study_name="x", from_storage=found.study._storage, to_storage=journal)
    return folder


def test_reading_needs_no_right_to_write(finished, tmp_path):
    """Mode 444, a folder that is read-only, SQLite's own URLs, a log left by a killed worker."""
    file, folders, urls = finished / "study.db", {}, {}
    for name in ("444", "folder", "log", "rollback"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        shutil.copy(file, folders[name] / "study.db")
        urls[name] = f"sqlite:///{folders[name]}/study.db"
    for name, query in (("ro", "mode=ro"), ("immutable", "immutable=1")):
        urls[name] = f"sqlite:///file:{file}?{query}&uri=true"
    urls["relative"] = "sqlite:///file:444/study.db?mode=ro&uri=true"
    shutil.copy(finished / "study.log", tmp_path / "study.log")
    urls["journal"] = f"journal:///{tmp_path}/study.log"
    with sqlite3.connect(folders["rollback"] / "study.db") as changed:
        changed.execute("PRAGMA journal_mode=DELETE")
    changed.close()
    writes = sqlite3.connect(folders["log"] / "study.db")  # what is in the log alone counts
    writes.execute("UPDATE trials SET state = 'FAIL' WHERE number > 5")
    writes.execute("UPDATE trials SET state = 'COMPLETE' WHERE number > 5")
    writes.commit()
    for path in (folders["444"] / "study.db", tmp_path / "study.log"):
        path.chmod(0o444)
    for name in ("folder", "log", "rollback"):
        folders[name].chmod(0o555)
    before = sorted(tmp_path.rglob("*"))
    try:
        done = subprocess.run(
            [*ALONE, sys.executable, "-c", READS, json.dumps({"": f"sqlite:///{file}", **urls})],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        after = sorted(tmp_path.rglob("*"))
    finally:
        writes.close()
        for folder in folders.values():
            folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    expected, writable = told.pop("")
    assert writable == ""
    assert {name: found for name, (found, _) in told.items()} == dict.fromkeys(urls, expected)
    words = ("read-only", "for reading only", "cannot be written")
    assert all(any(w in refused for w in words) for _, refused in told.values()), told
    assert after == before  # nothing was left beside them


def test_an_answer_is_read_and_measured_where_nothing_can_be_written(finished):
    """`BitSearch.result` writes its figures into the study; here it cannot, and answers."""
    url = f"sqlite:///file:{finished}/study.db?mode=ro&uri=true"
    search = product.opened(network(), data(), budget="0.25 bops", validation=data())
    found = search.result(hq.storages.load_study(url, "x"))
    history = hq.read_history(hq.storages.load_study(finished / "study.db", "x"))
    assert found.config == history.incumbent.config
    assert found.facts["validation_samples"] == 64
    assert "validation_samples" not in history.facts


def test_a_search_refuses_what_can_only_be_read(finished, tmp_path):
    """Before work, by what it is told: the URL, the mode, the folder, an open storage."""
    search = product.opened(network(), data(), budget="0.25 bops")
    url = f"sqlite:///file:{finished}/study.db?mode=ro&uri=true"
    with pytest.raises(StorageError, match=r"for reading only. A search writes: give sqlite:///"):
        search.open(url, "y")
    with pytest.raises(StorageError, match=r"readonly database. Check that the file"):
        search.open(optuna.storages.RDBStorage(url), "y")
    missing = f"sqlite:///file:{tmp_path}/none.db?mode=ro&uri=true"
    with pytest.raises(StorageError, match=r"There is no database at"):
        hq.storages.load_study(missing, "x")
    with pytest.raises(StorageError, match="for reading only"):
        search.open(missing, "x")
    assert list(tmp_path.iterdir()) == []


def drop(folder: Path) -> None:
    with sqlite3.connect(folder / "study.db") as database:
        database.execute("DROP TABLE trials")
    database.close()


def delete(folder: Path) -> None:
    optuna.delete_study(study_name="x", storage=f"sqlite:///{folder}/study.db")


def begin_anew(folder: Path) -> None:
    delete(folder)
    product.search(network(), data(), storage=folder / "study.db", name="x", limit=1)


def replace(name: str) -> Callable[[Path], None]:
    def by_a_copy(folder: Path) -> None:
        shutil.copy(folder / name, folder / "copy")
        (folder / "copy").replace(folder / name)

    return by_a_copy


VANISHES = {
    "table": ("study.db", drop, "no such table: trials. Somebody removed it"),
    "study": ("study.db", delete, "study 'x' was deleted while it was in use"),
    "study, begun anew": ("study.db", begin_anew, "was deleted and begun anew"),
    "file": ("study.db", lambda folder: (folder / "study.db").unlink(), "emptied, removed or"),
    "file, replaced": ("study.db", replace("study.db"), "emptied, removed or replaced"),
    "file, emptied": ("study.db", lambda f: (f / "study.db").write_bytes(b""), "was emptied"),
    "folder": ("study.db", shutil.rmtree, "emptied, removed or replaced"),
    "journal": ("study.log", lambda f: (f / "study.log").unlink(), "emptied, removed or"),
    "journal, replaced": ("study.log", replace("study.log"), "emptied, removed or replaced"),
}


@pytest.mark.parametrize("what", VANISHES)
def test_what_vanishes_under_a_worker_ends_it_with_a_sentence(what, tmp_path):
    """At once: nobody waits for what will not come back, and no new file is made in its place."""
    name, act, words = VANISHES[what]
    folder = tmp_path / "here"
    folder.mkdir()
    with pytest.raises(StorageError, match=words):
        product.search(
            network(), data(), storage=folder / name, name="x", during=lambda study: act(folder)
        )
    if what in ("file", "journal", "folder"):
        assert not (folder / name).exists()
    elif what == "study":  # the same command begins anew
        assert product.search(network(), data(), storage=folder / name, name="x", limit=4)


@pytest.mark.parametrize("kind", ["memory", "journal"])
def test_a_study_deleted_in_an_open_storage_ends_its_worker_with_a_sentence(kind, tmp_path):
    storage = optuna.storages.InMemoryStorage()
    if kind == "journal":
        storage = product.storage(tmp_path / "study.log")
    with pytest.raises(StorageError, match="study 'x' was deleted while it was in use"):
        product.search(
            network(), data(), storage=storage, name="x",
            during=lambda study: optuna.delete_study(study_name="x", storage=storage),
        )  # fmt: skip


def test_errors_of_the_users_own_code_stay_what_they_are(tmp_path):
    """A `KeyError` of the network is no study that was deleted."""
    study = product.opened(network(), data(), budget="0.25 bops").open(tmp_path / "study.db", "x")

    def broken(trial: optuna.Trial) -> float:
        raise KeyError("of the user's own")

    with pytest.raises(KeyError, match="of the user's own"):
        loop.work(study, broken)


def test_paths_are_taken_wherever_text_is(tmp_path):
    """A storage, its artifacts, a result's folder, a file of bits, a report."""
    search = product.opened(network(), data(), budget="0.25 bops")
    for name, kind in (("a b.db", "SQLite format 3"), ("study.log", '{"op_code":')):
        path = tmp_path / "new folder" / name
        study = search.optimize(path, "x", artifacts=tmp_path / "kept", seed=0, n_candidates=2)
        assert path.read_bytes().startswith(kind.encode())
        assert hq.storages.study_exists(path, "x") and hq.storages.storage_exists(path)
        loaded = hq.storages.load_study(path, "x")
        found = search.result(loaded, artifacts=tmp_path / "kept")
        assert found.config == search.result(study).config
    found.save(tmp_path / "result")
    hq.resolve(loaded, "0.3 bops").save(tmp_path / "bits.json")
    x = data()[0]
    assert hq.load(tmp_path / "result", network())(x).equal(found.network(x))
    assert set(hq.load_assignment(tmp_path / "bits.json")) == {"0", "2", "4"}
    assert any((tmp_path / "kept").iterdir())


def test_a_path_that_was_a_url_is_refused(tmp_path):
    """`Path("sqlite:///x.db")` has lost slashes; a folder "sqlite:" is what nobody means."""
    for url in ("sqlite:///x.db", "postgresql://me:secret@host/db"):
        with pytest.raises(StorageError, match="given as text, and not as a Path") as caught:
            hq.storages.open_storage(Path(url))
        assert "secret" not in str(caught.value)
    with pytest.raises(ArtifactError, match="given as text"):
        product.opened(network(), data()).open(None, artifacts=Path("s3://bucket/prefix"))
