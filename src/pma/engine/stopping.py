"""A flag that calls work off, readable from Python and from compiled loops."""

from __future__ import annotations

import numpy as np


class StopFlag:
    """Set once, by any thread."""

    def __init__(self) -> None:
        self.memory = np.zeros(1, np.uint8)

    def set(self) -> None:
        """Call the work off."""
        self.memory[0] = 1

    def is_set(self) -> bool:
        """Whether it was called off."""
        return bool(self.memory[0])
