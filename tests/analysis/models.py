"""Models small enough for dense Hessians."""

from typing import Any

import numpy as np
import torch

from pma.analysis.windows import TokenWindows

WORDS = 11


def tiny_model(*, experts: int = 0, hidden: int = 8, seed: int = 0) -> Any:
    """A Llama, or with `experts` an OLMoE, with weights large enough that their curvature is felt."""
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

    common: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": hidden,
        "intermediate_size": 8,
        "num_hidden_layers": 1 if not experts else 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "initializer_range": 0.4,
        "pad_token_id": None,  # its embedding would be zero, where a norm bends sharply
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    if experts:
        more = {"num_experts": experts, "num_experts_per_tok": 2, "output_router_logits": True}
        return OlmoeForCausalLM(OlmoeConfig(**common, **more))
    return LlamaForCausalLM(LlamaConfig(**common))


def tiny_windows(windows: int = 6, tokens: int = 9, documents: int = 3) -> TokenWindows:
    """Windows of random tokens, two of each document."""
    ids = np.random.default_rng(1).integers(0, WORDS, (windows, tokens))
    return TokenWindows(ids_WC=ids, document_W=np.arange(windows) % documents)
