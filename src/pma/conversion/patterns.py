"""How a tensor is re-indexed, written in one line: `(kv_heads qkv_slots[-2] head_dim) hidden -> (kv_heads
head_dim) hidden`.

On each side the axes of a tensor, outermost first: one name, or several in parentheses where the axis is made
of them. A name may carry an index (`[0]`, `[-2]`) or a range (`[:-2]`, `[:vocab]`): on the left what is taken
of the source, on the right where it goes in a target that several rules fill. What the left has left, the
right names, in any order. Names that are facts of the model must have that size; one other name an axis is
inferred.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pma.conversion.views import View
from pma.errors import FormatError, MismatchError, printable

Bound = int | str | None  # a number, the name of a fact, or open

_NAME = r"[a-z][a-z0-9_]*"
_BOUND = rf"-?\d+|{_NAME}"
_TOKEN = re.compile(
    rf"\s*(?:(?P<open>\()|(?P<close>\))|(?P<name>{_NAME})"
    rf"(?:\[(?P<low>{_BOUND})?(?P<range>:(?P<high>{_BOUND})?)?\])?(?=[\s()]|$))"
)


@dataclass(frozen=True, kw_only=True)
class Atom:
    """A factor of an axis. `index`: only that one is meant; else `start` to `stop` (None: all)."""

    name: str
    index: Bound = None
    start: Bound = None
    stop: Bound = None

    @property
    def is_part(self) -> bool:
        return self.index is not None or self.start is not None or self.stop is not None


Side = tuple[tuple[Atom, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Both sides of a re-indexing."""

    left: Side
    right: Side

    @property
    def fills_part(self) -> bool:
        """Whether other rules fill the rest of the target."""
        return any(atom.is_part for axis in self.right for atom in axis)

    def leading(self, left: Sequence[Atom], right: Sequence[Atom]) -> Pattern:
        """The pattern with further axes before its own."""
        return Pattern(
            left=(*((atom,) for atom in left), *self.left), right=(*((atom,) for atom in right), *self.right)
        )


def parse(text: str) -> Pattern:
    """The pattern that `text` writes down; a side alone stands for both. Raises FormatError."""
    sides = text.split("->")
    if len(sides) > 2:
        raise FormatError(f"{printable(text)!r}: expected one '->', found {len(sides) - 1}")
    left = _side(sides[0])
    pattern = Pattern(left=left, right=_side(sides[1]) if len(sides) == 2 else left)
    names = [{a.name for axis in side for a in axis if a.index is None} for side in (left, pattern.right)]
    if names[0] != names[1]:
        odd = ", ".join(sorted(names[0] ^ names[1]))
        raise FormatError(f"{printable(text)!r}: {odd} is on one side only and has no index")
    if len(sides) == 1 and any(atom.is_part for axis in left for atom in axis):
        raise FormatError(f"{printable(text)!r}: a part of an axis needs both sides, with '->' between them")
    return pattern


def same(rank: int) -> Pattern:
    """Every axis as it is."""
    side = tuple((Atom(name=f"_{axis}"),) for axis in range(rank))
    return Pattern(left=side, right=side)


def _side(text: str) -> Side:
    axes: list[tuple[Atom, ...]] = []
    group: list[Atom] | None = None
    place = 0
    while place < len(text.rstrip()):
        found = _TOKEN.match(text, place)
        if found is None or (found["open"] and group is not None) or (found["close"] and not group):
            raise FormatError(f"{printable(text)!r} is not understood from {printable(text[place:])!r} on")
        place = found.end()
        if found["open"]:
            group = []
        elif found["close"]:
            axes.append(tuple(group or ()))
            group = None
        elif group is None:
            axes.append((_atom(found, text),))
        else:
            group.append(_atom(found, text))
    names = [atom.name for axis in axes for atom in axis]
    if group is not None or len(set(names)) != len(names):
        raise FormatError(f"{printable(text)!r}: a parenthesis is open, or a name occurs twice")
    return tuple(axes)


def _atom(found: re.Match[str], text: str) -> Atom:
    low, high = (
        int(bound) if bound and bound.lstrip("-").isdigit() else bound
        for bound in (found["low"], found["high"])
    )
    if found["range"]:
        return Atom(name=found["name"], start=low, stop=high)
    if "[" in found[0] and low is None:
        raise FormatError(f"{printable(text)!r}: an index is empty")
    return Atom(name=found["name"], index=low)


