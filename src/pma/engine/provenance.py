"""`pma.json`: what an output was made from and how, and digests that tell whether it is still what was
written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma.engine.blocks import CHUNK_BYTES
from pma.engine.plan import Plan
from pma.engine.stream import Digests
from pma.errors import FormatError, MismatchError
from pma.formats import strict_json

RECORD_FILE = "pma.json"
RECORD_VERSION = 1
_LARGEST_RECORD_BYTES = 512 * 2**20


def record(
    plan: Plan, digests: Digests, side_files: Mapping[str, str], *, sha256_of: Path | None
) -> dict[str, Any]:
    """The content of `pma.json`. `side_files`: name -> where it was really read from."""
    options = plan.options
    return {
        "pma_record": RECORD_VERSION,
        "made_by": {"pma-llm": _version("pma-llm"), "torch": _version("torch"), "numpy": _version("numpy")},
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "scheme": "given weights" if options.weights is not None else options.scheme,
        "dtype": options.dtype.name if options.dtype else None,
        "exclude": list(options.exclude),
        "copy": list(options.copy),
        "allow_nonfinite": options.allow_nonfinite,
        "sources": [
            {
                **source.point.describe(),
                "path": str(source.point.path.resolve()),
                "weight": source.weight,
                "files": [asdict(identity) for identity in source.files],
            }
            for source in plan.sources
        ],
        "copied_from_newest": [name for name, policy in plan.policies.items() if policy.value != "average"],
        "excluded": list(plan.excluded),
        "left_out": [{"path": str(path), "reason": reason} for path, reason in plan.left_out],
        "side_files": dict(side_files),
        "outputs": [_output(plan, file.name, digests, sha256_of) for file in plan.layout.files],
    }


def _output(plan: Plan, name: str, digests: Digests, sha256_of: Path | None) -> dict[str, Any]:
    chunks = [digest for (file, _), digest in sorted(digests.items()) if file == name]
    size_bytes = next(file.size_bytes for file in plan.layout.files if file.name == name)
    output = {
        "name": name,
        "size_bytes": size_bytes,
        "chunk_bytes": CHUNK_BYTES,
        "blake3_root": root(chunks),
        "blake3_chunks": chunks,
    }
    if sha256_of is not None:
        output["sha256"] = sha256(sha256_of / name)
    return output


def root(chunks: list[str]) -> str:
    """One digest over the digests of a file's chunks."""
    return blake3(b"".join(map(bytes.fromhex, chunks))).hexdigest()


def sha256(path: Path) -> str:
    """The file's SHA-256, by reading it again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unchanged(plan: Plan) -> None:
    """After the last read: every source file is still the one that was planned with. Raises MismatchError."""
    for source in plan.sources:
        folder = source.point.path if source.point.path.is_dir() else source.point.path.parent
        for planned in source.files:
            path = folder / planned.name
            try:
                status = os.stat(path)
            except FileNotFoundError:
                raise MismatchError(f"{path} was removed while it was merged; nothing was written") from None
            if (status.st_size, status.st_mtime_ns) != (planned.size_bytes, planned.mtime_ns):
                raise MismatchError(
                    f"{path} was changed while it was merged; nothing was written. Merge again"
                )


def load(out: Path) -> dict[str, Any]:
    """Read the `pma.json` of an output. Raises FormatError where there is none or it is not one of ours."""
    path = out / RECORD_FILE
    if not path.is_file():
        raise FormatError(f"{out} holds no {RECORD_FILE}; expected a folder that `pma merge` wrote")
    value = strict_json.load_object(path, _LARGEST_RECORD_BYTES)
    if value.get("pma_record") != RECORD_VERSION:
        raise FormatError(f"{path}: record version {value.get('pma_record')!r}, expected {RECORD_VERSION}")
    return value


def encode(value: Mapping[str, Any]) -> bytes:
    """JSON as it is written to disk."""
    return json.dumps(value, indent=1).encode("utf-8") + b"\n"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
