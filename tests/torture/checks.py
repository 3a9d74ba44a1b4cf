"""What must hold at any moment: what looks complete is complete, and what a journal says is true."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from blake3 import blake3

import pma
from pma import engine, formats
from pma.engine import blocks
from pma.engine.commit import write_all
from pma.engine.journal import JOURNAL_FILE, Journal
from pma.engine.plan import Plan
from pma.engine.work import shared_work
from pma.errors import PmaError

Weights = dict[str, str]  # file -> BLAKE3 of its bytes
Targets = Sequence[tuple[Plan, Path]]


def weights_of(folder: Path) -> Weights:
    return {path.name: blake3(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def looks_complete(folder: Path) -> bool:
    try:
        found = pma.inspect(folder)
    except PmaError:
        return False
    # a folder of checkpoints is asked for each of them
    return bool(found["checkpoints"] if "checkpoints" in found else found["complete"])


def check_complete(root: Path, expected: Mapping[Path, Weights]) -> list[Path]:
    """Every folder under `root` that looks complete is one of `expected` and right, and the other way round
    where it exists. Returns those.
    """
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    found = [folder for folder in folders if looks_complete(folder)]
    there = {out for out in expected if out.exists()}
    assert set(found) == there, f"{found} look complete, {there} are there"
    for out in found:
        check_finished(out, expected[out])
    return found


def check_finished(out: Path, expected: Weights) -> None:
    assert formats.is_checkpoint(out)
    assert weights_of(out) == expected, f"{out} has other bytes than an uninterrupted merge"
    found = engine.verify(out).findings
    assert found == (), found


def check_journal(folder: Path) -> int:
    """Every chunk that the journal in a hidden folder calls done has those bytes. Returns how many."""
    if not (folder / JOURNAL_FILE).is_file():
        return 0
    journal = Journal(folder)
    journal.close()
    if not all((folder / name).is_file() for name, _ in journal.digests):
        return 0  # it was being cleared; such a journal is not trusted
    contents = {name: (folder / name).read_bytes() for name in {name for name, _ in journal.digests}}
    for (name, number), digest in journal.digests.items():
        chunk = contents[name][number * blocks.CHUNK_BYTES : (number + 1) * blocks.CHUNK_BYTES]
        assert blake3(chunk).hexdigest() == digest, f"chunk {number} of {name} is not what the journal says"
    return len(journal.digests)


def write_those_missing(targets: Targets, **how: object) -> int:
    """The same command again, for the outputs that are not there yet; returns the bytes resumed."""
    missing = [(plan, out) for plan, out in targets if not out.exists()]
    done = write_all(shared_work([plan for plan, _ in missing]), missing, **how) if missing else []
    return sum(merge.bytes_resumed for merge in done)
