"""Distributed checkpoints of 1, 2 and 4 ranks, written by torch: read, merged across shardings, loaded."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict

from pma import engine, formats, trajectory
from pma.engine import MergeOptions
from pma.errors import FormatError, InputError
from pma.formats import dcp as dcp_format
from pma.formats.contracts import CheckpointReader, requests_for
from pma.testing import Raw, ReaderContract, WriterContract, random_raw
from pma.testing.builders import _torch_tensor
from pma.testing.contracts import SAMPLE, read_whole
from pma.testing.distributed import as_float64, flattened, in_ranks, load_dcp, tensor_bytes
from pma.types import DType, Layout, Role, TensorSpec

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS_A_STEP = 64
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")

ODD = (
    *SAMPLE,
    random_raw("scalar", DType.F32, (), seed=6),
    random_raw("few", DType.BF16, (3, 2), seed=7),  # fewer rows than ranks
    random_raw("none", DType.F32, (0, 4), seed=8),
    random_raw("half", DType.F16, (5, 7), seed=9),
    random_raw("mask", DType.BOOL, (9,), seed=10),
)


def save_alone(folder: Path, tensors: Sequence[Raw]) -> Path:
    dcp.save({raw.spec.name: _torch_tensor(raw) for raw in tensors}, checkpoint_id=folder, no_dist=True)
    return folder


class TestOneRank(ReaderContract):
    sample = ODD

    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        return save_alone(folder, tensors)

    def open(self, path: Path) -> CheckpointReader:
        return dcp_format.open_reader(path)


@pytest.fixture(scope="module", params=[2, 4])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    torch.save({raw.spec.name: _torch_tensor(raw) for raw in ODD}, folder / "tensors.pt")
    in_ranks(FIXTURES / "save_sharded.py", request.param, folder / "tensors.pt", folder / "saved")
    return folder / "saved"


class TestSharded(ReaderContract):
    """Rows, columns and whole tensors from several ranks; some hold nothing of a tensor."""

    sample = ODD

    @pytest.fixture
    def checkpoint(self, tmp_path: Path, saved: Path) -> Path:
        return shutil.copytree(saved, tmp_path / "checkpoint")

    def open(self, path: Path) -> CheckpointReader:
        return dcp_format.open_reader(path)


class TestFreshLayout(WriterContract):
    sample = ODD

    def layout(self, tensors: Mapping[str, TensorSpec]) -> Layout:
        return dcp_format.plan_layout(tensors, None)

    def read_back(self, folder: Path) -> dict[str, bytes]:
        return {name: tensor_bytes(tensor) for name, tensor in load_dcp(folder).items()}


class TestLayoutOfASource(TestFreshLayout):
    @pytest.fixture(autouse=True)
    def _source(self, saved: Path) -> None:
        self.saved = saved

    def layout(self, tensors: Mapping[str, TensorSpec]) -> Layout:
        with closing(dcp_format.open_reader(self.saved)) as reader:
            return dcp_format.plan_layout(tensors, reader)

    def test_keeps_files_and_chunks(self) -> None:
        with closing(dcp_format.open_reader(self.saved)) as reader:
            layout = dcp_format.plan_layout(reader.tensors, reader)
            before = {(f.tensor, f.file, f.box) for name in reader.tensors for f in reader.fragments(name)}
        assert {(f.tensor, f.file, f.box) for file in layout.files for f in file.fragments} == before

    def test_every_element_begins_at_a_multiple_of_its_size(self) -> None:
        layout = self.layout({raw.spec.name: raw.spec for raw in self.sample})
        assert all(f.offset_bytes % 64 == 0 for file in layout.files for f in file.fragments)


PROFILES = ("torchtitan", "torchtitan-old", "plain", "accelerate", "composer")
NAMES = {
    "torchtitan": "torchtitan/checkpoint/step-{}",
    "torchtitan-old": "torchtitan-old/checkpoint/step-{}",
    "plain": "plain/step_{}",
    "accelerate": "accelerate/checkpoint-{}",
    "composer": "composer/ep0-ba{}",
}
INNER = {"accelerate": "pytorch_model_fsdp_0"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One training run, saved at steps 2 and 4 by two ranks, and at step 6 by four."""
    folder = tmp_path_factory.mktemp("runs")
    script = FIXTURES / "train_distributed.py"
    in_ranks(script, 2, "--profile", *PROFILES, "safetensors", "--out", folder, "--steps", 2, 4)
    in_ranks(script, 4, "--profile", *PROFILES, "--out", folder, "--steps", 6)
    in_ranks(script, 2, "--profile", "plain", "--out", folder / "columns", "--steps", 8, "--tensor-parallel")
    return folder


