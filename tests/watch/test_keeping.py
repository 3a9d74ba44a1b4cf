"""`--keep-window`: what the trainer removes stays, by hard links; nothing but our own links is removed."""

import os
import shutil
from pathlib import Path

import pytest

from pma import trajectory
from pma.errors import UsageError
from pma.pretraining.run_folder import newest_checkpoint
from pma.quantities import Steps
from pma.trajectory import KEPT_FOLDER, Growing
from pma.verbs import Choice, Window, average
from pma.watch import Keeper, Wanted, Watch
from pma.watch.keeping import LINKS_FILE

from .fakes import land, settle, watching


def keeping(run: Path, wanted: Wanted | None = None) -> Watch:
    run.mkdir(exist_ok=True)
    return watching(run, wanted, keeper=Keeper(run, run / KEPT_FOLDER))


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / KEPT_FOLDER).iterdir())


def rotate(run: Path, limit: int = 2) -> None:
    """As the Trainer does with save_total_limit."""
    there = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in there[:-limit]:
        shutil.rmtree(path)


def test_the_window_outlives_the_trainers_rotation(tmp_path: Path) -> None:
    watch = keeping(tmp_path, Wanted(last=4))
    for number in range(1, 8):
        land(tmp_path, 10 * number, float(number))
        settle(watch)
        rotate(tmp_path)
    assert [point.window for point in watch.history.alive][-2:] == [(30, 40, 50, 60), (40, 50, 60, 70)]
    assert watch.history.alive[-1].values["loss_merged"] == 5.5
    assert kept(tmp_path) == [f"checkpoint-{step}" for step in (40, 50, 60, 70)]
    # any command sees them
    found = trajectory.discover([tmp_path])
    assert [point.step for point in found.points] == [40, 50, 60, 70]
    assert found.left_out == ()
    tensors = average(Choice(paths=(tmp_path,), window=Window(last=4)))
    assert float(tensors["w"][0]) == 5.5


def test_pre_training_does_not_resume_from_what_is_kept(tmp_path: Path) -> None:
    watch = keeping(tmp_path)
    for number in range(1, 4):
        land(tmp_path, 10 * number, float(number))
        settle(watch)
    shutil.rmtree(tmp_path / "checkpoint-30")
    assert trajectory.discover([tmp_path]).points[-1].step == 30
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-20", 20)


def test_with_a_distance_those_between_are_kept_too(tmp_path: Path) -> None:
    watch = keeping(tmp_path, Wanted(last=3, every=Steps(20)))
    for number in range(1, 10):
        land(tmp_path, 10 * number, float(number))
        settle(watch)
        rotate(tmp_path)
    assert [point.window for point in watch.history.alive][-2:] == [(40, 60, 80), (50, 70, 90)]
    assert kept(tmp_path) == [f"checkpoint-{step}" for step in (50, 60, 70, 80, 90)]


def test_a_watch_that_is_started_again_keeps_what_is_kept(tmp_path: Path) -> None:
    for number in range(1, 5):
        land(tmp_path, 10 * number, float(number))
    settle(keeping(tmp_path, Wanted(last=4)))
    rotate(tmp_path, 1)
    again = keeping(tmp_path, Wanted(last=4))
    settle(again)
    assert kept(tmp_path) == [f"checkpoint-{step}" for step in (10, 20, 30, 40)]
    land(tmp_path, 50, 5.0)
    settle(again)
    assert again.history.alive[-1].window == (20, 30, 40, 50)


def test_what_was_written_anew_is_linked_anew(tmp_path: Path) -> None:
    watch = keeping(tmp_path)
    land(tmp_path, 10, 1.0)
    settle(watch)
    shutil.rmtree(tmp_path / "checkpoint-10")  # a trainer that starts over
    folder = land(tmp_path, 10, 5.0, logged={10: 9.0})
    settle(watch)
    link = tmp_path / KEPT_FOLDER / "checkpoint-10" / "model.safetensors"
    assert os.path.samefile(link, folder / "model.safetensors")
    assert [point.values["loss_last"] for point in watch.history.alive] == [5.0]


