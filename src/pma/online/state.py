"""What a recorder must find again to go on: a record of what it is of, and its sums, tracks and window."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pma.errors import FormatError, MismatchError, printable
from pma.formats.strict_json import parse_object

VERSION = 1
_COUNTS = ("first_step", "last_step", "updates")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What must be the same for a state to be gone on from. `shards`: processes the model is cut over."""

    every: int
    window_last: int
    window_of: str
    sigmas: tuple[float, ...]
    shards: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def check(self, saved: Mapping[str, Any], where: str) -> None:
        """Raises MismatchError where `saved` (a setup as JSON) is another."""
        mine = json.loads(json.dumps(asdict(self)))
        for name, what in (
            ("every", "records every so many steps"),
            ("shards", "is of a model cut over so many processes"),
            ("sigmas", "has tracks of these widths"),
            ("window_of", "has a window of these"),
            ("window_last", "has a window of so many"),
        ):
            if saved.get(name) != mine[name]:
                raise MismatchError(
                    f"{where} {what}: {printable(repr(saved.get(name)))}, this recorder: {mine[name]!r}; "
                    "make the recorder as it was, or begin anew without the state"
                )
        theirs = dict(map(tuple, saved["shapes"]))
        for name, shape in mine["shapes"]:
            if theirs.pop(name, None) != shape:
                found = dict(map(tuple, saved["shapes"])).get(name, "missing")
                raise MismatchError(
                    f"{where} is of another model: {printable(name)} is {printable(repr(found))}, expected "
                    f"{shape}; begin anew without the state"
                )
        for name in theirs:
            raise MismatchError(f"{where} is of another model: {printable(str(name))} is not in this one")


def encode(setup: Setup, step: int | None, sums: Mapping[str, Any], window: Sequence[Any]) -> str:
    """The record as JSON: the setup, the newest step, and of each sum and track its steps."""
    value = {
        "version": VERSION,
        "setup": asdict(setup),
        "step": step,
        "sums": dict(sums),
        "window": list(window),
    }
    return json.dumps(value)


def decode(text: object, where: str) -> dict[str, Any]:
    """The record in `text`. Raises FormatError for anything else."""
    if not isinstance(text, str):
        raise FormatError(f"{where}: the record is missing")
    value = parse_object(text.encode("utf-8", "surrogatepass"), where)
    if value.get("version") != VERSION:
        found = printable(repr(value.get("version")))
        raise FormatError(f"{where}: version {found}, expected {VERSION}; a newer pma may have written it")
    return value