def merged(paths: Sequence[Path], out: Path, **options: object) -> Path:
    found = trajectory.from_checkpoints(paths)
    with engine.plan(found.points, MergeOptions(**options)) as plan:
        engine.write(plan, out)
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = flattened(load_dcp(folder))
    training = ("optimizer", "lr_scheduler", "dataloader", "train_state", "rng", "state.optimizers", "state.")
    return {
        name: value
        for name, value in found.items()
        if name.startswith("state.model.") or not name.startswith(training)
    }


def assert_is_the_mean(out: Path, sources: Sequence[Path], name: str = "") -> None:
    """Equal, to the bit, to the mean in fp64 rounded to fp32 once: fp32 sources are summed in fp64."""
    inner = INNER.get(name, "")
    found, expected = weights_of(out / inner), [weights_of(path / inner) for path in sources]
    assert found.keys() == expected[0].keys()
    for key, tensor in found.items():
        mean = np.sum([as_float64(source[key]) for source in expected], axis=0) / len(expected)
        assert np.array_equal(mean.astype(np.float32), tensor.numpy()), key


@pytest.mark.parametrize("name", PROFILES)
def test_checkpoints_of_two_and_four_ranks_merge(runs: Path, tmp_path: Path, name: str) -> None:
    sources = [runs / NAMES[name].format(step) for step in (2, 4, 6)]
    out = merged(sources, tmp_path / "out")
    assert_is_the_mean(out, sources, name)


def test_a_run_is_found_and_merged_from_the_command_line(runs: Path, tmp_path: Path) -> None:
    run = runs / "torchtitan/checkpoint"
    command = [sys.executable, "-m", "pma", "merge", str(run), "--last", "2", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_is_the_mean(tmp_path / "out", [run / "step-4", run / "step-6"])


def test_columns_and_rows_merge(runs: Path, tmp_path: Path) -> None:
    sources = [runs / "plain/step_6", runs / "columns/plain/step_8"]
    out = merged(sources, tmp_path / "out")
    assert_is_the_mean(out, sources)
    with closing(dcp_format.open_reader(out)) as reader:
        boxes = {fragment.box for fragment in reader.fragments("tok_embeddings.weight")}
    assert boxes == {((0, 0), (96, 16)), ((0, 16), (96, 16))}


def test_another_type_keeps_the_chunks(runs: Path, tmp_path: Path) -> None:
    sources = [runs / NAMES["plain"].format(step) for step in (2, 4)]
    out = weights_of(merged(sources, tmp_path / "out", dtype=DType.BF16))
    both = [weights_of(source) for source in sources]
    for name, tensor in out.items():
        mean = (both[0][name].double() + both[1][name].double()) / 2
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, mean.to(torch.float32).to(torch.bfloat16)) or torch.allclose(
            tensor.double(), mean, rtol=2**-8
        )


def test_the_optimizer_comes_along_when_asked(runs: Path, tmp_path: Path) -> None:
    sources = [runs / NAMES["torchtitan"].format(step) for step in (4, 6)]
    out = merged(sources, tmp_path / "out", with_optimizer=True)
    assert_is_the_mean(out, sources)
    found, newest = flattened(load_dcp(out)), flattened(load_dcp(sources[-1]))
    assert found.keys() == newest.keys()
    kept = [name for name in found if name.startswith(("optimizer", "lr_scheduler", "train_state", "data"))]
    assert len(kept) > 100
    for name in kept:
        same = torch.equal if isinstance(found[name], torch.Tensor) else lambda a, b: a == b
        assert same(found[name], newest[name]), name