def apply(
    pattern: Pattern, shape: tuple[int, ...], facts: Mapping[str, int]
) -> tuple[View, View, tuple[int, ...]]:
    """View of the source, the same elements' view of the target, and the target's shape.

    `shape`: the source's. Raises MismatchError where it does not have the axes that the pattern says, or a
    fact is missing.
    """
    if len(shape) != len(pattern.left):
        raise MismatchError(f"shape {shape}, expected {len(pattern.left)} axes: {_text(pattern.left)}")
    source, source_names = View.whole(shape), list[str]()
    for axis, atoms in enumerate(pattern.left):
        sizes = _sizes(atoms, shape[axis], facts, f"axis {axis} of shape {shape}")
        source, names = _parts(source.split(len(source_names), sizes), len(source_names), atoms, facts)
        source_names += names
    known = {**facts, **dict(zip(source_names, source.shape, strict=True))}
    target_shape = tuple(
        math.prod(_full_size(atom, known, facts) for atom in atoms) for atoms in pattern.right
    )
    target, target_names = View.whole(target_shape), list[str]()
    for atoms in pattern.right:
        sizes = [_full_size(atom, known, facts) for atom in atoms]
        target, names = _parts(target.split(len(target_names), sizes), len(target_names), atoms, facts)
        target_names += names
    source = source.permuted([source_names.index(name) for name in target_names])
    if source.shape != target.shape:
        raise MismatchError(
            f"{_text(pattern.right)} has room for {target.shape}, the source gives {source.shape}"
        )
    return source, target, target_shape


def _sizes(atoms: Sequence[Atom], length: int, facts: Mapping[str, int], where: str) -> list[int]:
    """The sizes of an axis's factors, one of them inferred where it is no fact."""
    unknown = [atom.name for atom in atoms if atom.name not in facts]
    product = math.prod(facts[atom.name] for atom in atoms if atom.name in facts)
    if len(unknown) > 1:
        raise MismatchError(
            f"{where}: the sizes of {', '.join(unknown)} are unknown; the template must say them"
        )
    inferred = length // product if product else 0
    if (length % product if product else length) or (not unknown and inferred != 1):
        stated = ", ".join(f"{a.name} {facts[a.name]}" for a in atoms if a.name in facts)
        raise MismatchError(f"{where} is {length}, expected {_text((tuple(atoms),))} with {stated}")
    return [facts.get(atom.name, inferred) for atom in atoms]


def _full_size(atom: Atom, known: Mapping[str, int], facts: Mapping[str, int]) -> int:
    """A factor's size in the target: all of it, not only the part that is filled."""
    sizes = facts if atom.is_part else known
    if atom.name not in sizes:
        raise MismatchError(f"the size of {atom.name} in the target is unknown; the template must say it")
    return sizes[atom.name]


def _parts(
    view: View, first_axis: int, atoms: Sequence[Atom], facts: Mapping[str, int]
) -> tuple[View, list[str]]:
    """The view with the atoms' indices and ranges taken, and the names of the axes that are left."""
    names: list[str] = []
    for atom in atoms:
        axis = first_axis + len(names)
        length = view.shape[axis]
        if atom.index is not None:
            index = _place(atom.index, length, facts)
            if not 0 <= index < length:
                raise MismatchError(f"{atom.name} has {length} entries, and none of index {atom.index}")
            view = view.at(axis, index)
            continue
        start = 0 if atom.start is None else _place(atom.start, length, facts)
        stop = length if atom.stop is None else _place(atom.stop, length, facts)
        if not 0 <= start <= stop <= length:
            raise MismatchError(f"{atom.name} has {length} entries, not {start} to {stop}")
        view = view.cut(axis, start, stop)
        names.append(atom.name)
    return view, names


def _place(bound: int | str, length: int, facts: Mapping[str, int]) -> int:
    if isinstance(bound, str):
        if bound not in facts:
            raise MismatchError(f"{bound} is unknown; the template must say it")
        return facts[bound]
    return bound + length if bound < 0 else bound


def _text(side: Side) -> str:
    return " ".join(
        atoms[0].name if len(atoms) == 1 else f"({' '.join(atom.name for atom in atoms)})" for atoms in side
    )
