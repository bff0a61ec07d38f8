"""Files of a study that are too large for its database: weights, second moments, reports.

They live in one of Optuna's artifact stores, a folder or an S3 bucket, under the SHA-256 of their
content. The study holds a `Reference`, written after the upload, so whoever can read a reference
finds the whole file behind it. What is loaded is hashed first: other bytes than those that were
stored are an error, never a result. Only bytes that cannot run anything are kept here: JSON, HTML,
and tensors as safetensors (`hq_optuna.objective.training_steps`).

Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     artifacts = open_artifacts(folder)
    ...     reference = artifacts.put_json({"conv1": [8, 4]})
    ...     artifacts.get_json(reference), reference.n_bytes
    ({'conv1': [8, 4]}, 15)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from optuna.artifacts import ArtifactMeta, Boto3ArtifactStore, FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.study import Study

from hq_optuna import attributes
from hq_optuna.atomic_files import write_atomically
from hq_optuna.errors import ArtifactError
from hq_optuna.optuna_internals import (
    ARTIFACTS_ATTR_PREFIX,
    artifact_path,
    id_of,
    place_of,
    storage_of,
)


class Store(Protocol):
    """What is used of an Optuna artifact store."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Open an artifact, or raise `ArtifactNotFound`."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write an artifact."""

    def remove(self, artifact_id: str) -> None:
        """Remove an artifact."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What a database holds of an artifact.

    Attributes:
        id: Its name in the store.
        sha256: Hash of its content, 64 hexadecimal digits.
        n_bytes: Its length.
    """

    id: str
    sha256: str
    n_bytes: int

    def to_json(self) -> dict[str, str | int]:
        """Return ``{"id", "sha256", "bytes"}``."""
        return {"id": self.id, "sha256": self.sha256, "bytes": self.n_bytes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reference:
        """Rebuild from `to_json`'s data.

        Raises:
            ArtifactError: The data are no reference.
        """
        try:
            found = cls(str(data["id"]), str(data["sha256"]), int(data["bytes"]))
        except (KeyError, TypeError, ValueError):
            raise ArtifactError(
                f"{data!r} is no reference to an artifact: expected id, sha256 and bytes."
            ) from None
        if not re.fullmatch("[0-9a-f]{64}", found.sha256):
            raise ArtifactError(f"{found.sha256!r} is no SHA-256: expected 64 hexadecimal digits.")
        return found


class Artifacts:
    """An artifact store, addressed by content.

    Args:
        store: Any artifact store of Optuna.
        location: What messages call it.
        prefix: What ids begin with, for a bucket that holds other things too.
        cache: Folder in which what was fetched is kept for this host's other processes; ``None``
            for a store that is as near as a cache would be.
    """

    def __init__(
        self, store: Store, location: str, *, prefix: str = "", cache: Path | None = None
    ) -> None:
        self.store = store
        self.location = location
        self.prefix = prefix
        self.cache = cache

    def put(self, data: bytes) -> Reference:
        """Store bytes and return their reference. The same bytes are the same artifact.

        Raises:
            ArtifactError: The store cannot be written.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        reference = Reference(self.prefix + sha256, sha256, len(data))
        with self._explained("write", reference):
            self.store.write(reference.id, io.BytesIO(data))
        return reference

    def get(self, reference: Reference) -> bytes:
        """Return the bytes of an artifact, verified; from the store at most once for this host.

        Raises:
            ArtifactError: It is missing, or is not what was stored.
        """
        kept = None if self.cache is None else self.cache / reference.sha256
        if kept is not None:
            with contextlib.suppress(OSError):
                data = kept.read_bytes()
                if hashlib.sha256(data).hexdigest() == reference.sha256:
                    return data
        with self._explained("read", reference), self.store.open_reader(reference.id) as body:
            data = body.read()
        found = hashlib.sha256(data).hexdigest()
        if found != reference.sha256:
            raise ArtifactError(
                f"Artifact {reference.id} in {self.location} is not what was stored: expected "
                f"{reference.n_bytes} bytes with SHA-256 {reference.sha256[:12]}…, found "
                f"{len(data)} bytes with {found[:12]}…. Restore it, or delete it and run the step "
                "that made it again."
            )
        if kept is not None:
            with contextlib.suppress(OSError):  # a full disk only costs the next fetch
                write_atomically(kept, data)
        return data

    def discard(self, reference: Reference) -> None:
        """Remove an artifact that nobody needs any more.

        Raises:
            ArtifactError: It is missing, or the store cannot be written.
        """
        with self._explained("remove", reference):
            self.store.remove(reference.id)

    def put_json(self, data: Any) -> Reference:
        """Store JSON data; equal data give the same artifact."""
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return self.put(text.encode())

    def get_json(self, reference: Reference) -> Any:
        """Return JSON data, verified.

        Raises:
            ArtifactError: The artifact is missing, altered, or no JSON.
        """
        try:
            return json.loads(self.get(reference))
        except ValueError as error:
            raise ArtifactError(f"Artifact {reference.id} is no JSON: {error}.") from None

    @contextlib.contextmanager
    def _explained(self, doing: str, reference: Reference) -> Iterator[None]:
        try:
            yield
        except ArtifactNotFound:
            raise ArtifactError(
                f"Artifact {reference.id} is missing in {self.location}. Was it deleted, or is "
                "this another store than the one the study was made with (--artifacts)?"
            ) from None
        except Exception as error:  # a store's client raises what it likes
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ArtifactError(
                f"Cannot {doing} artifact {reference.id} in {self.location}: {text}. Check that "
                "the store can be reached and has room; what was recorded before stays."
            ) from None


