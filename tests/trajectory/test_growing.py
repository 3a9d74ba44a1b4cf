"""A trajectory that is kept up to date is the one that `discover` makes, whatever happens meanwhile."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from pma import formats, trajectory
from pma.errors import InputError
from pma.trajectory import KEPT_FOLDER, Growing, Trajectory
from pma.types import CheckpointMeta


class Trainer:
    """Writes checkpoints of no weights to speak of, with a log of loss and rate every 5 steps; its clock
    moves on with every file.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.step, self.history, self.now = run, 0, [], 10**18

    def train(self, steps: int, rate: float, lineage: int) -> None:
        for step in range(self.step + 5, self.step + steps + 1, 5):
            self.history.append({"step": step, "loss": step + lineage / 1000, "learning_rate": rate})
        self.step += steps

    def save(self) -> Path:
        folder = self.run / f"checkpoint-{self.step}"
        folder.mkdir(exist_ok=True)
        self._write(folder / "model.safetensors", "{}")
        state = {"global_step": self.step, "num_input_tokens_seen": self.step, "log_history": self.history}
        self._write(folder / "trainer_state.json", json.dumps(state))
        return folder

    def resume(self, folder: Path) -> None:
        self.step = int(folder.name.split("-")[1])
        self.history = json.loads((folder / "trainer_state.json").read_text())["log_history"]

    def _write(self, path: Path, text: str) -> None:
        self.now += 10**9
        path.write_text(text)
        os.utime(path, ns=(self.now, self.now))

    def saved(self) -> list[Path]:
        return sorted(self.run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def plain(found: Trajectory) -> list[tuple[object, ...]]:
    return [(p.path, p.step, p.tokens, p.learning_rate, p.phase) for p in found.points]


@pytest.mark.parametrize("seed", range(12))
def test_it_is_what_discover_finds(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    trainer, growing = Trainer(tmp_path), Growing(tmp_path)
    rate, lineage, landed = 1e-3, 0, 0
    for _ in range(30):
        event = chance.random()
        saved = trainer.saved()
        if event < 0.12 and len(saved) > 2:
            shutil.rmtree(saved[0])
        elif event < 0.2 and len(saved) > 1:
            lineage += 1
            trainer.resume(chance.choice(saved))
        elif event < 0.3:
            rate = chance.choice([1e-3, 5e-4])
        else:
            trainer.train(chance.choice([10, 20]), rate, lineage)
            trainer.save()
        if chance.random() < 0.7 and trainer.saved():
            looked = growing.look()
            landed += len(looked.landed)
            assert plain(looked.trajectory) == plain(trajectory.discover([tmp_path]))
            assert looked.trajectory.log == trajectory.discover([tmp_path]).log
            assert all(not p.meta.log.losses for p in looked.trajectory.points[:-1])
    assert landed > 10


def test_records_of_complete_checkpoints_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    read_meta = formats.read_meta

    def counted(path: Path) -> CheckpointMeta:
        read.append(path.name)
        return read_meta(path)

    monkeypatch.setattr(formats, "read_meta", counted)
    trainer = Trainer(tmp_path)
    for _ in range(3):
        trainer.train(10, 1e-3, 0)
        trainer.save()
    (tmp_path / "checkpoint-40").mkdir()
    growing = Growing(tmp_path)
    assert [point.step for point in growing.look().landed] == [10, 20, 30]
    for _ in range(3):
        assert growing.look().landed == ()
    assert sorted(read) == ["checkpoint-10", "checkpoint-20", "checkpoint-30", "checkpoint-40"]
    trainer.train(10, 1e-3, 0)
    trainer.save()
    assert [point.step for point in growing.look().landed] == [40]
    assert sorted(read)[3:] == ["checkpoint-40", "checkpoint-40"]


def test_a_file_that_comes_later_does_not_make_a_checkpoint_new(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.train(10, 1e-3, 0)
    folder = trainer.save()
    growing = Growing(tmp_path)
    growing.look()
    before = growing.mark(folder)
    (folder / "pma_interval_mean.safetensors").write_text("")
    assert growing.look().landed == ()
    assert growing.mark(folder) == before
    trainer.save()
    assert [point.path for point in growing.look().landed] == [folder]


def test_what_is_not_complete_is_waited_for(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.train(10, 1e-3, 0)
    folder = trainer.save()
    (folder / "trainer_state.json").rename(tmp_path / "later")
    growing = Growing(tmp_path)
    assert "not there yet" in growing.look().waiting[0][1]
    (tmp_path / "later").rename(folder / "trainer_state.json")
    assert [point.path for point in growing.look().landed] == [folder]
    (folder / "trainer_state.json").unlink()  # as when it is being removed, or written anew
    looked = growing.look()
    assert looked.trajectory.points == ()
    assert [path for path, _ in looked.waiting] == [folder]


def test_what_is_kept_stands_in_for_what_the_trainer_removed(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    for _ in range(3):
        trainer.train(10, 1e-3, 0)
        trainer.save()
    growing = Growing(tmp_path)
    growing.look()
    kept = tmp_path / KEPT_FOLDER / "checkpoint-10"
    kept.mkdir(parents=True)
    for file in (tmp_path / "checkpoint-10").iterdir():
        os.link(file, kept / file.name)
    assert growing.look().landed == ()
    shutil.rmtree(tmp_path / "checkpoint-10")
    looked = growing.look()
    assert looked.landed == ()
    assert looked.trajectory.points[0].path == kept
    assert plain(looked.trajectory) == plain(trajectory.discover([tmp_path]))
    # the trainer went back: what is kept of the dead lineage is left out by its log, as any other
    trainer.resume(tmp_path / "checkpoint-20")
    trainer.train(5, 1e-3, 1)
    trainer.save()
    shutil.rmtree(tmp_path / "checkpoint-30")
    assert [point.step for point in growing.look().trajectory.points] == [10, 20, 25]


def test_a_run_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        Growing(tmp_path / "missing")
    assert Growing(tmp_path).look().trajectory.points == ()


def test_names_by_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt_7"
    folder.mkdir()
    (folder / "model.safetensors").write_text("{}")
    (tmp_path / "other_8").mkdir()
    looked = Growing(tmp_path, r"ckpt_(?P<step>\d+)").look()
    assert [(point.path, point.step) for point in looked.landed] == [(folder, 7)]
