"""The watch: what lands is evaluated once, whatever trainers do meanwhile. Losses are plain arithmetic."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pma import watch as watch_room
from pma.errors import InputError, UsageError
from pma.quantities import Steps
from pma.results import Store
from pma.sweeping import Grid, evaluate, planned
from pma.watch import Judge, State, Wanted

from .fakes import judge, land, settle, steps, watching, write_weights


def test_each_checkpoint_gets_a_point_as_it_lands(tmp_path: Path) -> None:
    watch = watching(tmp_path)
    settle(watch)
    assert watch.history.alive == []
    for number, loss in enumerate([8.0, 4.0, 2.0, 1.0], start=1):
        land(tmp_path, 10 * number, loss)
        settle(watch)
        assert watch.history.alive[-1].step == 10 * number
    first, second, third, fourth = watch.history.alive
    assert (first.window, first.values) == (
        (),
        {"loss_last": 8.0, "loss_last_error": pytest.approx(0.144, abs=1e-3)},
    )
    assert first.note is not None
    assert "no merge" in first.note
    assert (second.window, second.values["loss_merged"]) == ((10, 20), 6.0)
    assert second.note is not None
    assert "2 of 3 checkpoints" in second.note
    assert (third.window, third.note) == ((10, 20, 30), None)
    assert fourth.values["loss_merged"] == pytest.approx(7 / 3, rel=1e-6)
    assert fourth.values["gain"] == pytest.approx(1 - 7 / 3, rel=1e-6)
    assert fourth.values["gain_error"] == pytest.approx(0, abs=1e-6)
    assert fourth.tokens == 4000


def test_a_trainer_that_writes_slowly_is_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    watch = watching(tmp_path, say=said.append)
    folder = write_weights(tmp_path, 10, 1.0)
    settle(watch)
    (folder / "trainer_state.json").write_text('{"global_step": 10, "log_hist')
    settle(watch)
    assert watch.history.alive == []
    assert [words for words in said if "trainer_state.json is not there yet" in words]
    assert [words for words in said if "being written, or damaged" in words]
    land(tmp_path, 10, 1.0)
    settle(watch)
    assert steps(watch.history.alive) == [10]


def test_weights_that_are_cut_short_are_waited_for(tmp_path: Path) -> None:
    """As with a trainer whose record does not come last."""
    folder = land(tmp_path, 10, 1.0)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4])
    watch = watching(tmp_path)
    settle(watch)
    settle(watch)
    assert watch.history.alive == []
    (folder / "model.safetensors").write_bytes(whole)
    settle(watch)
    assert steps(watch.history.alive) == [10]


def test_a_watch_that_is_started_again_goes_on(tmp_path: Path) -> None:
    seen: list[str] = []
    for number in (1, 2, 3):
        land(tmp_path, 10 * number, float(number))
    first = watching(tmp_path, judge=judge(seen))
    assert first.look()  # stopped after one
    assert steps(first.history.alive) == [30]
    again = watching(tmp_path, judge=judge(seen))
    settle(again)
    count = len(seen)
    assert steps(again.history.alive) == [10, 20, 30]
    assert steps(again.added) == [20, 10]
    shutil.rmtree(tmp_path / "checkpoint-10")
    third = watching(tmp_path, judge=judge(seen))
    settle(third)
    assert third.history.alive == again.history.alive
    assert (third.added, len(seen)) == ([], count)


def test_what_lands_does_not_wait_for_what_was_there(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        land(tmp_path, 10 * number, float(number))
    watch = watching(tmp_path)
    watch.look()
    land(tmp_path, 40, 4.0)
    watch.look()
    assert steps(watch.added) == [30, 40]
    settle(watch)
    assert steps(watch.added) == [30, 40, 20, 10]


def test_results_are_those_of_a_sweep(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        land(tmp_path, 10 * number, float(number))
    seen: list[str] = []
    watch = watching(tmp_path, judge=judge(seen))
    settle(watch)
    known = len(seen)
    given = judge(seen)
    with planned([tmp_path], Grid(lasts=(3,)), watch.wanted.options) as sweep:
        _, from_store = evaluate(sweep, given.measures, watch.store, load=given.load)
    assert (from_store, len(seen)) == (2, known)


@pytest.mark.parametrize("scheme", ["wma", "ema:0.2", "ema-normalized:0.2", "linear", "cosine:0.1", "1-sqrt"])
def test_the_raw_checkpoint_is_raw_by_any_scheme(tmp_path: Path, scheme: str) -> None:
    for number, loss in enumerate([4.0, 2.0, 1.0], start=1):
        land(tmp_path, 10 * number, loss)
    watch = watching(tmp_path, Wanted(last=3, scheme=scheme))
    settle(watch)
    assert [point.values["loss_last"] for point in watch.history.alive] == [4.0, 2.0, 1.0]
    assert watch.history.alive[-1].values["loss_merged"] not in (1.0, 7 / 3)


def test_windows_do_not_cross_phases(tmp_path: Path) -> None:
    """Two of warmup, three stable, two of decay: each window stays in its phase."""
    rates = {10: 4e-4, 20: 8e-4, 60: 5e-4, 70: 2e-4}
    watch = watching(tmp_path)
    for number in range(1, 8):
        land(tmp_path, 10 * number, float(number), rates=rates)
        settle(watch)
    windows = {point.step: point.window for point in watch.history.alive}
    # at 30 and 60 the log does not tell yet whether the rate stays
    assert windows[40] == (30, 40)
    assert windows[50] == (30, 40, 50)
    assert windows[60] == ()
    assert windows[70] == (60, 70)
    note = next(point.note for point in watch.history.alive if point.step == 60)
    assert note is not None
    assert "crosses phases" in note


def test_every_and_each_nth(tmp_path: Path) -> None:
    watch = watching(tmp_path, Wanted(last=3, every=Steps(20)), each=2)
    for number in range(1, 8):
        land(tmp_path, 10 * number, float(number))
        settle(watch)
    assert [(p.step, p.window) for p in watch.history.alive] == [
        (10, ()),
        (30, (10, 30)),
        (50, (10, 30, 50)),
        (70, (30, 50, 70)),
    ]


@pytest.mark.parametrize("moment", ["before it is opened", "while it is read"])
def test_a_checkpoint_that_vanishes_while_it_is_merged(tmp_path: Path, moment: str) -> None:
    """The trainer removes the window's oldest: it is merged without."""
    land(tmp_path, 10, 8.0)
    land(tmp_path, 20, 4.0)
    said: list[str] = []

    def load(tensors: Any, like: Path, *, context_tokens: int | None) -> Any:
        if moment == "while it is read" and like.name == "checkpoint-30":
            shutil.rmtree(tmp_path / "checkpoint-10", ignore_errors=True)
        return tensors

    watch = watching(tmp_path, judge=Judge(measures=judge().measures, load=load), say=said.append)
    settle(watch)
    land(tmp_path, 30, 2.0)
    looked = watch.growing.look

    def rotated() -> Any:
        found = looked()
        if moment == "before it is opened" and found.landed:
            shutil.rmtree(tmp_path / "checkpoint-10")
        return found

    watch.growing.look = rotated  # type: ignore[method-assign]
    settle(watch)
    assert watch.history.alive[-1].window == (20, 30)
    assert watch.history.alive[-1].values["loss_merged"] == 3.0
    assert any("checkpoint-10 is left out, as it vanished" in words for words in said)


