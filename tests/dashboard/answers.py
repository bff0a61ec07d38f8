"""What optuna-dashboard itself makes of a study, asked over HTTP's own interface, WSGI."""

from __future__ import annotations

import json
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from optuna.study import Study

from hq_optuna.artifacts.store import Artifacts


def dashboard() -> Any:
    """Return optuna-dashboard, or skip the test."""
    return pytest.importorskip(
        "optuna_dashboard", reason="needs optuna-dashboard: pip install 'hq_optuna[dashboard]'"
    )


def get(app: Any, path: str) -> bytes:
    """Return the body of a page that must be there."""
    environ: dict[str, Any] = {"PATH_INFO": path}
    setup_testing_defaults(environ)
    status: list[str] = []
    body = b"".join(app(environ, lambda code, headers, error=None: status.append(code)))
    assert status == ["200 OK"], (status, body)
    return body


def detail(study: Study, artifacts: Artifacts | None = None) -> dict[str, Any]:
    """Return what plain optuna-dashboard says of a study."""
    store = None if artifacts is None else artifacts.store
    app = dashboard().wsgi(study._storage, artifact_store=store)
    found: dict[str, Any] = json.loads(get(app, f"/api/studies/{study._study_id}"))
    return found
