"""Lightning, DeepSpeed, megatron-core and torchtitan go on from what `pma init` writes: what they load is
what the mode says, the first loss is the merge's, the rate that of the step.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pma import formats, trajectory, verbs
from pma.errors import UsageError
from pma.formats.deepspeed_layout import moment_name
from pma.testing.distributed import flattened, load_dcp, torchrun
from pma.trajectory import Window
from pma.verbs import Choice

from .test_deepspeed import run_jobs, values

MODES = ("newest", "second-moment", "average", "reset")
FIXTURES = Path(__file__).parents[1] / "formats" / "fixtures"
pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own, many and of every version


def init(run: Path, out: Path, mode: str, before: int | None = None) -> verbs.Restart:
    return verbs.init(Choice(paths=(run,), window=Window(last=3)), out, optimizer=mode, before_step=before)


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    whole = np.sum([t.double().numpy() for t in tensors], axis=0, dtype=np.float64) / len(tensors)
    return torch.from_numpy(np.asarray(whole, dtype=np.float32))


def of_mode(mode: str, kind: str, each: list[torch.Tensor]) -> torch.Tensor:
    """What a moment of a parameter is to be, from those of the window."""
    if mode == "average":
        return mean(each)
    zero = mode == "reset" or (mode == "second-moment" and kind == "exp_avg")
    return torch.zeros_like(each[-1]) if zero else each[-1]


# ---- Lightning ----


@pytest.fixture(scope="module")
def line() -> Any:
    """A module that notes its losses and rates by step, of a schedule that falls each step."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Line(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
            self.losses: dict[int, float] = {}
            self.rates: dict[int, float] = {}
            self.batches: dict[int, torch.Tensor] = {}

        def loss(self, x: torch.Tensor) -> torch.Tensor:
            return (self.inner(x) - x.sum(1, keepdim=True)).square().mean()

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self.loss(batch[0])
            self.losses[self.global_step + 1] = float(loss.detach())
            self.batches[self.global_step + 1] = batch[0]
            self.rates[self.global_step + 1] = self.optimizers().param_groups[0]["lr"]
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return lightning, Line


def data() -> Any:
    torch.manual_seed(0)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(96, 4)), batch_size=8)


def fitted(line: Any, folder: Path, steps: int, resume: Path | None = None) -> Any:
    lightning, module_class = line
    every = lightning.pytorch.callbacks.ModelCheckpoint(
        folder / "checkpoints", every_n_train_steps=2, save_top_k=-1, monitor=None
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        default_root_dir=folder, max_steps=steps, accelerator="cpu", callbacks=[every], **quiet
    )
    module = module_class()
    trainer.fit(module, data(), ckpt_path=resume)
    return module, trainer


