"""`pma init` of what accelerate's `save_state` wrote: `load_state` goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pma import verbs
from pma.verbs import Choice

from .trainer_runs import mean

MODES = ("newest", "second-moment", "average", "reset")
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


Parts = tuple[Accelerator, Any, Any, Any]


def prepared() -> Parts:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def step(
    number: int, accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any
) -> tuple[float, float]:
    """The loss and the rate of a step."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    accelerator.backward(loss)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return float(loss.detach()), rate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], tuple[float, float]]:
    """Three checkpoints, after steps 2, 4 and 6, and the loss and rate of step 7."""
    folder, parts = tmp_path_factory.mktemp("accelerate"), prepared()
    for number in range(1, 7):
        step(number, *parts)
        if number % 2 == 0:
            parts[0].save_state(str(folder / f"state_{number}"))
    return [folder / f"state_{number}" for number in (2, 4, 6)], step(7, *parts)


@pytest.mark.parametrize("mode", MODES)
def test_accelerate_goes_on(run: tuple[list[Path], tuple[float, float]], tmp_path: Path, mode: str) -> None:
    paths, (_, rate) = run
    made = verbs.init(Choice(paths=tuple(paths)), tmp_path / "out", optimizer=mode)
    assert made.resume_command == f'accelerator.load_state("{tmp_path / "out"}")'
    assert "scheduler.bin" in made.kept
    assert "random_states_0.pkl" in made.kept
    parts = prepared()
    parts[0].load_state(str(tmp_path / "out"))
    states = [torch.load(path / "optimizer.bin", weights_only=True)["state"] for path in paths]
    for number, kept in parts[2].state_dict()["state"].items():
        each = [state[number] for state in states]
        for kind in ("exp_avg", "exp_avg_sq"):
            zero = mode == "reset" or (mode == "second-moment" and kind == "exp_avg")
            expected = torch.zeros_like(each[-1][kind]) if zero else each[-1][kind]
            expected = mean([s[kind] for s in each]) if mode == "average" else expected
            assert torch.equal(kept[kind], expected)
        assert kept["step"] == (0 if mode == "reset" else 6)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(7))
    merged = float((parts[1](x) - x.sum(1, keepdim=True)).square().mean().detach())
    assert step(7, *parts) == (merged, rate)
