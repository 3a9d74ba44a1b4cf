"""`pma.json`: what an output was made from and how, and digests that tell whether it is still what was
written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma.engine import converting
from pma.engine.blocks import CHUNK_BYTES, Policy
from pma.engine.plan import Plan
from pma.engine.stream import Digests
from pma.errors import FormatError, IncompleteError, MismatchError, printable
from pma.formats import strict_json
from pma.formats.folder import chunks_of, open_folder
from pma.remote import location

RECORD_FILE = "pma.json"
RECORD_VERSION = 1
_LARGEST_RECORD_BYTES = 512 * 2**20


def record(
    plan: Plan,
    digests: Digests,
    side_files: Mapping[str, str],
    *,
    sha256_of: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """The content of `pma.json` for an output. `side_files`: name -> where it was really read from.
    `sha256_of` gives that of an output's file, to be added.
    """
    options = plan.options
    return {
        "pma_record": RECORD_VERSION,
        "made_by": {"pma-llm": _version("pma-llm"), "torch": _version("torch"), "numpy": _version("numpy")},
        "plan": heading(plan),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "scheme": "given weights" if options.weights is not None else options.scheme,
        "dtype": options.dtype.name if options.dtype else None,
        "exclude": list(options.exclude),
        "copy": list(options.copy),
        "with_optimizer": options.with_optimizer,
        "moments": options.moments,
        "to": options.to,
        "conversion": converting.record(plan.newest),
        "allow_nonfinite": options.allow_nonfinite,
        "use": options.use,
        "sources": [
            {
                **source.point.describe(),
                "path": str(absolute(source.point.path)),
                "folder": str(absolute(source.point.folder)),
                "weight": source.weight,
                "interval_mean": asdict(source.mean) if source.mean is not None else None,
                "files": [asdict(identity) for identity in source.files],
            }
            for source in plan.sources
        ],
        "copied_from_newest": _names(plan, Policy.COPY_NEWEST),
        "zero": _names(plan, Policy.ZERO),
        "excluded": list(plan.excluded),
        "left_out": [{"path": str(path), "reason": reason} for path, reason in plan.left_out],
        "small_files": _small_files(plan, side_files),
        "outputs": [_output(plan, file.name, digests, sha256_of) for file in plan.layout.files],
    }


def _names(plan: Plan, policy: Policy) -> list[str]:
    return [name for name, given in plan.policies.items() if given is policy]


def heading(plan: Plan) -> dict[str, Any]:
    """What must be the same for an interrupted merge to go on: sources, recipe, layout, and our own
    version.
    """
    options = plan.options
    choices = [options.scheme, options.weights, options.exclude, options.copy, options.allow_nonfinite]
    choices += [options.with_optimizer, options.moments, options.to]
    choices += [options.use] if options.uses_means else []
    files = [(file.name, file.size_bytes) for file in plan.layout.files]
    headers = [data.hex() for file in plan.layout.files for _, data in file.constants]
    sources = [
        (str(absolute(source.point.path)), [asdict(identity) for identity in source.files])
        for source in plan.sources
    ]
    made_by = [_version("pma-llm"), converting.record(plan.newest)]
    return {
        "journal": 1,
        "sources": _digest(sources),
        "options": _digest([made_by, choices, plan.weights, files, headers, CHUNK_BYTES]),
    }


def _digest(value: Any) -> str:
    return blake3(json.dumps(value, default=str).encode()).hexdigest()


def absolute(path: Path) -> Path:
    """A path as records name it: without links but for the last part of a file's."""
    # the last part stays a link: in a hub's cache it leads to a file of another name
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def _output(
    plan: Plan, name: str, digests: Digests, sha256_of: Callable[[str], str] | None
) -> dict[str, Any]:
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
        output["sha256"] = sha256_of(name)
    return output


def _small_files(plan: Plan, side_files: Mapping[str, str]) -> list[dict[str, Any]]:
    """Everything beside the weights: side files and the index. `from` is None for what was made here."""
    written = {**plan.layout.records, **plan.side_files}
    return [
        {"name": name, "from": side_files.get(name), "blake3": blake3(data).hexdigest()}
        for name, data in sorted(written.items())
    ]


def root(chunks: list[str]) -> str:
    """One digest over the digests of a file's chunks."""
    return blake3(b"".join(map(bytes.fromhex, chunks))).hexdigest()


def sha256(path: Path, name: str) -> str:
    """The SHA-256 of a file in a folder, by reading it again."""
    digest = hashlib.sha256()
    with closing(open_folder(path)) as folder:
        for chunk in chunks_of(folder, name, folder.size_bytes(name)):
            digest.update(chunk)
    return digest.hexdigest()


def add_source_digests(value: dict[str, Any]) -> None:
    """Add the SHA-256 of every source file to a record, by reading them again."""
    for source in value["sources"]:
        for file in source["files"]:
            file["sha256"] = sha256(location(source["folder"]), file["name"])


def check_unchanged(plan: Plan) -> None:
    """After the last read: every source file is still the one that was planned with. Raises MismatchError."""
    for source, reader in zip(plan.sources, plan.readers, strict=True):
        try:
            found = reader.identities()
        except IncompleteError as error:
            raise MismatchError(f"{error}: removed while it was merged; nothing was written") from None
        for planned, now in zip(source.files, found, strict=True):
            if planned != now:
                raise MismatchError(
                    f"{source.point.folder / planned.name} was changed while it was merged; nothing was "
                    "written. Merge again"
                )


def load(out: Path) -> dict[str, Any]:
    """Read the `pma.json` of an output. Raises FormatError where there is none or it is not one of ours."""
    path = out / RECORD_FILE
    if not path.is_file():
        raise FormatError(f"{out} holds no {RECORD_FILE}; expected a folder that `pma merge` wrote")
    value = strict_json.load_object(path, _LARGEST_RECORD_BYTES, 2 * _LARGEST_RECORD_BYTES)
    if value.get("pma_record") != RECORD_VERSION:
        found = printable(str(value.get("pma_record")))
        raise FormatError(f"{path}: record version {found}, expected {RECORD_VERSION}")
    if (what := _misshapen(value)) is not None:
        raise FormatError(f"{path} is damaged: {what}")
    return value


def _misshapen(value: Mapping[str, Any]) -> str | None:
    """What is wrong with a record's shape, or None. It is as untrusted as any file."""
    if not isinstance(value.get("small_files"), list):
        return "small_files is missing"
    for name in ("sources", "outputs"):
        entries = value.get(name)
        if (
            not isinstance(entries, list)
            or not entries
            or not all(isinstance(entry, dict) for entry in entries)
        ):
            return f"{name} is not a list of objects"
    for output in value["outputs"]:
        size, chunks = output.get("size_bytes"), output.get("blake3_chunks")
        if type(size) is not int or not 0 < size < 2**63 or not isinstance(chunks, list):
            return "an output has no size or no digests"
        if output.get("chunk_bytes") != CHUNK_BYTES or len(chunks) != -(-size // CHUNK_BYTES):
            return "an output has not one digest for each chunk"
        if not all(isinstance(chunk, str) and re.fullmatch("[0-9a-f]{64}", chunk) for chunk in chunks):
            return "a digest is not one"
    if not all(isinstance(source.get("files"), list) and source["files"] for source in value["sources"]):
        return "a source has no files"
    return None


def encode(value: Mapping[str, Any]) -> bytes:
    """JSON as it is written to disk."""
    return json.dumps(value, indent=1).encode("utf-8") + b"\n"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
