"""One model's checkpoint as another naming convention has it, read from where it lies: views and maps."""

from __future__ import annotations

from collections.abc import Sequence

from pma.conversion.fitting import Conversion, fit
from pma.conversion.maps import Map, load_map
from pma.conversion.reader import ConvertedReader
from pma.conversion.template import Template, read_template
from pma.formats.contracts import CheckpointReader

__all__ = ["Conversion", "ConvertedReader", "Map", "Template", "convert", "fit", "load_map", "read_template"]


def convert(
    reader: CheckpointReader, template: Template, given: Map | None = None, *, exclude: Sequence[str] = ()
) -> ConvertedReader:
    """`reader` as a checkpoint of the template's model. Raises MismatchError that lists what does not fit."""
    converted = ConvertedReader(reader, fit(reader.tensors, template, given, exclude=exclude))
    converted.check_ties()
    return converted
