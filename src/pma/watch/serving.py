"""`--port`: the page by HTTP on this machine alone, for a browser that reaches it through a tunnel."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pma.errors import UsageError

_ADDRESS = "127.0.0.1"


@contextmanager
def served(page: Path, port: int) -> Iterator[str]:
    """The address of `page` while in the block; port 0 takes a free one. Raises UsageError where it is in
    use.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            try:
                body = page.read_bytes() if self.path.split("?")[0] in ("/", f"/{page.name}") else None
            except OSError:
                body = None  # not written yet
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            """Nothing: the terminal is for the watch."""

    try:
        server = ThreadingHTTPServer((_ADDRESS, port), Handler)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"--port {port} cannot be used on {_ADDRESS} ({reason}); choose another, or 0 for a free one"
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="pma-watch-page", daemon=True)
    thread.start()
    try:
        yield f"http://{_ADDRESS}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
