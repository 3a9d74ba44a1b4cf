"""Every built-in format from a store to a store: the same bytes as on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pma import engine, verbs
from pma.remote import location
from pma.testing import tiny_run
from pma.trajectory import Window
from pma.verbs import Choice

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def weights(seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = {"embed": (40, 16), "layer.0.w": (16, 24), "layer.0.b": (24,), "layer.1.cube": (3, 5, 7)}
    return {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}


def safetensors(folder: Path) -> None:
    tiny_run(folder, steps=3, shards=2)


def distributed(folder: Path) -> None:
    for step in (10, 20, 30):
        dcp.save(weights(step), checkpoint_id=folder / f"step-{step}", no_dist=True)


def plain_torch(folder: Path) -> None:
    for step in (10, 20, 30):
        (folder / f"step-{step}").mkdir(parents=True)
        torch.save(weights(step), folder / f"step-{step}" / "pytorch_model.bin")


def zero(stage: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from ..formats.test_deepspeed import run

        folder.mkdir()
        run(folder, stage)

    return write


WRITERS = {
    "safetensors": safetensors,
    "dcp": distributed,
    "torch": plain_torch,
    "deepspeed-1": zero(1),
    "deepspeed-3": zero(3),
}


@pytest.mark.parametrize("name", WRITERS)
def test_from_a_store_to_a_store(name: str, memory: Any, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "run")
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/run/{file.relative_to(tmp_path / 'run')}", file.read_bytes())
    checkpoints = sorted(path for path in (tmp_path / "run").iterdir() if path.is_dir())
    remote = tuple(location("memory://run") / path.name for path in checkpoints)
    here, there = tmp_path / "merged", location("memory://merged")
    verbs.merge(Choice(paths=tuple(checkpoints), as_given=True), here)
    verbs.merge(Choice(paths=remote, as_given=True), there, staging=tmp_path / "staging")
    files = {p.relative_to(here).as_posix(): p.read_bytes() for p in here.rglob("*") if p.is_file()}
    sent = {found.removeprefix("/merged/"): memory.cat_file(found) for found in memory.find("/merged")}
    assert len(files) >= 2
    assert files.keys() == sent.keys()
    for file in files.keys() - {"pma.json"}:
        assert files[file] == sent[file], file
    checked = engine.verify(there, samples=None)
    assert (checked.findings, checked.sources_changed) == ((), ())
    assert checked.blocks_derived == checked.blocks_total > 0


@pytest.mark.parametrize("name", WRITERS)
def test_runs_are_told_as_on_this_machine(name: str, memory: Any, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "run")
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/run/{file.relative_to(tmp_path / 'run')}", file.read_bytes())

    def told(run: Path) -> Any:
        choice = Choice(paths=(run,), window=Window(last=2))
        try:
            with verbs.plan(choice) as plan:
                return [(s.point.path.name, s.point.step, s.point.tokens) for s in plan.sources], plan.tensors
        except Exception as error:
            return str(error).replace(str(run), "RUN")

    assert told(location("memory://run")) == told(tmp_path / "run")


@pytest.mark.parametrize("name", WRITERS)
def test_a_diagnosis_from_a_store(name: str, memory: Any, tmp_path: Path) -> None:
    """The same inner products as on this machine; what is only carried is not read ahead and left there."""
    WRITERS[name](tmp_path / "run")
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/run/{file.relative_to(tmp_path / 'run')}", file.read_bytes())
    here, there = (
        verbs.diagnose(Choice(paths=(run,))) for run in (tmp_path / "run", location("memory://run"))
    )
    assert there.whole.path == pytest.approx(here.whole.path, rel=1e-6)
    assert there.whole.merge_norm == pytest.approx(here.whole.merge_norm, rel=1e-6)
    assert there.groups.keys() == here.groups.keys()


def test_a_conversion_with_everything_in_a_store(memory: Any, tmp_path: Path) -> None:
    from ..conversion.models import FAMILIES, source, template
    from ..conversion.trainers import random_weights, titan_shapes

    sizes = FAMILIES["llama"]
    like = template(tmp_path / "like", "llama", sizes, weights=False)
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        source(tmp_path / name, random_weights(titan_shapes(sizes, generation="0.3")))
    for file in tmp_path.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/all/{file.relative_to(tmp_path)}", file.read_bytes())

    def merge(top: Path, out: Path, **how: Any) -> None:
        choice = Choice(paths=(top / "a", top / "b"), as_given=True)
        verbs.merge(choice, out, engine.MergeOptions(like=top / like.name), **how)

    merge(tmp_path, tmp_path / "merged")
    merge(location("memory://all"), location("memory://merged"), staging=tmp_path / "staging")
    made = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert memory.cat_file("/merged/model.safetensors") == made
    assert engine.verify(location("memory://merged")).findings == ()
