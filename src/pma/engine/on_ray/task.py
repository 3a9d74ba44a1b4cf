"""What runs on the nodes: the same plan made again, looked at, and parts of it carried out."""

from __future__ import annotations

import os
import pickle
import secrets
import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from pma.engine.attempt import errors_of_ours
from pma.engine.journal import part_journal
from pma.engine.on_ray.answers import Answer, answered
from pma.engine.partition import Part
from pma.engine.plan import MergeOptions, Plan
from pma.engine.planning import plan as planned
from pma.engine.together.part import Place, carry_out, pauses
from pma.engine.together.places import driver_at
from pma.engine.together.views import difference, view
from pma.errors import MismatchError, StorageError
from pma.remote import RemotePath
from pma.trajectory import TrajectoryPoint

# what one node made, another may see up to a minute later
_SEEN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A merge as it is told to other nodes: what to plan, where to, and under whose lease."""

    points: tuple[TrajectoryPoint, ...]
    options: MergeOptions
    as_given: bool
    files: int
    out: Path
    token: str
    staging: Path | None
    sha256: bool
    save_seconds: float
    silent_seconds: float

    def packed(self) -> bytes:
        """As bytes, which a process without this package can be given too."""
        return pickle.dumps(self)


def portable(plan: Plan) -> tuple[tuple[TrajectoryPoint, ...], MergeOptions]:
    """What a plan was made of, with paths that mean the same in any folder."""
    options = plan.options
    if options.like is not None:
        options = replace(options, like=options.like.absolute())
    if options.map is not None and Path(options.map).is_file():
        options = replace(options, map=str(Path(options.map).absolute()))
    points = tuple(replace(source.point, path=source.point.path.absolute()) for source in plan.sources)
    return points, options


def _spec_of(packed: bytes) -> Spec:
    spec: Spec = pickle.loads(packed)
    return spec


@lru_cache(maxsize=1)  # a process carries out many parts of one merge
def _plan_of(packed: bytes) -> Plan:
    spec = _spec_of(packed)
    made = planned(spec.points, spec.options, as_given=spec.as_given)
    if isinstance(spec.out, RemotePath):
        made = made.resharded(spec.files)
    return made


def look(packed: bytes, who: str) -> Answer:
    """See whether this node plans the same merge, sees the place that the driver works in, and can write
    there.
    """
    return answered(who, lambda: _look(_spec_of(packed), _plan_of(packed), who))


def _look(spec: Spec, plan: Plan, who: str) -> Answer:
    with closing(Place(spec.out, spec.token, silent_seconds=spec.silent_seconds)) as place:
        _await_driver(place, who)
        heading = place.driver().heading
        if heading is None:
            raise StorageError(f"{who}: {place.folder} has no words of the process that drives")
        found = difference(view(plan), heading["view"], me=who, them=heading["who"])
        if found is not None:
            raise MismatchError(f"{found}; every node has to see the same files")
        with errors_of_ours(place.folder):
            _try_to_write(place)
    return {}


def _await_driver(place: Place, who: str) -> None:
    started = time.monotonic()
    for pause in pauses():
        if driver_at(place.folder)[0].get("token") == place.token and place.driver().heading is not None:
            return
        if time.monotonic() - started > _SEEN_SECONDS or not place.folder.parent.exists():
            raise StorageError(
                f"{who}: {place.folder}, where the output is built, is not seen there; every node has to "
                "see the same file system"
            )
        time.sleep(pause)


def _try_to_write(place: Place) -> None:
    # named as journals are, which whoever finishes or goes on removes, should this process end amid it
    probe = place.folder / part_journal(place.token, f"probe-{secrets.token_hex(8)}")
    if isinstance(probe, RemotePath):
        probe.store.send_bytes(b"probe", probe.place)
        probe.store.remove(probe.place)
        return
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    os.unlink(probe)


def carry_out_part(packed: bytes, part: Part, name: str, who: str) -> Answer:
    """Carry out a part, under a name that no other attempt at it has."""
    return answered(who, lambda: _carry_out(packed, part, name, who))


def _carry_out(packed: bytes, part: Part, name: str, who: str) -> Answer:
    spec = _spec_of(packed)
    with errors_of_ours(spec.out):
        made = carry_out(
            lambda: _plan_of(packed),
            part,
            spec.out,
            spec.token,
            name=name,
            who=who,
            silent_seconds=spec.silent_seconds,
            save_seconds=spec.save_seconds,
            staging=spec.staging,
            sha256=spec.sha256,
        )
    return {"chunks": len(made)}
