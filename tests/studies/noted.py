"""Something to be made whose making can be counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pma.errors import InputError
from pma.studies import making
from pma.studies.making import Made


@dataclass(frozen=True, kw_only=True, eq=False)
class Noted(Made):
    """Writes its name, and a line for every time it was made."""

    kind: ClassVar[str] = "noted"
    name: str
    after: tuple[Noted, ...] = ()
    fails: bool = False

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "after": [each.describe() for each in self.after]}

    def needs(self) -> Sequence[Made]:
        return self.after

    def make(self, folder: Path, home: Path) -> None:
        folder.mkdir(exist_ok=True)
        for need in self.after:
            assert making.seconds(need, home) is not None
        with open(folder / "times", "a") as file:
            file.write("made\n")
        time.sleep(0.05)
        if self.fails:
            raise InputError("it fails")
