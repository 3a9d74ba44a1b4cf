"""Looking around a merge with a text: the line from last through it, the slopes and curvatures about it, the
plane that it lies in with last, and the routing of experts.

Half of the text is to choose by: the best place on the line, the best checkpoint, derivatives and planes are
of that half. Losses and gains that are told are of the other.
"""

# N checkpoints of the window, D documents

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma import engine
from pma.analysis import experts
from pma.analysis.contours import Contours, contours
from pma.analysis.curvature import Surface, of_model
from pma.analysis.deviations import Bending, bending
from pma.analysis.experts import Experts
from pma.analysis.gathering import Gathered, Wanted, gather, token_windows
from pma.analysis.halves import Halves, halve
from pma.analysis.keeping import Budget
from pma.analysis.line import LAST, MERGE, PLACES, Line, search, weights_at
from pma.analysis.room import Room, check_models, lacking, room_for, with_room_for_many
from pma.engine import MergeOptions, Plan
from pma.errors import InputError, UsageError
from pma.evaluation.model import check_scorable
from pma.evaluation.paired import Estimate, mean_estimate, paired_difference
from pma.evaluation.text import Document
from pma.formats.contracts import CheckpointReader
from pma.trajectory import TrajectoryPoint

Values = NDArray[np.float64]
# told of the share that is done, and what is under way
Progress = Callable[[float, str], None]
# of the whole work, about
_EVALUATED_SHARE, _BENT_SHARE = 0.4, 0.7


@dataclass(frozen=True, kw_only=True)
class Text:
    """What was read of the text: `documents` of `given`, each cut after `cut_characters` (None: none was)."""

    given: int
    documents: int
    choosing_documents: int
    cut_characters: int | None
    tokens: int
    context_tokens: int


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The checkpoint of lowest loss on the choosing half; on the other, its loss, and by how much the merge's
    is below it.
    """

    step: int | None
    is_last: bool
    loss: Estimate
    merge_below: Estimate


@dataclass(frozen=True, kw_only=True)
class Look:
    """All that was seen. `steps` and `weights` of the window, oldest first; `line_weights`: those that give
    the place on the line that is advised. A part is None where there is none, and `left_out` says why.
    """

    steps: tuple[int | None, ...]
    weights: tuple[float, ...]
    line_weights: tuple[float, ...]
    text: Text
    line: Line
    best: BestCheckpoint
    experts: Experts | None
    bending: Bending | None
    contours: Contours | None
    left_out: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def look(
    points: Sequence[TrajectoryPoint],
    documents: Sequence[Document],
    options: MergeOptions | None = None,
    *,
    as_given: bool = False,
    budget: Budget | None = None,
    context_tokens: int | None = None,
    progress: Progress = lambda share, words: None,
) -> Look:
    """Look around the merge of `points`, oldest first, with held-out `documents`.

    Raises UsageError for a window of one checkpoint or of interval means; InputError where the text cannot be
    halved, models do not fit into memory, or a checkpoint cannot be evaluated.
    """
    budget = budget or Budget()
    steps, count = tuple(point.step for point in points), len(points)
    with _checked(points, documents, options or MergeOptions(), as_given, budget) as (window, halves, room):
        lacks = lacking(room)
        wanted = _wanted(count, budget, vectors=lacks is None)
        announce = _announcing(progress, len(window.plans))
        seen = gather(window.plans, halves, wanted, context_tokens=context_tokens, announce=announce)
    nats_T = [seen.nats[model] for model in window.line.values()]
    line = search(list(window.line), nats_T, seen.token_D, halves.chooses_D)
    best = _lowest(seen, halves, count)
    if lacks is None:
        bent, drawn, left_out = _around(seen, halves, budget, steps, best, progress)
    else:
        bent, drawn, left_out = None, None, {"bending": lacks, "contours": lacks}
    if seen.no_routing is not None:
        left_out["experts"] = seen.no_routing
    return Look(
        steps=steps,
        weights=window.merge.weights,
        line_weights=weights_at(line.t, window.merge.weights),
        text=_text(seen, halves),
        line=line,
        best=_best(seen, halves, best, steps),
        experts=_experts(seen, count),
        bending=bent,
        contours=drawn,
        left_out=left_out,
    )


def check(
    points: Sequence[TrajectoryPoint],
    documents: Sequence[Document],
    options: MergeOptions | None = None,
    *,
    as_given: bool = False,
    budget: Budget | None = None,
) -> None:
    """All that `look` would raise before it reads a tensor."""
    with _checked(points, documents, options or MergeOptions(), as_given, budget or Budget()):
        pass


@contextmanager
def _checked(
    points: Sequence[TrajectoryPoint],
    documents: Sequence[Document],
    options: MergeOptions,
    as_given: bool,
    budget: Budget,
) -> Iterator[tuple[_Window, Halves, Room]]:
    if len(points) < 2:
        raise UsageError("a window of one checkpoint is its own merge, expected two or more; say --last N")
    if options.uses_means:
        raise UsageError(
            "the line from last to the merge is of checkpoints, and --use interval-means of none"
        )
    halves = halve(documents, most_characters=budget.text_characters)
    check_scorable(points[-1].path)
    with _planned(points, with_room_for_many(options), as_given) as window:
        room = room_for(window.merge, batch_tokens=budget.derivative_tokens // budget.batches)
        check_models(room)
        yield window, halves, room


def _wanted(count: int, budget: Budget, *, vectors: bool) -> Wanted:
    """Of the checkpoints and the merge, which follows them."""
    return Wanted(
        vectors=range(count + 1) if vectors else (),
        routing=(count - 2, count - 1, count),
        scorer=count,
        routing_tokens=budget.routing_tokens,
        context_tokens=budget.context_tokens,
    )


def _announcing(progress: Progress, models: int) -> Callable[[int], None]:
    return lambda done: progress(_EVALUATED_SHARE * done / models, f"model {done + 1} of {models}")


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Models as plans that share their reads: the N checkpoints, oldest first, the merge, the line's other
    places. `line`: the number of the plan at each place.
    """

    plans: tuple[Plan, ...]
    merge: Plan
    line: dict[float, int]