def test_a_dead_lineage_is_let_go_of(tmp_path: Path) -> None:
    watch = keeping(tmp_path, Wanted(last=4))
    for number in range(1, 5):
        land(tmp_path, 10 * number, float(number))
        settle(watch)
        rotate(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-40")
    land(tmp_path, 35, 9.0, logged={30: 8.0})
    settle(watch)
    assert kept(tmp_path) == ["checkpoint-10", "checkpoint-20", "checkpoint-35"]
    assert watch.history.alive[-1].window == (10, 20, 35)


def test_only_our_own_links_are_removed(tmp_path: Path) -> None:
    watch = keeping(tmp_path, Wanted(last=2))
    mine = tmp_path / KEPT_FOLDER / "checkpoint-5"
    shutil.copytree(land(tmp_path / "elsewhere", 5, 1.0), mine)
    for number in range(1, 4):
        land(tmp_path, 10 * number, float(number))
        settle(watch)
    beside = tmp_path / KEPT_FOLDER / "checkpoint-20" / "notes.txt"
    beside.write_text("of mine")
    original = tmp_path / "checkpoint-20" / "model.safetensors"
    land(tmp_path, 40, 4.0)
    settle(watch)
    assert (mine / "model.safetensors").is_file()
    assert original.is_file()
    # it is no checkpoint any more, but what somebody put into it stays
    left = tmp_path / KEPT_FOLDER / "checkpoint-20.pma-partial"
    assert [path.name for path in left.iterdir()] == ["notes.txt"]


def test_a_list_of_links_that_leads_elsewhere_removes_nothing_there(tmp_path: Path) -> None:
    watch = keeping(tmp_path, Wanted(last=1))
    precious = tmp_path / "precious"
    precious.write_text("stays")
    planted = tmp_path / KEPT_FOLDER / "checkpoint-5"
    planted.mkdir(parents=True)
    (planted / LINKS_FILE).write_text('{"links": ["../../../precious", "/etc/hostname", 7]}')
    land(tmp_path, 10, 1.0)
    settle(watch)
    assert precious.read_text() == "stays"
    assert kept(tmp_path) == ["checkpoint-10"]


def test_another_file_system_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not os.access(elsewhere, os.W_OK) or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    folder = elsewhere / f"pma-test-{os.getpid()}"
    try:
        with pytest.raises(UsageError, match=r"no hard link can be made .*Invalid cross-device link"):
            Keeper(tmp_path, folder)
    finally:
        folder.rmdir()
    assert list(tmp_path.iterdir()) == []


def test_the_optimizers_state_is_not_held_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pma.watch.keeping._LARGEST_BESIDE_BYTES", 1000)
    folder = land(tmp_path, 10, 1.0)
    (folder / "optimizer.pt").write_bytes(bytes(1001))
    (folder / "scheduler.pt").write_bytes(bytes(10))
    settle(keeping(tmp_path))
    names = {path.name for path in (tmp_path / KEPT_FOLDER / "checkpoint-10").iterdir()}
    assert {"model.safetensors", "config.json", "trainer_state.json", "scheduler.pt"} <= names
    assert "optimizer.pt" not in names


def test_a_folder_of_its_own(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    growing_from = out / "kept"
    land(run, 10, 1.0)
    watch = watching(run, growing=Growing(run, kept=growing_from), keeper=Keeper(run, growing_from))
    settle(watch)
    land(run, 20, 3.0)
    shutil.rmtree(run / "checkpoint-10")
    settle(watch)
    assert watch.history.alive[-1].values["loss_merged"] == 2.0
    assert [path.name for path in run.iterdir() if path.name != ".pma"] == ["checkpoint-20"]