def test_the_optimizer_of_accelerate_is_a_folder_beside(runs: Path, tmp_path: Path) -> None:
    sources = [runs / NAMES["accelerate"].format(step) for step in (4, 6)]
    out = merged(sources, tmp_path / "out", with_optimizer=True)
    found, newest = (flattened(load_dcp(path / "optimizer_0")) for path in (out, sources[-1]))
    moments = [name for name in found if name.endswith("exp_avg")]
    assert len(moments) == 21
    assert all(torch.equal(found[name], newest[name]) for name in moments)
    assert (out / "trainer_state.json").read_bytes() == (sources[-1] / "trainer_state.json").read_bytes()
    weights = merged(sources, tmp_path / "weights")
    assert not (weights / "optimizer_0").exists()
    assert (weights / "config.json").exists()


def test_converts_by_torchs_own_tool(runs: Path, tmp_path: Path) -> None:
    out = merged([runs / NAMES["plain"].format(step) for step in (2, 4)], tmp_path / "out")
    dcp_to_torch_save(out, tmp_path / "converted.pt")
    converted, loaded = torch.load(tmp_path / "converted.pt"), load_dcp(out)
    assert converted.keys() == loaded.keys()
    assert all(torch.equal(converted[name], loaded[name]) for name in loaded)


@pytest.fixture(scope="module")
def resumed(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Under FSDP2, on another number of ranks than any source: what each trainer did with its merge."""
    folder = tmp_path_factory.mktemp("resumed")
    wanted = []
    for name in PROFILES:
        sources = [runs / NAMES[name].format(step) for step in (4, 6)]
        wanted.append(f"{name}={merged(sources, folder / name, with_optimizer=name != 'plain')}")
    sources = [runs / f"safetensors/step_{step}" for step in (2, 4)]
    wanted.append(f"safetensors={merged(sources, folder / 'safetensors')}")
    in_ranks(FIXTURES / "resume_distributed.py", 3, folder / "told.json", *wanted)
    found: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return found


@pytest.mark.parametrize("name", [*PROFILES, "safetensors"])
def test_training_goes_on_from_a_merge(runs: Path, resumed: dict[str, Any], name: str) -> None:
    """With the mean as weights and, where it is kept, the newest optimizer state."""
    told = resumed[name]
    before, after = told["losses"]
    assert after < before < 5
    assert told["moved"] == [21, 21]
    # one step was made to have a state to load into
    assert told["counted"] == [1 if name in ("plain", "safetensors") else 6]
    each = [weights_of(runs / NAMES["plain"].format(step)) for step in (4, 6)]
    if name == "safetensors":
        each = [weights_of(runs / NAMES["plain"].format(step)) for step in (2, 4)]
    for key, total in told["sum"].items():
        mean = np.mean([as_float64(weights[key]) for weights in each], axis=0)
        assert total == pytest.approx(mean.astype(np.float32).astype(np.float64).sum(), rel=1e-12), key


def test_shards_of_safetensors_without_an_index_become_ordinary_safetensors(
    runs: Path, tmp_path: Path
) -> None:
    sources = [runs / f"safetensors/step_{step}" for step in (2, 4)]
    assert len(list(sources[0].iterdir())) == 2
    assert trajectory.discover([runs / "safetensors"]).points[1].step == 4
    out = merged(sources, tmp_path / "out")
    both = [load_dcp(source, dcp.HuggingFaceStorageReader) for source in sources]
    found = load_file(out / "model.safetensors")
    assert found.keys() == both[0].keys()
    for name, tensor in found.items():
        mean = (as_float64(both[0][name]) + as_float64(both[1][name])) / 2
        assert np.array_equal(mean.astype(np.float32), tensor.numpy()), name


def test_a_shard_of_safetensors_that_is_missing_leaves_a_hole(runs: Path, tmp_path: Path) -> None:
    path = shutil.copytree(runs / "safetensors/step_2", tmp_path / "step_2")
    (path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with closing(formats.open_checkpoint(path)) as reader, pytest.raises(FormatError, match="hole"):
        _ = reader.tensors


@pytest.mark.parametrize(
    ("name", "tokens", "rate"),
    [
        ("torchtitan", None, 0.96),
        ("torchtitan-old", None, 0.96),
        ("plain", None, None),
        ("accelerate", None, 1.0),
        ("composer", 4 * TOKENS_A_STEP, 0.5),
    ],
)
def test_step_tokens_and_rate(runs: Path, name: str, tokens: int | None, rate: float | None) -> None:
    meta = formats.read_meta(runs / NAMES[name].format(4))
    assert (meta.step, meta.tokens, meta.incomplete) == (4, tokens, None)
    assert meta.learning_rate == (None if rate is None else pytest.approx(rate * 1e-3))


def test_torchtitans_count_of_tokens_is_not_used(runs: Path) -> None:
    meta = formats.read_meta(runs / NAMES["torchtitan"].format(4))
    assert meta.tokens is None
    assert "one rank" in str(meta.tokens_source)


@pytest.mark.parametrize("name", ["torchtitan", "accelerate", "composer"])
def test_tells_weights_moments_and_the_rest(runs: Path, name: str) -> None:
    with closing(dcp_format.open_reader(runs / NAMES[name].format(4))) as reader:
        specs = reader.tensors.values()
        weights = {spec.name for spec in specs if spec.role is Role.PARAMETER}
        moments = [spec for spec in specs if spec.role is Role.MOMENT]
    assert len(weights) == 22
    assert len(moments) == 42
    assert {spec.parameter for spec in moments} == {n for n in weights if not n.endswith("freqs")}
    assert all(spec.name.endswith(("exp_avg", "exp_avg_sq")) for spec in moments)


@pytest.mark.parametrize("key", ["optimizer_0", "optimizer_state_dict", "opt"])
def test_an_optimizer_is_told_by_any_name(tmp_path: Path, key: str) -> None:
    """Lightning's sharded checkpoints have `model` and `optimizer_0`."""
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    path = tmp_path / "epoch=0-step=7.ckpt"
    dcp.save({"model": weights, key: moments}, checkpoint_id=path, no_dist=True)
    with closing(formats.open_checkpoint(path)) as reader:
        found = {name for name, spec in reader.tensors.items() if spec.role is Role.PARAMETER}
    assert found == {"model.weight", "model.bias"}
    assert formats.read_meta(path).step == 7
    assert formats.read_meta(path).learning_rate == (None if key == "opt" else 0.25)


def test_sources_alike_have_one_layout_digest(runs: Path) -> None:
    readers = [dcp_format.open_reader(runs / NAMES["plain"].format(step)) for step in (2, 4, 6)]
    digests = [reader.layout_digest for reader in readers]
    assert digests[0] == digests[1] != digests[2]
    for reader in readers:
        reader.close()


def test_reads_only_what_is_asked_for_of_many_chunks(runs: Path) -> None:
    with closing(dcp_format.open_reader(runs / NAMES["plain"].format(6))) as reader:
        whole = np.frombuffer(read_whole(reader, "output.weight"), np.float32).reshape(96, 32)
        found = reader.runs("output.weight", 2, 70, ((23, 4), (50, 8)))
        assert set(found.files) == {"__0_0.distcp", "__1_0.distcp"}
        assert found.count_R.sum() == 68
        into = bytearray(68 * 4)
        reader.read_many(requests_for(found, 4, memoryview(into)))
    assert into == whole[23:73, 4:12].reshape(-1)[2:70].tobytes()


@pytest.mark.parametrize("name", ["torchtitan", "accelerate"])
def test_a_save_that_is_not_finished(runs: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(runs / NAMES[name].format(4), tmp_path / Path(NAMES[name].format(4)).name)
    (path / INNER.get(name, "") / ".metadata").unlink()
    assert ".metadata is missing" in str(formats.read_meta(path).incomplete)
    with pytest.raises(InputError, match="not complete"):
        trajectory.from_checkpoints([path])


def test_strided_items_are_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.arange(12.0).reshape(3, 4).T}, checkpoint_id=tmp_path / "c", no_dist=True)
    with (
        closing(dcp_format.open_reader(tmp_path / "c")) as reader,
        pytest.raises(FormatError, match="strides"),
    ):
        reader.fragments("w")
