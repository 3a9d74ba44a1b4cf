"""`pma init` of plain files of torch.save: loops that save as litgpt and nanochat do go on from each mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pma import engine, verbs
from pma.errors import InputError, MismatchError, UsageError
from pma.trajectory import Window
from pma.verbs import Choice

MODES = ("newest", "second-moment", "average", "reset")
STEPS = (3, 6, 9)
LAST = 12


class CountingAdam(torch.optim.Optimizer):
    """Adam with a count of steps that is a plain number, as nanochat's own optimizers keep it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p]
                if not kept:
                    kept |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                kept["step"] += 1
                kept["exp_avg"].lerp_(p.grad, 0.1)
                kept["exp_avg_sq"].lerp_(p.grad**2, 0.05)
                first = kept["exp_avg"] / (1 - 0.9 ** kept["step"])
                second = kept["exp_avg_sq"] / (1 - 0.95 ** kept["step"])
                p.add_(first / (second.sqrt() + 1e-8), alpha=-group["lr"])


class Loop:
    """A model, its optimizer, a rate that falls every step, and data of each step."""

    def __init__(self, kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        self.optimizer = kind(self.model.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 20)
        self.step = 0
        self.losses: dict[int, float] = {}
        self.rates: dict[int, float] = {}

    def loss(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator)
        return (self.model(x) - x[:, :3].sin()).square().mean()

    def train(self, until: int, save: Callable[[Loop], None] | None = None) -> None:
        while self.step < until:
            self.step += 1
            loss = self.loss(self.step)
            loss.backward()
            self.rates[self.step] = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.losses[self.step] = float(loss.detach())
            if save is not None and self.step in STEPS:
                save(self)


def save_as_litgpt(run: Path) -> Callable[[Loop], None]:
    def save(loop: Loop) -> None:
        folder = run / f"step-{loop.step:08d}"
        folder.mkdir(parents=True)
        state = {
            "model": loop.model.state_dict(),
            "optimizer": loop.optimizer.state_dict(),
            "scheduler": loop.scheduler.state_dict(),
            "iter_num": 4 * loop.step,
            "step_count": loop.step,
            "rng": torch.get_rng_state(),
        }
        torch.save(state, folder / "lit_model.pth")

    return save


def load_as_litgpt(out: Path, loop: Loop) -> None:
    state = torch.load(out / "lit_model.pth", weights_only=True)
    loop.model.load_state_dict(state["model"])
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.scheduler.load_state_dict(state["scheduler"])
    assert state["rng"].dtype == torch.uint8
    loop.step = state["step_count"]


def save_as_nanochat(run: Path) -> Callable[[Loop], None]:
    def save(loop: Loop) -> None:
        run.mkdir(exist_ok=True)
        torch.save(loop.model.state_dict(), run / f"model_{loop.step:06d}.pt")
        torch.save(loop.optimizer.state_dict(), run / f"optim_{loop.step:06d}_rank0.pt")
        meta = {"step": loop.step, "scheduler": loop.scheduler.last_epoch}
        (run / f"meta_{loop.step:06d}.json").write_text(json.dumps(meta))

    return save


def load_as_nanochat(out: Path, loop: Loop) -> None:
    """As nanochat's `load_checkpoint`, by the step in the names; its loop computes the rate from the step."""
    loop.step = 9
    loop.model.load_state_dict(torch.load(out / "model_000009.pt", weights_only=True))
    loop.optimizer.load_state_dict(torch.load(out / "optim_000009_rank0.pt", weights_only=True))
    assert json.loads((out / "meta_000009.json").read_text())["step"] == 9
    loop.scheduler.last_epoch = 9


LOOPS = {
    "litgpt": (torch.optim.AdamW, save_as_litgpt, load_as_litgpt),
    "nanochat": (CountingAdam, save_as_nanochat, load_as_nanochat),
}


Trained = tuple[str, Path, Loop]


@pytest.fixture(scope="module", params=LOOPS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    kind, save, _ = LOOPS[request.param]
    run, loop = tmp_path_factory.mktemp("loop") / "run", Loop(kind)
    loop.train(LAST, save(run))
    return request.param, run, loop


def init(run: Path, out: Path, mode: str, last: int = 3) -> verbs.Restart:
    return verbs.init(Choice(paths=(run,), window=Window(last=last)), out, optimizer=mode)


def loaded(name: str, out: Path) -> Loop:
    kind, _, load = LOOPS[name]
    loop = Loop(kind)
    load(out, loop)
    return loop


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.from_numpy((np.sum([t.double().numpy() for t in tensors], 0) / len(tensors)).astype("f4"))


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_goes_on(trained: Trained, tmp_path: Path, mode: str) -> None:
    name, run, whole = trained
    made = init(run, tmp_path / "out", mode)
    assert made.step == 9
    loop = loaded(name, tmp_path / "out")
    expected = {"reset": 0}.get(mode, 9)
    assert all(kept["step"] == expected for kept in loop.optimizer.state.values())
    merged = float(loop.loss(10).detach())
    loop.train(LAST)
    assert loop.losses[10] == merged
    assert loop.rates == {step: whole.rates[step] for step in (10, 11, 12)}
    assert all(kept["step"] == expected + 3 for kept in loop.optimizer.state.values())


def source_of(name: str, run: Path, step: int) -> Loop:
    """A checkpoint of the run as torch loads it."""
    if name == "litgpt":
        return loaded(name, run / f"step-{step:08d}")
    loop = Loop(CountingAdam)
    loop.model.load_state_dict(torch.load(run / f"model_{step:06d}.pt"))
    loop.optimizer.load_state_dict(torch.load(run / f"optim_{step:06d}_rank0.pt"))
    return loop


@pytest.mark.parametrize("mode", MODES)
def test_what_is_loaded_is_what_the_mode_says(trained: Trained, tmp_path: Path, mode: str) -> None:
    name, run, _ = trained
    init(run, tmp_path / "out", mode)
    found, sources = loaded(name, tmp_path / "out"), [source_of(name, run, step) for step in STEPS]
    for number, parameter in enumerate(found.model.parameters()):
        theirs = [list(source.model.parameters())[number] for source in sources]
        assert torch.equal(parameter, mean([p.detach() for p in theirs]))
        state = found.optimizer.state[parameter]
        states = [source.optimizer.state[p] for source, p in zip(sources, theirs, strict=True)]
        for kind, zero in (("exp_avg", mode in ("second-moment", "reset")), ("exp_avg_sq", mode == "reset")):
            each = [s[kind] for s in states]
            expected = mean(each) if mode == "average" else torch.zeros_like(each[-1]) if zero else each[-1]
            assert torch.equal(state[kind], expected), kind


def test_a_merge_of_one_goes_on_to_the_same_weights(trained: Trained, tmp_path: Path) -> None:
    name, run, whole = trained
    init(run, tmp_path / "out", "newest", last=1)
    loop = loaded(name, tmp_path / "out")
    loop.train(LAST)
    for found, expected in zip(loop.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert engine.verify(tmp_path / "out", samples=None).findings == ()


def test_commands(trained: Trained, tmp_path: Path) -> None:
    name, run, _ = trained
    made = init(run, tmp_path / "out of it", "newest")
    if name == "litgpt":
        assert made.resume_command == f"litgpt pretrain … --resume '{tmp_path}/out of it/lit_model.pth'"
    else:
        assert "--resume-from-step=9" in made.resume_command
        assert "base_checkpoints/TAG" in made.notes[0]


def test_a_plain_count_beside_the_weights_is_not_reset(tmp_path: Path) -> None:
    loop = Loop(CountingAdam)
    loop.train(9, save_as_litgpt(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"optimizer/state/0/step is a plain number"):
        init(tmp_path / "run", tmp_path / "out", "reset")
    init(tmp_path / "run", tmp_path / "out", "average")


def test_other_groups_are_not_averaged(tmp_path: Path) -> None:
    loop = Loop()
    loop.train(9, save_as_litgpt(tmp_path / "run"))
    file = tmp_path / "run" / "step-00000006" / "lit_model.pth"
    state = torch.load(file)
    state["optimizer"]["param_groups"][0]["params"].reverse()
    torch.save(state, file)
    with pytest.raises(MismatchError, match="in other groups"):
        init(tmp_path / "run", tmp_path / "out", "average")


def test_nanochat_without_its_optimizer(tmp_path: Path) -> None:
    loop = Loop(CountingAdam)
    loop.train(9, save_as_nanochat(tmp_path / "run"))
    (tmp_path / "run" / "optim_000009_rank0.pt").unlink()
    with pytest.raises(InputError, match="stores no optimizer's state"):
        init(tmp_path / "run", tmp_path / "out", "newest")


def test_state_that_cannot_be_written_again_is_an_error(tmp_path: Path) -> None:
    """A view with strides inside the optimizer's state: dropping it would begin the optimizer anew."""
    loop = Loop()
    loop.train(9, save_as_litgpt(tmp_path / "run"))
    file = tmp_path / "run" / "step-00000009" / "lit_model.pth"
    state = torch.load(file)
    moment = state["optimizer"]["state"][0]
    moment["exp_avg"] = moment["exp_avg"].T.contiguous().T
    torch.save(state, file)
    with pytest.raises(InputError, match=r"cannot be carried: optimizer\."):
        init(tmp_path / "run", tmp_path / "out", "newest")
