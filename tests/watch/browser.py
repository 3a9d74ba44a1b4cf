"""A headless Chromium without a network, driven by chromedriver, which speaks JSON over HTTP (WebDriver)."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1100,1500",
    # whatever is asked for by name or address but of this machine is refused
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--proxy-server=127.0.0.1:1",
    "--proxy-bypass-list=127.0.0.1",
]
MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
_PATIENCE_SECONDS = 60


class Browser:
    """One session."""

    def __init__(self, driver: str, profile: Path) -> None:
        options = {
            "goog:chromeOptions": {
                "args": [*FLAGS, f"--user-data-dir={profile}"],
                "binary": shutil.which("chromium"),
            },
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._url = driver
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self._url = f"{driver}/session/{made['sessionId']}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._url + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """What `script`, a function's body, returns in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """Errors and warnings since the last call."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        self._call("DELETE", "")


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in `profile`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}", "--silent"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: _answers(url))
        made = Browser(url, profile)
        try:
            yield made
        finally:
            made.close()
    finally:
        driver.terminate()
        driver.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/status", timeout=1) as answer:
            return bool(json.load(answer)["value"]["ready"])
    except (OSError, urllib.error.URLError):
        return False


def wait_for(condition: Callable[[], Any], seconds: float = _PATIENCE_SECONDS) -> Any:
    """What `condition` returns once it is true."""
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
