"""DeepSpeed: ZeRO's partitions as tensors, universal checkpoints, merges from end to end. Files are made by
torch.save in DeepSpeed's layout; what DeepSpeed itself writes and reads is tried in `tests/heavy`.
"""

import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pma import engine, formats, trajectory
from pma.engine import MergeOptions
from pma.errors import FormatError, IncompleteError, InputError, UsageError
from pma.formats import deepspeed, deepspeed_universal
from pma.formats.contracts import CheckpointReader
from pma.formats.deepspeed_layout import moment_name
from pma.formats.folder_writer import FolderWriter
from pma.testing import Raw, ReaderContract, WriterContract, store_mean
from pma.testing.builders import _torch_tensor
from pma.testing.contracts import read_whole
from pma.testing.refusals import assert_refused
from pma.types import DType, Layout, Role, TensorSpec

from .zero_files import Zero, ZeroStageEnum

CORPUS = sorted((Path(__file__).parent / "corpus" / "deepspeed").glob("*/global_step10"))
SHAPES = {"embed": (7, 5), "layer.0.weight": (5, 6), "layer.0.bias": (3,), "scale": (), "one": (1,)}


def tensors(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def zero(seed: int = 0, **how: Any) -> Zero:
    """Two groups, moments, a buffer, a frozen parameter."""
    weights = tensors(seed)
    kept = {
        "groups": [dict(islice(weights.items(), 2)), dict(islice(weights.items(), 2, None))],
        "moments": {"exp_avg": tensors(seed + 100), "exp_avg_sq": tensors(seed + 200)},
        "buffers": {"mean": torch.full((3,), float(seed)), "seen": torch.tensor(seed)},
        "frozen": {"table": torch.arange(7, dtype=torch.bfloat16)},
    }
    return Zero(**{**kept, **how})


def values(reader: CheckpointReader, name: str) -> torch.Tensor:
    spec = reader.tensors[name]
    # no padding among them
    assert sum(fragment.length_bytes for fragment in reader.fragments(name)) == spec.length_bytes
    return _torch_tensor(Raw(spec=spec, data=read_whole(reader, name)))


class TestStage2(ReaderContract):
    stage = 2

    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        by_type: dict[DType, dict[str, torch.Tensor]] = {}
        for raw in tensors:
            by_type.setdefault(raw.spec.dtype, {})[raw.spec.name] = _torch_tensor(raw)
        weights = list(by_type[DType.F32].items())
        groups = [dict(weights[:1]), dict(weights[1:])]
        frozen, buffers = by_type[DType.BF16], by_type[DType.I64]
        return Zero(groups=groups, stage=self.stage, ranks=3, frozen=frozen, buffers=buffers).write(folder)

    def open(self, path: Path) -> deepspeed.ZeroReader:
        return deepspeed.open_reader(path)


class TestStage1(TestStage2):
    stage = 1


class TestStage3(TestStage2):
    stage = 3


class TestUniversalWriting(WriterContract):
    def layout(self, tensors: Mapping[str, TensorSpec]) -> Layout:
        return deepspeed_universal.plan_layout(tensors, None)

    def read_back(self, folder: Path) -> dict[str, bytes]:
        found = {path.parent.name: torch.load(path)["param"] for path in folder.glob("zero/*/fp32.pt")}
        found |= torch.load(folder / "mp_rank_00_model_states.pt")["module"]
        return {name: bytes(t.contiguous().flatten().view(torch.uint8).numpy()) for name, t in found.items()}


class TestUniversalReading(ReaderContract):
    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        with closing(TestStage2().open(TestStage2().write(folder.parent / "zero2", tensors))) as source:
            specs = {raw.spec.name: source.tensors[raw.spec.name] for raw in tensors}
            layout = deepspeed_universal.plan_layout(specs, source)
        fill(folder, layout, {raw.spec.name: raw.data for raw in tensors})
        return folder

    def open(self, path: Path) -> deepspeed_universal.UniversalReader:
        return deepspeed_universal.open_reader(path)

    def data_files(self, path: Path) -> list[Path]:
        # the second file of model states is for stage 3 of DeepSpeed, and has no tensors
        ours = [*path.glob("zero/*/fp32.pt"), path / "mp_rank_00_model_states.pt"]
        return sorted(ours, key=lambda file: file.name, reverse=True)

    test_identities_tell_a_change = None  # names have folders in them; see below

    def test_every_file_has_an_identity(self, checkpoint: Path) -> None:
        with closing(self.open(checkpoint)) as reader:
            before = reader.identities()
            names = {str(path.relative_to(checkpoint)) for path in self.data_files(checkpoint)}
            assert {identity.name for identity in before} >= names
            os.utime(self.data_files(checkpoint)[0], ns=(1, 1))
            assert reader.identities() != before

    def test_a_file_cut_short_is_refused(self, checkpoint: Path) -> None:
        for path in self.data_files(checkpoint):
            whole = path.read_bytes()
            path.write_bytes(whole[:-1])
            with pytest.raises((IncompleteError, FormatError), match=path.name):
                self._read_everything(checkpoint)
            path.write_bytes(whole)


def fill(folder: Path, layout: Layout, data: Mapping[str, bytes]) -> None:
    """Write a layout with the bytes of its tensors."""
    folder.mkdir()
    writer = FolderWriter(folder)
    writer.create(layout)
    part = writer.open_part()
    for file in layout.files:
        for offset, constant in file.constants:
            part.write(file.name, offset, memoryview(constant))
        for fragment in file.fragments:
            part.write(file.name, fragment.offset_bytes, memoryview(data[fragment.tensor]))
    part.close()
    writer.finish()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5, 40])
