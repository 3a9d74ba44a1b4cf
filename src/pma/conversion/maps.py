"""Maps: which tensor of a model becomes which of another, and how. Data, read strictly from TOML or JSON.

docs/conversion.md describes the file; the built-in maps in `pma/conversion/built_in` are such files too.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from blake3 import blake3

from pma.conversion.patterns import Atom, Pattern, parse
from pma.errors import FormatError, UsageError, printable
from pma.formats import strict_json

_LARGEST_MAP_BYTES = 2**20
_VARIABLE = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_OPTIONAL = re.compile(r"\[([^\[\]]*)\]")
_MOST_OPTIONAL = 4


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Tensors named `target` are made of tensors named by the first of `sources` that is there.

    A variable in braces counts something that the template tells ({layer} up to the fact `layers`); one that
    a name lacks is that tensor's leading axis. `view` None: every axis as it is. `models`: only for these
    (empty: for all). `optional`: where there is no source, there is no target. `tied_to`: the target that
    this one is, in a model with tied embeddings, and is then not stored.
    """

    target: str
    sources: tuple[str, ...]
    view: Pattern | None
    models: frozenset[str]
    optional: bool
    tied_to: str | None

    @property
    def variables(self) -> tuple[str, ...]:
        """Those of the target's name, in order."""
        return tuple(_VARIABLE.findall(self.target))

    def stacked(self, source: str) -> tuple[str, ...]:
        """Variables that only the source's name has: each value fills one index of a leading axis."""
        return tuple(name for name in _VARIABLE.findall(source) if name not in self.variables)

    def leading(self, source: str) -> tuple[list[Atom], list[Atom]]:
        """The leading axes of the source and of the target that stand for variables their names lack."""
        inside = _VARIABLE.findall(source)
        left = [Atom(name=plural(name), index=name) for name in self.variables if name not in inside]
        return left, [Atom(name=plural(name), index=name) for name in self.stacked(source)]


@dataclass(frozen=True, kw_only=True)
class Map:
    """Rules for model types `models` (empty: any). `name`: of a built-in map, or the path of a file.

    `identity`: tensors keep their names. `prefixes`: what may stand before every source's name. `unused`:
    patterns of source tensors that a model can do without; `refused`: arguments of the trainer that must not
    have been given, because the tensors do not tell; `facts`: names and keys of the configuration.
    """

    name: str
    digest: str
    models: frozenset[str]
    prefixes: tuple[str, ...]
    identity: bool
    unused: tuple[str, ...]
    refused: tuple[str, ...]
    facts: Mapping[str, str]
    rules: tuple[Rule, ...]


def plural(variable: str) -> str:
    """The fact that says how many a variable counts."""
    return variable + "s"


def filled_in(name: str, values: Mapping[str, int]) -> str:
    """A name with its variables replaced."""
    return _VARIABLE.sub(lambda found: str(values[found[1]]), name)


def built_in() -> Iterator[Map]:
    """The maps that come with PMA, in order of name."""
    for found in sorted(files("pma.conversion").joinpath("built_in").iterdir(), key=lambda file: file.name):
        if found.name.endswith(".toml"):
            yield parse_map(found.read_bytes(), Path(found.name))


def load_map(given: str) -> Map:
    """The built-in map of that name, else the one in that file. Raises UsageError, FormatError."""
    known = {found.name: found for found in built_in()}
    if given in known:
        return known[given]
    path = Path(given)
    if not path.is_file():
        raise UsageError(f"--map {given}: neither a file nor one of {', '.join(known)}")
    if path.stat().st_size > _LARGEST_MAP_BYTES:
        raise FormatError(
            f"{path} has more than {_LARGEST_MAP_BYTES} bytes; that is not believable for a map"
        )
    return replace(parse_map(path.read_bytes(), path), name=str(path.resolve()))


def parse_map(text: bytes, path: Path) -> Map:
    """The map in a TOML or JSON file's text. Raises FormatError for whatever is not understood in it."""
    where = str(path)
    if path.suffix == ".json":
        value = strict_json.parse_object(text, where)
    else:
        try:
            value = tomllib.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where} is not valid TOML: {printable(str(error))}") from error
    _check_keys(value, {"models", "prefixes", "identity", "unused", "refused", "facts", "rule"}, where)
    identity, rules = value.get("identity", False), value.get("rule", [])
    facts = value.get("facts", {})
    if type(identity) is not bool or not isinstance(rules, list) or not (identity or rules):
        raise FormatError(f"{where}: expected [[rule]] tables, or identity = true")
    if not isinstance(facts, dict) or not all(isinstance(key, str) for key in facts.values()):
        raise FormatError(f"{where}: facts gives each name a key of config.json")
    return Map(
        name=path.stem,
        digest=blake3(text).hexdigest(),
        models=frozenset(_texts(value, "models", where)),
        prefixes=tuple(_texts(value, "prefixes", where)) or ("",),
        identity=identity,
        unused=tuple(_texts(value, "unused", where)),
        refused=tuple(_texts(value, "refused", where)),
        facts=facts,
        rules=tuple(_rule(rule, f"{where}, rule {n}") for n, rule in enumerate(rules, 1)),
    )


def _rule(value: Any, where: str) -> Rule:
    if not isinstance(value, dict):
        raise FormatError(f"{where} is no table")
    _check_keys(value, {"target", "source", "view", "models", "optional", "tied_to"}, where)
    target, view = value.get("target"), value.get("view")
    given = value.get("source")
    sources = [given] if isinstance(given, str) else _texts(value, "source", where)
    tied_to, optional = value.get("tied_to"), value.get("optional", False)
    if not isinstance(target, str) or not sources or not isinstance(view, str | None):
        raise FormatError(f"{where}: expected target and source, names of tensors, and view, a text")
    if type(optional) is not bool or not isinstance(tied_to, str | None):
        raise FormatError(f"{where}: optional is true or false, and tied_to the name of a target")
    try:
        pattern = parse(view) if view is not None else None
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    return Rule(
        target=target,
        sources=tuple(name for source in sources for name in _expanded(source, where)),
        view=pattern,
        models=frozenset(_texts(value, "models", where)),
        optional=optional,
        tied_to=tied_to,
    )


def _expanded(name: str, where: str) -> list[str]:
    """A name with and without each of its parts in square brackets, the longest first."""
    parts = _OPTIONAL.split(name)  # texts and optional parts in turn
    if len(parts) // 2 > _MOST_OPTIONAL:
        raise FormatError(f"{where}: {printable(name)!r} has more than {_MOST_OPTIONAL} optional parts")
    choices = [(part, "") if i % 2 else (part,) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _check_keys(value: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise FormatError(
                f"{where}: {printable(key)!r} is not known; there are {', '.join(sorted(known))}"
            )


def _texts(value: Mapping[str, Any], key: str, where: str) -> list[str]:
    found = value.get(key, [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise FormatError(f"{where}: {key} is a list of texts")
    return found
