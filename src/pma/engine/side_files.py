"""The small files beside the weights, copied from the newest source so that the output can be used at
once.
"""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path

from pma.formats.contracts import CheckpointWriter
from pma.formats.strict_json import load_object
from pma.types import DType

# configuration, tokenizer, generation settings, chat template, code (copied and listed, never imported)
_PATTERNS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "*.py",
)
_LARGEST_BYTES = 128 * 2**20
_TORCH_NAMES = {DType.F16: "float16", DType.BF16: "bfloat16", DType.F32: "float32", DType.F64: "float64"}


def find(source: Path) -> list[Path]:
    """The side files of a checkpoint folder, in order of name."""
    if not source.is_dir():
        return []
    files = sorted(
        path for path in source.iterdir() if path.is_file() and path.stat().st_size <= _LARGEST_BYTES
    )
    return [path for path in files if any(fnmatchcase(path.name, pattern) for pattern in _PATTERNS)]


def copy(source: Path, writer: CheckpointWriter, dtype: DType | None) -> dict[str, str]:
    """Copy them; returns name -> the real path read. `dtype`: the output's type where it is not the sources'
    own.

    The type is then put into config.json, because transformers loads weights in the type that the
    configuration names.
    """
    copied = {}
    for path in find(source):
        data = path.read_bytes()
        if path.name == "config.json" and dtype is not None:
            config = load_object(path, _LARGEST_BYTES)
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = _TORCH_NAMES[dtype]
            data = json.dumps(config, indent=2).encode("utf-8") + b"\n"
        writer.write_bytes(path.name, data)
        copied[path.name] = os.path.realpath(path)
    return copied
