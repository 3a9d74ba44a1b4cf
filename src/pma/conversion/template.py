"""What a conversion aims at: a Hugging Face model folder, for names, sizes, configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma import formats
from pma.errors import FormatError, UsageError, printable
from pma.formats import side_files, strict_json

CONFIG_FILE = "config.json"
_LARGEST_CONFIG_BYTES = 16 * 2**20
_LARGEST_FACT = 2**31
# where a configuration says each fact; of several keys the first that is there
_FACT_KEYS = {
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "head_dim": ("head_dim",),
    "hidden": ("hidden_size",),
    "inner": ("intermediate_size",),
    "vocab": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_inner": ("moe_intermediate_size", "intermediate_size"),
    "shared_inner": ("shared_expert_intermediate_size",),
}


@dataclass(frozen=True, kw_only=True)
class Template:
    """The model that a converted checkpoint is to be.

    `digest`: of all that a conversion depends on. `facts`: sizes by name. `tied`: whether input and output
    embeddings are one; None where the configuration does not say. `shapes`: of every tensor, by name, where
    the folder holds weights; else None.
    """

    path: Path
    digest: str
    model_type: str
    config: Mapping[str, Any]
    facts: Mapping[str, int]
    tied: bool | None
    shapes: Mapping[str, tuple[int, ...]] | None
    side_files: Mapping[str, bytes]


def read_template(path: Path) -> Template:
    """Read a model folder: its configuration, its tensors' headers if there are any, its small files.

    Raises UsageError where it is no such folder, FormatError where what it holds is broken.
    """
    if not (path / CONFIG_FILE).is_file():
        raise UsageError(f"{path} holds no {CONFIG_FILE}; --like takes a Hugging Face model folder")
    config = strict_json.load_object(path / CONFIG_FILE, _LARGEST_CONFIG_BYTES)
    model_type, tied = config.get("model_type"), config.get("tie_word_embeddings")
    if not isinstance(model_type, str):
        raise FormatError(f"{path / CONFIG_FILE}: model_type is missing")
    shapes = None
    if formats.is_checkpoint(path):
        with closing(formats.open_checkpoint(path)) as reader:
            shapes = {name: spec.shape for name, spec in reader.tensors.items()}
    return Template(
        path=path,
        digest=_digest(path, shapes),
        model_type=model_type,
        config=config,
        facts=_facts(config, path / CONFIG_FILE),
        tied=tied if isinstance(tied, bool) else None,
        shapes=shapes,
        side_files=side_files.read(path),
    )


def _digest(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> str:
    """Of all that a conversion depends on: the configuration, and what tensors the weights are."""
    parts = [(path / CONFIG_FILE).read_bytes(), repr(sorted(shapes.items()) if shapes else None).encode()]
    return blake3(b"\n".join(parts)).hexdigest()


def _facts(config: Mapping[str, Any], where: Path) -> dict[str, int]:
    """Sizes that the configuration states, and those that follow from them."""
    facts = {"two": 2}
    for name, keys in _FACT_KEYS.items():
        found = next((key for key in keys if config.get(key) is not None), None)
        if found is not None:
            facts[name] = fact(config, found, where)
    heads, hidden, kv_heads = facts.get("heads"), facts.get("hidden"), facts.get("kv_heads")
    if "head_dim" not in facts and heads and hidden and hidden % heads == 0:
        facts["head_dim"] = hidden // heads
    if "head_dim" in facts and facts["head_dim"] % 2 == 0:
        facts["half"] = facts["head_dim"] // 2
    if heads and kv_heads and heads % kv_heads == 0:
        facts["qkv_slots"] = heads // kv_heads + 2  # a query group's heads, its key and its value
    return facts


def fact(config: Mapping[str, Any], key: str, where: Path) -> int:
    """A positive number of a configuration. Raises FormatError for anything else."""
    value = config.get(key)
    if type(value) is not int or not 0 < value < _LARGEST_FACT:
        raise FormatError(
            f"{where}: {printable(key)} is {printable(repr(value))}, expected a positive number"
        )
    return value
