"""A store of evaluations, so that no merge is evaluated twice on the same text."""

from pma.results.store import Row, Store, content_key

__all__ = ["Row", "Store", "content_key"]
