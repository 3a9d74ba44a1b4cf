"""The results in docs/studies: made by the current code's form, and their write-ups say what the numbers
say.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pma.studies import writing
from pma.studies.catalogue import STUDIES, Study
from pma.studies.running import BEGIN, END, INDEX_FILE

DOCS = Path(__file__).parents[2] / "docs" / "studies"
WRITTEN = [each for each in STUDIES if (DOCS / each.name).is_dir()]


@pytest.mark.parametrize("study", WRITTEN, ids=lambda study: study.name)
def test_the_write_up_is_what_the_code_makes_of_the_result(study: Study) -> None:
    folder = DOCS / study.name
    result = writing.read(folder)
    code = writing.code_of(study)
    assert result["study"] == study.name
    assert result["code_version"] == code.VERSION, "the form of its results has changed: run it again"
    told = code.tell(result["results"])
    text = (folder / writing.README_FILE).read_text(encoding="utf-8")
    assert text.split(writing.NOTES)[0] == writing.page(study, result, told), "pma study NAME --redraw"
    assert told.findings
    assert (folder / writing.FIGURE_FILE).read_bytes().startswith(b"\x89PNG")
    code.draw(result["results"]).to_dict()


def test_the_index_is_up_to_date() -> None:
    text = (DOCS / INDEX_FILE).read_text(encoding="utf-8")
    table = text.split(BEGIN)[1].split(END)[0]
    assert table.strip() == writing.index(DOCS, STUDIES).strip()


def test_nothing_else_lies_among_the_results() -> None:
    names = {path.name for path in DOCS.iterdir()}
    assert names <= {INDEX_FILE, *(each.name for each in STUDIES)}
