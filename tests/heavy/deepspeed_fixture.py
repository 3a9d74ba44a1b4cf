"""A tiny Llama trained under DeepSpeed, as a program: `torchrun --nproc-per-node 2 deepspeed_fixture.py ...`.

`train` saves checkpoints each few steps; `resume` loads a universal checkpoint, writes down the weights it
then has, and trains one step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


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


def engine_for(options: argparse.Namespace, *, universal: bool) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": options.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000,
    }
    if options.stage == 3:
        config["zero_optimization"] |= {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0}
    if options.elastic:
        config["zero_optimization"]["elastic_checkpoint"] = True
    if options.precision != "fp32":
        config[options.precision] = {"enabled": True}
    if options.accumulate:
        config["data_types"] = {"grad_accum_dtype": options.accumulate}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    model = Wrapped(tied=options.tied)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[Any] = [p for _, p in trained]
    if options.groups == 2:
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
    return float(loss)


def train(options: argparse.Namespace) -> None:
    engine = engine_for(options, universal=False)
    for number in range(1, options.steps + 1):
        step(engine, number)
        if number % options.every == 0:
            engine.save_checkpoint(options.folder, client_state={"note": "mine", "epoch": number})


def weights(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Masters, moments and 16-bit weights in full, as the engine holds them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, dict[str, torch.Tensor]] = {"fp32": {}, "exp_avg": {}, "exp_avg_sq": {}, "live": {}}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found["live"][name] = parameter.detach().clone()
        if not parameter.requires_grad:
            continue
        found["fp32"][name] = safe_get_full_fp32_param(parameter).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            found[key][name] = safe_get_full_optimizer_state(parameter, key).clone()
    return found


def resume(options: argparse.Namespace) -> None:
    engine = engine_for(options, universal=True)
    tag = None if options.tag == "" else options.tag
    path, client_state = engine.load_checkpoint(str(options.folder), tag=tag)
    loaded = weights(engine)
    report: dict[str, Any] = {
        "path": path,
        "global_steps": engine.global_steps,
        "rate": engine.get_lr()[0],
        "note": client_state.get("note"),
    }
    report["loss"] = step(engine, 1000)
    after = weights(engine)
    moved = [not torch.equal(loaded["fp32"][name], after["fp32"][name]) for name in loaded["fp32"]]
    report["moved"] = all(moved)
    if torch.distributed.get_rank() == 0:
        torch.save(loaded, options.report.with_suffix(".pt"))
        options.report.write_text(json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("train", "resume"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--accumulate", default="")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--tag", default="")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    train(options) if options.what == "train" else resume(options)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
