"""A place in a store, with those methods of `pathlib.Path` that PMA uses."""

from __future__ import annotations

import stat
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from pma.remote.store import Entry, Store

if TYPE_CHECKING:
    # a Path to type checkers, nothing of it at run time: what is not written here fails at once, and can
    # never touch a file of this machine that happens to have such a name
    _Path = Path
else:
    _Path = object


@dataclass(frozen=True)
class _Status:
    """What `stat` tells."""

    st_size: int
    st_mtime_ns: int
    st_mode: int


class RemotePath(_Path):
    """A file or folder behind a URL. As text it is the URL without credentials and query string.

    A path made with `/` or `iterdir` is looked up in the listing of its folder, so that a folder costs one
    request however many of its files are asked for. One that was named by itself is asked for by itself.
    """

    def __init__(
        self, protocol: str, rest: str, *, store: Store | None = None, query: str = "", listed: bool = False
    ) -> None:
        if store is None and "?" in rest and protocol.startswith("http"):
            rest, _, query = rest.partition("?")
        self._place = rest.rstrip("/")
        self._query = query
        self._listed = listed
        self.store = store or Store(protocol, self.place)

    def _at(self, place: str, *, listed: bool) -> Self:
        return type(self)(self.store.protocol, place, store=self.store, query=self._query, listed=listed)

    @property
    def place(self) -> str:
        """Where it is in its store: the URL without its protocol."""
        return f"{self._place}?{self._query}" if self._query else self._place

    # ---- names ----

    @property
    def name(self) -> str:
        return self._place.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parts(self) -> tuple[str, ...]:
        return (f"{self.store.protocol}://", *self._place.split("/"))

    @property
    def parent(self) -> Self:
        folder, slash, _ = self._place.rpartition("/")
        return self._at(folder, listed=False) if slash and folder.strip("/") else self

    @property
    def parents(self) -> tuple[Self, ...]:
        above, here = [], self
        while (parent := here.parent) is not here:
            above.append(parent)
            here = parent
        return tuple(above)

    def __truediv__(self, name: Any) -> Self:
        inside = str(name).strip("/")
        return self._at(f"{self._place}/{inside}", listed=True) if inside else self

    def joinpath(self, *names: Any) -> Self:
        return self._at("/".join([self._place, *map(str, names)]), listed=True)

    def relative_to(self, other: Any, *_: Any, **__: Any) -> PurePosixPath:  # type: ignore[override]
        """What `self` is called below the folder `other`."""
        return PurePosixPath(self._place).relative_to(PurePosixPath(other._place))

    def resolve(self, strict: bool = False) -> Self:
        return self

    absolute = resolve

    def __str__(self) -> str:
        return self.store.url(self._place)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a file of this machine")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._key == other._key

    def __lt__(self, other: Any) -> bool:
        return self._key < other._key if isinstance(other, RemotePath) else str(self) < str(other)

    def __gt__(self, other: Any) -> bool:
        return not self < other and self != other

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, str]:
        return self.store.protocol, self._place

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    # ---- what is there ----

    def _entry(self) -> Entry | None:
        if self._listed:
            return self._siblings().get(self.name)
        if self.store.listing(self.place):
            return Entry(size_bytes=0, is_folder=True, stamp=0, mtime_ns=0)
        return self.store.entry(self.place)

    def _siblings(self) -> Mapping[str, Entry]:
        return self.store.listing(self.parent.place)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self._entry() is not None

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        found = self._entry()
        return found is not None and found.is_folder

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        found = self._entry()
        return found is not None and not found.is_folder

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Generator[Self, None, None]:
        yield from [self / name for name in sorted(self.store.listing(self.place))]

    def glob(self, pattern: str, **_: Any) -> Iterator[Self]:  # type: ignore[override]  # newer Pythons add flags
        """Entries whose names fit, level by level; `**` is not for stores."""
        assert "**" not in pattern
        first, _slash, rest = pattern.partition("/")
        found = (path for path in self.iterdir() if fnmatchcase(path.name, first))
        return (inner for path in found for inner in path.glob(rest)) if rest else found

    def rglob(self, pattern: str, **_: Any) -> Iterator[Self]:  # type: ignore[override]  # newer Pythons add flags
        for path in self.iterdir():
            if fnmatchcase(path.name, pattern):
                yield path
            if path.is_dir():
                yield from path.rglob(pattern)

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        found = self._entry()
        if found is None:
            raise FileNotFoundError(2, "does not exist", str(self))
        mode = stat.S_IFDIR if found.is_folder else stat.S_IFREG
        return _Status(found.size_bytes, found.mtime_ns, mode)

    def read_bytes(self) -> bytes:
        found = self._entry()
        if found is None or found.is_folder:
            raise FileNotFoundError(2, "is no file", str(self))
        return self.store.read(self.place, 0, found.size_bytes)

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")
