"""The callback under the real Trainer: files with the checkpoint's own names, per-step means, resume, merged
loss.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from pma.errors import MissingExtra
from pma.formats import interval_mean
from pma.online import RecorderCallback

DENSE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
TIED = {**DENSE, "tie_word_embeddings": True}
MIXTURE = {**DENSE, "model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}


class Keep(TrainerCallback):
    """What `save_pretrained` would have stored at each step, written by transformers itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        model.save_pretrained(self.folder / str(state.global_step))


class Stop(BaseException):
    """Stands in for a kill."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            raise Stop


def make_trainer(out: Path, model: dict, **arguments: object) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (48, 8), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    torch.manual_seed(0)
    settings = {**model}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, attention_dropout=0.1)
    return Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=4,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=data,
        eval_dataset=data[:10],
    )


@pytest.fixture(autouse=True)
def quiet() -> None:
    from pma.evaluation.quiet import quiet_transformers

    quiet_transformers()


@pytest.mark.parametrize("model", [DENSE, TIED, MIXTURE], ids=["dense", "tied", "mixture"])
def test_means_have_the_checkpoints_names_and_are_of_every_step(tmp_path: Path, model: dict) -> None:
    trainer = make_trainer(tmp_path / "run", model)
    trainer.add_callback(RecorderCallback(trainer, on_cpu=True))
    trainer.add_callback(Keep(tmp_path / "steps"))
    trainer.train()
    for first, last in ((1, 4), (5, 8)):
        checkpoint = tmp_path / "run" / f"checkpoint-{last}"
        path = interval_mean.find(checkpoint)
        record = interval_mean.read_record(path)
        assert (record.first_step, record.last_step, record.updates) == (first, last, 4)
        assert record.averaged == "weights"
        stored, mean = load_file(checkpoint / "model.safetensors"), load_file(path)
        assert {name: tensor.shape for name, tensor in mean.items()} == {
            name: tensor.shape for name, tensor in stored.items()
        }
        steps = [
            load_file(tmp_path / "steps" / str(step) / "model.safetensors") for step in range(first, last + 1)
        ]
        for name, tensor in mean.items():
            total = steps[0][name].numpy()
            for step in steps[1:]:
                total = total + step[name].numpy()
            assert tensor.numpy().tobytes() == (total / np.float32(4)).tobytes(), name
    if model is MIXTURE:
        assert any(".experts.3." in name for name in mean)


def test_the_averages_loss_is_logged_beside_the_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", DENSE, eval_strategy="steps", eval_steps=4)
    callback = RecorderCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    merged = {e["step"]: e["eval_merged_loss"] for e in trainer.state.log_history if "eval_merged_loss" in e}
    raw = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert merged.keys() == raw.keys() == {4, 8}
    trainer.remove_callback(callback)
    # the same as of a model that is loaded with the stored mean
    for step, loss in merged.items():
        path = interval_mean.find(tmp_path / "run" / f"checkpoint-{step}")
        trainer.model.load_state_dict(load_file(path))
        assert trainer.evaluate()["eval_loss"] == loss != raw[step]
    logged = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    assert any("eval_merged_loss" in entry for entry in logged["log_history"])


def test_training_is_the_same_with_the_callback(tmp_path: Path) -> None:
    for name, recorded in (("with", True), ("without", False)):
        trainer = make_trainer(tmp_path / name, DENSE, eval_strategy="steps", eval_steps=2)
        if recorded:
            trainer.add_callback(RecorderCallback(trainer, tracks=(0.1,), window=1))
        trainer.train()
    with_it, without = (
        load_file(tmp_path / n / "checkpoint-8/model.safetensors") for n in ("with", "without")
    )
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_a_best_checkpoint_can_be_chosen_by_the_averages_loss(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run",
        DENSE,
        eval_strategy="steps",
        eval_steps=4,
        metric_for_best_model="eval_merged_loss",
        greater_is_better=False,
    )
    trainer.add_callback(RecorderCallback(trainer))
    trainer.train()
    assert trainer.state.best_metric is not None


def test_a_stopped_run_goes_on_to_the_same_files(tmp_path: Path) -> None:
    settings = {"window": 2, "tracks": (0.1, 0.2)}
    for name in ("whole", "stopped"):
        trainer = make_trainer(tmp_path / name, DENSE)
        trainer.add_callback(RecorderCallback(trainer, **settings))
        if name == "stopped":
            trainer.add_callback(StopAt(6))
            with pytest.raises(Stop):
                trainer.train()
            trainer = make_trainer(tmp_path / name, DENSE)
            trainer.add_callback(RecorderCallback(trainer, **settings))
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-4"))
        else:
            trainer.train()
    for file in (interval_mean.MEAN_FILE, "pma_recorder/state.safetensors"):
        files = [tmp_path / name / "checkpoint-8" / file for name in ("whole", "stopped")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_resume_without_state_says_that_tracks_begin_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path / "run", DENSE)
    trainer.train()
    trainer = make_trainer(tmp_path / "run", DENSE, save_strategy="no")
    trainer.add_callback(RecorderCallback(trainer, tracks=(0.1,)))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert "begin anew" in caplog.text


def test_without_their_trainers_the_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import pma.online

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "pma.online.trainer_callback")
    with pytest.raises(MissingExtra, match=r"pma-llm\[train\]"):
        _ = pma.online.RecorderCallback
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "pma.online.lightning_callback", raising=False)
    with pytest.raises(MissingExtra, match=r"pma-llm\[lightning\]"):
        _ = pma.online.LightningRecorder
