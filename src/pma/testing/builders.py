"""Tiny real checkpoints: files as the safetensors library and the transformers Trainer write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pma.formats.interval_mean import METADATA_KEY, IntervalMean, file_of
from pma.types import DType, TensorSpec

_SHORT = {"bf16": DType.BF16, "fp16": DType.F16, "fp32": DType.F32, "fp64": DType.F64}
PEAK_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A tensor as bytes, so that every element type can be written without a framework that knows it."""

    spec: TensorSpec
    data: bytes


def random_raw(name: str, dtype: DType, shape: tuple[int, ...], seed: int = 0) -> Raw:
    """Values drawn from a normal distribution (floats) or from all bit patterns (everything else)."""
    spec = TensorSpec(name=name, dtype=dtype, shape=shape)
    random = np.random.default_rng(seed)
    values = random.standard_normal(spec.element_count * (2 if dtype is DType.C64 else 1))
    if dtype is DType.BF16:
        data = (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()
    elif dtype.kind in ("float", "complex"):
        widths = {DType.F16: np.float16, DType.F32: np.float32, DType.C64: np.float32, DType.F64: np.float64}
        data = values.astype(widths[dtype]).tobytes()
    elif dtype is DType.BOOL:
        data = (values > 0).tobytes()
    else:
        data = random.bytes(spec.length_bytes)
    return Raw(spec=spec, data=data)


def write_safetensors(folder: Path, tensors: Sequence[Raw], shards: int = 1) -> None:
    """Write `tensors` by the safetensors library, over `shards` files with an index for more than one."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        inside = {raw.spec.name: _torch_tensor(raw) for raw in tensors[number::shards]}
        save_file(inside, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(inside, file)
    if shards > 1:
        total = sum(len(raw.data) for raw in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _torch_tensor(raw: Raw) -> Any:
    import torch

    from pma.engine.memory import torch_dtype

    quantised = {
        DType.F8_E4M3: torch.float8_e4m3fn,
        DType.F8_E5M2: torch.float8_e5m2,
        DType.F8_E8M0: torch.float8_e8m0fnu,
        DType.F8_E4M3FNUZ: torch.float8_e4m3fnuz,
        DType.F8_E5M2FNUZ: torch.float8_e5m2fnuz,
    }
    dtype = quantised.get(raw.spec.dtype) or torch_dtype(raw.spec.dtype)
    if not raw.data:
        return torch.empty(raw.spec.shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw.data), dtype=torch.uint8).view(dtype).reshape(raw.spec.shape)


def write_trainer_state(
    folder: Path,
    step: int,
    *,
    every: int = 10,
    tokens_a_step: int = 100,
    rates: Mapping[int, float] | None = None,
    losses: Mapping[int, float] | None = None,
) -> None:
    """`trainer_state.json` as the Trainer writes it; rate and loss logged each `every` steps."""
    steps = range(every, step + 1, every)
    history: list[dict[str, Any]] = [
        {
            "epoch": s / 1000,
            "learning_rate": (rates or {}).get(s, PEAK_RATE),
            "loss": (losses or {}).get(s, 4 - s / 1000),
            "step": s,
        }
        for s in steps
    ]
    state = {"global_step": step, "num_input_tokens_seen": step * tokens_a_step, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def tiny_run(
    folder: Path,
    steps: int = 5,
    dtype: str = "bf16",
    *,
    every: int = 10,
    shards: int = 1,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    extra: Sequence[Raw] = (),
) -> list[Path]:
    """A run of `steps` checkpoints, `every` steps apart, of random tensors; returns their folders, oldest
    first.

    `extra`: tensors that every checkpoint holds alike. Nothing but numpy and safetensors is needed.
    """
    shapes = shapes or {
        "embed.weight": (32, 16),
        "layer.0.weight": (16, 48),
        "layer.0.bias": (16,),
        "scale": (),
    }
    paths = []
    for number in range(1, steps + 1):
        path = folder / f"checkpoint-{number * every}"
        tensors = [
            random_raw(name, _SHORT[dtype], shape, seed=1000 * number + i)
            for i, (name, shape) in enumerate(shapes.items())
        ]
        write_safetensors(path, [*tensors, *extra], shards)
        (path / "config.json").write_text(json.dumps({"model_type": "tiny", "dtype": "bfloat16"}))
        write_trainer_state(path, number * every, every=every)
        paths.append(path)
    return paths


def store_mean(checkpoint: Path, tensors: Mapping[str, Any], **record: Any) -> Path:
    """Store `tensors` (of numpy, by name) as the interval mean of a checkpoint, in fp32; returns its file.

    `record`: fields of `IntervalMean`; by default of every step of the ten up to the checkpoint's name.
    """
    from safetensors.numpy import save_file

    last = int("".join(filter(str.isdigit, checkpoint.stem)))
    given = {"first_step": last - 9, "last_step": last, "updates": 10, "every": 1, "averaged": "weights"}
    text = IntervalMean(**{**given, **record}).to_json()
    path = file_of(checkpoint)
    values = {
        name: np.array(tensor, np.complex64 if np.iscomplexobj(tensor) else np.float32, order="C")
        for name, tensor in tensors.items()
    }
    save_file(values, path, metadata={"format": "pt", METADATA_KEY: text})
    return path


def tiny_llama_run(
    folder: Path,
    steps: int = 3,
    *,
    max_shard_size: str = "1GB",
    dtype: str = "float32",
    experts: int = 0,
    spread: float = 1.0,
) -> list[Path]:
    """Checkpoints of a real transformers Llama, or with `experts` of an OLMoE, with a real tokenizer. Weights
    are drawn at random; with a `spread` below 1 they lie so much nearer the first checkpoint's.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

    tokenizer = _tiny_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 95,
    }
    paths, first = [], dict[str, Any]()
    for number in range(1, steps + 1):
        torch.manual_seed(number)
        if experts:
            mixture = OlmoeConfig(**common, num_experts=experts, num_experts_per_tok=2, pad_token_id=None)
            model: Any = OlmoeForCausalLM(mixture)
        else:
            model = LlamaForCausalLM(LlamaConfig(**common))
        first = first or {name: value.detach().clone() for name, value in model.named_parameters()}
        for name, value in model.named_parameters():
            value.data.lerp_(first[name], 1 - spread)
        model = model.to(getattr(torch, dtype))
        path = folder / f"checkpoint-{number * 10}"
        model.save_pretrained(path, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(path)
        write_trainer_state(path, number * 10)
        paths.append(path)
    return paths


def _tiny_tokenizer() -> Any:
    """A token a printable ASCII character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(code): code - 32 for code in range(32, 127)} | {"<|endoftext|>": 95}
    inner = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
