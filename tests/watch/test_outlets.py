"""TensorBoard as its own reader sees it; Weights & Biases as a stand-in for its module sees it."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pma.errors import MissingExtra
from pma.watch import Point
from pma.watch.outlets import TensorBoard, WeightsAndBiases

from .fakes import land, settle, watching


def point(step: int, loss: float) -> Point:
    values = {"loss_last": loss, "loss_last_error": 0.1, "gain": 0.5, "gain_error": 0.01}
    return Point(step=step, tokens=None, checkpoint="c", mark=f"{step} {loss}", key=f"{step}", values=values)


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return {event.step: event.value for event in EventAccumulator(str(folder)).Reload().Scalars(name)}


def test_tensorboard_forgets_a_dead_lineage(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "board")
    for step in (10, 20, 30):
        board.add(point(step, step / 10))
    board.went_back(20)
    board.add(point(20, 7.0))
    board.close()
    assert scalars(tmp_path / "board", "pma/loss_last") == {10: 1.0, 20: 7.0}
    assert scalars(tmp_path / "board", "pma/gain") == {10: 0.5, 20: 0.5}


def test_tensorboard_goes_on_after_a_restart_without_duplicates(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        land(tmp_path, 10 * number, float(number))
        watch = watching(tmp_path, outlets=[TensorBoard(tmp_path / "board")])
        settle(watch)
        watch.close()
    assert scalars(tmp_path / "board", "pma/loss_last") == {10: 1.0, 20: 2.0, 30: 3.0}


def test_a_watch_that_sees_nothing_leaves_no_event_file(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "board")
    board.close()
    assert not (tmp_path / "board").exists()


def test_weights_and_biases_by_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls, not the service: what is sent, by which step, and that a restart is the same run."""
    calls: list[tuple[Any, ...]] = []

    def init(**how: Any) -> Any:
        calls.append(("init", how))
        return SimpleNamespace(
            define_metric=lambda *names, **how: calls.append(("define", *names, how)),
            log=lambda values: calls.append(("log", values)),
            finish=lambda: calls.append(("finish",)),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    ids = []
    for _ in range(2):
        sent = WeightsAndBiases("project", tmp_path / "run", "settings")
        sent.add(point(10, 2.0))
        sent.went_back(10)
        sent.close()
        ids.append(calls[0][1]["id"])
        assert calls[0][1]["resume"] == "allow"
        assert calls[1:] == [
            ("define", "step", {}),
            ("define", "pma/*", {"step_metric": "step"}),
            ("log", {"step": 10, "pma/loss_last": 2.0, "pma/gain": 0.5, "pma/gain_error": 0.01}),
            ("finish",),
        ]
        calls.clear()
    assert ids[0] == ids[1]
    WeightsAndBiases("project", tmp_path / "run", "other settings")
    assert calls[0][1]["id"] != ids[0]


def test_what_is_not_installed_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"pma-llm\[wandb\]"):
        WeightsAndBiases("project", tmp_path, "settings")