@pytest.fixture(scope="module")
def fit(line: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("lightning")
    return folder / "checkpoints", fitted(line, folder, 8)[0]


@pytest.mark.parametrize("mode", MODES)
def test_lightning_goes_on(line: Any, fit: tuple[Path, Any], tmp_path: Path, mode: str) -> None:
    run, whole = fit
    made = init(run, tmp_path / "out", mode, before=8)
    (out,) = (tmp_path / "out").glob("*.ckpt")
    assert made.resume_command == f'trainer.fit(model, ckpt_path="{out}")'
    sources = [torch.load(path, weights_only=False) for path in sorted(run.glob("*.ckpt"))[:3]]
    written = torch.load(out, weights_only=False)
    for name, tensor in written["state_dict"].items():
        assert torch.equal(tensor, mean([source["state_dict"][name] for source in sources]))
    for number, kept in written["optimizer_states"][0]["state"].items():
        states = [source["optimizer_states"][0]["state"][number] for source in sources]
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(kept[kind], of_mode(mode, kind, [state[kind] for state in states]))
        assert kept["step"] == (0 if mode == "reset" else 6)
    merged = line[1]()
    merged.load_state_dict(written["state_dict"])
    module, trainer = fitted(line, tmp_path / "on", 8, out)
    assert trainer.global_step == 8
    assert module.rates == {step: whole.rates[step] for step in (7, 8)}
    # Lightning itself begins at the first batch again, unless the data loader keeps its own state
    assert module.losses[7] == pytest.approx(float(merged.loss(module.batches[7]).detach()), abs=1e-6)


# ---- DeepSpeed ----

STAGES: dict[str, dict[str, Any]] = {"2": {"stage": 2, "groups": 2}, "3": {"stage": 3}}


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ZeRO runs of four steps, what each mode makes of the first three, and what DeepSpeed then held."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("zero")
    trains = [
        {"folder": str(folder / name), "report": str(folder / f"{name} told"), "steps": 4, **how}
        for name, how in STAGES.items()
    ]
    run_jobs(folder, trains)
    jobs = []
    for name, how in STAGES.items():
        for mode in MODES:
            out = folder / f"{name} {mode}"
            init(folder / name, out, mode, before=4)
            jobs.append({"what": "resume", "folder": str(out), "report": f"{out} resumed", **how})
    run_jobs(folder, jobs)
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_goes_on(zero: Path, stage: str, mode: str) -> None:
    told = json.loads((zero / f"{stage} {mode} resumed.json").read_text())
    held = torch.load(zero / f"{stage} {mode} resumed.pt")
    points = trajectory.resolve([zero / stage]).points
    assert [point.step for point in points] == [1, 2, 3, 4]
    assert told["global_steps"] == 3
    assert told["rate"] == pytest.approx(points[2].learning_rate)
    assert told["rate"] != pytest.approx(points[1].learning_rate)
    assert told["moved"]
    assert told["counted"] == pytest.approx([0.0 if mode == "reset" else 3.0] * len(told["counted"]))
    readers = [formats.open_checkpoint(point.path) for point in points[:3]]
    for key, found in held["fp32"].items():
        expected = mean([values(reader, key) for reader in readers])
        assert torch.equal(found.reshape(expected.shape), expected), key
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = [values(reader, moment_name(kind, key)) for reader in readers]
            assert torch.equal(held[kind][key].reshape(expected.shape), of_mode(mode, kind, moments)), key
    for reader in readers:
        reader.close()
    assert told["loss"] == pytest.approx(loss_of(held["live"]), rel=0.01)  # computed in bf16


def loss_of(live: dict[str, torch.Tensor]) -> float:
    """The loss of the weights on the first rank's data of the fixture's step 1000, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=33, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    llama = {name.removeprefix("llama."): t.float() for name, t in live.items() if name.startswith("llama.")}
    model.load_state_dict(llama)
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(100 * 1000))
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
    return float(loss + (live["odd"].float() ** 2).sum())


# ---- Megatron ----


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    folder = tmp_path_factory.mktemp("megatron") / "run"
    torchrun(FIXTURES / "save_megatron.py", 2, "--out", folder, "--steps", 10, 20, 30, 40)
    return folder


@pytest.mark.parametrize("mode", MODES[:3])
def test_megatron_loads_everything_on_four_ranks(megatron: Path, tmp_path: Path, mode: str) -> None:
    made = init(megatron, tmp_path / "out", mode, before=40)
    assert f"--load {tmp_path / 'out'}" in made.resume_command
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "30"
    program = Path(__file__).with_name("megatron_state.py")
    torchrun(program, 4, tmp_path / "out" / "iter_0000030", mode, 10, 20, 30)


def test_megatrons_count_of_steps_cannot_be_reset(megatron: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="counts the optimizer's steps in its common state"):
        init(megatron, tmp_path / "out", "reset")


def test_megatron_starts_another_stage(megatron: Path, tmp_path: Path) -> None:
    made = verbs.init(Choice(paths=(megatron,), window=Window(last=3)), tmp_path / "out", purpose="sft")
    assert "--finetune" in made.resume_command
    with closing(formats.open_checkpoint(tmp_path / "out")) as reader:
        assert not any(name.startswith("optimizer") for name in reader.tensors)


# ---- torchtitan ----


@pytest.fixture(scope="module")
def titan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by torchtitan's own checkpointer, saved every second step, and gone on from each mode by it."""
    if find_spec("torchtitan") is None:
        pytest.skip("torchtitan is not installed")
    folder = tmp_path_factory.mktemp("titan")
    program = Path(__file__).with_name("titan_run.py")
    torchrun(program, 2, folder, folder / "run")
    outs = [init(folder / "run" / "checkpoint", folder / mode, mode, before=7).path for mode in MODES]
    torchrun(program, 2, folder, folder / "resumed", *outs)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_torchtitan_goes_on(titan: Path, mode: str) -> None:
    whole, told = (json.loads((titan / f"{name}.json").read_text()) for name in ("run", mode))
    assert told["from"] == 6
    assert told["rates"] == {step: whole["rates"][step] for step in ("7", "8")}
    assert whole["rates"]["7"] != whole["rates"]["6"]
    assert told["counts"] == [0.0 if mode == "reset" else 6.0]
    sources = [flattened(load_dcp(titan / "run" / "checkpoint" / f"step-{step}")) for step in (2, 4, 6)]
    found = flattened(load_dcp(titan / mode))
    assert found.keys() == sources[-1].keys()
    moments = [name for name in found if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert len(moments) == 42
    for name in moments:
        each = [source[name] for source in sources]
        assert torch.equal(found[name], of_mode(mode, name.rpartition(".")[2], each)), name
    assert torch.equal(found["output.weight"], mean([source["output.weight"] for source in sources]))
    assert told["losses"]["7"] == pytest.approx(loss_of_titan(found), abs=1e-5)
    assert (titan / "resumed" / mode / "checkpoint" / "step-8" / ".metadata").is_file()


def loss_of_titan(weights: dict[str, Any]) -> float:
    """The loss of a whole model of these weights on the data of step 7."""
    sys.path.insert(0, str(FIXTURES))
    from train_distributed import Llama, train_step

    model = Llama()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), 7, False)
