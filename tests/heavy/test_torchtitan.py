"""Checkpoints of torchtitan's own model classes, saved by torch, become models of the same logits."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pma.errors import MismatchError

from ..conversion.models import TOKENS, assert_same_logits, converted_logits, source, template
from ..conversion.trainers import Sizes

pytest.importorskip("torchtitan", reason="torchtitan is not installed")

KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"


class _Absent(types.ModuleType):
    """Stands in for GPU kernels of another way to dispatch tokens, which need triton just to be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.Mock()


@pytest.fixture(scope="module")
def titan() -> Any:
    """torchtitan's models, with the attention of its that runs on a CPU."""
    import torch.utils.flop_counter  # noqa: F401  looks for triton too, and must not find the stand-in

    sys.modules.setdefault(KERNELS, _Absent(KERNELS))
    from torchtitan.models import llama3, qwen3
    from torchtitan.models.common.attention import ScaledDotProductAttention as Plain

    with (
        mock.patch.object(llama3, "get_attention_config", return_value=Plain.Config()),
        mock.patch.object(qwen3, "get_attention_config", return_value=Plain.Config()),
    ):
        yield types.SimpleNamespace(llama3=llama3, qwen3=qwen3)


def built(family: Any, model: Any, layers: Any, norm: Any, sizes: Sizes) -> Any:
    config = model.Config(
        dim=sizes.hidden,
        vocab_size=sizes.vocab,
        enable_weight_tying=sizes.tied,
        tok_embeddings=family.Embedding.Config(
            num_embeddings=sizes.vocab, embedding_dim=sizes.hidden, param_init=family._EMBEDDING_INIT
        ),
        norm=norm,
        lm_head=family.Linear.Config(
            in_features=sizes.hidden, out_features=sizes.vocab, param_init=family._LINEAR_INIT
        ),
        layers=layers,
    )
    made = config.build()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(std=0.3, generator=generator).add_(1.0 if "norm" in name else 0.0)
    return made.eval()


def llama(titan: Any, sizes: Sizes, *, fused: bool) -> Any:
    family = titan.llama3
    layers = family._build_llama3_layers(
        n_layers=sizes.layers,
        dim=sizes.hidden,
        n_heads=sizes.heads,
        n_kv_heads=sizes.kv_heads,
        hidden_dim=sizes.inner,
        rope=family.ComplexRoPE.Config(dim=sizes.head_dim, max_seq_len=64, theta=sizes.theta),
        fuse_qkv=fused,
        attn_backend="sdpa",
    )
    for layer in layers:
        layer.attention_norm.eps = layer.ffn_norm.eps = 1e-6
    norm = family.RMSNorm.Config(normalized_shape=sizes.hidden, param_init=family._NORM_INIT, eps=1e-6)
    return built(family, family.Llama3Model, layers, norm, sizes)


def qwen3(titan: Any, sizes: Sizes, *, fused: bool) -> Any:
    family = titan.qwen3
    common = {
        "n_layers": sizes.layers,
        "dim": sizes.hidden,
        "n_heads": sizes.heads,
        "n_kv_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "rope": family.CosSinRoPE.Config(dim=sizes.head_dim, max_seq_len=64, theta=sizes.theta),
        "fuse_qkv": fused,
        "attn_backend": "sdpa",
    }
    if sizes.experts:
        layers = family._build_qwen3_moe_layers(
            **common,
            moe_hidden_dim=sizes.expert_inner,
            num_experts=sizes.experts,
            top_k=sizes.chosen,
            moe_comm_backend="standard",
        )
    else:
        layers = family._build_qwen3_layers(**common, hidden_dim=sizes.inner)
    return built(family, family.Qwen3Model, layers, family._qwen3_norm(sizes.hidden), sizes)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dense_models(titan: Any, tmp_path: Path, family: str, fused: bool, tied: bool) -> None:
    sizes = Sizes(tied=tied, qk_norm=family == "qwen3", head_dim=12 if family == "qwen3" else 8)
    model = (llama if family == "llama" else qwen3)(titan, sizes, fused=fused)
    with torch.no_grad():
        expected = model(TOKENS[None])[0]
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    like = template(tmp_path / "like", family, sizes, weights=False)
    assert_same_logits(converted_logits(source(tmp_path / "s", state), like, tmp_path / "out"), expected)


@pytest.mark.filterwarnings(
    "ignore:In CPU autocast"
)  # the router asks for fp32, which on a CPU it has anyway
def test_experts(titan: Any, tmp_path: Path) -> None:
    """torchtitan multiplies by experts in bf16; weights that bf16 holds, and logits to its precision."""
    sizes = Sizes(qk_norm=True, head_dim=16, experts=6, expert_inner=24)
    model = qwen3(titan, sizes, fused=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = model(TOKENS[None])[0]
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    like = template(tmp_path / "like", "qwen3_moe", sizes, weights=False)
    checkpoint = source(tmp_path / "s", state)
    with pytest.raises(MismatchError, match=r"no place in the model \(2\):\n  layers.0.moe.expert_bias_E"):
        converted_logits(checkpoint, like, tmp_path / "refused")
    found = converted_logits(checkpoint, like, tmp_path / "out", exclude=("*.expert_bias_E",))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.std()))
    swapped = {name: v.flip(0) if name.endswith("w2_EDF") else v for name, v in state.items()}
    wrong = converted_logits(
        source(tmp_path / "w", swapped), like, tmp_path / "x", exclude=("*.expert_bias_E",)
    )
    assert (wrong - expected).abs().max() > 0.5 * float(expected.std())
