"""Fitting a map to a checkpoint and a template: the pieces of each target tensor, and what does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

from pma.conversion import maps
from pma.conversion.maps import Map, Rule, filled_in, plural
from pma.conversion.patterns import apply, same
from pma.conversion.template import CONFIG_FILE, Template, fact
from pma.conversion.views import Piece, covers, piece_of
from pma.errors import MismatchError, UsageError, printable
from pma.types import Role, TensorSpec

_How = TypeVar("_How")

_MODEL_ROLES = (Role.PARAMETER, Role.BUFFER)
# more tensors than any model has: a configuration that says so is wrong
_MOST_TENSORS = 2**22
_MOST_LISTED = 40


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Every target tensor with its pieces. `ties`: targets that are not stored and must equal another one.

    `unused`: source tensors that a model can do without; `left_out`: training state, which no model holds.
    """

    map: Map
    template: Template
    tensors: Mapping[str, TensorSpec]
    pieces: Mapping[str, tuple[Piece, ...]]
    ties: Mapping[str, str]
    unused: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(kw_only=True)
class Problems:
    """What does not fit: sources without a use, targets without a source, and tensors that differ."""

    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.unused) + len(self.missing) + len(self.differing)

    def text(self) -> str:
        """The problems as lines."""
        return "".join(
            [
                _listed("tensors of the checkpoint that have no place in the model", self.unused),
                _listed("tensors of the model that the checkpoint does not have", self.missing),
                _listed("tensors that differ", self.differing),
            ]
        )


def fit(
    specs: Mapping[str, TensorSpec],
    template: Template,
    given: Map | None = None,
    *,
    exclude: Sequence[str] = (),
) -> Conversion:
    """Fit the map `given`, or the only built-in one that fits, to the tensors of a checkpoint.

    `exclude`: patterns of source tensors to leave out. Raises MismatchError that lists what does not fit.
    """
    candidates = [given] if given is not None else _built_in_for(template)
    fitting: list[Conversion] = []
    failed: list[tuple[Map, Problems]] = []
    for candidate in candidates:
        found, problems = _with_any_prefix(specs, template, candidate, exclude)
        if problems.count:
            failed.append((candidate, problems))
        else:
            fitting.append(found)
    if len(fitting) > 1:
        names = ", ".join(found.map.name for found in fitting)
        raise UsageError(f"several maps fit: {names}; choose one with --map")
    if fitting:
        return fitting[0]
    if not failed:
        raise MismatchError(
            f"{template.path / CONFIG_FILE}: no built-in map is for models of type "
            f"{printable(template.model_type)}; give one with --map"
        )
    closest, problems = min(failed, key=lambda entry: entry[1].count)
    others = f" (the closest of {', '.join(one.name for one, _ in failed)})" if len(failed) > 1 else ""
    raise MismatchError(
        f"the checkpoint does not become the model of {template.path} by map {closest.name}{others}:"
        f"{problems.text()}\ngive another map with --map, or leave tensors out with --exclude"
    )


