"""What a process sees of a merge's sources, and where two processes see something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pma.engine import provenance
from pma.engine.plan import Plan
from pma.errors import printable

_FIELDS = ("size_bytes", "mtime_ns", "header_digest")
_WORDS = {"size_bytes": "{} bytes", "mtime_ns": "time {} ns", "header_digest": "a header of digest {:.12}"}


def view(plan: Plan) -> dict[str, Any]:
    """What this process would merge, as plain values: the plan's digests, and every source file."""
    return {
        "plan": provenance.heading(plan),
        "sources": {
            str(provenance.absolute(source.point.path)): {
                f.name: [getattr(f, field) for field in _FIELDS] for f in source.files
            }
            for source in plan.sources
        },
    }


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], *, me: str, them: str) -> str | None:
    """Where two views differ, in words; None where they do not."""
    if mine["plan"] == theirs["plan"]:
        return None
    for path in dict.fromkeys((*theirs["sources"], *mine["sources"])):
        both = mine["sources"].get(path), theirs["sources"].get(path)
        if None in both:
            return f"{me} {_verb(both[0])} {printable(path)}, {them} {_verb(both[1])} it"
        for name in dict.fromkeys((*both[1], *both[0])):
            one, other = both[0].get(name), both[1].get(name)
            if one is None or other is None:
                return f"{me} {_verb(one)} {printable(f'{path}/{name}')}, {them} {_verb(other)} it"
            for field, here, there in zip(_FIELDS, one, other, strict=True):
                if here != there:
                    words = _WORDS[field]
                    where = printable(f"{path}/{name}")
                    return f"{me} sees {where} with {words.format(here)}, {them} with {words.format(there)}"
    return f"{me} was started with other options, or is of another version, than {them}"


def _verb(found: object) -> str:
    return "does not use" if found is None else "uses"
