"""A model of a disk that loses power: which trees of files may be found afterwards.

What is written to a file is safe after that file's fsync; names made or removed in a folder are safe after
that folder's. What is not safe may be there or not: each write by itself (not at all, whole, in part, or only
as a longer file of zeros), each change of a name by itself, except that one name's changes keep their order.
"""

# stricter than ext4 or xfs, which keep more order than they promise

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 0  # the number of the top folder; files and folders are known by number, as by inode


@dataclass(frozen=True)
class Write:
    file: int
    offset_bytes: int
    data: bytes


@dataclass(frozen=True)
class Resize:
    """To `size_bytes`, or with `only_longer` to at least that."""

    file: int
    size_bytes: int
    only_longer: bool


@dataclass(frozen=True)
class Rename:
    """Names of one folder, changed in one step: to a number, or None for no such name any more."""

    folder: int
    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Sync:
    number: int


Operation = Write | Resize | Rename | Sync
How = Callable[[Operation], str]  # "lost", "done", and for writes also "torn" and "zeros"


@dataclass
class Tree:
    """Files and folders by number. A number that no name leads to is not there."""

    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})

    def copy(self) -> "Tree":
        return Tree(dict(self.files), {number: dict(names) for number, names in self.folders.items()})

    def apply(self, operation: Operation, how: str = "done", cut: float = 0.5) -> None:
        if isinstance(operation, Rename):
            names = self.folders[operation.folder]
            for name, number in operation.names:
                names.pop(name, None)
                if number is not None:
                    names[name] = number
        elif isinstance(operation, Resize):
            data, size_bytes = self.files[operation.file], operation.size_bytes
            if not operation.only_longer or size_bytes > len(data):
                self.files[operation.file] = data[:size_bytes].ljust(size_bytes, b"\0")
        elif isinstance(operation, Write):
            start, stop = operation.offset_bytes, operation.offset_bytes + len(operation.data)
            data = bytearray(self.files[operation.file].ljust(stop, b"\0"))
            written = {"done": len(operation.data), "zeros": 0, "torn": int(cut * len(operation.data))}[how]
            data[start : start + written] = operation.data[:written]
            self.files[operation.file] = bytes(data)

    def contents(self, number: int = ROOT, prefix: str = "") -> dict[str, bytes | None]:
        """Path -> bytes, or None for a folder."""
        found: dict[str, bytes | None] = {}
        for name, inside in sorted(self.folders[number].items()):
            if inside in self.folders:
                found[prefix + name] = None
                found |= self.contents(inside, f"{prefix}{name}/")
            else:
                found[prefix + name] = self.files[inside]
        return found

    def find(self, path: str) -> int:
        number = ROOT
        for name in path.split("/") if path else ():
            number = self.folders[number][name]
        return number


@dataclass
class Trace:
    """What happened, from `before` on. `numbers` of everything that ever was there."""

    before: Tree
    operations: list[Operation] = field(default_factory=list)
    new_files: set[int] = field(default_factory=set)
    new_folders: set[int] = field(default_factory=set)

    def after(self, count: int, how: How = lambda operation: "done", cut: float = 0.5) -> Tree:
        """What may be found where the power goes after `count` operations; `how` decides on each that is not
        safe.
        """
        tree = self.before.copy()
        tree.files |= dict.fromkeys(self.new_files, b"")
        tree.folders |= {number: {} for number in self.new_folders}
        safe = _safe(self.operations[:count])
        lost: set[tuple[int, str]] = set()  # names with a change that was lost: what came later needs it
        for index, operation in enumerate(self.operations[:count]):
            if isinstance(operation, Sync):
                continue
            outcome = "done" if index in safe else how(operation)
            if isinstance(operation, Rename):
                keys = {(operation.folder, name) for name, _ in operation.names}
                if outcome == "lost" or keys & lost:
                    lost |= keys
                    continue
            if outcome != "lost":
                tree.apply(operation, outcome, cut)
        return tree

    def crashes(self, count: int, chance: random.Random, samples: int) -> Iterator[Tree]:
        """Nothing unsafe survived; all did; only names, only data; all but one, one alone; and `samples`
        mixtures.
        """
        yield self.after(count, lambda operation: "lost")
        yield self.after(count)
        yield self.after(count, lambda operation: "done" if isinstance(operation, Rename) else "lost")
        yield self.after(count, lambda operation: "lost" if isinstance(operation, Rename) else "done")
        yield self.after(count, lambda operation: "zeros" if isinstance(operation, Write) else "done")
        safe = _safe(self.operations[:count])
        for one in (self.operations[index] for index in range(count) if index not in safe):
            yield self.after(count, lambda operation, one=one: "lost" if operation is one else "done")
            yield self.after(count, lambda operation, one=one: "done" if operation is one else "lost")
        for _ in range(samples):
            yield self.after(count, _by_chance(chance), cut=chance.random())


def _by_chance(chance: random.Random) -> How:
    survive = chance.choice((0.1, 0.5, 0.9))

    def how(operation: Operation) -> str:
        if chance.random() >= survive:
            return "lost"
        return chance.choice(("done", "done", "torn", "zeros")) if isinstance(operation, Write) else "done"

    return how


def _safe(operations: Sequence[Operation]) -> set[int]:
    """Numbers of the operations that a later sync made safe."""
    safe: set[int] = set()
    waiting: dict[int, list[int]] = {}
    for index, operation in enumerate(operations):
        if isinstance(operation, Sync):
            safe |= set(waiting.pop(operation.number, ()))
        else:
            number = operation.folder if isinstance(operation, Rename) else operation.file
            waiting.setdefault(number, []).append(index)
    return safe


def put(contents: dict[str, bytes | None], folder: Path) -> None:
    """Make a tree's contents real in an empty folder."""
    for path, data in contents.items():
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)


def seen(folder: Path) -> dict[str, bytes | None]:
    """The same of what is really there."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }
