"""Checkpoints of a real transformers Trainer, merged; the Trainer goes on from the merge."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pma import verbs
from pma.trajectory import Window
from pma.verbs import Choice

VOCABULARY, LENGTH, BATCH = 64, 16, 8
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def texts(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Tokens that count up, from random starts."""
    starts = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    rows = [(start + torch.arange(LENGTH)) % VOCABULARY for start in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model: PreTrainedModel, folder: Path, steps: int, data: list[dict[str, torch.Tensor]]) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    made: Any = Trainer(model=model, args=arguments, train_dataset=data)
    made.remove_callback(PrinterCallback)
    made.train()
    return made


def loss_of(model: PreTrainedModel, data: list[dict[str, torch.Tensor]]) -> float:
    rows = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        return float(model.eval()(input_ids=rows, labels=rows).loss)


@pytest.mark.parametrize("tied", [False, True])
def test_the_trainer_goes_on_from_a_merge(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    train(LlamaForCausalLM(config), tmp_path / "run", 6, texts(48, seed=1))
    sources = [tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4, 6)]
    verbs.merge(Choice(paths=(tmp_path / "run",), window=Window(last=3)), tmp_path / "out")

    each = [LlamaForCausalLM.from_pretrained(source) for source in sources]
    mean = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            stacked = torch.stack([model.get_parameter(name).double() for model in each])
            parameter.copy_(stacked.mean(0))
    merge = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    unseen = texts(BATCH, seed=2)
    expected = loss_of(mean, unseen)
    assert loss_of(merge, unseen) == expected
    assert all(loss_of(model, unseen) != expected for model in each)

    before = {name: parameter.detach().clone() for name, parameter in merge.named_parameters()}
    trainer = train(merge, tmp_path / "on", 1, unseen)
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(expected, rel=1e-3)
    assert math.isfinite(first)
    assert not any(torch.equal(before[name], value) for name, value in merge.named_parameters())
    assert loss_of(merge, unseen) < expected
