"""Checkpoints for the benchmark: sharded bf16 with the names and the configuration of a real Llama.

    python benchmarks/fixture.py RUN --checkpoints 10 --mib 1024

A program of its own, so that its memory is not counted against a command that the benchmark starts later.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pma.testing.builders import write_trainer_state

MIB = 2**20
SHARD_BYTES = 512 * 10**6
# values are drawn once and reused from other offsets; a prime length keeps tensors from lining up
POOL_ELEMENTS = 16_777_259
STEPS_APART = 1000


@dataclass(frozen=True, kw_only=True)
class Llama:
    """The sizes that give a Llama its tensors."""

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    key_value_heads: int
    layers: int

    @classmethod
    def of_about(cls, mib: int) -> Llama:
        """TinyLlama's widths where they fit, a quarter of them below, with as many layers as make `mib`."""
        widths = (
            {"hidden": 2048, "intermediate": 5632, "vocabulary": 32000, "heads": 32, "key_value_heads": 4}
            if mib >= 512
            else {"hidden": 512, "intermediate": 1408, "vocabulary": 8000, "heads": 8, "key_value_heads": 1}
        )
        none, one = (_bytes(cls(**widths, layers=layers).shapes()) for layers in (0, 1))
        return cls(**widths, layers=max(1, round((mib * MIB - none) / (one - none))))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the model."""
        key_value = self.hidden // self.heads * self.key_value_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            inside = {
                "self_attn.q_proj": (self.hidden, self.hidden),
                "self_attn.k_proj": (key_value, self.hidden),
                "self_attn.v_proj": (key_value, self.hidden),
                "self_attn.o_proj": (self.hidden, self.hidden),
                "mlp.gate_proj": (self.intermediate, self.hidden),
                "mlp.up_proj": (self.intermediate, self.hidden),
                "mlp.down_proj": (self.hidden, self.intermediate),
                "input_layernorm": (self.hidden,),
                "post_attention_layernorm": (self.hidden,),
            }
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
        return shapes | {
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }

    def config(self) -> dict[str, object]:
        """`config.json` as transformers writes it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def _bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


def shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names by shard, filled in order; at least two shards, whatever the size."""
    largest = min(SHARD_BYTES, _bytes(shapes) * 2 // 3)
    filled: list[list[str]] = [[]]
    room = largest
    for name, shape in shapes.items():
        length = _bytes({name: shape})
        if length > room and filled[-1]:
            filled.append([])
            room = largest
        filled[-1].append(name)
        room -= length
    return filled


def make_checkpoint(folder: Path, llama: Llama, pool: np.ndarray, number: int) -> None:
    """Write checkpoint `number`, its values taken from `pool` at offsets of its own."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    shapes = llama.shapes()
    places = {name: place for place, name in enumerate(shapes)}
    groups = shards(shapes)
    weight_map: dict[str, str] = {}
    for index, names in enumerate(groups):
        file = f"model-{index + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {}
        for name in names:
            rolled = np.roll(pool, 7_919 * places[name] + 1_000_003 * number)
            bits = np.resize(rolled, shapes[name]).view(np.int16)
            tensors[name] = torch.from_numpy(bits).view(torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index_json = {"metadata": {"total_size": _bytes(shapes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1))
    (folder / "config.json").write_text(json.dumps(llama.config(), indent=1))
    write_trainer_state(folder, number * STEPS_APART, every=STEPS_APART)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoints", type=int, required=True)
    parser.add_argument("--mib", type=int, required=True)
    arguments = parser.parse_args()
    values = 0.02 * np.random.default_rng(0).standard_normal(POOL_ELEMENTS, dtype=np.float32)
    pool = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    for number in range(1, arguments.checkpoints + 1):
        folder = arguments.run / f"checkpoint-{number * STEPS_APART}"
        make_checkpoint(folder, Llama.of_about(arguments.mib), pool, number)


if __name__ == "__main__":
    main()
