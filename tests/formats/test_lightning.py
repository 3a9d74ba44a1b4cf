"""Checkpoints of a real Lightning Trainer, merged and loaded back by Lightning."""

import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pma import formats, trajectory, verbs
from pma.engine import MergeOptions
from pma.trajectory import Window
from pma.types import Role
from pma.verbs import Choice

lightning = pytest.importorskip(
    "lightning", reason="lightning is not installed: pip install 'pma-llm[lightning]'"
)
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # lightning's own, many and of every version


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """A line, with hyperparameters and a schedule."""

    def __init__(self, width: int = 4, rate: float = 0.125, out: Path = Path("here")) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(width, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
        )

    def training_step(self, batch: Any, _: int) -> Any:
        loss = self.inner(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data() -> Any:
    torch.manual_seed(0)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 4)), batch_size=8)


def trainer(folder: Path, steps: int, *callbacks: Any) -> Any:
    return lightning.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=list(callbacks),
    )


def fit(folder: Path, *callbacks: Any) -> list[Path]:
    torch.manual_seed(1)
    every = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_top_k=-1, monitor="loss")
    trainer(folder, 6, every, *callbacks).fit(Module(), data())
    return sorted((folder / "checkpoints").glob("*.ckpt"))


def loaded(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


def assert_mean(out: dict[str, torch.Tensor], sources: list[dict[str, torch.Tensor]]) -> None:
    assert out.keys() == sources[-1].keys()
    for name, tensor in out.items():
        if tensor.is_floating_point():
            total = np.sum([s[name].double().numpy() for s in sources], axis=0, dtype=np.float64)
            expected = torch.from_numpy(np.asarray(total / len(sources))).to(tensor.dtype)
        else:
            expected = sources[-1][name]
        assert torch.equal(tensor, expected), name


def test_a_run_is_merged_and_loaded_back(tmp_path: Path) -> None:
    paths = fit(tmp_path / "run")
    assert [path.name for path in paths] == [
        "epoch=0-step=2.ckpt",
        "epoch=0-step=4.ckpt",
        "epoch=0-step=6.ckpt",
    ]
    found = trajectory.discover([tmp_path / "run" / "checkpoints"])
    assert [point.step for point in found.points] == [2, 4, 6]
    assert [point.learning_rate for point in found.points] == [0.125, 0.0625, 0.03125]
    choice = Choice(paths=(tmp_path / "run" / "checkpoints",), window=Window(last=3))
    verbs.merge(choice, tmp_path / "out")
    out = tmp_path / "out" / paths[-1].name
    assert_mean(loaded(out)["state_dict"], [loaded(path)["state_dict"] for path in paths])
    assert loaded(out).keys() >= {"hyper_parameters", "pytorch-lightning_version", "global_step", "loops"}
    assert not loaded(out).keys() & {"optimizer_states", "callbacks", "lr_schedulers"}
    module = Module.load_from_checkpoint(out, weights_only=True)
    assert (module.hparams.width, module.hparams.rate, str(module.hparams.out)) == (4, 0.125, "here")
    before = [p.clone() for p in module.parameters()]
    trainer(tmp_path / "on", 1).fit(module, data())  # one step of training from the merge
    assert not all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_training_goes_on_from_a_merge_that_carries_the_optimizer(tmp_path: Path) -> None:
    paths = fit(tmp_path / "run")
    with closing(formats.open_checkpoint(paths[-1])) as reader:
        roles = {spec.role for name, spec in reader.tensors.items() if name.startswith("optimizer_states/")}
        assert roles == {Role.MOMENT, Role.OTHER}
    verbs.merge(Choice(paths=tuple(paths)), tmp_path / "out", MergeOptions(with_optimizer=True))
    out = tmp_path / "out" / paths[-1].name
    before, after = loaded(paths[-1]), loaded(out)
    assert after.keys() == before.keys()
    moments = (each["optimizer_states"][0]["state"][0]["exp_avg"] for each in (before, after))
    assert torch.equal(*moments)
    assert_mean(after["state_dict"], [loaded(path)["state_dict"] for path in paths])
    on = trainer(tmp_path / "on", 7)
    module = Module()
    on.fit(module, data(), ckpt_path=out, weights_only=False)
    assert on.global_step == 7
    moved = [(p - after["state_dict"][name]).abs().max() for name, p in module.named_parameters()]
    assert all(0 < float(most) < 0.05 for most in moved)  # a step of Adam at a rate of 0.03


def test_with_an_averaging_callback_the_live_weights_are_merged(tmp_path: Path) -> None:
    paths = fit(tmp_path / "run", EMAWeightAveraging(decay=0.5))
    values = [loaded(path) for path in paths]
    assert not torch.equal(
        values[-1]["state_dict"]["inner.0.weight"], values[-1]["current_model_state"]["inner.0.weight"]
    )
    verbs.merge(Choice(paths=tuple(paths)), tmp_path / "out")
    out = tmp_path / "out" / paths[-1].name
    assert not loaded(out).keys() & {"current_model_state", "averaging_state"}
    assert_mean(loaded(out)["state_dict"], [value["current_model_state"] for value in values])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Module.load_from_checkpoint(out, weights_only=True)