def test_weights_moments_and_the_rest_are_what_was_cut(tmp_path: Path, stage: int, ranks: int) -> None:
    source = zero(stage=stage, ranks=ranks, shared={"head": "embed"})
    with closing(deepspeed.open_reader(source.write(tmp_path / "global_step10"))) as reader:
        expected: dict[str, torch.Tensor] = {**source.buffers, **source.frozen}
        for group in source.groups:
            expected |= group
        for kind, of in source.moments.items():
            expected |= {moment_name(kind, name): tensor for name, tensor in of.items()}
        expected |= {moment_name("step", name): torch.tensor(10.0) for name in SHAPES}
        assert reader.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(values(reader, name), tensor), name
        assert reader.shared == {"head": "embed"}
        roles = {name: spec.role for name, spec in reader.tensors.items()}
        assert roles["mean"] is Role.BUFFER
        assert roles["table"] is roles["embed"] is Role.PARAMETER
        assert roles["optimizer.exp_avg.embed"] is Role.MOMENT
        assert roles["optimizer.step.embed"] is Role.OTHER
        assert reader.tensors["optimizer.exp_avg.embed"].parameter == "embed"


shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(shapes, min_size=1, max_size=3),
    st.integers(1, 7),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 4]),
)
def test_any_shapes_and_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    groups: list[list[tuple[int, ...]]],
    ranks: int,
    stage: int,
    alignment: int,
) -> None:
    named = [
        tensors(g, {f"{g}.{i}": shape for i, shape in enumerate(group)}) for g, group in enumerate(groups)
    ]
    source = Zero(groups=named, ranks=ranks, stage=stage, alignment=alignment if stage < 3 else 1)
    path = source.write(tmp_path_factory.mktemp("zero") / "global_step1")
    with closing(deepspeed.open_reader(path)) as reader:
        for group in named:
            for name, tensor in group.items():
                assert torch.equal(values(reader, name), tensor)


def run(folder: Path, stage: int, **how: Any) -> list[Zero]:
    """Three checkpoints of a run with ranks that changed on the way, and `latest`."""
    sources = [zero(seed, stage=stage, step=10 * seed, ranks=1 + seed, **how) for seed in (1, 2, 3)]
    for source in sources:
        source.write(folder / f"global_step{source.step}")
    (folder / "latest").write_text("global_step30")
    return sources


def merged(folder: Path, out: Path, **options: Any) -> Path:
    points = trajectory.resolve([folder]).points
    with engine.plan(points, MergeOptions(**options)) as plan:
        engine.write(plan, out)
    return out