class FolderStore(FileSystemArtifactStore):
    """Optuna's folder of artifacts, in which a file appears whole or not at all."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write beside the place, then rename, so that nobody reads half a file."""
        write_atomically(artifact_path(self, artifact_id), content_body.read())


def open_artifacts(location: str | Path, *, cache: Path | None = None) -> Artifacts:
    """Open a folder, or an S3 bucket by URL, as an artifact store. Nothing is written yet.

    Args:
        location: A folder, or ``s3://bucket/prefix``; ``?endpoint_url=…&region_name=…`` for stores
            that speak S3 elsewhere. Credentials come from where boto3 looks for them
            (``AWS_ACCESS_KEY_ID``, ``~/.aws``, the machine's role), never from the URL.
        cache: Folder for what was fetched. Default for S3: ``$XDG_CACHE_HOME/hq_optuna/artifacts``.

    Raises:
        ArtifactError: The URL is none of these, or boto3 is not installed.
    """
    text = str(location)
    if isinstance(location, Path) and re.match("s3:/", text):
        raise ArtifactError(f"{text}: a URL is given as text, and not as a Path.")
    if "://" not in text:
        return Artifacts(FolderStore(Path(location)), text, cache=cache)
    url = urllib.parse.urlsplit(text)
    options = {key: values[-1] for key, values in urllib.parse.parse_qs(url.query).items()}
    unknown = set(options) - {"endpoint_url", "region_name"}
    if url.scheme != "s3" or not url.hostname or "@" in url.netloc or unknown:
        shown = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        raise ArtifactError(
            f"{shown!r} is no artifact store. Expected a folder, or s3://bucket/prefix, with "
            "?endpoint_url=…&region_name=… where needed and credentials in the environment."
        )
    try:
        import boto3
    except ImportError:
        raise ArtifactError(
            "Artifacts in S3 need boto3: pip install 'hq_optuna[s3]', or give a folder."
        ) from None
    prefix = url.path.strip("/")
    if cache is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(home) / "hq_optuna" / "artifacts"
    return Artifacts(
        Boto3ArtifactStore(url.netloc, boto3.client("s3", **options)),
        text,
        prefix=f"{prefix}/" if prefix else "",
        cache=cache,
    )


def attach(study: Study, name: str, reference: Reference, *, filename: str, mimetype: str) -> None:
    """Write the reference of an uploaded artifact into a study, where optuna-dashboard lists it.

    Args:
        study: The study.
        name: What `attached` finds it by; an earlier artifact of this name gives way.
        reference: What `Artifacts.put` returned.
        filename: What it is called when downloaded.
        mimetype: For example ``"application/json"``.
    """
    storage, study_id = place_of(study)
    if attached(study, name) == reference:
        return
    meta = ArtifactMeta(reference.id, filename, mimetype, None)
    storage.set_study_system_attr(
        study_id, ARTIFACTS_ATTR_PREFIX + reference.id, json.dumps(asdict(meta))
    )
    storage.set_study_system_attr(study_id, f"{attributes.ARTIFACT}:{name}", reference.to_json())


def attached(study: Study, name: str) -> Reference | None:
    """Return the reference of a study's artifact, or ``None``."""
    system = storage_of(study).get_study_system_attrs(id_of(study))
    data = system.get(f"{attributes.ARTIFACT}:{name}")
    return None if data is None else Reference.from_json(data)
