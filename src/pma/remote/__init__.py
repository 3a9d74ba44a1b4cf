"""Stores behind URLs, through fsspec: places written as URLs, listings, range reads, retries, uploads."""

from pma.remote.at_once import each_at_once
from pma.remote.location import location, redacted
from pma.remote.path import RemotePath
from pma.remote.store import Entry, Store

__all__ = ["Entry", "RemotePath", "Store", "each_at_once", "location", "redacted"]