def mean(sources: Sequence[Zero], name: str) -> torch.Tensor:
    """In fp64 by numpy, then rounded."""
    found = [next(g[name] for g in source.groups if name in g).double().numpy() for source in sources]
    return torch.from_numpy(np.asarray(np.sum(found, axis=0) / len(found), dtype=np.float32))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_merge_is_a_universal_checkpoint(tmp_path: Path, stage: int) -> None:
    sources = run(tmp_path / "run", stage)
    out = merged(tmp_path / "run", tmp_path / "out")
    for name in SHAPES:
        saved = torch.load(out / "zero" / name / "fp32.pt")
        assert torch.equal(saved["param"], mean(sources, name)), name
        for kind in ("exp_avg", "exp_avg_sq"):
            begun = torch.load(out / "zero" / name / f"{kind}.pt")["param"]
            assert begun.shape == SHAPES[name]
            assert not begun.any()
        assert torch.load(out / "zero" / name / "step.pt") == 0
    model = torch.load(out / "mp_rank_00_model_states.pt")
    assert model["module"]["mean"].tolist() == [2.0] * 3
    assert model["module"]["seen"] == 3
    assert torch.equal(model["module"]["table"], sources[0].frozen["table"])
    assert set(model["module"]) == {"mean", "seen", "table"}
    assert model["buffer_names"] == ["mean", "seen"]
    assert (model["global_steps"], model["mp_world_size"]) == (30, 1)
    assert model["lr_scheduler"] == {"last_batch_iteration": 29, "base": torch.tensor([0.25])}
    for_stage_3 = torch.load(out / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert (for_stage_3["global_steps"], for_stage_3["module"]) == (30, {})
    assert (out / "latest_universal").read_text() == "."


def test_the_newest_optimizer_is_carried(tmp_path: Path) -> None:
    newest = run(tmp_path / "run", 2)[-1]
    out = merged(tmp_path / "run", tmp_path / "out", with_optimizer=True)
    for name in SHAPES:
        for kind, of in newest.moments.items():
            assert torch.equal(torch.load(out / "zero" / name / f"{kind}.pt")["param"], of[name])
        assert torch.load(out / "zero" / name / "step.pt") == 30
    state = torch.load(out / "zero" / "optimizer_state.pt", weights_only=False, pickle_module=Stand)
    assert [group["lr"] for group in state["param_groups"][:2]] == [0.5, 0.5]
    # DeepSpeed pairs them with its own groups, and would not load those without a partner
    assert state["param_groups"][2:] == [{}] * 254
    assert state["optimizer_state_dict"]["state"][0]["step"] == 30
    assert state["ds_version"] == "0.19.8"
    assert not state.keys() & {"base_optimizer_state", "single_partition_of_fp32_groups"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_by_name(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python 3.11.0 to 3.11.3 write enumerations."""

    def by_name(self: ZeroStageEnum, _: object) -> Any:
        return getattr, (ZeroStageEnum, self.name)

    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", by_name)
    sources = run(tmp_path / "run", stage)
    out = merged(tmp_path / "run", tmp_path / "out")
    assert formats.read_meta(out).step == 30
    trained = {name for group in sources[0].groups for name in group}
    assert trained <= formats.open_checkpoint(out).tensors.keys()


class Inert:
    gradients = None  # asked for by name where Python 3.11.0 to 3.11.3 wrote the file

    def __init__(self, *_: object) -> None:
        pass


class Stand:
    """A pickle module to torch.load with, in which DeepSpeed's classes are inert."""

    __name__ = "stand"
    load = staticmethod(pickle.load)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return Inert if module.startswith("deepspeed.") else super().find_class(module, name)


def test_a_merge_of_merges(tmp_path: Path) -> None:
    sources = run(tmp_path / "run", 3)
    outs = [merged(tmp_path / "run", tmp_path / f"out{i}", with_optimizer=bool(i)) for i in range(2)]
    assert [formats.open_checkpoint(out).format for out in outs] == ["deepspeed-universal"] * 2
    assert formats.read_meta(outs[0]).step == 30
    assert formats.read_meta(outs[0]).learning_rate == 0.5
    points = trajectory.resolve(outs, as_given=True).points
    with engine.plan(points, MergeOptions(with_optimizer=True)) as plan:
        engine.write(plan, tmp_path / "again")
    saved = torch.load(tmp_path / "again" / "zero" / "embed" / "fp32.pt")
    assert torch.equal(saved["param"], mean(sources, "embed"))
    moment = torch.load(tmp_path / "again" / "zero" / "embed" / "exp_avg.pt")
    assert torch.equal(moment["param"], sources[-1].moments["exp_avg"]["embed"])


def test_what_users_saved_is_carried_or_left_out(tmp_path: Path) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    saved = {"note": "mine", "rng": torch.arange(5, dtype=torch.uint8), "loop": loop, "numbers": np.arange(3)}
    run(tmp_path / "run", 2, model={**saved, "large": torch.zeros(2**19)})
    model = torch.load(merged(tmp_path / "run", tmp_path / "out") / "mp_rank_00_model_states.pt")
    assert model["note"] == "mine"
    assert torch.equal(model["rng"], saved["rng"])
    assert not {"numbers", "large"} & model.keys()


def test_excluded_parameters_have_no_files(tmp_path: Path) -> None:
    run(tmp_path / "run", 2)
    out = merged(tmp_path / "run", tmp_path / "out", exclude=("*embed",))
    assert not (out / "zero" / "embed").exists()
    assert (out / "zero" / "one").is_dir()
    with pytest.raises(UsageError, match="no trained parameter"):
        merged(tmp_path / "run", tmp_path / "none", exclude=("embed", "layer*", "scale", "one"))


def test_other_types(tmp_path: Path) -> None:
    sources = run(tmp_path / "run", 2)
    out = merged(tmp_path / "run", tmp_path / "out", dtype=DType.BF16)
    saved = torch.load(out / "zero" / "embed" / "fp32.pt")["param"]
    assert torch.equal(saved, mean(sources, "embed").bfloat16())


def test_counts_that_are_numbers(tmp_path: Path) -> None:
    """As DeepSpeed's own optimizers count: in the state as a number, or in the groups."""
    inner = {"state": {}, "param_groups": [{"lr": 0.1, "step": 30}, {"lr": 0.1, "step": 30}]}
    run(tmp_path / "run", 2, optimizer={"base_optimizer_state": inner})
    out = merged(tmp_path / "run", tmp_path / "out")
    state = torch.load(out / "zero" / "optimizer_state.pt", weights_only=False, pickle_module=Stand)
    assert [group["step"] for group in state["param_groups"][:2]] == [0, 0]
    assert state["optimizer_state_dict"]["state"][0]["step"] == 0
    assert not (out / "zero" / "one" / "step.pt").exists()


def test_conversion_without_a_source_of_deepspeed(tmp_path: Path) -> None:
    specs = {name: TensorSpec(name=name, dtype=DType.F32, shape=shape) for name, shape in SHAPES.items()}
    buffer = TensorSpec(name="mean", dtype=DType.F32, shape=(2,), role=Role.BUFFER)
    layout = formats.plan_layout({**specs, "mean": buffer}, None, to="deepspeed-universal")
    data = {name: bytes(spec.length_bytes) for name, spec in {**specs, "mean": buffer}.items()}
    fill(tmp_path / "out", layout, data)
    with closing(formats.open_checkpoint(tmp_path / "out")) as reader:
        assert {
            name: spec.shape for name, spec in reader.tensors.items() if spec.role is Role.PARAMETER
        } == SHAPES
        assert reader.tensors["mean"] == buffer
    assert formats.read_meta(tmp_path / "out").step == 0
    stray = TensorSpec(name="extra", dtype=DType.U8, shape=(9,), role=Role.OPAQUE)
    with pytest.raises(UsageError, match="extra has no place"):
        formats.plan_layout({**specs, "extra": stray}, None, to="deepspeed-universal")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_in_a_store(tmp_path: Path, stage: int) -> None:
    import fsspec

    from pma.remote import location

    sources = run(tmp_path / "run", stage)
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "run"), f"/zero{stage}", recursive=True)
    try:
        points = trajectory.resolve([location(f"memory://zero{stage}")]).points
        assert [point.step for point in points] == [10, 20, 30]
        with engine.plan(points, MergeOptions(with_optimizer=True)) as plan:
            engine.write(plan, tmp_path / "out")
    finally:
        store.rm(f"/zero{stage}", recursive=True)
    for name in SHAPES:
        saved = torch.load(tmp_path / "out" / "zero" / name / "fp32.pt")["param"]
        assert torch.equal(saved, mean(sources, name))
        moment = torch.load(tmp_path / "out" / "zero" / name / "exp_avg.pt")["param"]
        assert torch.equal(moment, sources[-1].moments["exp_avg"][name])


def test_a_run_is_found(tmp_path: Path) -> None:
    run(tmp_path / "run", 2)
    points = trajectory.resolve([tmp_path / "run"]).points
    assert [(p.path.name, p.step, p.learning_rate, p.tokens) for p in points] == [
        (f"global_step{step}", step, 0.5, None) for step in (10, 20, 30)
    ]


def test_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    inside = zero(step=30).write(tmp_path / "checkpoint-30" / "global_step30")
    assert not formats.is_checkpoint(inside.parent)
    (inside.parent / "latest").write_text("global_step30")
    (inside.parent / "config.json").write_text("{}")
    assert formats.read_meta(inside.parent).incomplete is not None
    (inside.parent / "trainer_state.json").write_text(
        '{"global_step": 30, "num_input_tokens_seen": 900, "log_history": [{"step": 30, "loss": 2.5}]}'
    )
    meta = formats.read_meta(inside.parent)
    assert (meta.step, meta.tokens, meta.incomplete, meta.log.losses) == (30, 900, None, ((30, 2.5),))
    with closing(formats.open_checkpoint(inside.parent)) as reader:
        assert torch.equal(values(reader, "embed"), tensors(0)["embed"])
        assert reader.side_files() == {"config.json": b"{}"}


def test_tokens_of_megatron_deepspeed(tmp_path: Path) -> None:
    from argparse import Namespace

    path = zero(model={"args": Namespace(consumed_train_tokens=12345)}).write(tmp_path / "global_step10")
    meta = formats.read_meta(path)
    assert (meta.tokens, meta.tokens_source) == (
        12345,
        "args.consumed_train_tokens in mp_rank_00_model_states.pt",
    )


RANK_1 = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HALF_WRITTEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file of a rank": (lambda path: (path / RANK_1).unlink(), "1 rank"),
    "no file of the first rank": (
        lambda path: (path / RANK_1.replace("rank_1_mp", "rank_0_mp")).unlink(),
        "rank 0 is missing",
    ),
    "no model": (lambda path: (path / MODEL).unlink(), "no file of model states"),
    "only the model": (
        lambda path: [file.unlink() for file in path.glob("bf16*")],
        "no file of optimizer states",
    ),
    "a rank cut short": (lambda path: cut(path / RANK_1), "cut short"),
    "the model cut short": (lambda path: cut(path / MODEL), "cut short"),
    "an empty file": (lambda path: (path / RANK_1).write_bytes(b""), RANK_1),
}


