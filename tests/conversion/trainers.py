"""Forward passes in the conventions of torchtitan and Megatron, in plain torch from what their code does, and
random weights under their names. The references that a converted model's logits must equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A tiny model. Every size differs from every other, so that no axis can stand in for another."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    hidden: int = 32
    inner: int = 44
    vocab: int = 61
    experts: int = 0
    chosen: int = 2
    expert_inner: int = 20
    shared_inner: int = 28
    renormalised: bool = True
    tied: bool = False
    qk_norm: bool = False
    bias: bool = False
    shared: bool = False
    theta: float = 10000.0


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # norms near one, everything else large enough that a wrong row shows
    return {
        name: torch.randn(shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0)
        for name, shape in shapes.items()
    }


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(tokens, heads, head_dim) of queries, and of fewer keys and values, each for a group of queries."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    out = scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True)
    return out.transpose(0, 1).reshape(q.shape[0], -1)


def angles(tokens: int, sizes: Sizes) -> Tensor:
    steps = torch.arange(0, sizes.head_dim, 2).float() / sizes.head_dim
    return torch.outer(torch.arange(tokens).float(), sizes.theta**-steps)


def rotated_neighbours(x: Tensor, sizes: Sizes) -> Tensor:
    """Rotary embedding as Meta's and torchtitan's Llama: elements 2i and 2i + 1 are one complex number."""
    turn = torch.polar(torch.ones(1), angles(len(x), sizes))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn[:, None]).flatten(-2)


def rotated_halves(x: Tensor, sizes: Sizes) -> Tensor:
    """Rotary embedding of Megatron, and of torchtitan's Qwen3: element i turns with i + head_dim / 2."""
    cos, sin = angles(len(x), sizes).cos()[:, None], angles(len(x), sizes).sin()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def routed(x: Tensor, router: Tensor, sizes: Sizes) -> Tensor:
    """How much of each expert each token takes, (tokens, experts)."""
    scores, chosen = linear(x, router).softmax(-1).topk(sizes.chosen)
    if sizes.renormalised:
        scores = scores / scores.sum(-1, keepdim=True)
    return torch.zeros(len(x), sizes.experts).scatter(1, chosen, scores)


# ---------------------------------------------------------------------------------------------- torchtitan


