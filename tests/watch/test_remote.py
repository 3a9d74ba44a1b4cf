"""A run in a store is watched through its listings; here the store is memory."""

from pathlib import Path

import fsspec
import pytest

from pma.errors import UsageError
from pma.remote import location, store
from pma.results import Store
from pma.trajectory import Growing
from pma.watch import Keeper, Wanted

from .fakes import land, settle, steps, watching


def test_a_run_in_a_store_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_LISTING_SECONDS", 0.0)
    memory = fsspec.filesystem("memory")
    place = f"watch-{tmp_path.name}/run"
    run = location(f"memory://{place}")

    def send(folder: Path, *, without: str = "") -> None:
        for file in folder.iterdir():
            if file.name != without:
                memory.pipe(f"/{place}/{folder.name}/{file.name}", file.read_bytes())

    send(land(tmp_path, 10, 4.0))
    results = Store(tmp_path / "results.sqlite")
    watch = watching(run, Wanted(last=2), growing=Growing(run), store=results)
    settle(watch)
    assert steps(watch.history.alive) == [10]
    send(land(tmp_path, 20, 2.0), without="trainer_state.json")
    settle(watch)
    assert steps(watch.history.alive) == [10]
    send(tmp_path / "checkpoint-20")
    settle(watch)
    assert [(p.step, p.values.get("loss_merged")) for p in watch.history.alive] == [(10, None), (20, 3.0)]
    memory.rm(f"/{place}/checkpoint-10", recursive=True)
    send(land(tmp_path, 30, 1.0))
    settle(watch)
    assert watch.history.alive[-1].window == (20, 30)
    with pytest.raises(UsageError, match="which the store of"):
        Keeper(run, tmp_path / "kept")