@pytest.mark.parametrize("trick", HALF_WRITTEN)
def test_half_written(tmp_path: Path, trick: str) -> None:
    path = zero().write(tmp_path / "global_step10")
    damage, why = HALF_WRITTEN[trick]
    damage(path)
    meta = formats.read_meta(path)
    assert meta.incomplete is not None
    assert why in meta.incomplete or trick == "no file of a rank"
    with pytest.raises((IncompleteError, FormatError), match=why):
        formats.open_checkpoint(path)


def test_a_checkpoint_that_latest_does_not_name_yet(tmp_path: Path) -> None:
    run(tmp_path / "run", 2)
    (tmp_path / "run" / "latest").write_text("global_step20\n")
    found = trajectory.resolve([tmp_path / "run"])
    assert [point.step for point in found.points] == [10, 20]
    assert "`latest` names global_step20" in found.left_out[0][1]


def test_half_written_universal(tmp_path: Path) -> None:
    run(tmp_path / "run", 2)
    out = merged(tmp_path / "run", tmp_path / "out")
    for name in ("zero/one/fp32.pt", "zero/optimizer_state.pt", MODEL):
        whole = (out / name).read_bytes()
        (out / name).unlink()
        if name == MODEL:
            (out / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
        assert formats.read_meta(out).incomplete is not None
        with pytest.raises(IncompleteError):
            formats.open_checkpoint(out)
        (out / name).write_bytes(whole)


class Runs:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def _shape(**shapes: Any) -> dict[str, Any]:
    return {"param_shapes": [shapes]}


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a model that runs": ({"model": {"note": Runs(os.system, "touch canary")}}, "'posix.system'"),
    "an optimizer that runs": ({"optimizer": {"note": Runs(os.system, "touch canary")}}, "'posix.system'"),
    "getattr": ({"model": {"note": Runs(getattr, "", "join")}}, "builtin.*getattr"),
    "a class outside the list": ({"model": {"note": Path.home}}, "refused"),
    "shapes of nothing": ({"model": {"param_shapes": None}}, "param_shapes is missing"),
    "shapes of text": ({"model": _shape(embed="ab")}, "no list of counts"),
    "shapes below zero": ({"model": _shape(embed=(-1, 5))}, "no list of counts"),
    "a shape of exabytes": ({"model": _shape(embed=(2**40, 2**40))}, "not believable"),
    "more parameters than weights": ({"model": _shape(embed=torch.Size((2**30,)))}, "groups of shapes"),
    "fewer parameters than weights": (
        {"model": {"param_shapes": [{"embed": torch.Size((1,))}, {"one": torch.Size((1,))}]}},
        "the ranks store",
    ),
    "a parameter twice": (
        {"model": {"param_shapes": [{"embed": torch.Size((7, 5))}] * 2}},
        "occurs twice",
    ),
    "a million ranks": ({"optimizer": {"partition_count": [10**6, 10**6]}}, "ranks"),
    "ranks of experts": ({"optimizer": {"partition_count": [2, 1]}}, "experts"),
    "stage 9": ({"optimizer": {"zero_stage": 9}}, "stage 9"),
    "weights that are none": ({"optimizer": {"single_partition_of_fp32_groups": [1, 2]}}, "missing"),
    "weights of integers": (
        {"optimizer": {"single_partition_of_fp32_groups": [torch.arange(4), torch.arange(4)]}},
        "floating",
    ),
    "moments that are too short": (
        {
            "optimizer": {
                "base_optimizer_state": {
                    "state": {0: {"exp_avg": torch.zeros(2)}, 1: {"exp_avg": torch.zeros(1)}},
                    "param_groups": [],
                }
            }
        },
        "shorter than the weights",
    ),
    "groups of numbers": (
        {"optimizer": {"base_optimizer_state": {"state": {}, "param_groups": [1]}}},
        "own state is missing",
    ),
    "a share of nothing": (
        {"model": {"shared_params": {"head": "nowhere"}}},
        "shares memory with an unknown",
    ),
    "shares that are numbers": ({"model": {"shared_params": {1: 2}}}, "something else than names"),
    "buffers that are trained": ({"buffers": {"embed": torch.zeros(1)}}, "also something else"),
    "buffers that are frozen": ({"buffers": {"table": torch.zeros(7)}}, "also something else"),
    "buffers that are no names": ({"model": {"buffer_names": [{}]}}, "no list of names"),
    "a buffer that lies crosswise": ({"buffers": {"mean": torch.zeros(2, 3).T}}, "one after the other"),
    "a parameter named like a moment": (
        {"buffers": {"optimizer.exp_avg.embed": torch.zeros(1)}},
        "occurs twice",
    ),
    "moments of two types": (
        {
            "optimizer": {
                "base_optimizer_state": {
                    "state": {
                        0: {"exp_avg": torch.zeros(99)},
                        1: {"exp_avg": torch.zeros(99, dtype=torch.bfloat16)},
                    },
                    "param_groups": [],
                }
            }
        },
        "exp_avg is of several types",
    ),
    "paddings that do not fit": ({"optimizer": {"param_alignment_paddings": [[0], [0]]}}, "do not fit"),
    "paddings that are text": ({"optimizer": {"param_alignment_paddings": ["a"]}}, "than counts"),
    "a frozen shape alone": (
        {"model": {"frozen_param_shapes": {"x": torch.Size((1,))}}},
        "has a shape or values, not both",
    ),
    "no module": ({"model": {"module": None}}, "module is a NoneType"),
}


