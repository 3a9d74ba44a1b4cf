"""Checkpoints that megatron-core 0.16.1 saved: merged, loaded by it on other numbers of ranks, trained on."""

import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from pma import engine, formats, trajectory
from pma.engine import MergeOptions
from pma.errors import FormatError, InputError
from pma.formats import megatron
from pma.testing.contracts import read_whole
from pma.testing.distributed import as_float64, load_dcp, torchrun
from pma.types import Role

FIXTURES = Path(__file__).parents[1] / "formats" / "fixtures"
TRAINING = Path(__file__).with_name("megatron_fixture.py")
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None,
        reason="megatron-core is not installed: pip install 'megatron-core==0.16.1'",
    ),
    pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "run"
    torchrun(FIXTURES / "save_megatron.py", 2, "--out", folder, "--steps", 10, 20, 30)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of megatron-core's own GPT and optimizer, two ranks of tensor parallelism."""
    folder = tmp_path_factory.mktemp("megatron-trained") / "run"
    torchrun(TRAINING, 2, "train", folder, 2, 4, 6)
    return folder


def merged(paths: Sequence[Path], out: Path, **options: object) -> Path:
    found = trajectory.from_checkpoints(paths)
    with engine.plan(found.points, MergeOptions(**options)) as plan:
        engine.write(plan, out)
    return out


def test_the_run_is_found(run: Path) -> None:
    found = trajectory.discover([run])
    assert [(point.step, point.tokens) for point in found.points] == [(s, s * 4 * 128) for s in (10, 20, 30)]
    meta = found.points[0].meta
    assert meta.learning_rate == 2e-4
    assert meta.tokens_source == "consumed_train_samples × seq_length"


def test_megatron_loads_the_merge_on_four_ranks(run: Path, tmp_path: Path) -> None:
    out = merged([run / f"iter_{step:07}" for step in (10, 20, 30)], tmp_path / "out")
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "30"
    torchrun(FIXTURES / "load_megatron.py", 4, out / "iter_0000030", 10, 20, 30)


@pytest.mark.parametrize("with_optimizer", [False, True])
@pytest.mark.parametrize("ranks", [2, 1])
def test_megatron_trains_on_from_a_merge(
    trained: Path, tmp_path: Path, ranks: int, with_optimizer: bool
) -> None:
    """The loss is that of weights averaged in fp64, and a step of Megatron's own optimizer lowers it."""
    sources = [trained / f"iter_{step:07}" for step in (2, 4, 6)]
    out = merged(sources, tmp_path / "out", with_optimizer=with_optimizer)
    torchrun(TRAINING, ranks, "resume", tmp_path / "told.json", out / "iter_0000006", *sources)
    every = json.loads((tmp_path / "told.json").read_text())
    assert len(every) == ranks
    for told in every:
        assert (told["iteration"], told["carried"]) == (6, with_optimizer)
        assert told["moments"] == [True] * (30 if with_optimizer else 0)
        assert told["equal"]
        assert told["loss"] == told["expected_loss"] == told["step_loss"]
        assert told["loss"] not in told["source_losses"]
        assert told["moved"] == told["parameters"] == 15
        assert told["loss_after"] < told["loss"] < told["loss_after"] + 0.5


def test_the_merge_is_a_checkpoint_again(run: Path, tmp_path: Path) -> None:
    out = merged([run / f"iter_{step:07}" for step in (10, 20)], tmp_path / "out")
    assert formats.read_meta(out).step == 20
    again = merged([out, run / "iter_0000030"], tmp_path / "again")
    assert (again / "iter_0000030/metadata.json").exists()


