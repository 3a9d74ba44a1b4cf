"""megatron-core's own GPT, its weights under its own names for them, becomes a model of the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from ..conversion.models import TOKENS, assert_same_logits, converted_logits, source, template
from ..conversion.trainers import Sizes

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

# what other libraries it would like to have, and what it does not need of torch
pytestmark = pytest.mark.filterwarnings("ignore")
PADDED_VOCAB = 64


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Megatron's groups over one process, and its code for GPUs standing aside."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tracker = SimpleNamespace(fork=nullcontext, is_initialized=lambda: True)
    with (
        mock.patch("torch.cuda.current_device", return_value="cpu"),
        mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", return_value=tracker),
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
    ):
        yield parallel_state
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def built(sizes: Sizes) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    experts: dict[str, Any] = {}
    if sizes.experts:
        experts = {
            "num_moe_experts": sizes.experts,
            "moe_router_topk": sizes.chosen,
            "moe_ffn_hidden_size": sizes.expert_inner,
            "moe_token_dispatcher_type": "allgather",
        }
        if sizes.shared:
            experts |= {
                "moe_shared_expert_intermediate_size": sizes.shared_inner,
                "moe_shared_expert_gate": True,
                "moe_router_pre_softmax": not sizes.renormalised,
            }
    config = TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        num_query_groups=sizes.kv_heads,
        kv_channels=sizes.head_dim,
        ffn_hidden_size=sizes.inner,
        use_cpu_initialization=True,
        add_bias_linear=False,
        add_qkv_bias=sizes.bias,
        gated_linear_unit=True,
        activation_func=silu,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        qk_layernorm=sizes.qk_norm,
        **experts,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=sizes.experts or None,
        moe_grouped_gemm=False,
        qk_layernorm=sizes.qk_norm,
        normalization="RMSNorm",
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=PADDED_VOCAB,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=sizes.tied,
        rotary_base=int(sizes.theta),
    )
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator).add_(1.0 if "norm" in name else 0.0)
    return model.eval()


def global_tensors(state: Any, metadata: dict[str, Any]) -> dict[str, Tensor]:
    """Megatron's sharded tensors put together under their global names, as torch_dist stores them."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found: dict[str, Tensor] = {}
    waiting = [state]
    while waiting:
        value = waiting.pop()
        if isinstance(value, ShardedTensorFactory):
            waiting.append(value.build())
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, ShardedTensor):
            whole = found.setdefault(value.key, torch.full(value.global_shape, torch.nan))
            sizes = (1,) * value.prepend_axis_num + tuple(value.data.shape)
            place = tuple(slice(a, a + n) for a, n in zip(value.global_offset, sizes, strict=True))
            whole[place] = value.data.detach().reshape(sizes)
    assert not any(tensor.isnan().any() for tensor in found.values()), metadata
    return found


FAMILIES = {
    "llama": Sizes(),
    "llama tied": Sizes(tied=True),
    "qwen2": Sizes(bias=True),
    "qwen3": Sizes(qk_norm=True, head_dim=12),
    "mixtral": Sizes(experts=6),
    "qwen2_moe": Sizes(experts=6, bias=True, shared=True, renormalised=False),
    "qwen3_moe": Sizes(experts=6, qk_norm=True, head_dim=12),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "stacked": {"non_homogeneous_layers": False},
    "by layer": {"non_homogeneous_layers": True},
    "apart": {"singleton_local_shards": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_megatrons_own_model(one_process: Any, tmp_path: Path, name: str, layout: str) -> None:
    sizes = FAMILIES[name]
    model = built(sizes)
    group = one_process.get_data_parallel_group(with_context_parallel=True)
    metadata = {**LAYOUTS[layout], "dp_cp_group": group}
    weights = global_tensors(model.sharded_state_dict(metadata=metadata), metadata)
    assert any("decoder.layers.0." in key for key in weights) == (layout != "stacked")
    future = torch.ones(len(TOKENS), len(TOKENS), dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        expected = model(TOKENS[None], torch.arange(len(TOKENS))[None], future).float()[0, :, : sizes.vocab]
    like = template(tmp_path / "like", name.split()[0], replace(sizes), weights=layout == "stacked")
    assert_same_logits(converted_logits(source(tmp_path / "s", weights), like, tmp_path / "out"), expected)
