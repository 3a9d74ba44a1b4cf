"""Every study ran, says something of its claims, and its page is what the code makes of its numbers.

python .ci/check_studies.py FOLDER
"""

import sys
from pathlib import Path

from pma.studies import writing
from pma.studies.catalogue import STUDIES


def main() -> None:
    """Exit with a message where anything is not so."""
    results = Path(sys.argv[1]) / "results"
    for study in STUDIES:
        folder = results / study.name
        result = writing.read(folder)
        told = writing.code_of(study).tell(result["results"])
        text = (folder / writing.README_FILE).read_text(encoding="utf-8")
        if text.split(writing.NOTES)[0] != writing.page(study, result, told) or not told.findings:
            sys.exit(f"{folder}: its page does not say what its numbers say")
        lines = len(text.splitlines())
        print(f"{study.name}: {told.verdict}; {lines} lines")
    index = (results / "README.md").read_text(encoding="utf-8")
    if "not run" in index:
        sys.exit("the index lists a study as not run")


main()
