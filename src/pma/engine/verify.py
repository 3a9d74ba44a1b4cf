"""Is an output still what was written, and is what was written right? Re-hash it; re-derive blocks from
the sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma import conversion, formats
from pma.engine import provenance
from pma.engine.blocks import Block
from pma.engine.means import SNAPSHOTS
from pma.engine.plan import MergeOptions, Plan
from pma.engine.planning import plan
from pma.engine.read_ahead import ReadAhead
from pma.engine.stopping import StopFlag
from pma.engine.work import work_of
from pma.errors import FormatError, InputError, PmaError, printable
from pma.formats.files import is_inside
from pma.formats.folder import chunks_of, open_folder
from pma.remote import location
from pma.trajectory import from_checkpoints
from pma.types import DType


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked and what was found wrong. `findings` is empty where all is well."""

    path: Path
    chunks_hashed: int
    blocks_derived: int
    blocks_total: int
    sources_changed: tuple[str, ...]
    findings: tuple[str, ...]


def verify(out: Path, *, samples: int | None = 16) -> Verification:
    """Re-hash every chunk of `out`, and re-derive `samples` blocks, spread evenly, from the sources (0 for
    none, None for all).

    Raises FormatError where `out` holds no record of ours. Sources that changed or are gone are reported, and
    their blocks are then not derived.
    """
    value = provenance.load(out)
    try:
        findings, hashed = _rehash(out, value["outputs"])
        findings += _changed_small_files(out, value["small_files"])
        changed = (*_changed_sources(value["sources"]), *_changed_conversion(value))
        derived, total = 0, 0
        if not changed and samples != 0:
            with _planned_again(out, value) as again:
                total = len(again.blocks)
                chosen = _spread(total, samples)
                derived = len(chosen)
                findings += _derive(again, out, chosen)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{out / provenance.RECORD_FILE} is damaged: {printable(repr(error))}") from error
    return Verification(
        path=out,
        chunks_hashed=hashed,
        blocks_derived=derived,
        blocks_total=total,
        sources_changed=changed,
        findings=tuple(findings),
    )


def _rehash(out: Path, outputs: Sequence[dict[str, Any]]) -> tuple[list[str], int]:
    findings, hashed = [], 0
    folder = open_folder(out)
    for output in outputs:
        name = _name_inside(output["name"])
        path = out / name
        if not path.is_file():
            findings.append(f"{path} is missing")
            continue
        size_bytes = path.stat().st_size
        if size_bytes != output["size_bytes"]:
            findings.append(f"{path} has {size_bytes} bytes, expected {output['size_bytes']}")
            continue
        chunk_bytes, chunks = output["chunk_bytes"], output["blake3_chunks"]
        if provenance.root(chunks) != output["blake3_root"]:
            findings.append(f"{path}: the digests in {provenance.RECORD_FILE} do not fit their root")
        for number, data in enumerate(chunks_of(folder, name, size_bytes, chunk_bytes)):
            hashed += 1
            if blake3(data).hexdigest() != chunks[number]:
                start = number * chunk_bytes
                where = f"block {number}, bytes {start} to {start + len(data)}"
                names = _tensors_at(out, name, start, start + len(data))
                findings.append(f"{path}: {where}{names}: not what was written")
    return findings, hashed


def _tensors_at(out: Path, file: str, start: int, stop: int) -> str:
    """The tensors that lie in some bytes of an output, as words; none where its header is what is damaged."""
    try:
        with closing(formats.open_checkpoint(out)) as reader:
            places = ((name, fragment) for name in reader.tensors for fragment in reader.fragments(name))
            inside = [
                printable(name)
                for name, f in places
                if f.file == file and f.offset_bytes < stop and f.offset_bytes + f.length_bytes > start
            ]
    except PmaError:
        return ""
    more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
    return f", with {', '.join(inside[:3])}{more}" if inside else ""


def _changed_small_files(out: Path, small_files: Sequence[dict[str, Any]]) -> list[str]:
    findings = []
    for file in small_files:
        path = out / _name_inside(file["name"])
        if not path.is_file():
            findings.append(f"{path} is missing")
        elif blake3(path.read_bytes()).hexdigest() != file["blake3"]:
            findings.append(f"{path} is not what was written")
    return findings