def test_one_that_is_written_anew_while_it_is_merged(tmp_path: Path) -> None:
    land(tmp_path, 10, 8.0)
    land(tmp_path, 20, 2.0)
    times = []

    def load(tensors: Any, like: Path, *, context_tokens: int | None) -> Any:
        times.append(1)
        if len(times) == 1:  # the raw checkpoint; the merge was read too, and comes next
            time.sleep(0.01)
            land(tmp_path, 10, 4.0)
        return tensors

    watch = watching(tmp_path, judge=Judge(measures=judge().measures, load=load))
    settle(watch)
    last = watch.history.alive[-1]
    assert (last.window, last.values["loss_merged"]) == ((10, 20), 3.0)
    # nothing was kept under the name of a merge with what was there before
    losses = [sum(row.result["raw"]["nats"]) / 3 for row in watch.store.rows("fake")]
    assert sorted(losses) == [2.0, 3.0, 4.0]


def test_the_newest_vanishes(tmp_path: Path) -> None:
    land(tmp_path, 10, 8.0)
    watch = watching(tmp_path)
    settle(watch)
    land(tmp_path, 20, 4.0)
    looked = watch.growing.look

    def rotated() -> Any:
        found = looked()
        if found.landed:
            shutil.rmtree(tmp_path / "checkpoint-20")
        return found

    watch.growing.look = rotated  # type: ignore[method-assign]
    settle(watch)
    settle(watch)
    assert steps(watch.history.alive) == [10]
    watch.growing.look = looked  # type: ignore[method-assign]
    land(tmp_path, 30, 2.0)
    settle(watch)
    assert watch.history.alive[-1].window == (10, 30)


