"""A real S3 server on loopback (moto's), which counts what it serves and fails when told to."""

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import BaseWSGIServer, make_server

SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"""


class S3Server:
    """The server. `served`: (method, path, bytes of the answer) of each request, in order."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self.served: list[tuple[str, str, int]] = []
        #: shares of requests that are answered 503, cut in the middle, and answered late
        self.busy = self.cut = self.late = 0.0
        #: called before each request; raises what the server is to do instead of answering
        self.before: Callable[[str, str], None] = lambda method, path: None
        self._random = random.Random(0)
        self._lock = threading.Lock()
        self._server: BaseWSGIServer = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def behave(self) -> None:
        """No faults, nothing counted."""
        self.busy = self.cut = self.late = 0.0
        self.before = lambda method, path: None
        self.served.clear()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.before(method, path)
        with self._lock:
            busy, cut, late = (self._random.random() < p for p in (self.busy, self.cut, self.late))
        if late:
            time.sleep(0.05)
        if busy:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(
                "503 Slow Down",
                [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))],
            )
            return [SLOW_DOWN]
        body = b"".join(self._app(environ, start))
        self.served.append((method, path, len(body)))
        return self._half_of(body) if cut and method == "GET" and len(body) > 1 else [body]

    def _half_of(self, body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        raise ConnectionResetError("the connection is cut, as the test wants it")


class _Quiet(MotoRequestHandler):
    """Logs nothing."""

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        """A test that fails says why itself."""