@contextmanager
def _planned(points: Sequence[TrajectoryPoint], options: MergeOptions, as_given: bool) -> Iterator[_Window]:
    opened: dict[Path, CheckpointReader] = {}

    def plan(of: Sequence[TrajectoryPoint], **changes: Any) -> Plan:
        return engine.plan(of, replace(options, **changes), as_given=as_given, opened=opened)

    try:
        merge = plan(points)
        alone = [plan([point], scheme="sma", weights=None) for point in points]
        beside = [t for t in PLACES if t not in (LAST, MERGE)]
        on_line = [plan(points, weights=weights_at(t, merge.weights)) for t in beside]
        numbers = {LAST: len(points) - 1, MERGE: len(points)}
        numbers |= {t: len(points) + 1 + i for i, t in enumerate(beside)}
        yield _Window(plans=(*alone, merge, *on_line), merge=merge, line=numbers)
    finally:
        for reader in opened.values():
            reader.close()


def _lowest(seen: Gathered, halves: Halves, count: int) -> int:
    """The checkpoint of lowest loss on the half to choose by."""
    return min(range(count), key=lambda number: float(seen.nats[number][halves.chooses_D].sum()))


def _best(seen: Gathered, halves: Halves, number: int, steps: Sequence[int | None]) -> BestCheckpoint:
    told = ~halves.chooses_D
    nats, tokens = seen.nats[number][told], seen.token_D[told]
    return BestCheckpoint(
        step=steps[number],
        is_last=number == len(steps) - 1,
        loss=mean_estimate(nats, tokens),
        merge_below=paired_difference(nats, seen.nats[len(steps)][told], tokens),
    )


def _text(seen: Gathered, halves: Halves) -> Text:
    assert seen.scorer is not None
    return Text(
        given=halves.given,
        documents=len(halves.documents),
        choosing_documents=int(halves.chooses_D.sum()),
        cut_characters=halves.cut_characters,
        tokens=int(seen.token_D.sum()),
        context_tokens=seen.scorer.context_tokens,
    )


def _experts(seen: Gathered, count: int) -> Experts | None:
    if len(seen.routings) < 3:
        return None
    neighbour, last, merge = (seen.routings[count - back] for back in (2, 1, 0))
    return experts.compare(last=last, merge=merge, neighbour=neighbour)


def _around(
    seen: Gathered,
    halves: Halves,
    budget: Budget,
    steps: Sequence[int | None],
    best: int,
    progress: Progress,
) -> tuple[Bending | None, Contours | None, dict[str, str]]:
    """Derivatives at the merge, and the plane; and of what is not there, why."""
    merge, points = seen.vectors[len(steps)], np.array([seen.vectors[n] for n in range(len(steps))])
    of_plane = budget.plane_points**2

    def surface(tokens: int) -> Surface:
        assert seen.scorer is not None
        text = token_windows(
            seen.scorer,
            halves.half(chooses=True),
            context_tokens=budget.context_tokens,
            tokens=tokens,
        )
        return of_model(seen.scorer.model, text, batches=budget.batches)

    def advance(done: int) -> None:
        share = _BENT_SHARE + (1 - _BENT_SHARE) * done / of_plane
        progress(share, f"point {done} of {of_plane} of the plane")

    bent, drawn, left_out = None, None, {}
    try:
        progress(_EVALUATED_SHARE, "slopes and curvatures")
        bent = bending(surface(budget.derivative_tokens), merge, points, steps=steps)
    except InputError as error:
        left_out["bending"] = str(error)
    try:
        drawn = contours(
            surface(budget.plane_tokens),
            merge,
            points,
            steps=steps,
            best=best,
            points_a_side=budget.plane_points,
            advance=advance,
        )
    except InputError as error:
        left_out["contours"] = str(error)
    return bent, drawn, left_out