def test_rotation_does_not_take_points_away(tmp_path: Path) -> None:
    watch = watching(tmp_path)
    for number in range(1, 6):
        land(tmp_path, 10 * number, float(number))
        if number > 2:
            shutil.rmtree(tmp_path / f"checkpoint-{10 * (number - 2)}")
        settle(watch)
    assert [(p.step, p.window) for p in watch.history.alive][2:] == [
        (30, (20, 30)),
        (40, (30, 40)),
        (50, (40, 50)),
    ]


def crashed_and_resumed(run: Path, watch: watch_room.Watch, *, rotate: bool) -> None:
    """Steps 10 to 40; resumed from 20 with other losses, over 30 and 40 in place, to 50."""
    for number in range(1, 5):
        land(run, 10 * number, float(number))
        settle(watch)
    if rotate:
        shutil.rmtree(run / "checkpoint-10"), shutil.rmtree(run / "checkpoint-20")
        shutil.rmtree(run / "checkpoint-40")
    for step in (30, 40, 50):
        time.sleep(0.01)
        land(run, step, step / 2, logged={30: 9.0, 40: 9.0, 50: 9.0})
        settle(watch)


@pytest.mark.parametrize("rotate", [False, True])
def test_a_trainer_that_crashes_and_resumes(tmp_path: Path, *, rotate: bool) -> None:
    went_back: list[int] = []

    class Outlet:
        def add(self, point: object) -> None: ...

        def went_back(self, step: int) -> None:
            went_back.append(step)

        def close(self) -> None: ...

    watch = watching(tmp_path, outlets=[Outlet()])
    crashed_and_resumed(tmp_path, watch, rotate=rotate)
    alive = {point.step: point.values["loss_last"] for point in watch.history.alive}
    assert alive == {10: 1.0, 20: 2.0, 30: 15.0, 40: 20.0, 50: 25.0}
    assert {point.step: point.values["loss_last"] for point in watch.history.abandoned} == {30: 3.0, 40: 4.0}
    assert went_back == [30]
    again = watching(tmp_path)
    settle(again)
    assert again.history.alive == watch.history.alive
    assert again.history.abandoned == watch.history.abandoned


@pytest.mark.parametrize("watched", [True, False])
def test_a_restart_that_saves_at_other_steps(tmp_path: Path, *, watched: bool) -> None:
    """Resumed from 20, which is gone by then, and saved at 35: 30 is dead too, and only its log says so. Also
    where nobody watched meanwhile.
    """
    watch = watching(tmp_path)
    for number in range(1, 5):
        land(tmp_path, 10 * number, float(number))
        settle(watch)
    for number in range(1, 5):
        shutil.rmtree(tmp_path / f"checkpoint-{10 * number}")
    land(tmp_path, 35, 7.0, logged={30: 9.0})
    if not watched:
        watch = watching(tmp_path)
    settle(watch)
    assert steps(watch.history.alive) == [10, 20, 35]
    assert steps(watch.history.abandoned) == [30, 40]


