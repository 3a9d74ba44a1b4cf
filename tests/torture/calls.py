"""Every call to the system by which the engine changes files: recorded as operations of `disk.py`, or made
to fail.
"""

import os
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pma.engine import staging

from .disk import Operation, Rename, Resize, Sync, Trace, Tree, Write, seen

NAMES = (
    "open",
    "close",
    "write",
    "pwrite",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "link",
    "replace",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
    "utime",
)
_NEVER_FAIL = ("close",)


class Calls:
    """Stands in for the functions of `os` while it is installed; what is outside of `root` passes through.

    `fail`: asked before each call (its number, its name, the path as far as known) whether to raise.
    """

    def __init__(self, root: Path, fail: Callable[[int, str, str], None] | None = None) -> None:
        self._root, self._fail = root, fail
        self._real = {name: getattr(os, name) for name in NAMES}
        self._rename_folder = staging._rename_without_replacing
        self._numbers = count(1)
        self._paths: dict[int, str] = {}  # descriptor -> path
        self._opened: dict[int, int] = {}  # descriptor -> number of the file or folder
        self._positions: Counter[int] = Counter()
        self._renaming = False
        self.count = 0
        self.seen: Counter[str] = Counter()
        self.trace = Trace(_taken(root, self._numbers))
        self._now = self.trace.before.copy()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in NAMES:
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(staging, "_rename_without_replacing", self._rename_without_replacing)

    def check_complete(self) -> None:
        """No call that changes files was missed: the trace gives what is there."""
        assert self._now.contents() == seen(self._root)
        assert self.trace.after(len(self.trace.operations)).contents() == seen(self._root)

    def _inside(self, path: Any) -> str | None:
        """The path below root, "" for root itself, or None for what lies elsewhere."""
        if isinstance(path, int):
            return self._paths.get(path)
        path = Path(os.fsdecode(path))
        if path == self._root:
            return ""
        return str(path.relative_to(self._root)) if self._root in path.parents else None

    def _called(self, name: str, path: str) -> None:
        if name not in _NEVER_FAIL:
            self.seen[name] += 1
            self.count += 1
            if self._fail is not None:
                self._fail(self.count, name, path)

    def _did(self, operation: Operation) -> None:
        self.trace.operations.append(operation)
        self._now.apply(operation)
        if self._fail is None:
            assert self._now.contents() == seen(self._root), f"a call was missed before {operation}"

    def _named(self, *changes: tuple[str, int | None]) -> None:
        """Names given or taken; all are of one folder."""
        [folder] = {path.rpartition("/")[0] for path, _ in changes}
        names = tuple((path.rpartition("/")[2], number) for path, number in changes)
        self._did(Rename(self._now.find(folder), names))

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        inside = None if dir_fd is not None else self._inside(path)
        if inside is None:
            return self._real["open"](path, flags, mode, dir_fd=dir_fd)
        existed = os.path.lexists(path)
        if flags & os.O_CREAT:
            self._called("open", inside)
        descriptor: int = self._real["open"](path, flags, mode)
        if flags & os.O_CREAT and not existed:
            number = next(self._numbers)
            self.trace.new_files.add(number)
            self._now.files[number] = b""
            self._named((inside, number))
        elif flags & os.O_TRUNC:
            self._did(Resize(self._now.find(inside), 0, only_longer=False))
        self._paths[descriptor], self._opened[descriptor] = inside, self._now.find(inside)
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        self._opened.pop(descriptor, None)
        self._positions.pop(descriptor, None)
        self._real["close"](descriptor)

    def _write(self, descriptor: int, data: Any) -> int:
        if descriptor not in self._opened:
            return self._real["write"](descriptor, data)
        self._called("write", self._paths[descriptor])
        written: int = self._real["write"](descriptor, data)
        self._did(Write(self._opened[descriptor], self._positions[descriptor], bytes(data)[:written]))
        self._positions[descriptor] += written
        return written

    def _pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        if descriptor not in self._opened:
            return self._real["pwrite"](descriptor, data, offset)
        self._called("pwrite", self._paths[descriptor])
        written: int = self._real["pwrite"](descriptor, data, offset)
        self._did(Write(self._opened[descriptor], offset, bytes(data)[:written]))
        return written

    def _ftruncate(self, descriptor: int, size_bytes: int) -> None:
        if descriptor in self._opened:
            self._called("ftruncate", self._paths[descriptor])
        self._real["ftruncate"](descriptor, size_bytes)
        if descriptor in self._opened:
            self._did(Resize(self._opened[descriptor], size_bytes, only_longer=False))

    def _posix_fallocate(self, descriptor: int, offset: int, length: int) -> None:
        if descriptor in self._opened:
            self._called("posix_fallocate", self._paths[descriptor])
        self._real["posix_fallocate"](descriptor, offset, length)
        if descriptor in self._opened:
            self._did(Resize(self._opened[descriptor], offset + length, only_longer=True))

    def _fsync(self, descriptor: int) -> None:
        self._sync("fsync", descriptor)

    def _fdatasync(self, descriptor: int) -> None:
        self._sync("fdatasync", descriptor)

    def _sync(self, name: str, descriptor: int) -> None:
        if descriptor in self._opened:
            self._called(name, self._paths[descriptor])
        self._real[name](descriptor)
        if descriptor in self._opened:
            self._did(Sync(self._opened[descriptor]))

    def _link(self, source: Any, target: Any) -> None:
        into = self._inside(target)
        if into is not None:
            self._called("link", into)
        self._real["link"](source, target)
        if into is not None:
            self._named((into, self._now.find(self._inside(source) or "")))

    def _replace(self, source: Any, target: Any) -> None:
        self._moved("replace", source, target, self._real["replace"])

    def _rename(self, source: Any, target: Any) -> None:
        if self._renaming:
            self._real["rename"](source, target)
        else:
            self._moved("rename", source, target, self._real["rename"])

    def _rename_without_replacing(self, folder: Path, out: Path) -> None:
        self._renaming = True
        try:
            self._moved("rename", folder, out, self._rename_folder)
        finally:
            self._renaming = False

    def _moved(self, name: str, source: Any, target: Any, move: Callable[[Any, Any], None]) -> None:
        old, new = self._inside(source), self._inside(target)
        if old is not None:
            self._called(name, old)
        move(source, target)
        if old is not None and new is not None:
            self._named((old, None), (new, self._now.find(old)))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._removed("unlink", path, dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._removed("rmdir", path, dir_fd)

    def _removed(self, name: str, path: Any, dir_fd: int | None) -> None:
        inside = None if dir_fd is not None else self._inside(path)
        if inside is not None:
            self._called(name, inside)
        self._real[name](path, dir_fd=dir_fd)
        if inside is not None:
            self._named((inside, None))

    def _mkdir(self, path: Any, mode: int = 0o777) -> None:
        inside = self._inside(path)
        if inside is not None:
            self._called("mkdir", inside)
        self._real["mkdir"](path, mode)
        if inside is not None:
            number = next(self._numbers)
            self.trace.new_folders.add(number)
            self._now.folders[number] = {}
            self._named((inside, number))

    def _utime(self, path: Any, *args: Any, **how: Any) -> None:
        inside = self._inside(path)
        if inside is not None:
            self._called("utime", inside)
        self._real["utime"](path, *args, **how)


def _taken(root: Path, numbers: Any) -> Tree:
    """The tree that is there now, all of it safe."""
    tree = Tree()
    for path, data in seen(root).items():
        folder, _, name = path.rpartition("/")
        number = next(numbers)
        tree.folders[tree.find(folder)][name] = number
        if data is None:
            tree.folders[number] = {}
        else:
            tree.files[number] = data
    return tree