def test_masters_are_averaged_and_moments_are_the_newests(run: Path, tmp_path: Path) -> None:
    sources = [run / f"iter_{step:07}" for step in (20, 30)]
    out = merged(sources, tmp_path / "out", with_optimizer=True)
    with closing(megatron.open_reader(out)) as found, closing(megatron.open_reader(sources[1])) as newest:
        roles = {name: spec.role for name, spec in found.tensors.items()}
        assert roles == {name: spec.role for name, spec in newest.tensors.items()}
        moments = [name for name, role in roles.items() if role is Role.MOMENT]
        masters = [name for name, role in roles.items() if role is Role.MASTER]
        assert (len(moments), len(masters)) == (16, 8)
        for name in [*moments, "rng_state/shard_0.0_1.1"]:
            assert read_whole(found, name) == read_whole(newest, name)
        assert all(found.tensors[name].parameter in roles for name in moments + masters)
        with closing(megatron.open_reader(sources[0])) as oldest:
            for name in masters:
                old, new, mean = (
                    np.frombuffer(read_whole(reader, name), np.float32) for reader in (oldest, newest, found)
                )
                assert np.array_equal(((old.astype(float) + new) / 2).astype(np.float32), mean), name


def test_raw_optimizer_buffers_are_skipped_and_said_so(run: Path) -> None:
    with closing(megatron.open_reader(run / "iter_0000010")) as reader:
        assert not any("gbuf" in name for name in reader.tensors)
        assert "raw optimizer buffers" in reader.ignored_files[0]


def test_common_state_inside(run: Path, tmp_path: Path) -> None:
    """Newer versions keep the common state as an entry; made here from what 0.16.1 wrote beside."""
    torchrun(
        FIXTURES / "save_megatron.py", 2, "--out", tmp_path / "run", "--steps", 10, 20, "--common-inside"
    )
    sources = [tmp_path / f"run/iter_{step:07}" for step in (10, 20)]
    assert not (sources[0] / "common.pt").exists()
    meta = formats.read_meta(sources[0])
    assert (meta.step, meta.tokens) == (10, 10 * 4 * 128)
    out = merged(sources, tmp_path / "out")
    assert formats.read_meta(out).tokens == 20 * 4 * 128


def test_what_the_marker_does_not_reach_yet_is_not_complete(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "latest_checkpointed_iteration.txt").write_text("20")
    found = trajectory.discover([copy])
    assert [point.step for point in found.points] == [10, 20]
    assert "still names iteration 20" in found.left_out[0][1]


class Runs:
    """Something whose pickle runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_a_common_state_that_runs_something_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run / "iter_0000010", tmp_path / "run/iter_0000010")
    torch.save({"iteration": 10, "args": Runs(f"touch {tmp_path / 'canary'}")}, copy / "common.pt")
    with pytest.raises(InputError, match=r"common\.pt.*posix\.system.*refused"):
        merged([copy, run / "iter_0000020"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("text", ['{"sharded_backend": ' + "[" * 100_000, "[]", "", "\x80pickle"])
def test_a_config_that_is_no_record(run: Path, tmp_path: Path, text: str) -> None:
    copy = shutil.copytree(run / "iter_0000010", tmp_path / "iter_0000010")
    (copy / "metadata.json").write_text(text)
    with pytest.raises(FormatError, match=r"metadata\.json"):
        megatron.open_reader(copy)


@pytest.mark.parametrize("text", ["../../etc", "20/..", "-1", "", "9" * 40])
def test_a_marker_that_names_something_else(run: Path, tmp_path: Path, text: str) -> None:
    out = merged([run / f"iter_{step:07}" for step in (10, 20)], tmp_path / "out")
    (out / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(FormatError, match="names no iteration"):
        megatron.open_reader(out)


def test_another_backend_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run / "iter_0000010", tmp_path / "iter_0000010")
    (copy / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(FormatError, match="torch_dist"):
        megatron.open_reader(copy)


def test_the_mean_is_that_of_torchs_own_loader(run: Path, tmp_path: Path) -> None:
    sources = [run / f"iter_{step:07}" for step in (10, 30)]
    out = merged(sources, tmp_path / "out") / "iter_0000030"
    found, both = load_dcp(out), [load_dcp(source) for source in sources]
    for name, tensor in found.items():
        if isinstance(tensor, torch.Tensor):
            mean = (as_float64(both[0][name]) + as_float64(both[1][name])) / 2
            assert np.array_equal(torch.from_numpy(mean).to(torch.bfloat16).double(), as_float64(tensor)), (
                name
            )