def titan_shapes(sizes: Sizes, *, generation: str = "0.3") -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchtitan 0.3, or of those before."""
    s, new = sizes, generation == "0.3"
    qkv = "attention.qkv_linear." if new else "attention."
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (s.vocab, s.hidden)}
    for layer in (f"layers.{i}." for i in range(s.layers)):
        shapes |= {
            layer + "attention_norm.weight": (s.hidden,),
            layer + qkv + "wq.weight": (s.heads * s.head_dim, s.hidden),
            layer + qkv + "wk.weight": (s.kv_heads * s.head_dim, s.hidden),
            layer + qkv + "wv.weight": (s.kv_heads * s.head_dim, s.hidden),
            layer + "attention.wo.weight": (s.hidden, s.heads * s.head_dim),
            layer + "ffn_norm.weight": (s.hidden,),
        }
        if s.qk_norm:
            shapes |= dict.fromkeys((layer + f"attention.{x}_norm.weight" for x in "qk"), (s.head_dim,))
        if s.experts:
            names = ("w1_EFD", "w3_EFD", "w2_EDF") if new else ("w1", "w3", "w2")
            w1, w3, w2 = (
                layer + ("moe.routed_experts.inner_experts." if new else "moe.experts.") + x for x in names
            )
            shapes |= dict.fromkeys((w1, w3), (s.experts, s.expert_inner, s.hidden))
            shapes |= {w2: (s.experts, s.hidden, s.expert_inner)}
            shapes |= {layer + "moe.router.gate.weight": (s.experts, s.hidden)}
        else:
            shapes |= dict.fromkeys(
                (layer + f"feed_forward.{x}.weight" for x in ("w1", "w3")), (s.inner, s.hidden)
            )
            shapes |= {layer + "feed_forward.w2.weight": (s.hidden, s.inner)}
    shapes |= {"norm.weight": (s.hidden,)}
    if not s.tied:
        shapes |= {"lm_head.weight" if new else "output.weight": (s.vocab, s.hidden)}
    return shapes


def titan_logits(weights: Weights, sizes: Sizes, tokens: Tensor, *, generation: str = "0.3") -> Tensor:
    new = generation == "0.3"
    rotated = rotated_halves if sizes.qk_norm else rotated_neighbours
    x = weights["tok_embeddings.weight"][tokens]
    for layer in range(sizes.layers):
        w = {k.removeprefix(f"layers.{layer}."): v for k, v in weights.items()}
        h = rms(x, w["attention_norm.weight"])
        prefix = "attention.qkv_linear." if new else "attention."
        q, k, v = (
            linear(h, w[f"{prefix}{p}.weight"]).unflatten(-1, (-1, sizes.head_dim))
            for p in ("wq", "wk", "wv")
        )
        if sizes.qk_norm:
            q, k = rms(q, w["attention.q_norm.weight"]), rms(k, w["attention.k_norm.weight"])
        x = x + linear(attend(rotated(q, sizes), rotated(k, sizes), v), w["attention.wo.weight"])
        h = rms(x, w["ffn_norm.weight"])
        if sizes.experts:
            prefix = "moe.routed_experts.inner_experts." if new else "moe.experts."
            w1, w2, w3 = (
                w[prefix + p] for p in (("w1_EFD", "w2_EDF", "w3_EFD") if new else ("w1", "w2", "w3"))
            )
            inner = silu(torch.einsum("td,efd->tef", h, w1)) * torch.einsum("td,efd->tef", h, w3)
            share = routed(h, w["moe.router.gate.weight"], sizes)
            x = x + torch.einsum("tef,edf,te->td", inner, w2, share)
        else:
            inner = silu(linear(h, w["feed_forward.w1.weight"])) * linear(h, w["feed_forward.w3.weight"])
            x = x + linear(inner, w["feed_forward.w2.weight"])
    out = "tok_embeddings.weight" if sizes.tied else "lm_head.weight" if new else "output.weight"
    return linear(rms(x, weights["norm.weight"]), weights[out])


# ------------------------------------------------------------------------------------------------ Megatron


def megatron_shapes(sizes: Sizes, *, padded_vocab: int = 64) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer each, as they are before layers and experts are stacked."""
    s = sizes
    group = (s.heads // s.kv_heads + 2) * s.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (padded_vocab, s.hidden)}
    for layer in (f"decoder.layers.{i}." for i in range(s.layers)):
        shapes |= {
            layer + "self_attention.linear_qkv.layer_norm_weight": (s.hidden,),
            layer + "self_attention.linear_qkv.weight": (s.kv_heads * group, s.hidden),
            layer + "self_attention.linear_proj.weight": (s.hidden, s.heads * s.head_dim),
        }
        if s.bias:
            shapes[layer + "self_attention.linear_qkv.bias"] = (s.kv_heads * group,)
        if s.qk_norm:
            shapes |= {layer + f"self_attention.{x}_layernorm.weight": (s.head_dim,) for x in "qk"}
        if s.experts:
            shapes[layer + "pre_mlp_layernorm.weight"] = (s.hidden,)
            shapes[layer + "mlp.router.weight"] = (s.experts, s.hidden)
            for expert in (f"{layer}mlp.experts.experts.{e}." for e in range(s.experts)):
                shapes[expert + "linear_fc1.weight"] = (2 * s.expert_inner, s.hidden)
                shapes[expert + "linear_fc2.weight"] = (s.hidden, s.expert_inner)
        else:
            shapes[layer + "mlp.linear_fc1.layer_norm_weight"] = (s.hidden,)
            shapes[layer + "mlp.linear_fc1.weight"] = (2 * s.inner, s.hidden)
            shapes[layer + "mlp.linear_fc2.weight"] = (s.hidden, s.inner)
        if s.shared:
            shapes[layer + "mlp.shared_experts.linear_fc1.weight"] = (2 * s.shared_inner, s.hidden)
            shapes[layer + "mlp.shared_experts.linear_fc2.weight"] = (s.hidden, s.shared_inner)
            shapes[layer + "mlp.shared_experts.gate_weight"] = (1, s.hidden)
    shapes["decoder.final_layernorm.weight"] = (s.hidden,)
    if not s.tied:
        shapes["output_layer.weight"] = (padded_vocab, s.hidden)
    return shapes


def gated(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """Megatron's gated MLP: gate and up are the halves of one projection."""
    gate, up = linear(x, fc1).chunk(2, -1)
    return linear(silu(gate) * up, fc2)


def megatron_logits(weights: Weights, sizes: Sizes, tokens: Tensor) -> Tensor:
    x = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(sizes.layers):
        w = {k.removeprefix(f"decoder.layers.{layer}."): v for k, v in weights.items()}
        h = rms(x, w["self_attention.linear_qkv.layer_norm_weight"])
        mixed = linear(h, w["self_attention.linear_qkv.weight"], w.get("self_attention.linear_qkv.bias"))
        mixed = mixed.unflatten(-1, (sizes.kv_heads, -1))
        a_group = sizes.heads // sizes.kv_heads * sizes.head_dim
        q, k, v = mixed.split([a_group, sizes.head_dim, sizes.head_dim], dim=-1)
        q = q.reshape(len(x), sizes.heads, sizes.head_dim)
        if sizes.qk_norm:
            q = rms(q, w["self_attention.q_layernorm.weight"])
            k = rms(k, w["self_attention.k_layernorm.weight"])
        seen = attend(rotated_halves(q, sizes), rotated_halves(k, sizes), v)
        x = x + linear(seen, w["self_attention.linear_proj.weight"])
        if not sizes.experts:
            h = rms(x, w["mlp.linear_fc1.layer_norm_weight"])
            x = x + gated(h, w["mlp.linear_fc1.weight"], w["mlp.linear_fc2.weight"])
            continue
        h = rms(x, w["pre_mlp_layernorm.weight"])
        share = routed(h, w["mlp.router.weight"], sizes)
        for e in range(sizes.experts):
            expert = f"mlp.experts.experts.{e}."
            x = x + share[:, e : e + 1] * gated(
                h, w[expert + "linear_fc1.weight"], w[expert + "linear_fc2.weight"]
            )
        if sizes.shared:
            fc1, fc2 = (w[f"mlp.shared_experts.{name}.weight"] for name in ("linear_fc1", "linear_fc2"))
            x = x + linear(h, w["mlp.shared_experts.gate_weight"]).sigmoid() * gated(h, fc1, fc2)
    out = "embedding.word_embeddings.weight" if sizes.tied else "output_layer.weight"
    return linear(rms(x, weights["decoder.final_layernorm.weight"]), weights[out])[:, : sizes.vocab]


def stacked(
    weights: Weights, sizes: Sizes, *, layers: bool = True, experts: bool = True
) -> dict[str, Tensor]:
    """Megatron's weights as torch_dist has them: experts of a layer, and layers, along leading axes."""
    found: dict[str, Tensor] = dict(weights)
    counts = [("mlp.experts.experts.", sizes.experts)] * experts + [
        ("decoder.layers.", sizes.layers)
    ] * layers
    for marker, count in counts:
        for name in [name for name in found if marker + "0." in name]:
            parts = [found.pop(name.replace(marker + "0.", f"{marker}{i}.", 1)) for i in range(count)]
            found[name.replace(marker + "0.", marker, 1)] = torch.stack(parts)
    return found


def apart(weights: Weights) -> dict[str, Tensor]:
    """Megatron's gate and up under names of their own, as `singleton_local_shards` writes them."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith("linear_fc1.weight"):
            found[name + "_w"], found[name + "_v"] = (x.contiguous() for x in value.chunk(2, -2))
        else:
            found[name] = value
    return found
