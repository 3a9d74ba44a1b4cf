"""A tiny Llama or OLMoE under the real transformers Trainer, with a rate that falls every step, so that a
schedule that began anew would show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from pma.evaluation.quiet import quiet_transformers

STEPS, EVERY, LENGTH, BATCH = 12, 3, 16, 4
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {**CONFIG, "model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}


class Data(torch.utils.data.Dataset):
    """Sequences of a language with few words."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(8, (LENGTH,), generator=generator).cumsum(0) % 64
        return {"input_ids": ids, "labels": ids}


def batch(step: int) -> torch.Tensor:
    """What the model sees in step `step`, counted from 1."""
    return torch.stack([Data()[i]["input_ids"] for i in range((step - 1) * BATCH, step * BATCH)])


def trainer(out: Path, config: dict[str, Any] = CONFIG, model: Any = None, **arguments: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
    from transformers.trainer_callback import PrinterCallback

    quiet_transformers()
    set_seed(0)
    settings = dict(config)
    if model is None:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    training: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "save_steps": EVERY,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    made = Trainer(model=model, args=TrainingArguments(**training | arguments), train_dataset=Data())
    made.remove_callback(PrinterCallback)
    return made


def logged(checkpoint: Path, what: str) -> dict[int, float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[what] for entry in history if what in entry}


def loss_on(checkpoint: Path, ids: torch.Tensor) -> float:
    """The loss of the model that transformers itself loads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def optimizer_state(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The fp64 mean, rounded once, by numpy."""
    stacked = np.stack([tensor.numpy().astype(np.float64) for tensor in tensors])
    return torch.from_numpy(np.asarray(stacked.sum(0) / len(tensors)).astype(np.float32))
