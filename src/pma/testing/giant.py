"""Checkpoints too large to read: a mixture of experts with 671e9 parameters, real headers and sparse data.

The files have their full size and take no room; reading them gives zeros. Source: arXiv 2412.19437, and names
and shapes of deepseek-ai/DeepSeek-V3 on Hugging Face; differs: bf16 throughout, and without the layer that
predicts a second token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pma.formats.safetensors import INDEX_FILE
from pma.formats.safetensors_header import encode_header
from pma.testing.builders import write_trainer_state
from pma.types import DType, TensorSpec

SHARDS = 163
_LAYERS, _DENSE_LAYERS, _EXPERTS = 61, 3, 256
_HIDDEN, _VOCABULARY = 7168, 129280
_DENSE_WIDTH, _EXPERT_WIDTH = 18432, 2048
_ATTENTION = {
    "q_a_proj": (1536, _HIDDEN),
    "q_a_layernorm": (1536,),
    "q_b_proj": (24576, 1536),
    "kv_a_proj_with_mqa": (576, _HIDDEN),
    "kv_a_layernorm": (512,),
    "kv_b_proj": (32768, 512),
    "o_proj": (_HIDDEN, 16384),
}
_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": _LAYERS,
    "hidden_size": _HIDDEN,
    "vocab_size": _VOCABULARY,
    "n_routed_experts": _EXPERTS,
}
_TOKENS_A_STEP = 15360 * 4096


@dataclass(frozen=True, kw_only=True)
class _File:
    """One shard: its header with the length field, and its size with the data."""

    name: str
    header: bytes
    size_bytes: int


def giant_run(folder: Path, checkpoints: int = 10, *, every: int = 1000) -> list[Path]:
    """A run of `checkpoints` checkpoints of 1.3 TB, `every` steps apart; returns their folders, oldest first.

    Each takes about 10 MB of disk, for its headers and index; building ten takes a second or two.
    """
    shards = _sharded(giant_tensors())
    files = [_file(name, tensors) for name, tensors in shards.items()]
    index = _index(shards)
    paths = []
    for number in range(1, checkpoints + 1):
        path = folder / f"checkpoint-{number * every}"
        path.mkdir(parents=True)
        for file in files:
            with (path / file.name).open("wb") as opened:
                opened.write(file.header)
                opened.truncate(file.size_bytes)
        (path / INDEX_FILE).write_bytes(index)
        (path / "config.json").write_text(json.dumps(_CONFIG, indent=2))
        write_trainer_state(path, number * every, every=every, tokens_a_step=_TOKENS_A_STEP)
        paths.append(path)
    return paths


def giant_tensors() -> list[TensorSpec]:
    """Every tensor of the model, in the order of its modules."""
    tensors = [_weight("model.embed_tokens", _VOCABULARY, _HIDDEN)]
    for number in range(_LAYERS):
        tensors += _layer(f"model.layers.{number}", dense=number < _DENSE_LAYERS)
    return [*tensors, _weight("model.norm", _HIDDEN), _weight("lm_head", _VOCABULARY, _HIDDEN)]


def _layer(layer: str, *, dense: bool) -> list[TensorSpec]:
    return [
        *(_weight(f"{layer}.self_attn.{name}", *shape) for name, shape in _ATTENTION.items()),
        *(_projections(f"{layer}.mlp", _DENSE_WIDTH) if dense else _experts(f"{layer}.mlp")),
        _weight(f"{layer}.input_layernorm", _HIDDEN),
        _weight(f"{layer}.post_attention_layernorm", _HIDDEN),
    ]


def _experts(mlp: str) -> list[TensorSpec]:
    bias = TensorSpec(name=f"{mlp}.gate.e_score_correction_bias", dtype=DType.F32, shape=(_EXPERTS,))
    tensors = [_weight(f"{mlp}.gate", _EXPERTS, _HIDDEN), bias]
    for number in range(_EXPERTS):
        tensors += _projections(f"{mlp}.experts.{number}", _EXPERT_WIDTH)
    return tensors + _projections(f"{mlp}.shared_experts", _EXPERT_WIDTH)


def _projections(mlp: str, width: int) -> list[TensorSpec]:
    return [
        _weight(f"{mlp}.gate_proj", width, _HIDDEN),
        _weight(f"{mlp}.up_proj", width, _HIDDEN),
        _weight(f"{mlp}.down_proj", _HIDDEN, width),
    ]


def _weight(module: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=f"{module}.weight", dtype=DType.BF16, shape=shape)


def _sharded(tensors: Sequence[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """Tensors by file, each shard about as large as any other, in the order of the safetensors library."""
    total_bytes = sum(spec.length_bytes for spec in tensors)
    shards: dict[str, list[TensorSpec]] = {}
    before_bytes = 0
    for spec in tensors:
        number = before_bytes * SHARDS // total_bytes + 1
        shards.setdefault(f"model-{number:05}-of-{SHARDS:06}.safetensors", []).append(spec)
        before_bytes += spec.length_bytes
    for inside in shards.values():
        inside.sort(key=lambda spec: (-spec.dtype.bits, spec.name))
    return shards


def _file(name: str, tensors: Sequence[TensorSpec]) -> _File:
    header = encode_header(tensors, {"format": "pt"})
    data_bytes = sum(spec.length_bytes for spec in tensors)
    return _File(name=name, header=header, size_bytes=len(header) + data_bytes)


def _index(shards: Mapping[str, Sequence[TensorSpec]]) -> bytes:
    weight_map = {spec.name: name for name, inside in shards.items() for spec in inside}
    total_bytes = sum(spec.length_bytes for inside in shards.values() for spec in inside)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode("utf-8") + b"\n"
