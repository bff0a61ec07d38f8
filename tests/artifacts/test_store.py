"""Artifacts: by content, verified, whole or not at all; in a folder and in S3."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import optuna
import pytest

from hq_optuna.artifacts.store import (
    Artifacts,
    FolderStore,
    Reference,
    attach,
    attached,
    open_artifacts,
)
from hq_optuna.errors import ArtifactError

TABLE = {"conv1": {"weights": {"8": 1e-5, "4": 0.1 + 0.2}}}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An S3 bucket that boto3 itself talks to, without a network."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with moto.mock_aws():
        boto3.client("s3").create_bucket(Bucket="searches")
        yield "s3://searches/team/a"


class Counting(FolderStore):
    """Counts how often anything is read."""

    reads = 0

    def open_reader(self, artifact_id: str) -> BinaryIO:
        self.reads += 1
        return super().open_reader(artifact_id)


def test_an_artifact_is_named_by_its_content_and_comes_back_exactly(tmp_path: Path) -> None:
    artifacts = open_artifacts(tmp_path / "store")
    reference = artifacts.put_json(TABLE)
    text = json.dumps(TABLE, sort_keys=True, separators=(",", ":")).encode()
    sha256 = hashlib.sha256(text).hexdigest()
    assert reference == Reference(sha256, sha256, len(text))
    assert artifacts.get_json(reference) == TABLE
    assert (tmp_path / "store" / sha256).read_bytes() == text
    # Another process finds the same; equal data are stored once.
    again = open_artifacts(tmp_path / "store")
    assert again.put_json(dict(reversed(TABLE.items()))) == reference
    assert again.get_json(Reference.from_json(reference.to_json())) == TABLE
    assert [p.name for p in (tmp_path / "store").iterdir()] == [sha256]


def test_a_bucket_keeps_artifacts_under_its_prefix(bucket: str) -> None:
    import boto3

    artifacts = open_artifacts(bucket)
    reference = artifacts.put(b"weights")
    assert reference.id == f"team/a/{hashlib.sha256(b'weights').hexdigest()}"
    stored = boto3.client("s3").list_objects_v2(Bucket="searches")["Contents"]
    assert [entry["Key"] for entry in stored] == [reference.id]
    assert artifacts.get(reference) == b"weights"


def test_what_was_fetched_from_a_bucket_is_not_fetched_again(bucket: str) -> None:
    import boto3

    reference = open_artifacts(bucket).put(b"second moments")
    open_artifacts(bucket).get(reference)
    boto3.client("s3").delete_object(Bucket="searches", Key=reference.id)
    assert open_artifacts(bucket).get(reference) == b"second moments"  # from this host's cache


def test_a_damaged_cache_is_fetched_again(tmp_path: Path) -> None:
    store = Counting(tmp_path / "store")
    artifacts = Artifacts(store, "store", cache=tmp_path / "cache")
    reference = artifacts.put(b"content")
    assert [artifacts.get(reference) for _ in range(3)] == 3 * [b"content"]
    assert store.reads == 1
    (tmp_path / "cache" / reference.sha256).write_bytes(b"contenu")
    assert artifacts.get(reference) == b"content"
    assert store.reads == 2
    assert (tmp_path / "cache" / reference.sha256).read_bytes() == b"content"


def test_a_cache_that_cannot_be_written_costs_only_the_next_fetch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Counting(tmp_path / "store")
    artifacts = Artifacts(store, "store", cache=tmp_path / "file")
    reference = artifacts.put(b"content")
    assert artifacts.get(reference) == artifacts.get(reference) == b"content"
    assert store.reads == 2


@pytest.mark.parametrize("damaged", [b"contenu", b"", b"content and more"])
def test_altered_bytes_are_an_error_that_names_both(tmp_path: Path, damaged: bytes) -> None:
    artifacts = open_artifacts(tmp_path)
    reference = artifacts.put(b"content")
    (tmp_path / reference.id).write_bytes(damaged)
    words = f"is not what was stored: expected 7 bytes .*, found {len(damaged)} bytes"
    with pytest.raises(ArtifactError, match=words):
        artifacts.get(reference)


def test_a_missing_artifact_says_where_it_was_looked_for(tmp_path: Path, bucket: str) -> None:
    nobody = Reference("0" * 64, "0" * 64, 1)
    for location in (str(tmp_path / "empty"), bucket):
        with pytest.raises(ArtifactError, match=r"is missing in .*--artifacts") as caught:
            open_artifacts(location).get(nobody)
        assert location in str(caught.value)


def test_a_store_that_cannot_be_written_is_explained(tmp_path: Path, bucket: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match=r"Cannot write artifact .* (File exists|Not a dir)"):
        open_artifacts(tmp_path / "file" / "folder").put(b"x")
    with pytest.raises(ArtifactError, match=r"Cannot write .*NoSuchBucket"):
        open_artifacts("s3://another").put(b"x")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = open_artifacts(tmp_path)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        artifacts.put(b"x" * 1000)
    assert list(tmp_path.iterdir()) == []


def test_many_writers_of_the_same_content_never_show_half_of_it(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4000
    artifacts = open_artifacts(tmp_path)
    reference = artifacts.put(data)
    errors: list[Exception] = []

    def write_and_read() -> None:
        try:
            for _ in range(20):
                artifacts.put(data)
                assert artifacts.get(reference) == data
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write_and_read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [p.name for p in tmp_path.iterdir()] == [reference.id]


@pytest.mark.parametrize(
    "url", ["http://host/x", "s3://", "s3://me:secret@bucket/x", "s3://bucket?acl=public"]
)
def test_what_is_no_store_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ArtifactError, match=r"is no artifact store\. Expected a folder") as caught:
        open_artifacts(url)
    assert "secret" not in str(caught.value)


def test_without_boto3_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(ArtifactError, match=r"pip install 'hq_optuna\[s3\]'"):
        open_artifacts("s3://bucket")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"id": "a"}, "is no reference"),
        ([], "is no reference"),
        ({"id": "a", "sha256": "../../etc", "bytes": 1}, "is no SHA-256"),
    ],
)
def test_a_damaged_reference_is_refused(data: Any, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        Reference.from_json(data)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    artifacts = open_artifacts(tmp_path)
    with pytest.raises(ArtifactError, match="is no JSON"):
        artifacts.get_json(artifacts.put(b"\x80\x04K\x01."))  # a pickle
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.put_json({"score": float("nan")})


def test_a_study_lists_its_artifacts_where_optuna_looks(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 's.db'}", study_name="s")
    artifacts = open_artifacts(tmp_path / "store")
    assert attached(study, "report") is None
    for text in (b"<p>first", b"<p>second", b"<p>second"):
        reference = artifacts.put(text)
        attach(study, "report", reference, filename="report.html", mimetype="text/html")
        assert attached(study, "report") == reference
    # Optuna's own functions see and fetch them.
    listed = optuna.artifacts.get_all_artifact_meta(study)
    assert [(m.filename, m.mimetype) for m in listed] == 2 * [("report.html", "text/html")]
    optuna.artifacts.download_artifact(
        artifact_store=artifacts.store,
        artifact_id=reference.id,
        file_path=str(tmp_path / "down.html"),
    )
    assert (tmp_path / "down.html").read_bytes() == b"<p>second"


def test_the_dashboard_serves_an_attached_artifact(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 's.db'}", study_name="s")
    artifacts = open_artifacts(tmp_path / "store")
    reference = artifacts.put(b"<p>report")
    attach(study, "report", reference, filename="report.html", mimetype="text/html")
    app = dashboard.wsgi(study._storage, artifact_store=artifacts.store)
    status: list[str] = []
    body = app(
        {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": f"/artifacts/{study._study_id}/{reference.id}",
            "SERVER_NAME": "here",
            "SERVER_PORT": "80",
            "wsgi.url_scheme": "http",
            "wsgi.input": BytesIO(),
        },
        lambda code, headers, *rest: status.append(code),
    )
    assert status == ["200 OK"]
    assert b"".join(body) == b"<p>report"
