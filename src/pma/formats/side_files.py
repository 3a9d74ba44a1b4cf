"""The small files beside the weights of a checkpoint: with them a copy of the weights can be used at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from pma.errors import InputError
from pma.formats.strict_json import parse_object
from pma.remote import RemotePath
from pma.types import DType

# configuration, tokenizer, generation settings, chat template, code (copied and listed, never imported)
_PATTERNS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "*.model",
    "processor_config.json",
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


@contextmanager
def on_this_machine(source: Path) -> Iterator[Path]:
    """A folder with the checkpoint's side files: itself, or for one in a store a copy while in the block."""
    if not isinstance(source, RemotePath):
        yield source
        return
    with TemporaryDirectory(prefix="pma-") as folder:
        for name, data in read(source).items():
            (Path(folder) / name).write_bytes(data)
        yield Path(folder)


def read(source: Path) -> dict[str, bytes]:
    """The side files of a checkpoint folder by name. Raises InputError for unusable ones."""
    if not source.is_dir():
        return {}
    files = {}
    for path in sorted(source.iterdir()):
        if not path.is_file() or not any(fnmatchcase(path.name, pattern) for pattern in _PATTERNS):
            continue
        if path.stat().st_size > _LARGEST_BYTES:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes; that is not believable for a side file"
            )
        try:
            files[path.name] = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return files


def with_dtype(files: Mapping[str, bytes], dtype: DType, where: str) -> dict[str, bytes]:
    """The files with `dtype` in config.json, because transformers loads weights in the type named there.

    `where`: the configuration's path, for messages.
    """
    if "config.json" not in files:
        return dict(files)
    config = parse_object(files["config.json"], where)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = _TORCH_NAMES[dtype]
    return {**files, "config.json": json.dumps(config, indent=2).encode("utf-8") + b"\n"}
