"""A store of evaluations, so that no merge is evaluated twice on the same text."""

from pma.results.store import STORE_FILE, Row, Store, content_key

__all__ = ["STORE_FILE", "Row", "Store", "content_key"]
