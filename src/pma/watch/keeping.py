"""`--keep-window`: hard links to the window's checkpoints, which stay when the trainer removes its own.

A kept folder holds a list of our links, written first. Only what such a list names is ever removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pma import formats
from pma.errors import InputError, UsageError
from pma.formats import UNFINISHED_SUFFIX, strict_json
from pma.formats.files import is_inside
from pma.remote import RemotePath
from pma.trajectory import TrajectoryPoint

LINKS_FILE = ".pma-links.json"
# what no merge reads, such as an optimizer's state, is kept only if it is small: it would hold up gigabytes
_LARGEST_BESIDE_BYTES = 64 * 2**20
_LARGEST_LIST_BYTES = 16 * 2**20


class Keeper:
    """Keeps checkpoints of `run` in `folder`. Raises UsageError where hard links cannot be made there."""

    def __init__(self, run: Path, folder: Path) -> None:
        if isinstance(run, RemotePath):
            raise UsageError(f"--keep-window makes hard links, which the store of {run} does not have")
        self.folder = folder
        self._try_a_link(run)

    def _try_a_link(self, run: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        original = run / f".pma-link-test-{os.getpid()}"
        link = self.folder / original.name
        try:
            original.touch()
            os.link(original, link)
        except OSError as error:
            raise UsageError(
                f"--keep-window: no hard link can be made from {run} to {self.folder} ({error.strerror}); "
                "both must be on one file system that has hard links, and writable. Leave --keep-window out, "
                "or let the trainer keep more checkpoints itself"
            ) from error
        finally:
            link.unlink(missing_ok=True)
            original.unlink(missing_ok=True)

    def keep(self, points: Sequence[TrajectoryPoint]) -> list[str]:
        """Keep these checkpoints and no others of ours; returns what could not be kept, and why."""
        wanted = {point.path.name: point.path for point in points}
        for path in self._mine():
            if path.name not in wanted:
                self._remove(path)
        return [why for path in wanted.values() if (why := self._kept(path)) is not None]

    def _mine(self) -> list[Path]:
        return [path for path in sorted(self.folder.iterdir()) if (path / LINKS_FILE).is_file()]

    def _kept(self, path: Path) -> str | None:
        target = self.folder / path.name
        if path.parent == self.folder or _is_linked(path, target):
            return None
        if not path.is_dir():
            return f"{path} is a lone file; --keep-window keeps checkpoints that are folders"
        partial = _partial(target)
        try:
            for old in (partial, target):
                if old.exists():
                    self._remove(old)
            names = _names(path)
            partial.mkdir()
            (partial / LINKS_FILE).write_text(json.dumps({"links": names}))
            for name in names:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(path / name, partial / name)
            partial.rename(target)
        except (OSError, InputError) as error:
            return f"{path} could not be kept: {error}"
        return None

    def _remove(self, path: Path) -> None:
        """Remove our links, and folders that are empty then; whatever else lies there stays."""
        names = _links(path)
        partial = _partial(path)
        if path != partial:
            if partial.exists():
                self._remove(partial)
            path.rename(partial)  # half of it must never be taken for a checkpoint
        for name in [*names, LINKS_FILE]:
            (partial / name).unlink(missing_ok=True)
        inner = {parent for name in names for parent in Path(name).parents if parent.name}
        for folder in [*sorted(inner, key=lambda each: -len(each.parts)), Path()]:
            try:
                (partial / folder).rmdir()
            except OSError:
                return  # somebody put something there


def _is_linked(path: Path, target: Path) -> bool:
    """Whether `target` holds our links to the files that are in `path` now: they may be written anew."""
    if not (target / LINKS_FILE).is_file():
        return False
    names = _links(target)
    return all((path / name).exists() and os.path.samefile(path / name, target / name) for name in names)


def _links(path: Path) -> list[str]:
    links = strict_json.load_object(path / LINKS_FILE, _LARGEST_LIST_BYTES).get("links")
    return [name for name in links if is_inside(name)] if isinstance(links, list) else []


def _partial(path: Path) -> Path:
    return path if path.name.endswith(UNFINISHED_SUFFIX) else path.with_name(path.name + UNFINISHED_SUFFIX)


def _names(path: Path) -> list[str]:
    """The files of a checkpoint to keep: all that a merge reads, and what is small."""
    with closing(formats.open_checkpoint(path)) as reader:
        read = {identity.name for identity in reader.identities()}
    names = []
    for folder, _, inside in os.walk(path):
        for file in inside:
            name = (Path(folder) / file).relative_to(path).as_posix()
            if name in read or os.stat(path / name).st_size <= _LARGEST_BESIDE_BYTES:
                names.append(name)
    return sorted(names)