@pytest.mark.parametrize("trick", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, trick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    how, why = HOSTILE[trick]
    path = zero(**how).write(tmp_path / "global_step10")
    with pytest.raises(InputError, match=why):
        assert formats.open_checkpoint(path).tensors
    assert not (tmp_path / "canary").exists()


NAMES = ("../../outside", "a/b", "..", ".", "a\nb", "x" * 300, "optimizer_state.pt", "\x1b[31m")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_cannot_be_folders(tmp_path: Path, name: str) -> None:
    path = zero(groups=[{name: torch.zeros(3)}], moments={}).write(tmp_path / "global_step10")
    point = trajectory.resolve([path]).points
    with pytest.raises(FormatError, match="cannot be the name of a folder") as caught:
        engine.plan(point, MergeOptions())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["../../outside", "a/b"])
def test_universal_names_that_lead_outside(tmp_path: Path, name: str) -> None:
    source = zero(groups=[{"embed": torch.zeros(3)}], moments={})
    out = merged_one(source, tmp_path)
    state = torch.load(out / MODEL)
    state["param_shapes"] = [{name: torch.Size((3,))}]
    torch.save(state, out / MODEL)
    with pytest.raises(FormatError, match="cannot be the name of a folder"):
        formats.open_checkpoint(out)
    assert formats.read_meta(out).incomplete is not None


