"""A tiny Llama trained under DeepSpeed, as a program for torchrun: `deepspeed_fixture.py JOBS`.

JOBS is a JSON file with a list of jobs, done one after the other in the same processes, because starting them
takes longest. `train` saves checkpoints and writes down what the engine then holds and what DeepSpeed reads
of them; `convert` makes a universal checkpoint by DeepSpeed's own converter; `resume` loads one, writes down
what the engine then holds, and trains a step.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do; `report` begins the names of files in which to write down."""

    folder: str
    what: str = "train"
    stage: int = 2
    precision: str = "bf16"
    accumulate: str = ""
    groups: int = 1
    steps: int = 3
    tied: bool = False
    elastic: bool = False
    tag: str | None = None
    report: str = ""


class Wrapped(nn.Module):
    """The Llama with what checkpoints must also hold: buffers, a frozen parameter, one of odd length."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=97, hidden_size=16, intermediate_size=33, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        self.llama = LlamaForCausalLM(config)
        self.frozen = nn.Parameter(torch.arange(7, dtype=torch.float32) / 7, requires_grad=False)
        self.odd = nn.Parameter(torch.linspace(-1, 1, 5))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.mean += 0.5
        out = self.llama(input_ids=tokens, labels=tokens)
        return out.loss + (self.odd**2).sum() + 0 * self.frozen.sum()


def engine_for(job: Job, *, universal: bool) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": job.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000,
    }
    if job.stage == 3:
        config["zero_optimization"] |= {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0}
    if job.elastic:
        config["zero_optimization"]["elastic_checkpoint"] = True
    if job.precision != "fp32":
        config[job.precision] = {"enabled": True}
    if job.accumulate:
        config["data_types"] = {"grad_accum_dtype": job.accumulate}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    model = Wrapped(tied=job.tied)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[Any] = [p for _, p in trained]
    if job.groups == 2:
        groups = [
            {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for _, p in trained if p.dim() == 1], "weight_decay": 0.0},
        ]
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


def step(engine: Any, number: int) -> float:
    generator = torch.Generator().manual_seed(100 * number + torch.distributed.get_rank())
    tokens = torch.randint(0, 97, (2, 12), generator=generator)
    loss = engine(tokens)
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def train(job: Job) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = engine_for(job, universal=False)
    for number in range(1, job.steps + 1):
        step(engine, number)
        engine.save_checkpoint(job.folder, client_state={"note": "mine", "epoch": number})
        held = weights(engine, moments=False)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            # its reader does not know the files of the optimizer for bf16 with fp32 gradients
            read = (
                {}
                if job.accumulate
                else get_fp32_state_dict_from_zero_checkpoint(job.folder, engine_tag(engine))
            )
            torch.save({"held": held, "read": dict(read)}, f"{job.report}.{number}.pt")


def engine_tag(engine: Any) -> str:
    return f"global_step{engine.global_steps}"


def convert(job: Job) -> None:
    """`folder` has the checkpoint, `report` is the folder to make."""
    from deepspeed.checkpoint.ds_to_universal import main as convert_all

    if torch.distributed.get_rank() == 0:
        arguments = {
            "num_extract_workers": 1,
            "num_merge_workers": 1,
            "keep_temp_folder": False,
            "strict": True,
        }
        made = {"input_folder": job.folder, "output_folder": job.report, "inject_missing_state": True}
        convert_all(SimpleNamespace(**arguments, **made))
    torch.distributed.barrier()


def weights(engine: Any, *, moments: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Masters, 16-bit weights and moments in full, as the engine holds them; moments only after loading,
    because DeepSpeed does not find those of torch's AdamW that it began itself.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, dict[str, torch.Tensor]] = {"fp32": {}, "exp_avg": {}, "exp_avg_sq": {}, "live": {}}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found["live"][name] = parameter.detach().clone()
        if not parameter.requires_grad:
            continue
        found["fp32"][name] = safe_get_full_fp32_param(parameter).clone()
        for key in ("exp_avg", "exp_avg_sq") if moments else ():
            found[key][name] = safe_get_full_optimizer_state(parameter, key).clone()
    return found


def counted(engine: Any) -> list[float]:
    """Each flat vector's count of steps, as the optimizer inside has it."""
    return [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]


def resume(job: Job) -> None:
    engine = engine_for(job, universal=True)
    path, client_state = engine.load_checkpoint(job.folder, tag=job.tag)
    loaded = weights(engine, moments=True)
    found: dict[str, Any] = {
        "path": path,
        "global_steps": engine.global_steps,
        "rate": engine.get_lr()[0],
        "note": client_state.get("note"),
        "buffer": engine.module.mean.tolist(),
        "counted": counted(engine),
    }
    found["loss"] = step(engine, 1000)
    after = weights(engine, moments=False)
    found["moved"] = all(
        not torch.equal(loaded["fp32"][name], after["fp32"][name]) for name in loaded["fp32"]
    )
    if torch.distributed.get_rank() == 0:
        torch.save(loaded, job.report + ".pt")
        Path(job.report + ".json").write_text(json.dumps(found))


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for values in json.loads(Path(sys.argv[1]).read_text()):
        job = Job(**values)
        {"train": train, "convert": convert, "resume": resume}[job.what](job)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
