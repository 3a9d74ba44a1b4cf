"""Plain files of torch.save: the contracts, the files of nanochat and litgpt, shards, and merges from end to
end.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pma import engine, formats, trajectory, verbs
from pma.engine import MergeOptions
from pma.errors import FormatError, IncompleteError, UsageError
from pma.formats import torch_files
from pma.formats.torch_files import TorchReader
from pma.testing import Raw, ReaderContract, WriterContract, random_raw
from pma.testing.builders import _torch_tensor
from pma.testing.contracts import SAMPLE, read_whole
from pma.testing.refusals import assert_refused
from pma.trajectory import Window
from pma.types import DType, Layout, Role, TensorSpec
from pma.verbs import Choice

ODD = [random_raw("scalar", DType.F32, (), seed=1), random_raw("one byte", DType.U8, (1,), seed=3)]
State = dict[str, torch.Tensor]


class TestBareStateDict(ReaderContract):
    sample = (*SAMPLE, *ODD, random_raw("empty", DType.BF16, (0, 7), seed=2))

    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        folder.mkdir()
        torch.save({raw.spec.name: _torch_tensor(raw) for raw in tensors}, folder / "model.pt")
        return folder

    def open(self, path: Path) -> TorchReader:
        return torch_files.open_reader(path)


class TestLoneFile(TestBareStateDict):
    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        return super().write(folder, tensors) / "model.pt"


class TestViewsOfOneStorage(TestBareStateDict):
    """Every tensor is a part of one storage."""

    sample = tuple(random_raw(f"t{i}", DType.F32, (i, 5), seed=i) for i in range(1, 5))

    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        folder.mkdir()
        whole = torch.cat([_torch_tensor(raw).flatten() for raw in tensors])
        state, at = {}, 0
        for raw in tensors:
            state[raw.spec.name] = whole[at : at + raw.spec.element_count].view(raw.spec.shape)
            at += raw.spec.element_count
        torch.save(state, folder / "model.pth")
        return folder


class TestShards(TestBareStateDict):
    def write(self, folder: Path, tensors: Sequence[Raw]) -> Path:
        folder.mkdir()
        weight_map = {}
        for number in range(2):
            file = f"pytorch_model-{number + 1:05}-of-00002.bin"
            inside = {raw.spec.name: _torch_tensor(raw) for raw in tensors[number::2]}
            torch.save(inside, folder / file)
            weight_map |= dict.fromkeys(inside, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder


class TestWriting(WriterContract):
    def layout(self, tensors: Mapping[str, TensorSpec]) -> Layout:
        return torch_files.plan_layout(tensors, None)

    def read_back(self, folder: Path) -> dict[str, bytes]:
        found = torch.load(folder / "model.pt", weights_only=True, mmap=True)
        return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in found.items()}


class TestWritingLikeAWrapper(TestWriting):
    @pytest.fixture(autouse=True)
    def _newest(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.path = tmp_path_factory.mktemp("newest") / "run.pt"
        state = {raw.spec.name: _torch_tensor(raw) for raw in self.sample}
        torch.save({"step": 7, "model": state, "optimizer": {"m": torch.ones(2)}, "note": "x"}, self.path)

    def layout(self, tensors: Mapping[str, TensorSpec]) -> Layout:
        with closing(torch_files.open_reader(self.path)) as reader:
            return torch_files.plan_layout(tensors, reader)

    def read_back(self, folder: Path) -> dict[str, bytes]:
        found = torch.load(folder / "run.pt", weights_only=True)
        assert (found["step"], found["note"], "optimizer" in found) == (7, "x", False)
        return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in found["model"].items()}


def state(seed: int, dtype: torch.dtype = torch.bfloat16) -> State:
    generator = torch.Generator().manual_seed(seed)
    drawn = {f"layer.{i}.weight": torch.randn(33, 7, generator=generator).to(dtype) for i in range(3)}
    return {**drawn, "norm": torch.randn(7, generator=generator), "steps": torch.tensor(seed)}


def means(states: Sequence[State]) -> State:
    """The twin: numpy in fp64, rounded once."""
    found = {}
    for name, newest in states[-1].items():
        if newest.is_floating_point():
            total = np.sum([each[name].double().numpy() for each in states], axis=0, dtype=np.float64)
            found[name] = torch.from_numpy(np.asarray(total / len(states))).to(newest.dtype)
        else:
            found[name] = newest
    return found


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def nanochat_run(folder: Path, steps: Sequence[int] = (100, 200, 300)) -> list[State]:
    folder.mkdir()
    states = [state(step) for step in steps]
    for step, weights in zip(steps, states, strict=True):
        torch.save(weights, folder / f"model_{step:06d}.pt")
        meta = {"step": step, "user_config": {"total_batch_size": 524288}, "model_config": {"n_layer": 3}}
        (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
        torch.save([{"state": {}}], folder / f"optim_{step:06d}_rank0.pt")
    return states


def litgpt_run(folder: Path, steps: Sequence[int] = (100, 200, 300)) -> list[State]:
    states = [state(step) for step in steps]
    for step, weights in zip(steps, states, strict=True):
        path = folder / f"step-{step:08d}"
        path.mkdir(parents=True)
        moments = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(5.0)}}}
        full = {"model": weights, "optimizer": {**moments, "param_groups": [{"lr": 0.25, "params": [0]}]}}
        full |= {"iter_num": 4 * step, "step_count": step, "hparams": {"out_dir": Path("out"), "seed": 42}}
        full["train_dataloader"] = {"position": 12}
        torch.save(full, path / "lit_model.pth")
        (path / "model_config.yaml").write_text("name: tiny\n")
    return states


def merged(run: Path, out: Path, **options: Any) -> engine.Merge:
    return verbs.merge(Choice(paths=(run,), window=Window(last=3)), out, MergeOptions(**options))


def test_a_nanochat_run_from_its_folder_to_a_merge(tmp_path: Path) -> None:
    states = nanochat_run(tmp_path / "run")
    (tmp_path / "run" / "meta_000400.json").unlink(missing_ok=True)
    torch.save(state(400), tmp_path / "run" / "model_000400.pt")
    found = trajectory.discover([tmp_path / "run"])
    assert [(point.step, point.tokens) for point in found.points] == [
        (s, s * 524288) for s in (100, 200, 300)
    ]
    assert found.points[0].meta.tokens_source == "step × total_batch_size in meta_000100.json"
    assert "meta_000400.json is not there yet" in found.left_out[0][1]
    with verbs.plan(Choice(paths=(tmp_path / "run",), window=Window(last=3))) as plan:
        assert any(name.endswith("optim_000300_rank0.pt") for name in plan.describe()["ignored_files"])
    merged(tmp_path / "run", tmp_path / "out")
    out = torch.load(tmp_path / "out" / "model_000300.pt", weights_only=True, mmap=True)
    assert_same(out, means(states))
    assert json.loads((tmp_path / "out" / "meta_000300.json").read_text())["step"] == 300
    assert not list((tmp_path / "out").glob("optim*"))
    assert not engine.verify(tmp_path / "out").findings
    assert verbs.inspect(tmp_path / "out")["format"] == "torch"


def test_a_litgpt_run_from_its_folder_to_a_merge(tmp_path: Path) -> None:
    states = litgpt_run(tmp_path / "run")
    found = trajectory.discover([tmp_path / "run"])
    assert [(point.step, point.learning_rate) for point in found.points] == [
        (s, 0.25) for s in (100, 200, 300)
    ]
    merged(tmp_path / "run", tmp_path / "out")
    out = torch.load(tmp_path / "out" / "lit_model.pth", weights_only=True)
    assert_same(out["model"], means(states))
    assert out.keys() == {"model", "iter_num", "step_count", "hparams"}
    assert out["hparams"] == {"out_dir": "out", "seed": 42}
    assert (tmp_path / "out" / "model_config.yaml").read_text() == "name: tiny\n"


def test_training_state_is_told_apart_and_carried_on_request(tmp_path: Path) -> None:
    litgpt_run(tmp_path / "run")
    newest = tmp_path / "run" / "step-00000300"
    with closing(formats.open_checkpoint(newest)) as reader:
        roles = {name: spec.role for name, spec in reader.tensors.items() if name.startswith("optimizer")}
        assert isinstance(reader, TorchReader)
        weights = {n: s for n, s in reader.tensors.items() if s.role is Role.PARAMETER}
        assert set(reader.left_out(weights)) == {"optimizer", "train_dataloader"}
    assert roles == {"optimizer/state/0/exp_avg": Role.MOMENT, "optimizer/state/0/step": Role.OTHER}
    merged(tmp_path / "run", tmp_path / "out", with_optimizer=True)
    out = torch.load(tmp_path / "out" / "lit_model.pth", weights_only=True)
    before = torch.load(newest / "lit_model.pth", weights_only=False)
    assert out.keys() == before.keys()
    assert out["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
    assert torch.equal(out["optimizer"]["state"][0]["exp_avg"], torch.ones(3))
    assert out["train_dataloader"] == {"position": 12}


@pytest.mark.parametrize("to", ["hf", "dcp", "deepspeed-universal"])
def test_training_state_does_not_become_weights_of_another_format(to: str, tmp_path: Path) -> None:
    litgpt_run(tmp_path / "run")
    with pytest.raises(UsageError, match=f"--to {to} has no place for the training state"):
        merged(tmp_path / "run", tmp_path / "out", with_optimizer=True, to=to)


@pytest.mark.parametrize(
    ("step", "optimizer"), [("iter_num", "optimizer"), ("global_step", "optimizer_state_dict")]
)
def test_step_and_rate_of_a_loop_of_ones_own(step: str, optimizer: str, tmp_path: Path) -> None:
    groups = {"state": {}, "param_groups": [{"lr": 0.5, "params": [0]}]}
    torch.save({"model_state_dict": state(7), step: 7, optimizer: groups}, tmp_path / "ckpt.pt")
    meta = formats.read_meta(tmp_path / "ckpt.pt")
    assert (meta.step, meta.learning_rate) == (7, 0.5)


def test_shards_stay_as_in_the_newest(tmp_path: Path) -> None:
    states = []
    for step in (10, 20):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        states.append(state(step))
        files = {name: f"pytorch_model-0000{1 + (name == 'norm')}-of-00002.bin" for name in states[-1]}
        for file in set(files.values()):
            inside = {name: tensor for name, tensor in states[-1].items() if files[name] == file}
            torch.save(inside, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    verbs.merge(Choice(paths=(tmp_path / "run",), window=Window(last=2)), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"] == files
    out = {}
    for file in sorted(set(files.values())):
        out |= torch.load(tmp_path / "out" / file, weights_only=True)
    assert_same({name: out[name] for name in states[-1]}, means(states))


def test_excluded_tensors_and_another_type(tmp_path: Path) -> None:
    litgpt_run(tmp_path / "run")
    merged(tmp_path / "run", tmp_path / "out", exclude=("norm",), dtype=DType.F32)
    out = torch.load(tmp_path / "out" / "lit_model.pth", weights_only=True)["model"]
    assert "norm" not in out
    assert out["layer.0.weight"].dtype is torch.float32


def test_tied_weights_and_metadata_of_state_dicts(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    paths = []
    for number in range(2):
        paths.append(tmp_path / f"{number}.pt")
        model = Tied()
        torch.save(model.state_dict(keep_vars=bool(number)), paths[-1])
    verbs.merge(Choice(paths=tuple(paths)), tmp_path / "out")
    out = torch.load(tmp_path / "out" / "1.pt", weights_only=True)
    assert torch.equal(out["embed.weight"], out["head.weight"])
    assert out._metadata == model.state_dict()._metadata
    model.load_state_dict(out)


DETECTED = {
    "model.pt": True,
    "x.ckpt": True,
    "x.pth": True,
    "pytorch_model.bin": True,
    "optimized.pt": True,
    "optim_000100_rank0.pt": False,
    "optimizer.pt": False,
    "scheduler.pt": False,
    "rng_state_0.pth": False,
    "training_args.bin": False,
    "mp_rank_00_model_states.pt": False,
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": False,
    "common.pt": False,
    "notes.txt": False,
}


@pytest.mark.parametrize("name", DETECTED)
def test_files_are_told_by_their_names(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    assert torch_files.detect(tmp_path / name) is DETECTED[name]
    assert torch_files.detect(tmp_path) is DETECTED[name]


def test_a_folder_of_several_files_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        torch.save(state(1), tmp_path / name)
    assert not torch_files.detect(tmp_path)
    with pytest.raises(FormatError, match="name one"):
        torch_files.open_reader(tmp_path)
    (tmp_path / "b.ckpt").unlink()
    (tmp_path / ".metadata").write_bytes(b"")
    assert not torch_files.detect(tmp_path)


STEPS = {
    "model_000100.pt": 100,
    "step-00000100": 100,
    "epoch=3-step=100.ckpt": 100,
    "step=100.ckpt": 100,
    "my-run-epoch=3-val=0.25-step=100-v1.ckpt": 100,
    "last.ckpt": None,
    "model_x.pt": None,
    "optim_000100_rank0.pt": None,
    "substep=100.ckpt": None,
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_in_names(name: str) -> None:
    found = torch_files.CHECKPOINT_NAME.fullmatch(name)
    assert (int(found["step"]) if found else None) == STEPS[name]


def saved(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def doubling(path: Path) -> None:
    """A list that holds its like twice, sixty levels deep: 2^60 ways lead to the bottom."""
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    torch.save({"model": {"w": torch.ones(2)}, "x": value}, path)


def deep(path: Path) -> None:
    value: list[Any] = []
    for _ in range(300):
        value = [value]
    torch.save({"model": {"w": torch.ones(2)}, "x": value}, path)


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tensors": (saved({"a": 1, "b\x1b[31m": 2}), "expected tensors by name"),
    "a list": (saved([torch.ones(2)]), "expected a state dict"),
    "names that are numbers": (saved({1: torch.ones(2)}), "expected text"),
    "modules of modules": (saved({"w": torch.ones(2), "inner": {"w": torch.ones(2)}}), "one level of names"),
    "a turned tensor": (saved({"w": torch.ones(2, 3).t()}), "contiguous"),
    "modules below the entry": (saved({"model": {"enc": {"w": torch.ones(2)}}}), "model holds enc"),
    "nested deeply": (deep, "nested too deeply"),
}


@pytest.mark.parametrize("trick", WRONG)
def test_contents_that_are_no_checkpoint(trick: str, tmp_path: Path) -> None:
    make, words = WRONG[trick]
    make(tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt", words)


def test_what_is_shared_is_looked_into_once(tmp_path: Path) -> None:
    doubling(tmp_path / "0.pt")
    doubling(tmp_path / "1.pt")
    verbs.merge(Choice(paths=(tmp_path / "0.pt", tmp_path / "1.pt")), tmp_path / "out")
    out = torch.load(tmp_path / "out" / "1.pt", weights_only=True)["x"]
    assert out[0] is out[1]


INDEXES: dict[str, Any] = {
    "../model.bin": {"w": "../model.bin"},
    "absolute": {"w": "/etc/passwd.bin"},
    "a separator": {"w": "a/b.bin"},
    "another kind of file": {"w": "model.pt"},
    "an escape": {"w": "\x1b[31m.bin"},
    "no names": {},
    "no mapping": [1],
}


@pytest.mark.parametrize("trick", INDEXES)
def test_indexes_that_lead_elsewhere(trick: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": INDEXES[trick]}))
    with pytest.raises(FormatError, match=r"weight_map|plain name"):
        torch_files.open_reader(tmp_path)


def test_half_written_files(tmp_path: Path) -> None:
    """Each is left out of a run with the reason, and refused when named."""
    litgpt_run(tmp_path / "run")
    file = tmp_path / "run" / "step-00000300" / "lit_model.pth"
    file.write_bytes(file.read_bytes()[:1000])
    found = trajectory.discover([tmp_path / "run"])
    assert [point.step for point in found.points] == [100, 200]
    assert "no zip directory at its end" in found.left_out[0][1]
    with pytest.raises(IncompleteError, match=r"lit_model\.pth"):
        formats.open_checkpoint(file.parent)


def test_what_is_read_while_a_run_is_listed_is_closed(tmp_path: Path) -> None:

    litgpt_run(tmp_path / "run")
    before = len(os.listdir("/proc/self/fd"))
    trajectory.discover([tmp_path / "run"])
    torch.save([1], tmp_path / "a.pt")
    with pytest.raises(FormatError):
        torch_files.open_reader(tmp_path / "a.pt")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_bare_state_dict_reads_like_its_wrapper(tmp_path: Path) -> None:
    weights = state(3)
    torch.save(weights, tmp_path / "bare.pt")
    torch.save({"state_dict": weights, "epoch": 1}, tmp_path / "wrapped.pt")
    for name in ("bare.pt", "wrapped.pt"):
        with closing(torch_files.open_reader(tmp_path / name)) as reader:
            assert list(reader.tensors) == list(weights)
            data = weights["layer.1.weight"].view(torch.uint8).numpy().tobytes()
            assert read_whole(reader, "layer.1.weight") == data


class Runs:
    """What torch.save pickles as a call of os.system."""

    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


@pytest.mark.parametrize("where", ["beside the weights", "in the weights", "instead of the weights"])
def test_a_checkpoint_that_runs_something(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {
        "beside the weights": {"model": state(1), "hparams": Runs()},
        "in the weights": {**state(1), "x": Runs()},
        "instead of the weights": Runs(),
    }
    monkeypatch.chdir(tmp_path)
    torch.save(values[where], "model.ckpt")
    assert_refused(tmp_path / "model.ckpt", "'posix.system'", "nothing in it was run")
    assert "posix.system" in str(formats.read_meta(tmp_path / "model.ckpt").incomplete)
    with pytest.raises(FormatError, match="posix"):
        formats.open_checkpoint(tmp_path / "model.ckpt")
    assert not (tmp_path / "canary").exists()