def merged_one(source: Zero, folder: Path) -> Path:
    path = source.write(folder / "global_step10")
    with engine.plan(trajectory.resolve([path]).points, MergeOptions()) as plan:
        engine.write(plan, folder / "out")
    return folder / "out"


def test_a_universal_tensor_of_another_shape(tmp_path: Path) -> None:
    out = merged_one(zero(), tmp_path)
    torch.save({"param": torch.zeros(2)}, out / "zero" / "embed" / "fp32.pt")
    with pytest.raises(FormatError, match=r"fp32\.pt: it has shape \(2,\), expected \(7, 5\)"):
        formats.open_checkpoint(out)
    torch.save({"param": Runs(os.system, "true")}, out / "zero" / "embed" / "fp32.pt")
    with pytest.raises(FormatError, match=r"posix\.system"):
        formats.open_checkpoint(out)


OTHERS = (
    "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt",
    "mp_rank_01_model_states.pt",
    "layer_00-model_00-model_states.pt",
    "layer_0_expert_0_mp_rank_00_model_states.pt",
    "expp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
)


@pytest.mark.parametrize("name", OTHERS)
def test_parallelism_that_is_not_read(tmp_path: Path, name: str) -> None:
    path = zero().write(tmp_path / "global_step10")
    (path / name).write_bytes(b"")
    with pytest.raises(FormatError, match=r"tensor-parallel|pipeline|same rank"):
        formats.open_checkpoint(path)
    assert formats.read_meta(path).incomplete is not None


