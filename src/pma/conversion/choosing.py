"""Which map, and which prefix of names, makes a checkpoint the template's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pma.conversion import maps
from pma.conversion.fitting import Conversion, Fitting, Problems
from pma.conversion.maps import Map, filled_in
from pma.conversion.template import CONFIG_FILE, Template
from pma.errors import MismatchError, UsageError, printable
from pma.types import TensorSpec


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
    # where others are likelier by their names, a map is not worth a look at every tensor
    shares = [max(_likeness(specs, template, one, prefix) for prefix in one.prefixes) for one in candidates]
    candidates = [one for one, share in zip(candidates, shares, strict=True) if 2 * share >= max(shares)]
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


def _built_in_for(template: Template) -> list[Map]:
    """Built-in maps to this type of model; names alone say nothing where the template has none."""
    return [
        found
        for found in maps.built_in()
        if template.model_type in found.models or (not found.models and template.shapes is not None)
    ]


def _likeness(specs: Mapping[str, TensorSpec], template: Template, given: Map, prefix: str) -> float:
    """The share of a map's rules whose first source is there."""
    if given.identity:
        wanted = [{prefix + name} for name in template.shapes or ()]
    else:
        rules = [rule for rule in given.rules if not rule.models or template.model_type in rule.models]
        wanted = [
            {prefix + filled_in(s, dict.fromkeys(maps.variables_of(s), 0)) for s in rule.sources}
            for rule in rules
        ]
    return sum(not names.isdisjoint(specs) for names in wanted) / max(len(wanted), 1)


def _with_any_prefix(
    specs: Mapping[str, TensorSpec], template: Template, given: Map, exclude: Sequence[str]
) -> tuple[Conversion, Problems]:
    """The fit with the prefix that leaves the fewest problems."""
    likeness = [_likeness(specs, template, given, prefix) for prefix in given.prefixes]
    prefixes = [p for p, share in zip(given.prefixes, likeness, strict=True) if 2 * share >= max(likeness)]
    tried = (Fitting(specs, template, given, prefix, exclude) for prefix in prefixes)
    best: Fitting | None = None
    for one in tried:
        if best is None or one.problems.count < best.problems.count:
            best = one
        if not best.problems.count:
            break
    assert best is not None
    return best.conversion(), best.problems