def _changed_sources(sources: Sequence[dict[str, Any]]) -> Iterator[str]:
    for source in sources:
        folder = open_folder(location(source["folder"]))
        for file in source["files"]:
            name = _name_inside(file["name"])
            try:
                found = folder.status(name)
            except InputError:
                yield f"{folder.path / name} is gone"
                continue
            if found != (file["size_bytes"], file["mtime_ns"]):
                yield f"{folder.path / name} has changed since"


def _changed_conversion(value: dict[str, Any]) -> Iterator[str]:
    """Template and map of a conversion, where they are not what they were."""
    done = value.get("conversion")
    if not done:
        return
    try:
        like = conversion.read_template(location(done["like"]))
        if like.digest != done["like_blake3"]:
            yield f"{like.path}, the model that was aimed at, has changed since"
        if conversion.load_map(done["map"]).digest != done["map_blake3"]:
            yield f"the map {printable(done['map'])} has changed since"
    except PmaError as error:
        yield str(error)


def _planned_again(out: Path, value: dict[str, Any]) -> Plan:
    """The plan that the record describes; explicit weights stand in for the scheme that they came from.

    Raises FormatError where the record describes no merge, or another than the one that lies there.
    """
    trajectory = from_checkpoints([location(source["path"]) for source in value["sources"]], as_given=True)
    options = MergeOptions(
        weights=tuple(source["weight"] for source in value["sources"]),
        dtype=DType[value["dtype"]] if value["dtype"] else None,
        exclude=tuple(value["exclude"]),
        copy=tuple(value["copy"]),
        with_optimizer=value.get("with_optimizer", False),
        moments=value.get("moments", "newest"),
        to=value.get("to"),
        like=location(value["conversion"]["like"]) if value.get("conversion") else None,
        map=value["conversion"]["map"] if value.get("conversion") else None,
        use=value.get("use", SNAPSHOTS),
        allow_nonfinite=value["allow_nonfinite"],
    )
    again = plan(trajectory.points, options, as_given=True).resharded(len(value["outputs"]))
    planned = [(file.name, file.size_bytes) for file in again.layout.files]
    if planned != [(output["name"], output["size_bytes"]) for output in value["outputs"]]:
        again.close()
        raise FormatError(f"{out / provenance.RECORD_FILE}: its outputs are not what its sources would give")
    return again


def _derive(again: Plan, out: Path, numbers: Sequence[int]) -> list[str]:
    from pma.engine.compute import BlockWorker

    findings = []
    work, folder = work_of(again), open_folder(out)
    with ReadAhead(work, map(again.blocks.__getitem__, numbers), lambda block: [0], StopFlag()) as ahead:
        worker = BlockWorker(
            work.readers,
            work.recipes,
            tile_bytes=work.tile_bytes,
            allow_nonfinite=work.allow_nonfinite,
            ahead=ahead,
        )
        while (block := ahead.next()) is not None:
            [(_, expected)] = worker.make(block)
            written = memoryview(bytearray(block.length_bytes))
            try:
                folder.read(block.file, block.offset_bytes, [written])
            except InputError as error:
                findings.append(str(error))
                continue
            if written != expected:
                stop = block.offset_bytes + block.length_bytes
                findings.append(
                    f"{out / block.file}: {_differing(block, written, expected)} (in block {block.chunk[1]}, "
                    f"bytes {block.offset_bytes} to {stop}) is not what the sources give"
                )
    return findings


def _differing(block: Block, written: memoryview, expected: memoryview) -> str:
    """Name the first tensor of a block whose bytes differ."""
    for span in block.spans:
        ends = [piece.block_offset for piece in span.pieces[1:]] + [span.block_offset + span.length_bytes]
        for piece, end in zip(span.pieces, ends, strict=True):
            if written[piece.block_offset : end] != expected[piece.block_offset : end]:
                return printable(piece.tensor)
    return "the header"


def _spread(count: int, samples: int | None) -> Sequence[int]:
    if samples is None or samples >= count:
        return range(count)
    return [i * count // samples for i in range(samples)]


def _name_inside(name: str) -> str:
    if not is_inside(name):
        raise FormatError(f"{printable(name)!r} in {provenance.RECORD_FILE} leads out of its folder")
    return name
