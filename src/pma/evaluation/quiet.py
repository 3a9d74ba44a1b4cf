"""Keeps transformers from writing progress bars and advice between our lines."""

from __future__ import annotations

import logging


def quiet_transformers() -> None:
    """Errors only, no progress bars; call it after transformers was imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
