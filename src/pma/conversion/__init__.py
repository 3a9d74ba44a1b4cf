"""One model's checkpoint as another naming convention has it, read from where it lies: views and maps."""

from __future__ import annotations

from collections.abc import Sequence

from pma.conversion.fitting import Conversion, fit, model_tensors
from pma.conversion.maps import Map, load_map
from pma.conversion.reader import ConvertedReader
from pma.conversion.template import Template, read_template
from pma.errors import FormatError, MismatchError
from pma.formats import megatron
from pma.formats.contracts import CheckpointReader
from pma.formats.unpickling import Record

__all__ = [
    "Conversion",
    "ConvertedReader",
    "Map",
    "Template",
    "convert",
    "convert_alike",
    "fit",
    "load_map",
    "read_template",
]


def convert(
    reader: CheckpointReader, template: Template, given: Map | None = None, *, exclude: Sequence[str] = ()
) -> ConvertedReader:
    """`reader` as a checkpoint of the template's model. Raises MismatchError that lists what does not fit."""
    return convert_alike([reader], template, given, exclude=exclude)[0]


def convert_alike(
    readers: Sequence[CheckpointReader],
    template: Template,
    given: Map | None = None,
    *,
    exclude: Sequence[str] = (),
) -> list[ConvertedReader]:
    """Every reader converted, by the map that fits the last; those of the same tensors are fitted once."""
    last = fit(readers[-1].tensors, template, given, exclude=exclude)
    converted = []
    for reader in readers:
        same = model_tensors(reader.tensors) == model_tensors(readers[-1].tensors)
        own = last if same else fit(reader.tensors, template, last.map, exclude=exclude)
        _check_arguments(reader, own.map)
        converted.append(ConvertedReader(reader, own))
        converted[-1].check_ties()
    return converted


def _check_arguments(reader: CheckpointReader, used: Map) -> None:
    """Raises MismatchError where the trainer's own arguments say that its tensors mean something else."""
    if not isinstance(reader, megatron.Reader) or not used.refused:
        return
    try:
        given = reader.common().get("args")
    except FormatError:  # arguments of classes that are not known; nothing can be told then
        return
    for name in used.refused:
        if isinstance(given, Record) and given.get(name):
            raise MismatchError(
                f"{reader.path} was trained with --{name.replace('_', '-')}, which changes what its tensors "
                f"mean; map {used.name} does not convert that"
            )
