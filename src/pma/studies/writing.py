"""A study's folder: result.json with every number, the figure, and a README of one screen made from the
numbers.

The README is a function of result.json, so a test can hold what is committed to the code. Only what stands
below the line `<!-- notes -->` is a person's, and is kept.
"""

from __future__ import annotations

import json
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pma.errors import InputError, MissingExtra
from pma.formats.strict_json import load_object
from pma.reporting.charts import require_altair
from pma.studies.catalogue import Study
from pma.studies.telling import Table, Told

RESULT_FILE, FIGURE_FILE, README_FILE = "result.json", "figure.png", "README.md"
FORMAT = 1
NOTES = "<!-- notes -->"
_LARGEST_RESULT_BYTES = 64 * 2**20
_PACKAGES = ("pma-llm", "torch", "transformers", "numpy", "scipy", "lm_eval")


def result_of(study: Study, results: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """What result.json holds. `how`: preset, seeds, command, seconds and the like."""
    return {
        "pma_study": FORMAT,
        "study": study.name,
        "code_version": code_of(study).VERSION,
        **how,
        "versions": versions(),
        "results": results,
    }


def versions() -> dict[str, str]:
    """Of Python and of what the numbers come from. Raises MissingExtra where something is not installed."""
    require_altair()
    try:
        return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    except PackageNotFoundError as error:
        raise MissingExtra("a study", "train,eval,report", str(error.name)) from error


def code_of(study: Study) -> Any:
    """The study's module: `run(lab)`, `tell(results)`, `draw(results)` and VERSION, which rises when the
    form of its results changes.
    """
    return import_module(f"pma.studies.{study.name}")


def write(study: Study, result: dict[str, Any], folder: Path) -> Told:
    """Write the three files; a person's notes in an earlier README stay."""
    folder.mkdir(parents=True, exist_ok=True)
    code = code_of(study)
    (folder / RESULT_FILE).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    code.draw(result["results"]).save(folder / FIGURE_FILE, scale_factor=1.5)
    told: Told = code.tell(result["results"])
    readme = folder / README_FILE
    before = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    notes = before[before.index(NOTES) + len(NOTES) :] if NOTES in before else "\n"
    readme.write_text(page(study, result, told) + NOTES + notes, encoding="utf-8")
    return told


def read(folder: Path) -> dict[str, Any]:
    """The result in a study's folder. Raises InputError where it is of another form than the code's."""
    if not (folder / RESULT_FILE).is_file():
        raise InputError(f"{folder} holds no {RESULT_FILE}; run the study first")
    result = load_object(folder / RESULT_FILE, _LARGEST_RESULT_BYTES)
    if result.get("pma_study") != FORMAT:
        raise InputError(
            f"{folder / RESULT_FILE}: form {result.get('pma_study')}, expected {FORMAT}; run it again"
        )
    return result


def page(study: Study, result: dict[str, Any], told: Told) -> str:
    """The README without notes."""
    exploratory = " One seed: exploratory." if len(result["seeds"]) == 1 else ""
    parts = [
        f"# {study.title}",
        f"**Claim** ({study.source}): {_sentence(study.claim)}",
        f"**Set-up.** {told.set_up}{exploratory}",
        *(_table(table) for table in told.tables),
        f"![{study.title}]({FIGURE_FILE})",
        f"**Verdict: {told.verdict}.**",
        "\n".join(f"- {f.claim}: **{f.verdict.value}**. {f.evidence}" for f in told.findings),
        *told.notes,
        f"**To tell more:** {told.more}",
        f"```sh\n{result['command']}\n```",
        f"Preset `{result['preset']}`, seeds {', '.join(map(str, result['seeds']))}. This command took "
        f"{_minutes(result['seconds'])}; the training runs it uses, which other studies share, "
        f"{_minutes(result['training_seconds'])} of one core. Raw numbers, versions: `result.json`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n\n"


def _sentence(claim: str) -> str:
    return claim if claim.endswith("?") else f"{claim}."


def _table(table: Table) -> str:
    head = [f"| {' | '.join(table.columns)} |", f"|{' --- |' * len(table.columns)}"]
    rows = [f"| {' | '.join(row)} |" for row in table.rows]
    return (f"{table.title}\n\n" if table.title else "") + "\n".join([*head, *rows])


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def index(folder: Path, studies: tuple[Study, ...]) -> str:
    """The table of all studies, claim by claim, from the results in `folder`."""
    lines = ["| study | claim | verdict |", "| --- | --- | --- |"]
    for study in studies:
        here = folder / study.name
        if not (here / RESULT_FILE).is_file():
            lines.append(f"| {study.name} | {study.claim} ({study.source}) | not run |")
            continue
        told: Told = code_of(study).tell(read(here)["results"])
        lines += [
            f"| [{study.name}]({study.name}/README.md) | {finding.claim} | **{finding.verdict.value}** |"
            for finding in told.findings
        ]
    return "\n".join(lines) + "\n"
