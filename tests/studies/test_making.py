"""What studies share is made once, whoever asks, and goes on where it was stopped."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from concurrent.futures import Executor
from pathlib import Path

import pytest

from pma.errors import InputError, Interrupted, UsageError
from pma.studies import making, presets
from pma.studies.catalogue import STUDIES, study
from pma.studies.data import Data, Text, find_data
from pma.studies.lab import Lab
from pma.studies.making import Made, Trunk, ensure
from pma.studies.workers import pool

sys.path.insert(0, str(Path(__file__).parent))  # processes that are spawned find it there too
from noted import Noted


def lab(home: Path, workers: Executor) -> Lab:
    data = Data(text=Text.of(()), other_domain=Text.of(()), instructions=Text.of(()), tasks=())
    return Lab(home=home, preset=presets.preset("toy"), data=data, seeds=(0, 1), workers=workers)


def times(made: Made, home: Path) -> int:
    return len((made.folder(home) / "times").read_text().splitlines())


def test_made_once_for_several_processes_at_once(tmp_path: Path) -> None:
    one = Noted(name="one")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.starmap(ensure, [(one, tmp_path)] * 6)
    assert times(one, tmp_path) == 1


def test_a_failure_leaves_it_unmade_and_its_time_counts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it fails"):
        ensure(Noted(name="one", fails=True), tmp_path)
    one = Noted(name="one")
    assert making.seconds(one, tmp_path) is None
    ensure(one, tmp_path)
    assert times(one, tmp_path) == 2
    assert (making.seconds(one, tmp_path) or 0) >= 0.1  # of both attempts


def test_needs_are_made_first_and_shared(tmp_path: Path) -> None:
    root = Noted(name="root")
    branches = [Noted(name=f"branch {i}", after=(root,)) for i in range(3)]
    with pool(2) as workers:
        here = lab(tmp_path, workers)
        here.make([*branches, root])
    assert times(root, tmp_path) == 1
    assert all(times(branch, tmp_path) == 1 for branch in branches)
    assert set(here.used) == {made.folder(tmp_path) for made in (root, *branches)}
    assert all(seconds > 0 for seconds in here.used.values())


def test_past_the_deadline_training_stops_and_goes_on(tmp_path: Path) -> None:
    size = presets.preset("toy").sizes[0]
    folder = tmp_path / "text"
    folder.mkdir()
    words = "\n<|endoftext|>\n".join(f"document {i} " + f"word{i} and " * 40 for i in range(120))
    (folder / "text.txt").write_text(words)
    trunk = Trunk(recipe=size.at(1e-3, 0), text=Text.of([folder / "text.txt"]))
    ensure(trunk.needs()[0], tmp_path)
    with pytest.raises(Interrupted):
        ensure(trunk, tmp_path, deadline=time.time() - 1)
    assert making.seconds(trunk, tmp_path) is None
    ensure(trunk, tmp_path, deadline=time.time() + 600)
    assert trunk.checkpoint(tmp_path, presets.preset("toy").steps).is_dir()


def test_the_same_text_elsewhere_is_the_same_run(tmp_path: Path) -> None:
    size = presets.preset("toy").sizes[0]
    trunks = []
    for name in ("here", "there"):
        path = tmp_path / name / "text.txt"
        path.parent.mkdir()
        path.write_text("some text")
        trunks.append(Trunk(recipe=size.at(1e-3, 0), text=Text.of([path])))
    assert trunks[0] == trunks[1]
    assert trunks[0].folder(tmp_path) == trunks[1].folder(tmp_path)
    assert Trunk(recipe=size.at(2e-3, 0), text=trunks[0].text) != trunks[0]


def test_data_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"corpus_small.txt.xz is missing"):
        find_data(tmp_path, "corpus_small.txt.xz", (), tmp_path)


def test_without_data_there_are_instructions_and_another_domain(tmp_path: Path) -> None:
    data = find_data(None, "", ("blimp",), tmp_path)
    rows = [json.loads(line) for line in data.instructions.paths[0].read_text().splitlines()]
    assert len(rows) > 500
    assert all(row["prompt"].startswith("def ") and row["response"] for row in rows)
    assert "The" in data.other_domain.paths[0].read_text()
    assert data.tasks == ()
    assert data.text.paths == ()


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_fit_together(name: str) -> None:
    preset = presets.preset(name)
    for size in preset.sizes:
        assert list(size.rates) == sorted(size.rates)
        assert size.recipe.steps_for(size.recipe.run.tokens) == preset.steps
    for step in (*preset.fork_steps, *preset.stages):
        assert step % preset.every_steps == 0
    assert preset.fork_steps[-1] + preset.anneal_steps == preset.steps
    for family in (presets.DENSE, presets.MIXTURE):
        assert len(preset.of(family)) >= 3
    assert {preset.size(middle).family for middle in preset.middle} == {presets.DENSE, presets.MIXTURE}


def test_wrong_names_are_refused() -> None:
    with pytest.raises(UsageError, match="cpu, gpu, toy"):
        presets.preset("tpu")
    with pytest.raises(UsageError, match="fig1, fig2"):
        study("fig99")
    assert len({each.name for each in STUDIES}) == len(STUDIES)
