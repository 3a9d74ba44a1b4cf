"""Names as trainers write them, and the part of the model that each is of."""

import pytest

from pma.diagnosis.groups import group_of


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "embedding"),
        ("tok_embeddings.weight", "embedding"),  # torchtitan
        ("output.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),  # litgpt, nanochat, GPT-2
        ("embedding.word_embeddings.weight", "embedding"),  # Megatron
        ("output_layer.weight", "embedding"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("layers.3.attention.wq.weight", "attention"),
        ("decoder.layers.self_attention.linear_qkv.weight", "attention"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("model.layers.3.mlp.gate_proj.weight", "mlp"),
        ("layers.3.feed_forward.w1.weight", "mlp"),
        ("decoder.layers.mlp.linear_fc1.weight", "mlp"),
        ("transformer.h.0.mlp.c_fc.weight", "mlp"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "experts"),
        ("layers.3.moe.experts.w1", "experts"),
        ("decoder.layers.mlp.experts.experts.linear_fc2.weight", "experts"),
        ("model.layers.3.mlp.shared_expert.up_proj.weight", "experts"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.block_sparse_moe.gate.weight", "router"),
        ("layers.3.moe.router.gate.weight", "router"),
        ("decoder.layers.mlp.router.weight", "router"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "router"),
        ("model.layers.3.input_layernorm.weight", "norms"),
        ("model.layers.3.self_attn.q_norm.weight", "norms"),
        ("transformer.ln_f.weight", "norms"),
        ("transformer.h.0.ln_1.bias", "norms"),
        ("decoder.layers.mlp.linear_fc1.layer_norm_weight", "norms"),
        ("rope.freqs", "other"),
        ("scale", "other"),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group
