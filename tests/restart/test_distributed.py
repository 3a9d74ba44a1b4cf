"""`pma init` of distributed checkpoints: two FSDP2 processes go on from each mode; what they load is what the
mode says, the first loss is the merge's, the rate that of the step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pma import verbs
from pma.errors import InputError, UsageError
from pma.testing.distributed import flattened, in_ranks, load_dcp
from pma.trajectory import Window
from pma.verbs import Choice

FIXTURES = Path(__file__).parents[1] / "formats" / "fixtures"
MODES = ("newest", "second-moment", "average", "reset")
WATCHED = "layers.0.attention.wq.weight"
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 2, 4, 6 and 7, and what each mode makes of the first three, gone on from by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    profiles = ("torchtitan", "accelerate", "plain")
    script = FIXTURES / "train_distributed.py"
    in_ranks(script, 2, "--profile", *profiles, "--out", folder, "--steps", 2, 4, 6, 7)
    outs = [init(folder / "torchtitan/checkpoint", folder / mode, mode).path for mode in MODES]
    one = init(folder / "torchtitan/checkpoint", folder / "one", "newest", last=1).path
    (folder / "told").mkdir()
    in_ranks(Path(__file__).parent / "fixtures" / "resume_titan.py", 2, folder / "told", *outs, one)
    return folder


def init(run: Path, out: Path, mode: str, last: int = 3) -> verbs.Restart:
    return verbs.init(Choice(paths=(run,), window=Window(last=last)), out, optimizer=mode, before_step=7)


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.from_numpy((np.sum([t.double().numpy() for t in tensors], 0) / len(tensors)).astype("f4"))


def loss_on(weights: dict[str, Any], step: int) -> float:
    """The loss of a whole model of these weights on the data of a step."""
    sys.path.insert(0, str(FIXTURES))
    from train_distributed import Llama, train_step

    model = Llama()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), step, False)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_go_on(runs: Path, mode: str) -> None:
    told = torch.load(runs / "told" / f"{mode}.pt")
    assert told["step"] == 6
    assert told["rates"] == pytest.approx([0.94e-3, 0.93e-3], rel=1e-6)  # as in the run that went on itself
    merged = flattened(load_dcp(runs / mode))
    assert told["losses"][0] == pytest.approx(loss_on(merged, 7), abs=1e-5)
    assert told["losses"][1] < 6


@pytest.mark.parametrize("mode", MODES)
def test_what_is_loaded_is_what_the_mode_says(runs: Path, mode: str) -> None:
    told = torch.load(runs / "told" / f"{mode}.pt")["state"]
    sources = [flattened(load_dcp(runs / f"torchtitan/checkpoint/step-{step}")) for step in (2, 4, 6)]
    first, second = (
        [source[f"optimizer.state.{WATCHED}.{kind}"] for source in sources]
        for kind in ("exp_avg", "exp_avg_sq")
    )
    zero = torch.zeros_like(first[-1])
    expected = {
        "newest": (first[-1], second[-1], 6),
        "second-moment": (zero, second[-1], 6),
        "average": (mean(first), mean(second), 6),
        "reset": (zero, zero, 0),
    }[mode]
    assert torch.equal(told["exp_avg"], expected[0])
    assert torch.equal(told["exp_avg_sq"], expected[1])
    assert told["step"] == expected[2]
    merged = flattened(load_dcp(runs / mode))
    assert torch.equal(merged[WATCHED], mean([source[WATCHED] for source in sources]))
    for name in (
        "train_state.step",
        "lr_scheduler.last_epoch",
        "lr_scheduler._last_lr",
        "dataloader.dp_rank_0",
    ):
        assert merged[name] == sources[-1][name]


def test_a_merge_of_one_goes_on_like_the_run_itself(runs: Path) -> None:
    told = torch.load(runs / "told" / "one.pt")
    assert told["losses"][1] == loss_of_step_8(runs)


def loss_of_step_8(runs: Path) -> float:
    weights = flattened(load_dcp(runs / "torchtitan/checkpoint/step-7"))
    return pytest.approx(loss_on(weights, 8), abs=1e-5)


def test_commands(runs: Path, tmp_path: Path) -> None:
    made = init(runs / "torchtitan/checkpoint", tmp_path / "a", "newest")
    assert f"--checkpoint.initial_load_path {tmp_path / 'a'} " in made.resume_command
    assert "still empty" in made.notes[0]
    assert any("exp_avg (21)" in kept for kept in made.kept)
    chosen = Choice(paths=(runs / "accelerate",), window=Window(last=3))
    made = verbs.init(chosen, tmp_path / "b", optimizer="average")
    assert f'resume_from_checkpoint="{tmp_path / "b"}"' in made.resume_command
    assert "exp_avg (21)" in made.averaged
    assert "trainer_state.json" in made.kept
    start = verbs.init(
        Choice(paths=(runs / "torchtitan/checkpoint",), window=Window(last=3)), tmp_path / "c", purpose="ct"
    )
    assert not any(name.startswith("optimizer") for name in flattened(load_dcp(start.path)))


def test_the_moments_of_accelerate_are_in_a_folder_beside(runs: Path, tmp_path: Path) -> None:
    chosen = Choice(paths=(runs / "accelerate",), window=Window(last=3))
    verbs.init(chosen, tmp_path / "out", optimizer="average", before_step=7)
    found = flattened(load_dcp(tmp_path / "out" / "optimizer_0"))
    sources = [flattened(load_dcp(runs / f"accelerate/checkpoint-{s}" / "optimizer_0")) for s in (2, 4, 6)]
    for kind in ("exp_avg", "exp_avg_sq"):
        name = f"optimizer.state.{WATCHED}.{kind}"
        assert torch.equal(found[name], mean([source[name] for source in sources]))


def test_weights_alone_cannot_be_gone_on_from(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stores no optimizer's state.*--for ct"):
        init(runs / "plain", tmp_path / "out", "newest")


def test_counts_that_are_stored_as_objects_are_not_reset(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    for step in (1, 2):
        kept = {"exp_avg": torch.ones(3), "step": step}
        states = {"w": torch.ones(3), "optimizer": {"state": {"w": kept}}, "train_state": {"step": step}}
        dcp.save(states, checkpoint_id=tmp_path / "run" / f"step-{step}", no_dist=True)
    chosen = Choice(paths=(tmp_path / "run",), window=Window(last=2))
    with pytest.raises(UsageError, match="stored as an object"):
        verbs.init(chosen, tmp_path / "out", optimizer="reset")
    verbs.init(chosen, tmp_path / "out", optimizer="second-moment")