def test_a_merge_that_cannot_be_made_leaves_the_raw_point(tmp_path: Path) -> None:
    land(tmp_path, 10, float("nan"))
    watch = watching(tmp_path, clock=lambda: 0.0)
    settle(watch)
    land(tmp_path, 20, 2.0)
    settle(watch)
    [point] = watch.history.alive
    assert (point.step, point.window, point.values["loss_last"]) == (20, (), 2.0)
    assert point.note is not None
    assert "no merge: " in point.note
    assert "every value must be finite" in point.note


def test_one_that_cannot_be_evaluated_is_given_up_after_three_attempts(tmp_path: Path) -> None:
    now, said = [0.0], []
    land(tmp_path, 10, float("nan"))
    watch = watching(tmp_path, clock=lambda: now[0], say=said.append)
    for _ in range(10):
        settle(watch)
        now[0] += 100
    assert len([words for words in said if "step 10 was not evaluated" in words]) == 3
    assert "given up" in said[-1]


def test_what_would_fail_with_every_checkpoint_ends_the_watch(tmp_path: Path) -> None:
    land(tmp_path, 10, 1.0)

    def load(tensors: Any, like: Path, *, context_tokens: int | None) -> Any:
        raise InputError("no such configuration")

    watch = watching(tmp_path, judge=Judge(measures=judge().measures, load=load))
    with pytest.raises(InputError, match="no such configuration"):
        watch.look()


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--last 0"):
        Wanted(last=0)
    with pytest.raises(UsageError, match="best"):
        Wanted(scheme="best")
    with pytest.raises(InputError, match="is no folder"):
        watching(tmp_path / "missing")


class Pages:
    """Remembers what was shown."""

    def __init__(self) -> None:
        self.states: list[State] = []

    def show(self, state: State) -> None:
        self.states.append(state)


def test_the_page_is_written_with_news_and_at_the_end(tmp_path: Path) -> None:
    pages, sleeps = Pages(), []
    watch = watching(tmp_path, page=pages, clock=lambda: 7.0 * len(sleeps))

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 2:
            land(tmp_path, 10, 1.0)
        if len(sleeps) == 6:
            raise KeyboardInterrupt

    assert watch_room.run(watch, poll_seconds=7, once=False, sleep=sleep)
    assert sleeps == [7] * 6
    shown = [(len(state.points), state.live) for state in pages.states]
    assert shown == [(0, True), (1, True), (1, False)]


def test_once_ends_by_itself(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        land(tmp_path, 10 * number, float(number))
    watch = watching(tmp_path)
    assert not watch_room.run(watch, poll_seconds=1, once=True, sleep=lambda seconds: None)
    assert steps(watch.history.alive) == [10, 20, 30]


def test_a_store_of_another_settings_is_not_mixed_in(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        land(tmp_path, 10 * number, float(number))
    settle(watching(tmp_path))
    other = watching(tmp_path, Wanted(last=2))
    assert other.history.alive == []
    settle(other)
    assert [point.window for point in other.history.alive] == [(), (10, 20), (20, 30)]


def test_a_damaged_point_in_the_store_is_an_error(tmp_path: Path) -> None:
    watch = watching(tmp_path)
    land(tmp_path, 10, 1.0)
    settle(watch)
    [point] = watch.history.alive
    key = watch_room.settings_key(watch.wanted, watch.judge)
    with Store(tmp_path / "other.sqlite") as store:
        store.put(point.key, key, merge={}, result={**point.to_json(), "window": "ten"})
        with pytest.raises(InputError, match="cannot be read"):
            watching(tmp_path, store=store)