def test_many_parameters(tmp_path: Path) -> None:
    """A record a parameter in every rank's file, as a large mixture has, opens soon and in little memory."""
    from collections import OrderedDict

    from .zero_files import fragment_address

    names = [f"model.layers.{i // 400}.mlp.experts.{i % 400}.down_proj.weight" for i in range(12_000)]
    addresses = [OrderedDict((name, fragment_address(numel=1, start=i)) for i, name in enumerate(names))]
    group = dict.fromkeys(names, torch.ones(1))
    source = zero(groups=[group], moments={}, optimizer={"param_slice_mappings": addresses})
    with closing(formats.open_checkpoint(source.write(tmp_path / "global_step10"))) as reader:
        assert len(reader.tensors) == 12_003


def test_refusals_are_soon_and_small(tmp_path: Path) -> None:
    path = zero(optimizer={"note": Runs(os.system, "touch canary")}).write(tmp_path / "global_step10")
    assert_refused(path, "posix.system")


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.parent.name)
def test_the_corpus_is_read(path: Path) -> None:
    with closing(formats.open_checkpoint(path)) as reader:
        assert SHAPES.keys() <= reader.tensors.keys()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_is_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Fuzz: files of the corpus with bytes replaced."""
    path = tmp_path_factory.mktemp("fuzz") / "global_step10"
    shutil.copytree(data.draw(st.sampled_from(CORPUS)), path)
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    damaged = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    formats.read_meta(path)
    with suppress(InputError), closing(formats.open_checkpoint(path)) as reader:
        for name in reader.tensors:
            read_whole(reader, name)


@pytest.mark.parametrize("stage", [1, 3])
def test_interval_means_beside_partitions(tmp_path: Path, stage: int) -> None:
    """The means are whole tensors by name; the output is as that of the partitions, masters included."""
    run(tmp_path / "run", stage)
    steps = (10, 20, 30)
    for step in steps:
        checkpoint = tmp_path / "run" / f"global_step{step}"
        reader = formats.open_checkpoint(checkpoint)
        weights = [s for s in reader.tensors.values() if s.role in (Role.PARAMETER, Role.BUFFER)]
        floats = [spec for spec in weights if spec.dtype.kind == "float"]
        store_mean(checkpoint, {spec.name: np.full(spec.shape, step) for spec in floats})
        reader.close()
    out = merged(tmp_path / "run", tmp_path / "out", use="interval-means", with_optimizer=True)
    for name, shape in SHAPES.items():
        saved = torch.load(out / "zero" / name / "fp32.pt")
        assert torch.equal(saved["param"], torch.full(shape, 20.0)), name
    assert torch.load(out / "mp_rank_00_model_states.pt")["module"]["mean"].tolist() == [20.0] * 3
    assert engine.verify(out, samples=None).findings == ()
