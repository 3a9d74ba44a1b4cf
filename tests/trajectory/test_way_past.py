"""Which checkpoints come before a breakaway, and from where a run is led past it."""

from pathlib import Path

from pma import trajectory
from pma.logs import Breakaway, Kind
from pma.testing import tiny_run
from pma.testing.builders import write_trainer_state
from pma.trajectory import ways_past


def breakaway(first: int, last: int, kind: Kind = Kind.COLLAPSE, every: int = 1) -> Breakaway:
    return Breakaway(
        quantity="loss",
        kind=kind,
        good_step=first - every,
        first_step=first,
        seen_step=first,
        peak_step=first,
        last_step=last,
        entries=1 + last - first,
        level=3.0,
        peak=9.0,
        size_mads=50.0,
    )


def run(folder: Path, count: int = 10) -> trajectory.Trajectory:
    """Checkpoints at 10, 20, …, of a constant rate."""
    tiny_run(folder, steps=count, shapes={"w": (2,)})
    return trajectory.discover([folder])


def steps(way: trajectory.WayPast) -> list[int | None]:
    return [point.step for point in way.checkpoints]


def test_the_newest_three_before_it(tmp_path: Path) -> None:
    (way,) = ways_past(run(tmp_path), [breakaway(75, 100)])
    assert (steps(way), way.before_step, way.reserve) == ([50, 60, 70], 74, None)


def test_a_checkpoint_of_the_last_good_step_may_be_bad_already(tmp_path: Path) -> None:
    """The loss of step 71 is the first that sees the update of step 70."""
    found = run(tmp_path)
    assert [steps(ways_past(found, [breakaway(s, 100)])[0])[-1] for s in (70, 71, 72)] == [60, 60, 70]
    # logged every five steps, the mean of steps 71 to 75 was the first to show it
    assert steps(ways_past(found, [breakaway(75, 100, every=5)])[0])[-1] == 60


def test_checkpoints_that_another_breakaway_touches_are_no_way_back(tmp_path: Path) -> None:
    found = run(tmp_path)
    spike, collapse = breakaway(65, 72, Kind.SPIKE), breakaway(85, 100)
    first, second = ways_past(found, [spike, collapse])
    assert (steps(first), first.before_step) == ([40, 50, 60], 64)
    assert (steps(second), second.before_step) == ([40, 50, 60], 64)
    blip = breakaway(70, 70, Kind.BLIP)
    assert steps(ways_past(found, [blip, collapse])[1]) == [60, 70, 80]


def test_too_few_and_none_are_said(tmp_path: Path) -> None:
    found = run(tmp_path)
    few, none = ways_past(found, [breakaway(25, 30), breakaway(5, 6)])
    assert steps(few) == [10, 20]
    assert few.reserve == "there are only 2 complete checkpoints before step 24, not 3"
    assert steps(none) == []
    assert none.reserve == "there is no complete checkpoint before step 4"


def test_a_window_across_phases_is_said(tmp_path: Path) -> None:
    rates = {s: 1e-3 if s <= 60 else 1e-4 for s in range(10, 101, 10)}
    for path in tiny_run(tmp_path, steps=10, shapes={"w": (2,)}):
        write_trainer_state(path, int(path.name.split("-")[1]), rates=rates)
    (way,) = ways_past(trajectory.discover([tmp_path]), [breakaway(75, 100)])
    assert way.reserve is not None
    assert way.reserve.startswith("the window crosses phases")
