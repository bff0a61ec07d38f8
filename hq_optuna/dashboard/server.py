"""optuna-dashboard in this process, on a study's storage and artifacts."""

from __future__ import annotations

import errno
import importlib.util
import logging
import socket
import socketserver
import threading
from collections.abc import Mapping
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.util import setup_testing_defaults

from optuna.storages import BaseStorage

from hq_optuna.artifacts.store import Artifacts
from hq_optuna.dashboard.view import ShownStorage, clearer
from hq_optuna.errors import DashboardError

logger = logging.getLogger(__name__)


class DashboardServer:
    """Serves optuna-dashboard at its ``url`` while the ``with`` block runs.

    The storage is open and may hold any studies; bit searches are shown as `view` says. The
    dashboard asks for no password, and lets everyone who reaches the host's address change and
    delete studies. Port 0 takes any free one.

    Raises:
        DashboardError: optuna-dashboard is not installed, or the port cannot be had.
    """

    def __init__(
        self,
        storage: BaseStorage,
        artifacts: Artifacts | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
    ) -> None:
        if importlib.util.find_spec("optuna_dashboard") is None:
            raise DashboardError(
                "optuna-dashboard is not installed. Install it: pip install 'hq_optuna[dashboard]'."
            )
        import optuna_dashboard

        shown = self._shown = ShownStorage(storage)
        app: Any = optuna_dashboard.wsgi(
            shown, artifact_store=None if artifacts is None else artifacts.store
        )
        if hasattr(app, "install"):  # a Bottle application, as in 0.21
            app.install(clearer(shown))
        try:
            self._server = _Server((host, port), _Quiet)
        except OSError as error:
            raise _explained(error, host, port) from None
        self._server.set_app(app)
        self._app = app
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def show_pages(self, study_id: int, pages: Mapping[str, Any]) -> None:
        """Show pages of a study that are newer than its own, see `changed_pages`."""
        self._shown.show_pages(study_id, pages)

    def read_ahead(self, study_id: int) -> threading.Thread:
        """Prepare the answers of a study, in a thread, so that its first page need not wait.

        Of a study of thousands of trials most of the time goes into reading them once.
        """

        def read() -> None:
            for path in ("", "/param_importances"):
                environ: dict[str, Any] = {"PATH_INFO": f"/api/studies/{study_id}{path}"}
                setup_testing_defaults(environ)
                for _ in self._app(environ, lambda status, headers, error=None: lambda data: None):
                    pass

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """One thread a request: an answer of seconds must not hold up the others."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # http.server asks the name service for this host's name, which may take many seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that leaves a page closes its connections; that is no error of ours.
        logger.debug("A request of %s was not answered.", client_address, exc_info=True)


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug(format, *arguments)


def _explained(error: OSError, host: str, port: int) -> DashboardError:
    text = (
        f"Cannot listen on {host}, port {port}: {error.strerror or error}. Give an address of "
        "this host (--host)."
    )
    if error.errno == errno.EADDRINUSE:
        text = (
            f"Port {port} of {host} is taken, perhaps by another dashboard. Give another one "
            f"(--port {port + 1}), or --port 0 for any that is free."
        )
    if error.errno == errno.EACCES:
        text = f"Port {port} needs rights this user has not. Give one above 1023 (--port 8080)."
    return DashboardError(text)
