"""DeepSpeed itself: what it writes is read to the bit, and it goes on from what is written. Two processes
train a tiny Llama on the CPU; see `deepspeed_fixture`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pma import engine, formats, trajectory
from pma.engine import MergeOptions
from pma.formats.contracts import CheckpointReader
from pma.formats.deepspeed_layout import moment_name
from pma.testing import Raw
from pma.testing.builders import _torch_tensor
from pma.testing.contracts import read_whole
from pma.types import DType, Role

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

MOMENTS = ("exp_avg", "exp_avg_sq")
RUNS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1, "groups": 2},
    "stage 2": {"stage": 2, "groups": 2, "steps": 4},
    "stage 3": {"stage": 3, "steps": 4},
    "stage 2, tied": {"stage": 2, "tied": True},
    "stage 3, tied, two groups": {"stage": 3, "tied": True, "groups": 2},
    "stage 2, elastic": {"stage": 2, "elastic": True, "steps": 1},
    "stage 2, fp32": {"stage": 2, "precision": "fp32", "steps": 1},
    "stage 1, fp32 gradients": {"stage": 1, "accumulate": "fp32", "steps": 1},
}


def run_jobs(folder: Path, jobs: Sequence[dict[str, Any]], ranks: int = 2) -> None:
    """Do jobs with DeepSpeed in processes of their own."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = Path(__file__).with_name("deepspeed_fixture.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(program), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
        check=False,
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, "\n".join(told) or done.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run, what DeepSpeed held and read of them, and two converted by DeepSpeed."""
    folder = tmp_path_factory.mktemp("deepspeed")
    jobs = [
        {"folder": str(folder / name), "report": str(folder / f"{name} told"), **how}
        for name, how in RUNS.items()
    ]
    for name in ("stage 2", "stage 3", "stage 3, tied, two groups"):
        for step in (2, 3):
            inside, made = folder / name / f"global_step{step}", folder / f"{name} universal"
            made.mkdir(exist_ok=True)
            out = made / f"global_step{step}_universal"
            jobs.append({"what": "convert", "folder": str(inside), "report": str(out)})
    run_jobs(folder, jobs)
    return folder


def values(reader: CheckpointReader, name: str) -> torch.Tensor:
    spec = reader.tensors[name]
    return _torch_tensor(Raw(spec=spec, data=read_whole(reader, name)))


def checkpoints(trained: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for step in range(1, RUNS[name].get("steps", 3) + 1):
        yield trained / name / f"global_step{step}", torch.load(trained / f"{name} told.{step}.pt")


@pytest.mark.parametrize("name", RUNS)
def test_reads_what_deepspeed_reads(trained: Path, name: str) -> None:
    for path, told in checkpoints(trained, name):
        assert formats.read_meta(path).step == int(path.name.removeprefix("global_step"))
        with closing(formats.open_checkpoint(path)) as reader:
            names = {n for n, spec in reader.tensors.items() if spec.role in (Role.PARAMETER, Role.BUFFER)}
            shared = reader.shared  # type: ignore[attr-defined]
            # of stage 1, DeepSpeed's reader leaves out what is not trained
            assert names | shared.keys() >= told["read"].keys()
            assert names - told["read"].keys() <= ({"frozen"} if RUNS[name]["stage"] == 1 else set()) or (
                not told["read"]
            )
            for key, expected in told["read"].items():
                found = values(reader, shared.get(key, key))
                assert torch.equal(found.to(expected.dtype), expected), key


@pytest.mark.parametrize("name", RUNS)
def test_reads_what_the_engine_holds(trained: Path, name: str) -> None:
    for path, told in checkpoints(trained, name):
        with closing(formats.open_checkpoint(path)) as reader:
            held = told["held"]
            assert len(held["fp32"]) >= 20
            for key, expected in held["fp32"].items():
                assert torch.equal(values(reader, key), expected.reshape(reader.tensors[key].shape)), key
            assert torch.equal(values(reader, "frozen"), held["live"]["frozen"])


def test_learning_rates_are_the_schedules(trained: Path) -> None:
    points = trajectory.resolve([trained / "stage 2"]).points
    assert [point.step for point in points] == [1, 2, 3, 4]
    # logarithmic warmup over 4 steps to 0.01
    expected = [0.01 * np.log(step) / np.log(4) for step in (1, 2, 3, 4)]
    assert [point.learning_rate for point in points] == pytest.approx(expected)


def test_latest_and_tied_names(trained: Path) -> None:
    for name in ("stage 2, tied", "stage 3, tied, two groups"):
        with closing(formats.open_checkpoint(trained / name / "global_step3")) as reader:
            assert reader.shared == {  # type: ignore[attr-defined]
                "llama.lm_head.weight": "llama.model.embed_tokens.weight"
            }
            assert "llama.lm_head.weight" not in reader.tensors
    (trained / "stage 1" / "latest").write_text("global_step2")
    assert [point.step for point in trajectory.resolve([trained / "stage 1"]).points] == [1, 2]


@pytest.mark.parametrize("name", ["stage 2", "stage 3", "stage 3, tied, two groups"])
def test_reads_what_deepspeed_converts(trained: Path, name: str) -> None:
    universal = trained / f"{name} universal" / "global_step3_universal"
    assert formats.read_meta(universal).step == 3
    with (
        closing(formats.open_checkpoint(universal)) as converted,
        closing(formats.open_checkpoint(trained / name / "global_step3")) as source,
    ):
        assert converted.format == "deepspeed-universal"
        # the converter of stage 3 writes one count of steps for all
        expected = {n: s for n, s in source.tensors.items() if s.role is not Role.OTHER}
        assert {n: s for n, s in converted.tensors.items() if s.role is not Role.OTHER} == expected
        for key in expected:
            assert torch.equal(values(converted, key), values(source, key)), key


MERGES: dict[str, tuple[str, bool]] = {
    "2": ("stage 2", False),
    "2 with optimizer": ("stage 2", True),
    "3": ("stage 3", False),
    "3 with optimizer": ("stage 3", True),
    "tied": ("stage 3, tied, two groups", True),
    "of universal": ("stage 2 universal", True),
    "of universal 3": ("stage 3 universal", True),
}
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "2": ("2", {"stage": 2, "groups": 2}),
    "2 in stage 1": ("2", {"stage": 1, "groups": 2}),
    "2 with optimizer": ("2 with optimizer", {"stage": 2, "groups": 2}),
    "2 with optimizer, in stage 3": ("2 with optimizer", {"stage": 3, "groups": 2}),
    "3": ("3", {"stage": 3}),
    "3 with optimizer": ("3 with optimizer", {"stage": 3}),
    "3 with optimizer, in stage 2": ("3 with optimizer", {"stage": 2}),
    "3, by its tag": ("3", {"stage": 2, "tag": "3"}),
    "tied": ("tied", {"stage": 3, "groups": 2, "tied": True}),
    "of universal": ("of universal", {"stage": 2, "groups": 2}),
    "of universal 3": ("of universal 3", {"stage": 3}),
}


@pytest.fixture(scope="module")
def merges(trained: Path) -> Path:
    """A folder with merges of the last two or three checkpoints, and what DeepSpeed held after loading."""
    (trained / "merges").mkdir()
    for name, (run, with_optimizer) in MERGES.items():
        points = trajectory.resolve([trained / run]).points[-3:]
        with engine.plan(points, MergeOptions(with_optimizer=with_optimizer)) as plan:
            engine.write(plan, trained / "merges" / name)
    jobs = []
    for name, (merge, how) in RESUMED.items():
        folder = trained / "merges" if "tag" in how else trained / "merges" / merge
        report = str(trained / f"{name} resumed")
        jobs.append({"what": "resume", "folder": str(folder), "report": report, **how})
    run_jobs(trained, jobs)
    return trained


@pytest.mark.parametrize("name", RESUMED)
def test_deepspeed_goes_on_from_a_merge(merges: Path, name: str) -> None:
    run, with_optimizer = MERGES[RESUMED[name][0]]
    told = json.loads((merges / f"{name} resumed.json").read_text())
    held = torch.load(merges / f"{name} resumed.pt")
    points = trajectory.resolve([merges / run]).points[-3:]
    newest = points[-1].step
    assert (told["global_steps"], told["note"]) == (newest, "mine")
    assert told["rate"] == pytest.approx(points[-1].learning_rate)
    assert told["counted"] == pytest.approx(
        [float(newest or 0) if with_optimizer else 0.0] * len(told["counted"])
    )
    assert told["moved"]
    assert np.isfinite(told["loss"])
    readers = [formats.open_checkpoint(point.path) for point in points]
    assert len(held["fp32"]) >= 20
    for key, found in held["fp32"].items():
        whole = np.sum([values(reader, key).double().numpy() for reader in readers], axis=0) / len(readers)
        expected = torch.from_numpy(np.asarray(whole, dtype=np.float32))
        assert torch.equal(found.reshape(expected.shape), expected), key
        live = held["live"][key].reshape(expected.shape)
        assert torch.equal(live, expected.to(live.dtype)), key
        for kind in MOMENTS:
            moment = torch.zeros(expected.shape)
            if with_optimizer:
                moment = values(readers[-1], moment_name(kind, key))
            assert torch.equal(held[kind][key].reshape(expected.shape), moment), (kind, key)
    for reader in readers:
        reader.close()


def test_the_merge_in_bf16_is_read(trained: Path) -> None:
    points = trajectory.resolve([trained / "stage 3"]).points[-2:]
    with engine.plan(points, MergeOptions(dtype=DType.BF16)) as plan:
        engine.write(plan, trained / "bf16")
    saved = torch.load(trained / "bf16" / "zero" / "odd" / "fp32.pt")
    assert saved["param"].dtype is torch.bfloat16
