"""A run's own training log: found, read, and which one was taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pma import formats
from pma.errors import FormatError, InputError, UsageError
from pma.formats.hf_trainer import STATE_FILE
from pma.logs.curves import Row, TrainingCurves, collect, recognised
from pma.logs.event_files import NAME as EVENTS_NAME
from pma.logs.event_files import event_rows
from pma.logs.rows import Notes, column_names, csv_rows, json_rows, trainer_state_rows

_TABLES: Mapping[str, Callable[[Path, Notes], Iterable[Row]]] = {
    ".csv": csv_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
}
_DEEPEST = 4
_MOST_FILES = 10_000
_HEAD_BYTES = 64 * 2**10

Names = Mapping[str, str] | None


def read(path: Path, *, names: Names = None) -> TrainingCurves:
    """Loss, gradient norm and learning rate by step from a log, a checkpoint, or the folder of a run.

    A log is a `trainer_state.json`, a TensorBoard event file or a folder of them, JSON lines, or CSV. Of
    several logs in a run's folder that which reaches furthest is taken. `names`: what columns are called,
    by "step", "loss", "grad_norm", "learning_rate", where it is not as usual.

    Raises InputError where there is no log, FormatError where it is damaged or has no loss, MissingExtra for
    event files without TensorBoard.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a training log, a checkpoint or a run")
    if not path.is_dir():
        return _read_file(path, names)
    if (path / STATE_FILE).is_file() and not _states_below(path):
        return _read_file(path / STATE_FILE, names)
    return _furthest(path, names)


def _read_file(path: Path, names: Names) -> TrainingCurves:
    notes: Notes = []
    if path.name == STATE_FILE or path.suffix == ".json":
        curves = collect(trainer_state_rows(path), (path,), names=names, exact=True)
    elif path.name.startswith(EVENTS_NAME):
        curves = collect(event_rows([path], notes), (path,), names=names)
    elif path.suffix in _TABLES:
        curves = collect(_TABLES[path.suffix](path, notes), (path,), names=names)
    else:
        raise UsageError(
            f"{path} is no log of a kind that is known; there are {STATE_FILE}, {EVENTS_NAME}…, "
            f"{', '.join(f'*{suffix}' for suffix in _TABLES)}"
        )
    return replace(curves, notes=(*notes, *curves.notes))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The logs in a run's folder."""

    states: tuple[Path, ...]
    events: tuple[Path, ...]
    tables: tuple[Path, ...]


def _furthest(run: Path, names: Names) -> TrainingCurves:
    """The curves of the log that reaches the highest step; on a tie, that of the checkpoints."""
    found = _find(run)
    read_any: list[TrainingCurves] = []
    failures: list[InputError | UsageError] = []
    attempts: list[Callable[[], TrainingCurves]] = []
    if found.states:
        attempts.append(lambda: _newest_state(found.states, names))
    if found.events:
        attempts.append(lambda: _read_events(found.events, names))
    attempts.extend(lambda table=table: _read_file(table, names) for table in found.tables)  # type: ignore[misc]
    for attempt in attempts:
        try:
            read_any.append(attempt())
        except (InputError, UsageError) as error:
            failures.append(error)
    if not read_any:
        if failures:
            raise failures[0]
        raise InputError(
            f"{run} holds no training log: looked for {STATE_FILE} in checkpoints, {EVENTS_NAME}…, "
            f"{', '.join(f'*{suffix}' for suffix in _TABLES)} with a step and a loss. Name the log itself"
        )
    taken = max(read_any, key=lambda curves: int(curves.steps[-1]))  # the first of those that reach as far
    notes = [f"not read: {error}" for error in failures]
    others = [c for c in read_any if c is not taken]
    notes += [
        f"{_named(c.sources)} reaches step {int(c.steps[-1])} only"
        for c in others
        if c.steps[-1] < taken.steps[-1]
    ]
    return replace(taken, notes=(*taken.notes, *notes))


def _named(sources: Sequence[Path]) -> str:
    return str(sources[0]) + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")


def _read_events(paths: Sequence[Path], names: Names) -> TrainingCurves:
    notes: Notes = []
    curves = collect(event_rows(paths, notes), tuple(paths), names=names)
    return replace(curves, notes=(*notes, *curves.notes))


def _states_below(run: Path) -> list[Path]:
    """The Trainer's states in the checkpoints of a run, the highest step first."""
    named = [(formats.named_step(path.name), path / STATE_FILE) for path in run.iterdir()]
    there = [(step, state) for step, state in named if step is not None and state.is_file()]
    return [state for _, state in sorted(there, key=lambda item: item[0], reverse=True)]


def _newest_state(states: Sequence[Path], names: Names) -> TrainingCurves:
    """The log of the run's head: of the highest step, or of what was written last if the two contradict each
    other, which is a restart that is not yet that far.

    A state that is being written, or damaged, is passed over.
    """
    notes: list[str] = []
    latest = max(states, key=lambda state: state.stat().st_mtime_ns)
    highest = _first_whole(states, names, notes)
    if latest == highest.sources[0] or latest.stat().st_mtime_ns <= highest.sources[0].stat().st_mtime_ns:
        return replace(highest, notes=(*highest.notes, *notes))
    try:
        written_last = _read_file(latest, names)
    except FormatError:
        return replace(highest, notes=(*highest.notes, *notes))
    if not _contradict(highest, written_last):
        return replace(highest, notes=(*highest.notes, *notes))
    notes.append(f"{highest.sources[0].parent.name} is of a lineage that was restarted, and was left out")
    return replace(written_last, notes=(*written_last.notes, *notes))


def _first_whole(states: Sequence[Path], names: Names, notes: Notes) -> TrainingCurves:
    failure: FormatError | None = None
    for state in states:
        try:
            return _read_file(state, names)
        except FormatError as error:
            failure = failure or error
            notes.append(f"passed over: {error}")
    assert failure is not None
    raise failure


def _contradict(one: TrainingCurves, other: TrainingCurves) -> bool:
    """Whether the two logged another loss at the same step (NaN equals NaN)."""
    mine, theirs = (dict(zip(*map(list, c.series("loss")), strict=True)) for c in (one, other))
    return any(str(mine[step]) != str(theirs[step]) for step in mine.keys() & theirs.keys())


def _find(run: Path) -> _Found:
    states = _states_below(run)
    if (run / STATE_FILE).is_file():
        states.append(run / STATE_FILE)  # the Trainer's at the end of training
    files = list(_files_below(run, _DEEPEST))
    return _Found(
        states=tuple(states),
        events=tuple(path for path in files if path.name.startswith(EVENTS_NAME)),
        tables=tuple(path for path in files if path.suffix in _TABLES and _is_log(path)),
    )


def _files_below(folder: Path, deepest: int) -> Iterator[Path]:
    """Files that may be logs, not those in checkpoints and hidden folders; the first thousands of a huge
    folder.
    """
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in entries[:_MOST_FILES]:
        if path.is_dir():
            if deepest > 1 and formats.named_step(path.name) is None:
                yield from _files_below(path, deepest - 1)
        elif path.suffix in _TABLES or path.name.startswith(EVENTS_NAME):
            yield path


def _is_log(path: Path) -> bool:
    """Whether the first lines name a step and a loss; a run's folder may hold tables of other things."""
    if not isinstance(path, type(Path())):
        return False  # not worth a download
    with path.open("rb") as file:
        return recognised(column_names(path, file.read(_HEAD_BYTES)))
