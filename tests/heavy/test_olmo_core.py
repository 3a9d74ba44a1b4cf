"""Checkpoints that OLMo-core's own checkpointer saved: merged, loaded back by it, trained on."""

import importlib.util
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pma import engine, formats, trajectory, verbs
from pma.engine import MergeOptions
from pma.formats import dcp
from pma.testing.distributed import as_float64, flattened, load_dcp, torchrun
from pma.trajectory import Window
from pma.types import Role
from pma.verbs import Choice

FIXTURES = Path(__file__).parents[1] / "formats" / "fixtures"
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("olmo_core") is None,
        reason="OLMo-core is not installed: pip install ai2-olmo-core",
    ),
    # its own, of packages of Google's that are not needed here, among others
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::ImportWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmo")
    script = FIXTURES / "train_distributed.py"
    torchrun(script, 2, "--profile", "olmo", "--out", folder, "--steps", 2, 4)
    torchrun(script, 4, "--profile", "olmo", "--out", folder, "--steps", 6)
    return folder / "olmo"


def load_olmo(checkpoint: Path) -> dict[str, Any]:
    """By OLMo-core's own reader: torch's cannot read what it saves."""
    from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemReader

    return load_dcp(checkpoint / "model_and_optim", RemoteFileSystemReader)


def merged(paths: Sequence[Path], out: Path, **options: object) -> Path:
    found = trajectory.from_checkpoints(paths)
    with engine.plan(found.points, MergeOptions(**options)) as plan:
        engine.write(plan, out)
    return out


def test_the_run_is_found(run: Path) -> None:
    points = trajectory.discover([run]).points
    assert [(point.step, point.tokens) for point in points] == [(2, 128), (4, 256), (6, 384)]
    assert points[1].meta.learning_rate == pytest.approx(0.96e-3)
    assert points[1].meta.tokens_source == "global_train_tokens_seen in train/rank0.pt"


def test_the_merge_is_the_mean(run: Path, tmp_path: Path) -> None:
    sources = [run / f"step{step}" for step in (2, 4, 6)]
    out = merged(sources, tmp_path / "out")
    found, each = load_dcp(out / "model_and_optim"), [load_olmo(source) for source in sources]
    assert found.keys() == {"model"}
    for name, tensor in found["model"].items():
        mean = np.mean([as_float64(source["model"][name]) for source in each], axis=0)
        assert np.array_equal(mean.astype(np.float32), tensor.numpy()), name


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_olmo_core_loads_the_merge_and_trains(run: Path, tmp_path: Path, with_optimizer: bool) -> None:
    out = merged([run / f"step{step}" for step in (4, 6)], tmp_path / "out", with_optimizer=with_optimizer)
    assert (out / ".metadata.json").is_file()
    assert (out / "train/rank0.pt").is_file() == with_optimizer
    torchrun(FIXTURES / "resume_olmo.py", 2, out, tmp_path / "losses.txt")
    step, before, after = (tmp_path / "losses.txt").read_text().split()
    assert float(after) < float(before)
    assert step == ("6" if with_optimizer else "None")
    if with_optimizer:
        found, newest = (flattened(load_olmo(path)) for path in (out, run / "step6"))
        assert found.keys() == newest.keys()


def test_a_save_that_is_not_finished(run: Path, tmp_path: Path) -> None:
    out = merged([run / f"step{step}" for step in (4, 6)], tmp_path / "step9", with_optimizer=True)
    (out / "pma.json").unlink()
    assert formats.read_meta(out).incomplete is None
    (out / ".metadata.json").unlink()
    assert formats.read_meta(out).incomplete == ".metadata.json is not there yet"


def test_moments_belong_to_parameters(run: Path) -> None:
    with closing(dcp.open_reader(run / "step2")) as reader:
        moments = [spec for spec in reader.tensors.values() if spec.role is Role.MOMENT]
        assert len(moments) == 42
        assert all(reader.tensors[str(spec.parameter)].role is Role.PARAMETER for spec in moments)


@pytest.mark.parametrize("mode", ["second-moment", "reset"])
def test_olmo_core_goes_on_from_what_init_wrote(run: Path, tmp_path: Path, mode: str) -> None:
    chosen = Choice(paths=(run,), window=Window(last=3))
    made = verbs.init(chosen, tmp_path / "out", optimizer=mode)
    assert made.resume_command == f'trainer.load_checkpoint("{tmp_path / "out"}")'
    torchrun(FIXTURES / "resume_olmo.py", 2, tmp_path / "out", tmp_path / "losses.txt")
    step, before, after = (tmp_path / "losses.txt").read_text().split()
    assert step == "6"
    assert float(after) < float(before)
    found, newest = (flattened(load_olmo(path)) for path in (tmp_path / "out", run / "step6"))
    moments = [name for name in found if name.startswith("optim.state.")]
    assert len(moments) > 60
    for name in moments:
        zero = mode == "reset" or name.endswith(".exp_avg")
        assert np.array_equal(
            as_float64(found[name]), 0 * as_float64(newest[name]) if zero else as_float64(newest[name])
        ), name
