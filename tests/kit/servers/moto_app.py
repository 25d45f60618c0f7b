"""moto's server with puts one at a time: by itself it looks whether a key is free and stores later,
so two could both win."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import run_simple


class PutsOneAtATime:
    """The WSGI application, with a lock around what creates objects."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Serve one request."""
        if environ["REQUEST_METHOD"] == "PUT":
            with self._lock:
                return list(self._app(environ, start_response))
        return self._app(environ, start_response)


if __name__ == "__main__":
    run_simple(
        "127.0.0.1",
        int(sys.argv[1]),
        PutsOneAtATime(),
        threaded=True,
        request_handler=MotoRequestHandler,
    )
