"""Lightning's own fit with the recorder: means beside its checkpoints, resume, validation of the average."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from pma import formats
from pma.errors import UsageError
from pma.formats import interval_mean
from pma.online import LightningRecorder
from pma.types import Role

lightning = pytest.importorskip(
    "lightning", reason="lightning is not installed: pip install 'pma-llm[lightning]'"
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # lightning's own, many and of every version


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.register_buffer("adapted", torch.zeros(3))
        self.seen: dict[int, dict[str, np.ndarray]] = {}
        self.validated: list[float] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        self.adapted += 0.1
        # of the step and not of the batch: Lightning resumes in the middle of an epoch with its first batch
        rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(self.global_step))
        return self.net(rows).square().mean()

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.validated.append(float(self.net(batch[0]).square().mean()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Keep(Callback):
    """The weights after each optimizer step."""

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        state = pl_module.state_dict()
        if trainer.global_step not in pl_module.seen:  # else gradients accumulate
            pl_module.seen[trainer.global_step] = {name: t.numpy().copy() for name, t in state.items()}


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


def data() -> torch.utils.data.DataLoader:
    rows = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=4)


def fit(
    out: Path, recorder: LightningRecorder, *extra: Callback, resume: Path | None = None, **options: object
) -> Module:
    lightning.seed_everything(0, verbose=False)
    module = Module()
    top = options.pop("save_top_k", -1)
    saver = ModelCheckpoint(
        dirpath=out, filename="{step}", every_n_train_steps=4, save_top_k=top, monitor=None, save_last=False
    )
    trainer = lightning.Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        callbacks=[saver, recorder, Keep(), *extra],
        **options,
    )
    trainer.fit(module, data(), data() if "val_check_interval" in options else None, ckpt_path=resume)
    return module


def expected_mean(module: Module, steps: range, name: str) -> np.ndarray:
    total = module.seen[steps[0]][name]
    for step in steps[1:]:
        total = total + module.seen[step][name]
    return total / np.float32(len(steps))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_means_lie_beside_lightnings_checkpoints(tmp_path: Path, accumulate: int) -> None:
    module = fit(tmp_path, LightningRecorder(on_cpu=True), accumulate_grad_batches=accumulate)
    for last in (4, 8, 12):
        checkpoint = tmp_path / f"step={last}.ckpt"
        path = interval_mean.find(checkpoint)
        record = interval_mean.read_record(path)
        assert (record.first_step, record.last_step, record.updates) == (last - 3, last, 4)
        mean = load_file(path)
        with closing(formats.open_checkpoint(checkpoint)) as reader:
            stored = {n for n, s in reader.tensors.items() if s.role in (Role.PARAMETER, Role.BUFFER)}
        assert set(mean) == stored
        for name, found in mean.items():
            expected = expected_mean(module, range(last - 3, last + 1), name)
            assert found.tobytes() == expected.tobytes(), name


def test_a_killed_fit_goes_on_to_the_same_means(tmp_path: Path) -> None:
    settings = {"window": 2, "tracks": (0.1,)}
    fit(tmp_path / "whole", LightningRecorder(**settings))
    with pytest.raises(KeyError, match="killed"):
        fit(tmp_path / "killed", LightningRecorder(**settings), Stop(7))
    again = LightningRecorder(**settings)
    fit(tmp_path / "killed", again, resume=tmp_path / "killed" / "step=4.ckpt")
    for last in (8, 12):
        files = [interval_mean.find(tmp_path / n / f"step={last}.ckpt") for n in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes()
    states = [
        torch.load(tmp_path / n / "step=12.ckpt", weights_only=True)["callbacks"]["LightningRecorder"]
        for n in ("whole", "killed")
    ]
    assert states[0]["record"] == states[1]["record"]
    assert all(torch.equal(t, states[1]["tensors"][name]) for name, t in states[0]["tensors"].items())


def test_a_plain_recorder_adds_nothing_to_the_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, LightningRecorder())
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert not saved["callbacks"].get("LightningRecorder")


def test_validation_is_of_the_average_and_training_goes_on_the_same(tmp_path: Path) -> None:
    with_it = fit(tmp_path / "a", LightningRecorder(validate_average=True), val_check_interval=4)
    without = fit(tmp_path / "b", LightningRecorder(), val_check_interval=4)
    for name, value in without.seen[12].items():
        assert value.tobytes() == with_it.seen[12][name].tobytes()
    assert len(with_it.validated) == len(without.validated)
    assert with_it.validated != without.validated
    net = Module()
    net.load_state_dict(
        {n: torch.from_numpy(expected_mean(with_it, range(1, 5), n)) for n in with_it.seen[4]}
    )
    first = next(iter(data()))[0]
    sanity = len(with_it.validated) - 3 * len(data())
    assert with_it.validated[sanity] == pytest.approx(float(net.net(first).square().mean()), rel=1e-6)


def test_means_go_with_their_checkpoints(tmp_path: Path) -> None:
    fit(tmp_path, LightningRecorder(), save_top_k=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "step=12.ckpt",
        "step=12.pma_interval_mean.safetensors",
    ]


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[LightningRecorder()],
    )
    with pytest.raises(UsageError, match="2 optimizers"):
        trainer.fit(Two(), data())
