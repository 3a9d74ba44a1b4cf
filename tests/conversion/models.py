"""Tiny models of transformers to compare with, templates of them, and logits of converted checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from pma import formats
from pma.conversion import convert, read_template
from pma.testing.contracts import read_whole

from .trainers import Sizes

TOKENS = torch.tensor([3, 60, 17, 17, 0, 42, 8, 1, 59, 5, 33])
MOE = {"experts": 6}
FAMILIES: dict[str, Sizes] = {
    "llama": Sizes(),
    "mistral": Sizes(),
    "qwen2": Sizes(bias=True),
    "qwen3": Sizes(qk_norm=True, head_dim=12),
    "mixtral": Sizes(**MOE),
    "qwen2_moe": Sizes(**MOE, bias=True, shared=True, renormalised=False),
    "qwen3_moe": Sizes(**MOE, qk_norm=True, head_dim=12),
}


def hf_config(family: str, sizes: Sizes) -> PretrainedConfig:
    wide = sizes.experts and family != "mixtral"
    values: dict[str, Any] = {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab,
        "intermediate_size": sizes.expert_inner if family == "mixtral" else sizes.inner,
        "tie_word_embeddings": sizes.tied,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "rope_theta": sizes.theta,
        "num_experts_per_tok": sizes.chosen,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if wide:
        values |= {"num_experts": sizes.experts, "moe_intermediate_size": sizes.expert_inner}
        values |= {
            "norm_topk_prob": sizes.renormalised,
            "shared_expert_intermediate_size": sizes.shared_inner,
        }
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    elif sizes.experts:
        values |= {"num_local_experts": sizes.experts}
    return AutoConfig.for_model(family, **values)


def template(folder: Path, family: str, sizes: Sizes, *, weights: bool) -> Path:
    config = hf_config(family, sizes)
    if weights:  # of some other model of the same shapes, as a base model's would be
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return folder


def source(folder: Path, weights: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    return folder


def converted_logits(checkpoint: Path, like: Path, out: Path, exclude: Sequence[str] = ()) -> Tensor:
    """What transformers computes from the converted checkpoint, loaded from files."""
    out.mkdir()
    opened = formats.open_checkpoint(checkpoint)
    with closing(convert(opened, read_template(like), exclude=exclude)) as reader:
        tensors = {
            name: torch.from_numpy(np.frombuffer(read_whole(reader, name), np.float32).copy()).reshape(
                spec.shape
            )
            for name, spec in reader.tensors.items()
        }
        for name, data in reader.side_files().items():
            (out / name).write_bytes(data)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(TOKENS[None]).logits[0]


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.5  # else a wrong model could come near
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
