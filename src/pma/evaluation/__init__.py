"""Held-out loss, bits per byte and a cloze task; one code for checkpoints and for merges that were not
written.

`model` and `scoring` need torch; they are imported where they are used.
"""

from pma.evaluation.text import Document, read_documents, write_documents

__all__ = ["Document", "read_documents", "write_documents"]