def model_tensors(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Those that belong to the model, not to its training."""
    return {name: spec for name, spec in specs.items() if spec.role in _MODEL_ROLES}


def _built_in_for(template: Template) -> list[Map]:
    """Built-in maps to this type of model; names alone say nothing where the template has none."""
    return [
        found
        for found in maps.built_in()
        if template.model_type in found.models or (not found.models and template.shapes is not None)
    ]


def _with_any_prefix(
    specs: Mapping[str, TensorSpec], template: Template, given: Map, exclude: Sequence[str]
) -> tuple[Conversion, Problems]:
    """The fit with the prefix that leaves the fewest problems."""
    tried = (_Fitting(specs, template, given, prefix, exclude) for prefix in given.prefixes)
    best: _Fitting | None = None
    for one in tried:
        if best is None or one.problems.count < best.problems.count:
            best = one
        if not best.problems.count:
            break
    assert best is not None
    return best.conversion(), best.problems


class _Fitting:
    """One map, with one prefix, laid over one checkpoint."""

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        template: Template,
        given: Map,
        prefix: str,
        exclude: Sequence[str],
    ) -> None:
        self._template, self._map, self._prefix = template, given, prefix
        self._left_out = tuple(name for name, spec in specs.items() if spec.role not in _MODEL_ROLES)
        excluded = {name for name in specs if any(fnmatchcase(name, pattern) for pattern in exclude)}
        skipped = excluded.union(self._left_out)
        self._specs = {name: spec for name, spec in specs.items() if name not in skipped}
        where = template.path / CONFIG_FILE
        own = {name: fact(template.config, key, where) for name, key in given.facts.items()}
        self._facts = {**template.facts, **own}
        self.problems = Problems()
        self._tensors: dict[str, TensorSpec] = {}
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._ties: dict[str, str] = {}
        self._used: set[str] = set()
        self._told: set[str] = set()
        if given.identity:
            self._keep_names()
        else:
            self._apply_rules()
        self._check_all_used(excluded)

    def conversion(self) -> Conversion:
        """What was found."""
        return Conversion(
            map=self._map,
            template=self._template,
            tensors=self._tensors,
            pieces=self._pieces,
            ties=self._ties,
            unused=tuple(self._unused),
            left_out=self._left_out,
        )

    def _keep_names(self) -> None:
        if self._template.shapes is None:
            raise UsageError(
                f"{self._template.path} holds no weights, so it tells no names; map {self._map.name} needs a "
                "--like folder that does"
            )
        for target in self._template.shapes:
            spec = self._specs.get(self._prefix + target)
            if spec is None:
                self.problems.missing.append(target)
            else:
                self._attempt(self._keep, target, spec)

    def _keep(self, target: str, spec: TensorSpec) -> None:
        source, view, shape = apply(same(len(spec.shape)), spec.shape, {})
        self._put(target, spec, shape, [piece_of(spec.name, source, view)])

    def _apply_rules(self) -> None:
        for target, rules in self._targets().items():
            self._attempt(self._make, target, rules)
        missing = (self._template.shapes or {}).keys() - self._tensors.keys()
        self.problems.missing += sorted(
            printable(name) for name in missing - self._told if not self._is_needless(name)
        )

    def _attempt(self, make: Callable[[str, _How], None], target: str, how: _How) -> None:
        try:
            make(target, how)
        except MismatchError as error:
            self._told.add(target)
            self.problems.differing.append(f"{printable(target)}: {error}")

    def _targets(self) -> dict[str, list[tuple[Rule, dict[str, int]]]]:
        """Every target of the model, with the rules that may make it, in order."""
        found: dict[str, list[tuple[Rule, dict[str, int]]]] = {}
        for rule in self._map.rules:
            if rule.models and self._template.model_type not in rule.models:
                continue
            for values in self._counted(rule.variables):
                target = filled_in(rule.target, values)
                if self._template.shapes is None or target in self._template.shapes or rule.tied_to:
                    found.setdefault(target, []).append((rule, values))
        return found

    def _counted(self, variables: Iterable[str]) -> Iterator[dict[str, int]]:
        """Every combination of the variables' values."""
        names, total = list(variables), 1
        for name in names:
            if plural(name) not in self._facts:
                raise MismatchError(
                    f"map {self._map.name} counts {{{name}}}, but {self._template.path / CONFIG_FILE} does "
                    f"not say how many {plural(name)} the model has"
                )
            total *= self._facts[plural(name)]
        if total > _MOST_TENSORS:
            raise MismatchError(
                f"{self._template.path / CONFIG_FILE} says there are {total} "
                f"{' × '.join(map(plural, names))}; that is not believable"
            )
        for values in itertools.product(*(range(self._facts[plural(name)]) for name in names)):
            yield dict(zip(names, values, strict=True))

    def _make(self, target: str, rules: Sequence[tuple[Rule, dict[str, int]]]) -> None:
        shapes = self._template.shapes
        stored = target in shapes if shapes is not None else self._template.tied is not True
        tied = rules[0][0].tied_to is not None and not stored
        pieces: list[Piece] = []
        shape: tuple[int, ...] = ()
        spec: TensorSpec | None = None
        for rule, values in rules:
            for source, everything in self._sources(rule, values):
                spec, shape, piece, part = self._piece(rule, source, everything)
                pieces.append(piece)
            if pieces and not part:
                break
        if spec is None:
            required = shapes is not None or not all(rule.optional for rule, _ in rules)
            # a configuration that does not say whether embeddings are tied
            unsaid = rules[0][0].tied_to is not None and shapes is None and self._template.tied is None
            if required and not tied and not unsaid:
                wanted = " or ".join(filled_in(s, v) for rule, v in rules for s in rule.sources[:1])
                self._told.add(target)
                self.problems.missing.append(f"{printable(target)} (from {printable(self._prefix + wanted)})")
            return
        self._put(target, spec, shape, pieces, tied_to=rules[0][0].tied_to if tied else None)

    def _sources(self, rule: Rule, values: Mapping[str, int]) -> list[tuple[str, dict[str, int]]]:
        """Pattern of the source's name that is there and all variables; several where sources are stacked."""
        for source in rule.sources:
            everything = [{**values, **more} for more in self._counted(rule.stacked(source))]
            present = [self._prefix + filled_in(source, all_) in self._specs for all_ in everything]
            if all(present):
                return [(source, all_) for all_ in everything]
            if any(present):
                absent = self._prefix + filled_in(source, everything[present.index(False)])
                raise MismatchError(f"{printable(absent)} is not there, but others to be stacked with it are")
        return []

    def _piece(
        self, rule: Rule, source: str, values: Mapping[str, int]
    ) -> tuple[TensorSpec, tuple[int, ...], Piece, bool]:
        spec = self._specs[self._prefix + filled_in(source, values)]
        left, right = rule.leading(source)
        pattern = (rule.view or same(len(spec.shape) - len(left))).leading(left, right)
        try:
            seen, target, shape = apply(pattern, spec.shape, {**self._facts, **values})
        except MismatchError as error:
            self._used.add(spec.name)  # it has a place, and does not fit it
            raise MismatchError(f"{printable(spec.name)}: {error}") from None
        return spec, shape, piece_of(spec.name, seen, target), pattern.fills_part

    def _put(
        self,
        target: str,
        spec: TensorSpec,
        shape: tuple[int, ...],
        pieces: Sequence[Piece],
        tied_to: str | None = None,
    ) -> None:
        self._used.update(piece.source for piece in pieces)
        made = TensorSpec(name=target, dtype=spec.dtype, shape=shape, role=spec.role)
        expected = (self._template.shapes or {}).get(target, shape)
        sources = [self._specs[piece.source] for piece in pieces]
        if any(source.dtype is not spec.dtype for source in sources):
            kinds = ", ".join(sorted({source.dtype.name for source in sources}))
            raise MismatchError(f"it is made of tensors of several types: {kinds}")
        if spec.dtype.bits < 8:
            raise MismatchError(f"{spec.dtype.name} is a quantised type; dequantise the checkpoint first")
        if not covers(pieces, made.element_count):
            raise MismatchError("the rules leave some of its elements without a source, or give one two")
        if shape != expected:
            raise MismatchError(f"shape {shape}, expected {expected} as in {self._template.path}")
        self._pieces[target] = tuple(pieces)
        if tied_to is None:
            self._tensors[target] = made
        else:
            self._ties[target] = tied_to

    def _check_all_used(self, excluded: set[str]) -> None:
        self._unused = [name for name in self._specs if name not in self._used]
        self.problems.unused += [printable(n) for n in self._unused if not self._is_needless(n)]
        self._unused += sorted(excluded)

    def _is_needless(self, name: str) -> bool:
        plain = name.removeprefix(self._prefix)
        return any(fnmatchcase(plain, pattern) for pattern in self._map.unused)


def _listed(what: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    more = f"\n  and {len(lines) - _MOST_LISTED} more" if len(lines) > _MOST_LISTED else ""
    return f"\n{what} ({len(lines)}):" + "".join(f"\n  {line}" for line in lines[:_MOST_LISTED]) + more
