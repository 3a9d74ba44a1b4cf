"""Places as people write them: a path of this machine, or a URL of any store that fsspec has a driver for."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from pma.errors import UsageError

_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
# what a URL may carry that nobody else should see: user:password@, and ?signature=… or #…
_CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@]*:[^/\s]*@")
_QUERY = re.compile(r"(?P<url>[A-Za-z][A-Za-z0-9+.-]*://[^\s?]*)\?[^\s'\")]*")


def location(text: str | Path) -> Path:
    """The path or URL in `text`, such as `runs/7b`, `file:///runs/7b` or `s3://bucket/runs/7b`.

    A URL becomes a `RemotePath`, which does what PMA does with a path. Nothing is asked of the store yet.
    Raises UsageError for a URL that names no place.
    """
    if not isinstance(text, str):
        return text
    url = _URL.fullmatch(text)
    if url is None:
        return Path(text)
    protocol, rest = url["protocol"].lower(), url["rest"]
    if protocol in ("file", "local"):
        return Path(unquote(rest).removeprefix("localhost"))
    if not rest.strip("/"):
        raise UsageError(
            f"{redacted(text)} names no bucket or folder; expected a URL such as s3://bucket/run"
        )
    if not rest.isprintable() or ".." in rest.split("/"):
        raise UsageError(f"{redacted(text)!r} is no plain URL: '..' and control characters are not followed")
    from pma.remote.path import RemotePath

    return RemotePath(protocol, rest)


def credentials_in(url: str) -> list[str]:
    """The parts of a URL that nobody else should see, longest first."""
    secrets = []
    if user := _CREDENTIALS.match(url):
        both = user[0].partition("://")[2].removesuffix("@")
        secrets += [both, both.partition(":")[2]]
    if _QUERY.match(url):
        secrets.append(url.partition("?")[2])
    return sorted(filter(None, secrets), key=len, reverse=True)


def redacted(text: str) -> str:
    """`text` with the passwords and query strings of all URLs in it left out."""
    return _QUERY.sub(r"\g<url>", _CREDENTIALS.sub(r"\g<scheme>", text))
